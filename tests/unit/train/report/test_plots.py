"""Ticks are round, and the picture of tiles takes any name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.unit.train.report.made_up import NAMES, make_rows
from train.report import draw_tiles
from train.report.plots import choose_ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-9 * max(1.0, abs(low)):
        return
    ticks = choose_ticks(low, high)
    assert len(ticks) <= 12
    assert all(low - 1e-6 * max(width, abs(low), 1) <= tick <= high + 1e-6 * max(width, abs(low), 1) for tick in ticks)


def test_the_picture_takes_any_name(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = make_rows(rng.random((5, len(NAMES))) < 0.5, NAMES)
    images = [rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(5)]
    draw_tiles(tmp_path / "tiles.png", images, rows, rows.labels)
    assert min(Image.open(tmp_path / "tiles.png").size) > 200
