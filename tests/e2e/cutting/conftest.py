"""Raw xView: scenes and their annotations."""

from __future__ import annotations

import pytest

from tests.raw_xview import (
    RawXView,
    make_raw_xview,
)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawXView:
    return make_raw_xview(tmp_path_factory.mktemp("raw"), size=300)
