"""Where a cache can lie."""

from pathlib import Path

import pytest


@pytest.fixture(params=["directory", "bucket"])
def cache_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a cache, with nothing there yet: a directory, then a prefix of a bucket on the real server."""
    if request.param == "directory":
        return str(tmp_path / "cache")
    return f"gs://{request.getfixturevalue('bucket').name}/some/cache"
