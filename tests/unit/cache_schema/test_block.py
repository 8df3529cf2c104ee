"""What a block may hold, and its digest."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cache_schema import BlockValues, IntegrityError, Layout, Status
from tests.caches import make_values

LAYOUT = Layout(rows=300, width=8, pooling=("cls", "patch_mean"), block_rows=256)
ROWS = LAYOUT.block_slice(1)
VALUES = make_values(LAYOUT, 1)


def test_digest_follows_the_written_format() -> None:
    stream = b"".join(VALUES.pooled[name].astype("<f2").tobytes() for name in ("cls", "patch_mean"))
    stream += VALUES.label_ids.astype("<u2").tobytes() + VALUES.status.tobytes()

    assert VALUES.digest(LAYOUT) == hashlib.sha256(stream).digest()
    assert VALUES.digest(replace(LAYOUT, pooling=("patch_mean", "cls"))) != VALUES.digest(LAYOUT)


def test_digest_is_of_values_not_of_memory() -> None:
    held = BlockValues(
        {name: np.asfortranarray(vectors.astype(">f2")) for name, vectors in VALUES.pooled.items()},
        np.asfortranarray(VALUES.label_ids.astype(">u2")),
        np.repeat(VALUES.status, 2)[::2],
    )
    assert held.digest(LAYOUT) == VALUES.digest(LAYOUT)


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("name", ["cls", "patch_mean", "label_ids", "status"])
def test_digest_sees_every_bit(name: str, bit: int) -> None:
    arrays = {**VALUES.pooled, "label_ids": VALUES.label_ids, "status": VALUES.status}
    raw = bytearray(arrays[name].tobytes())
    raw[-1] ^= 1 << bit
    arrays[name] = np.frombuffer(bytes(raw), arrays[name].dtype).reshape(arrays[name].shape)
    flipped = BlockValues(
        {pooling: arrays[pooling] for pooling in LAYOUT.pooling}, arrays["label_ids"], arrays["status"]
    )

    assert flipped.digest(LAYOUT) != VALUES.digest(LAYOUT)


def test_sound_values_are_storable() -> None:
    VALUES.refuse_unstorable(LAYOUT, ROWS)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pooling", LAYOUT.pooling)
def test_a_vector_that_does_not_fit_is_refused_by_row(pooling: str, broken: float) -> None:
    vectors = VALUES.pooled[pooling].copy()
    vectors[7, 3] = broken
    with pytest.raises(IntegrityError, match=f"{pooling} of row 263 is not finite"):
        replace(VALUES, pooled={**VALUES.pooled, pooling: vectors}).refuse_unstorable(LAYOUT, ROWS)


@pytest.mark.parametrize("columns", [slice(None), slice(2, 3)], ids=["whole row", "one value"])
@pytest.mark.parametrize("value", [0.0, np.inf])
def test_a_quarantined_row_holds_nan_only(columns: slice, value: float) -> None:
    vectors = VALUES.pooled["cls"].copy()
    assert VALUES.status[10] == Status.UNDECODABLE
    vectors[10, columns] = value
    with pytest.raises(IntegrityError, match="cls of row 266 holds values, but status says"):
        replace(VALUES, pooled={**VALUES.pooled, "cls": vectors}).refuse_unstorable(LAYOUT, ROWS)


@pytest.mark.parametrize("code", [0, 6, 255])
def test_a_status_that_settles_nothing_is_refused(code: int) -> None:
    status = VALUES.status.copy()
    status[10] = code
    with pytest.raises(IntegrityError, match=rf"status of row 266 is {code}, which no"):
        replace(VALUES, status=status).refuse_unstorable(LAYOUT, ROWS)


def test_every_contradiction_is_named_with_its_first_rows() -> None:
    status, vectors = VALUES.status.copy(), VALUES.pooled["cls"].copy()
    status[[3, 5]] = 9
    vectors[[0, 1, 2, 4, 6]] = np.nan
    vectors[10] = 1
    wrong = replace(VALUES, status=status, pooled={**VALUES.pooled, "cls": vectors})
    assert wrong.find_contradictions(LAYOUT, ROWS) == [
        "array status of rows 259, 261 is 9, which no committed row has",
        "array cls of rows 256, 257, 258 and 2 more is not finite in float16",
        "array cls of row 266 holds values, but status says not embedded",
    ]
    assert VALUES.find_contradictions(LAYOUT, ROWS) == []


@pytest.mark.parametrize(
    "change, name",
    [
        ({"status": VALUES.status[:-1]}, "status"),
        ({"status": VALUES.status.astype(np.int64)}, "status"),
        ({"label_ids": VALUES.label_ids[:, :-1]}, "label_ids"),
        ({"label_ids": VALUES.label_ids.astype(np.int32)}, "label_ids"),
        ({"pooled": {"cls": VALUES.pooled["cls"]}}, "patch_mean"),
        ({"pooled": {name: vectors.astype(np.float32) for name, vectors in VALUES.pooled.items()}}, "cls"),
        ({"pooled": {name: vectors[:, :4] for name, vectors in VALUES.pooled.items()}}, "cls"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(change: dict[str, Any], name: str) -> None:
    with pytest.raises(IntegrityError, match=f"array {name} of a block must be"):
        replace(VALUES, **change).refuse_unstorable(LAYOUT, ROWS)
