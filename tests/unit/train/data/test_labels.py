"""Which rows a trainer may use: what is left out is counted, and labels that mean nothing end the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema import LABEL_ID_COLUMNS, NO_LABEL, RawLabels, Status, TaxonomyError, TileTable
from tests.planted import fresh_seed
from train.config import DataConfig
from train.data.labels import LabelledRows, label_rows
from train.errors import TrainError

TYPE_CLASS = {73: 48, 18: 5, 86: 55}
"""Some of xView's type ids and the class ids they are."""


def make_table(rows: int, *, unlabelled: tuple[int, ...] = ()) -> TileTable:
    label_size = np.full(rows, 40, np.int64)
    label_size[list(unlabelled)] = NO_LABEL
    return TileTable(
        tile=np.array([f"images/s{i // 2:03d}_{i % 2}.png" for i in range(rows)], np.dtypes.StringDType()),
        size=np.full(rows, 100, np.int64),
        crc32c=np.arange(rows, dtype=np.uint32),
        generation=np.arange(rows, dtype=np.int64),
        label_size=label_size,
        label_crc32c=np.arange(rows, dtype=np.uint32),
    )


def count_ids(rows: int, instances: dict[int, dict[int, int]]) -> np.ndarray:
    """(rows, 128) from row -> raw id -> instances."""
    counts = np.zeros((rows, LABEL_ID_COLUMNS), np.uint16)
    for row, ids in instances.items():
        for label_id, count in ids.items():
            counts[row, label_id] = count
    return counts


def label(counts: np.ndarray, status: dict[int, Status] | None = None, **options: Any) -> LabelledRows:
    unlabelled = options.pop("unlabelled", ())
    states = np.full(len(counts), Status.EMBEDDED, np.uint8)
    for row, state in (status or {}).items():
        states[row] = state
    reading = options.pop("reading", None)
    table, raw = make_table(len(counts), unlabelled=unlabelled), RawLabels.pack(counts)
    return label_rows(table, raw, states, DataConfig(**options), reading=reading)


def noted(rows: LabelledRows, text: str) -> bool:
    return any(text in note for note in rows.notes)


def test_labels_are_those_of_the_ids() -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    present = rng.random((40, len(TYPE_CLASS))) < 0.5
    present[0] = True
    counts = np.zeros((40, LABEL_ID_COLUMNS), np.uint16)
    counts[:, list(TYPE_CLASS)] = present * rng.integers(1, 50, present.shape)
    rows = label(counts)
    expected = np.zeros((40, 60), bool)
    expected[:, list(TYPE_CLASS.values())] = present
    assert rows.reading == "type"
    assert np.array_equal(rows.labels, expected)
    assert np.array_equal(rows.empty, ~present.any(axis=1))
    assert rows.index.tolist() == list(range(40))
    assert rows.scenes.tolist() == [f"s{i // 2:03d}" for i in range(40)]
    assert rows.class_ids == tuple(range(60))
    assert (rows.class_names[48], rows.class_names[5], rows.class_names[55]) == (
        "Building",
        "Small Car",
        "Storage Tank",
    )


def test_rows_that_cannot_be_used_are_left_out_and_counted() -> None:
    counts = count_ids(10, {i: {73: 60} for i in range(10)})
    counts[6] = count_ids(1, {0: {75: 2}})[0]  # an artefact and nothing else: neither positive nor empty
    counts[7] = 0
    status = {1: Status.UNDECODABLE, 2: Status.GONE, 3: Status.CHECKSUM_MISMATCH, 4: Status.PENDING}
    rows = label(counts, status, unlabelled=(5,))
    assert rows.index.tolist() == [0, 7, 8, 9]
    assert rows.tiles.tolist() == [f"images/s{i // 2:03d}_{i % 2}.png" for i in (0, 7, 8, 9)]
    assert rows.empty.tolist() == [False, True, False, False]
    assert noted(rows, "3 tiles are quarantined: left out")
    assert noted(rows, "1 tiles are not embedded yet: left out")
    assert noted(rows, "1 tiles have no label file: left out")
    assert noted(rows, "1 tiles have labels, but of no known class: left out")
    assert noted(rows, "2 instances of annotation artefacts dropped")


def test_nothing_is_said_where_nothing_was_left_out() -> None:
    rows = label(count_ids(4, {i: {73: 1} for i in range(4)}))
    assert rows.notes == ("4 rows, label ids read as type ids",)


def test_artefacts_do_not_count_as_unknown() -> None:
    rows = label(count_ids(4, {0: {73: 10, 75: 5, 82: 4}, 1: {73: 1}}))
    assert noted(rows, "9 instances of annotation artefacts dropped")
    assert not noted(rows, "ignored")


