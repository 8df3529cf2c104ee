"""An extraction in this process or under torchrun, and the comparison of two caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cache_schema import Status, open_cache
from extract.__main__ import run as extract_command_line
from tests.planted import Finished, run_here
from tests.tiles import (
    read_arrays,
    relative_differences,
)

PROJECT_ROOT = Path(__file__).parents[3]
TILES, BLOCKS = 560, 3
SLOW = ("--image-size", "160", "--batch-size", "4", "--precision", "float32")
"""Settings of the runs that are stopped: a second a block, so that there is something to stop."""


def extract(cwd: Path, *arguments: object) -> Finished:
    """`python -m extract run …` in this process."""
    return run_here(extract_command_line, cwd, "run", "--device", "cpu", "--workers", 0, *arguments)


def assert_same_cache(a: str | Path, b: str | Path) -> None:
    """The same version, every array equal; vectors to 1e-3 of their norm, their digests aside."""
    assert open_cache(str(a)).id == open_cache(str(b)).id
    mine, other = read_arrays(a), read_arrays(b)
    assert mine.keys() == other.keys()
    embedded = mine["status"] == Status.EMBEDDED
    for name in mine.keys() - {"commit", "seal"}:
        if name in ("cls", "patch_mean"):
            assert relative_differences(mine[name][embedded], other[name][embedded]).max() <= 1e-3
            assert np.isnan(mine[name][~embedded]).all()
            assert np.isnan(other[name][~embedded]).all()
        else:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)
