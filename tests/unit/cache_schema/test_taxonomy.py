"""Which raw id is which class, and when that cannot be told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import LABEL_ID_COLUMNS, RawLabels, Taxonomy, TaxonomyError, format_histogram
from tests.planted import fresh_seed

XVIEW = Taxonomy.xview()
ONLY_CLASS = {*range(11), 14, 16, 22, 30, 31, 39, 43, 46, 48, 58}
BOTH = sorted(set(range(60)) - ONLY_CLASS)


def count(**ids: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """count(i11=3) is a histogram with 3 instances of id 11."""
    histogram = np.zeros(LABEL_ID_COLUMNS, np.int64)
    for name, instances in ids.items():
        histogram[int(name[1:])] = instances
    return histogram


def make_rows(*rows: dict[int, int]) -> RawLabels:
    label_ids = np.zeros((len(rows), LABEL_ID_COLUMNS), np.uint16)
    for row, ids in enumerate(rows):
        for label_id, instances in ids.items():
            label_ids[row, label_id] = instances
    return RawLabels.pack(label_ids)


def test_packed_labels_know_which_ids_occur_and_how_often_in_all() -> None:
    rng = np.random.default_rng(fresh_seed())
    label_ids = rng.integers(0, 2**16, (50, LABEL_ID_COLUMNS)).astype(np.uint16)
    label_ids[rng.random(label_ids.shape) < 0.7] = 0
    raw = RawLabels.pack(label_ids)
    ids = rng.permutation(LABEL_ID_COLUMNS).tolist()
    np.testing.assert_array_equal(raw.find(ids), label_ids[:, ids] > 0)
    assert raw.totals.tolist() == [sum(column) for column in label_ids.T.tolist()]
    assert raw.marks.nbytes == 16 * len(label_ids)
    assert raw.find([]).shape == (50, 0)


def test_xview_has_its_60_classes() -> None:
    assert len(XVIEW) == 60
    assert XVIEW.type_ids is not None
    assert len(set(XVIEW.type_ids)) == 60
    assert (min(XVIEW.type_ids), max(XVIEW.type_ids)) == (11, 94)
    assert XVIEW.artefacts == {75, 82}
    assert not XVIEW.artefacts & set(XVIEW.type_ids)
    named = {XVIEW.names[i]: XVIEW.type_ids[i] for i in (0, 5, 48, 59)}
    assert named == {"Fixed-wing Aircraft": 11, "Small Car": 18, "Building": 73, "Tower": 94}


def test_which_class_ids_are_evidence() -> None:
    assert XVIEW.type_ids is not None
    assert set(range(60)) - set(XVIEW.type_ids) == ONLY_CLASS
    assert len(BOTH) == 39


@pytest.mark.parametrize("evidence", sorted(ONLY_CLASS))
def test_one_id_that_only_class_ids_explain_decides(evidence: int) -> None:
    assert XVIEW.detect_label_ids(count(i18=500, **{f"i{evidence}": 1})) == "class"


@pytest.mark.parametrize("evidence", [60, 73, 75, 82, 94, 99, 126])
def test_one_id_above_59_decides(evidence: int) -> None:
    assert XVIEW.detect_label_ids(count(i18=500, **{f"i{evidence}": 1})) == "type"


def test_both_kinds_of_evidence_is_an_error_with_histogram_and_flag() -> None:
    with pytest.raises(TaxonomyError) as caught:
        XVIEW.detect_label_ids(count(i5=2, i18=40, i73=7, i127=3))

    text = str(caught.value)
    assert "[5]" in text
    assert "[73]" in text
    assert "--label-ids type" in text
    assert "--label-ids class" in text
    assert "5:2 18:40 73:7 other:3" in text


@given(st.sets(st.sampled_from(BOTH)), st.integers(0, 10))
def test_no_evidence_is_an_error(ids: set[int], malformed: int) -> None:
    histogram = count(i127=malformed, **{f"i{i}": 1 for i in ids})
    with pytest.raises(TaxonomyError) as caught:
        XVIEW.detect_label_ids(histogram)

    assert "--label-ids type or --label-ids class" in str(caught.value)
    assert format_histogram(histogram) in str(caught.value)
    assert "both a type id and a class id" in str(caught.value)


def test_the_last_column_is_no_evidence() -> None:
    assert XVIEW.detect_label_ids(count(i3=1, i127=1000)) == "class"


def test_a_class_list_without_type_ids_needs_no_evidence() -> None:
    assert Taxonomy(("a", "b"), None).detect_label_ids(count(i90=4)) == "class"


def test_decode_type_ids() -> None:
    decoded = XVIEW.decode(make_rows({18: 2, 73: 1}, {94: 1}, {}), "type")

    assert decoded.labels.shape == (3, 60)
    assert [np.flatnonzero(row).tolist() for row in decoded.labels] == [[5, 48], [59], []]
    assert decoded.empty.tolist() == [False, False, True]
    assert decoded.unusable.tolist() == [False, False, False]
    assert decoded.instances == 4
    assert (decoded.artefacts, decoded.unknown, decoded.malformed) == (0, {}, 0)


def test_decode_class_ids() -> None:
    decoded = XVIEW.decode(make_rows({5: 2, 48: 1}, {18: 1}), "class")
    assert [np.flatnonzero(row).tolist() for row in decoded.labels] == [[5, 48], [18]]


def test_artefacts_are_dropped_and_counted_among_type_ids() -> None:
    rows = make_rows({18: 1, 75: 3}, {82: 2})
    decoded = XVIEW.decode(rows, "type")

    assert decoded.artefacts == 5
    assert decoded.unknown == {}
    assert decoded.labels.sum() == 1
    assert decoded.unusable.tolist() == [False, True]
    as_classes = XVIEW.decode(rows, "class")
    assert as_classes.artefacts == 0
    assert as_classes.unknown == {75: 3, 82: 2}


def test_unknown_and_malformed_are_counted_apart() -> None:
    decoded = XVIEW.decode(make_rows({18: 1, 14: 2, 99: 1}, {14: 1, 127: 4}), "type")

    assert decoded.unknown == {14: 3, 99: 1}
    assert decoded.malformed == 4
    assert decoded.instances == 9


def test_unusable_is_not_empty() -> None:
    decoded = XVIEW.decode(make_rows({}, {14: 1}, {127: 1}, {75: 1}, {18: 1, 127: 1}), "type")

    assert decoded.empty.tolist() == [True, False, False, False, False]
    assert decoded.unusable.tolist() == [False, True, True, True, False]


def test_capped_counts_do_not_wrap_in_sums() -> None:
    decoded = XVIEW.decode(make_rows(*[{18: 65_535, 127: 65_535}] * 3), "type")
    assert (decoded.instances, decoded.malformed) == (6 * 65_535, 3 * 65_535)


def test_type_reading_needs_type_ids() -> None:
    with pytest.raises(TaxonomyError, match="--label-ids class"):
        Taxonomy(("a",), None).decode(make_rows({0: 1}), "type")


def test_histogram_text() -> None:
    assert format_histogram(count(i11=40, i18=2213, i127=3)) == "11:40 18:2213 other:3"
    assert format_histogram(count()) == "other:0"


@pytest.mark.parametrize(
    "header", ["class_id,name\n0,ship\n1,crane\n", "\ufeffclass_id,name\r\n0, ship\r\n1,crane \r\n"]
)
def test_a_users_classes(tmp_path: Path, header: str) -> None:
    (tmp_path / "classes.csv").write_text(header, encoding="utf-8", newline="")
    taxonomy = Taxonomy.from_file(tmp_path / "classes.csv")

    assert (taxonomy.names, taxonomy.type_ids, taxonomy.artefacts) == (("ship", "crane"), None, frozenset())


def test_a_users_type_ids(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text('class_id,type_id,name\n0,100,"ship, large"\n1,126,crane\n')
    taxonomy = Taxonomy.from_file(tmp_path / "classes.csv")

    assert (taxonomy.names, taxonomy.type_ids) == (("ship, large", "crane"), (100, 126))
    assert taxonomy.detect_label_ids(count(i100=1)) == "type"
    assert taxonomy.decode(make_rows({126: 1}), "type").labels.tolist() == [[False, True]]


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "expected the header"),
        ("class_id,name\n", "expected the header"),
        ("id,name\n0,ship\n", "expected the header"),
        ("class_id,name,colour\n0,ship,red\n", "expected the header"),
        ("class_id,name\nzero,ship\n", "zero"),
        ("class_id,name\n1,ship\n", "0, 1, 2"),
        ("class_id,name\n0,ship\n2,crane\n", "0, 1, 2"),
        ("class_id,name\n0,ship\n0,crane\n", "0, 1, 2"),
        ("class_id,name\n0,ship\n1,ship\n", "its own name"),
        ("class_id,name\n0,ship\n1, \n", "its own name"),
        ("class_id,name\n0,ship\n1\n", "1 has 1 fields, not 2"),
        ("class_id,name\n0,ship,red\n", "0,ship,red has 3 fields"),
        ("class_id,type_id,name\n0,5,ship\n1,5,crane\n", "distinct"),
        ("class_id,type_id,name\n0,127,ship\n", "0..126"),
        ("class_id,type_id,name\n0,-1,ship\n", "0..126"),
        pytest.param("class_id,name\n0," + "x" * 200_000, "field larger than", id="endless name"),
        ("class_id,type_id,name\n0,,ship\n", "invalid literal"),
        ("class_id,type_id,name\n0\n", "0 has 1 fields, not 3"),
        ("class_id,name\n" + "".join(f"{i},c{i}\n" for i in range(128)), "0..126"),
    ],
)
def test_a_users_class_list_that_cannot_be_used(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "classes.csv"
    file.write_bytes(text.encode())
    with pytest.raises(TaxonomyError, match=why) as caught:
        Taxonomy.from_file(file)
    assert str(file) in str(caught.value)


def test_an_unreadable_class_list(tmp_path: Path) -> None:
    with pytest.raises(TaxonomyError, match="cannot read the class list"):
        Taxonomy.from_file(tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes(b"class_id,name\n0,b\xe9b\xe9\n")
    with pytest.raises(TaxonomyError, match="cannot read the class list"):
        Taxonomy.from_file(tmp_path / "latin.csv")