@pytest.mark.parametrize(
    "column, what", [(12 + 87, "99 (1x)"), (LABEL_ID_COLUMNS - 1, "1 malformed or with an id above 126")]
)
def test_one_percent_of_meaningless_lines_is_reported_and_more_ends_the_run(column: int, what: str) -> None:
    bearable = count_ids(4, {0: {73: 50}, 2: {73: 49, column: 1}})
    assert bearable.sum() == 100
    assert noted(label(bearable), "1.00% of all label lines are ignored")
    assert noted(label(bearable), what)
    assert noted(label(bearable), "labels of images/s001_0.png")
    too_many = count_ids(4, {0: {73: 50}, 2: {73: 48, column: 1}})
    with pytest.raises(TaxonomyError, match=r"1\.01% of all label lines are ignored.*images/s001_0.png.*--label-ids"):
        label(too_many)


def test_the_reading_is_detected_given_or_inherited() -> None:
    class_ids = count_ids(3, {0: {48: 3, 5: 1}, 1: {58: 1}})
    rows = label(class_ids)
    assert rows.reading == "class"
    assert rows.labels[0].nonzero()[0].tolist() == [5, 48]
    ambiguous = count_ids(3, {0: {18: 3}, 1: {19: 1}})
    with pytest.raises(TaxonomyError, match=r"--label-ids type or --label-ids class\n.*18:3 19:1"):
        label(ambiguous)
    assert label(ambiguous, label_ids="type").labels[0].nonzero()[0].tolist() == [5]
    assert label(ambiguous, label_ids="class").labels[0].nonzero()[0].tolist() == [18]
    assert label(ambiguous, reading="class").labels[0].nonzero()[0].tolist() == [18]


def test_the_wrong_label_ids_flag_is_an_error() -> None:
    type_ids = count_ids(3, {0: {73: 3, 18: 1}, 1: {86: 1}})
    with pytest.raises(TaxonomyError, match=r"no class ids of this class list: 73 \(3x\), 86 \(1x\)"):
        label(type_ids, label_ids="class")
    class_ids = count_ids(3, {0: {48: 3, 5: 1}, 1: {58: 1}})
    with pytest.raises(TaxonomyError, match=r"no type ids of this class list: 5 \(1x\), 48 \(3x\), 58 \(1x\)"):
        label(class_ids, label_ids="type")


def test_excluded_classes_leave_model_and_metrics() -> None:
    counts = count_ids(3, {0: {73: 3}, 1: {86: 1, 73: 1}, 2: {18: 1}})
    rows = label(counts, exclude=(48, 5))
    assert len(rows.class_ids) == len(rows.class_names) == rows.labels.shape[1] == 58
    assert not {48, 5} & set(rows.class_ids)
    assert not {"Building", "Small Car"} & set(rows.class_names)
    # A tile that shows excluded classes alone is a tile without an object to find, not one without labels.
    assert rows.empty.tolist() == [True, False, True]
    assert rows.labels[1].nonzero()[0].tolist() == [rows.class_names.index("Storage Tank")]


@pytest.mark.parametrize("exclude", [(60,), (-1,), (5, 99), tuple(range(60))])
def test_excluding_what_is_no_class_or_all_classes_is_an_error(exclude: tuple[int, ...]) -> None:
    with pytest.raises(TrainError, match=r"--exclude .*0 to 59"):
        label(count_ids(3, {0: {73: 1}}), exclude=exclude)


def test_a_taxonomy_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_text("class_id,name\n0,roof\n1,pool\n")
    rows = label(count_ids(3, {0: {0: 2}, 1: {1: 1}}), taxonomy=str(path))
    assert rows.class_names == ("roof", "pool")
    assert rows.labels.tolist() == [[True, False], [False, True], [False, False]]
    with pytest.raises(TaxonomyError, match="2"):
        label(count_ids(3, {0: {0: 2}, 1: {2: 1}}), taxonomy=str(path))


def test_select_keeps_rows_aligned() -> None:
    counts = count_ids(6, {i: {73: 1} if i % 2 else {86: 1} for i in range(6)})
    rows = label(counts, {0: Status.UNDECODABLE})
    some = rows.select(np.array([False, True, False, True, True]))
    assert some.index.tolist() == [2, 4, 5]
    assert some.tiles.tolist() == ["images/s001_0.png", "images/s002_0.png", "images/s002_1.png"]
    assert some.labels[:, 55].tolist() == [True, True, False]
    assert len(some) == 3
