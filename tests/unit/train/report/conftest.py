"""Random numbers for a run of made-up logits."""

from __future__ import annotations

import numpy as np
import pytest

from tests.planted import fresh_seed


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(fresh_seed())
