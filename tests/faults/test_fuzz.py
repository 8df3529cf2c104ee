"""A few hundred mutated images and label files; `tests/faults/fuzz.py` takes any number of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.faults import fuzz
from tests.planted import fresh_seed

IMAGES, LABELS = 300, 300


def test_images_decode_or_are_refused_and_a_crash_is_noticed() -> None:
    """The sample in the middle ends the process it is in, as a crash would; those after it are tried in another."""

    class Unreadable(bytes):
        def hex(self, *_: object) -> str:
            return "no digits"

    rng = np.random.default_rng(fresh_seed())
    samples = [fuzz.draw_image(rng) for _ in range(IMAGES)]
    middle = IMAGES // 2
    deadly = fuzz.Sample("deadly", Unreadable())
    outcomes = fuzz.decode_all([*samples[:middle], deadly, *samples[middle:]])
    assert outcomes.pop(middle).startswith("failed: process ended with 1:")
    assert not [outcome for outcome in outcomes if outcome.startswith("failed")]
    kinds = [(s.kind[:4], o.split(":")[0]) for s, o in zip(samples, outcomes, strict=True)]
    seen = Counter(kinds)
    for container in ("PNG,", "JPEG", "TIFF"):
        assert seen[container, "decoded"] >= 5, "mutations that nothing survives test the first door only"
        assert seen[container, "refused"] >= 5


def test_rows_of_images() -> None:
    rows = fuzz.fuzz_images(30, fresh_seed())
    assert all(row.keys() == {"fault", "tried", "survived"} for row in rows)
    assert sum(row["tried"] for row in rows) == sum(row["survived"] for row in rows) == 30


def test_labels_are_counted_line_by_line() -> None:
    (row,) = fuzz.fuzz_labels(LABELS, fresh_seed())
    assert row == {"fault": "label file fuzzed", "tried": LABELS, "survived": LABELS}


def test_what_failed_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuzz, "KEPT", tmp_path)
    monkeypatch.setattr(fuzz, "parse_labels", lambda text: text.decode("ascii"))  # raises on some, and is no result
    seed = fresh_seed()
    (row,) = fuzz.fuzz_labels(5, seed)
    assert row["survived"] == 0
    rng = np.random.default_rng(seed)
    for number in range(5):
        assert (tmp_path / f"labels-{seed}-{number}").read_bytes() == fuzz.draw_labels(rng)
