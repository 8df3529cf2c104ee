"""Thumbnails are small, and a place that does not answer is asked once."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_schema import TileprobeError
from tests.caches import make_table
from train.errors import TrainError
from train.report.tiles import MOST_BYTES, SIDE, encode_thumbnail, read_thumbnails


def test_thumbnails_fit_their_budget(tmp_path: Path, rng: np.random.Generator) -> None:
    """Noise is the worst there is to encode."""
    noise = rng.integers(0, 256, (500, 300, 3), dtype=np.uint8)
    limit = MOST_BYTES * 3 // 4 // 600
    made = encode_thumbnail(noise, limit)
    data = base64.b64decode(made.uri.removeprefix("data:image/webp;base64,"))
    assert len(data) <= limit
    image = Image.open(io.BytesIO(data))
    assert image.size == (made.width, made.height)
    assert max(image.size) == SIDE
    assert image.size[1] / image.size[0] == pytest.approx(5 / 3, rel=0.02)


class Gone:
    """A place that does not answer, and counts how often it was asked."""

    url, identity = "gs://gone", "crc32c"

    def __init__(self) -> None:
        self.asked = 0

    def list(self, folder: str) -> Any:
        raise NotImplementedError

    def read(self, name: str, generation: int) -> bytes:
        self.asked += 1
        raise TrainError("no answer")

    read_checked = read


def test_where_nothing_answers_one_tile_is_tried() -> None:
    gone = Gone()
    with pytest.raises(TileprobeError, match="no answer"):
        read_thumbnails(gone, make_table(40), range(40))
    assert gone.asked == 1
