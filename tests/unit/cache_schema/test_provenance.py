"""Provenance: round trips, strict parsing, and what the version id depends on."""

import hashlib
import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheFormatError, Provenance, Recorded, provenance
from tests.caches import make_provenance, make_recorded, make_table

TABLE = make_table(6)
ID = make_provenance().version_id(TABLE.identity_digest())
OTHER: dict[str, Any] = {
    "weights_sha256": "cd" * 32,
    "depth": 5,
    "width": 16,
    "image_size": 80,
    "mean": (0.43, 0.411, 0.297),
    "std": (0.213, 0.156, 0.144),
    "resampling": "bicubic",
    "pooling": ("patch_mean", "cls"),
    "precision": "bf16",
}

COUNTS = st.integers(1, 2**40)
THREE = st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3)
PROVENANCES = st.builds(
    Provenance,
    weights_sha256=st.text(),
    depth=COUNTS,
    width=COUNTS,
    image_size=COUNTS,
    mean=THREE,
    std=THREE,
    resampling=st.text(),
    pooling=st.lists(st.text(min_size=1), min_size=1, unique=True).map(tuple),
    precision=st.text(),
)
RECORDS = st.builds(Recorded, batch_size=COUNTS, libraries=st.dictionaries(st.text(), st.text()))


@given(PROVENANCES)
def test_provenance_survives_json(made: Provenance) -> None:
    read = Provenance.from_json(json.loads(json.dumps(made.to_json())))

    assert read == made
    assert read.version_id(b"") == made.version_id(b"")
    assert read.differences(made) == []


@given(PROVENANCES, PROVENANCES, st.sampled_from([field.name for field in fields(Provenance)]))
def test_another_value_of_any_ingredient_is_another_id(made: Provenance, other: Provenance, name: str) -> None:
    changed = replace(made, **{name: getattr(other, name)})
    same = getattr(made, name) == getattr(other, name)

    assert [line.partition(":")[0] for line in made.differences(changed)] == ([] if same else [name])
    assert (changed.version_id(b"") == made.version_id(b"")) == same


@given(RECORDS)
def test_recorded_survives_json(made: Recorded) -> None:
    assert Recorded.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_version_id_follows_the_written_format() -> None:
    text = (
        '{"depth":4,"format":1,"image_size":64,"mean":[0.43,0.411,0.296],"pooling":["cls","patch_mean"],'
        '"precision":"float32","resampling":"bilinear-antialias","std":[0.213,0.156,0.143],'
        f'"weights_sha256":"{"ab" * 32}","width":8}}'
    )
    assert hashlib.sha256(text.encode("ascii") + TABLE.identity_digest()).hexdigest()[:20] == ID


@pytest.mark.parametrize("field", [field.name for field in fields(Provenance)])
def test_each_ingredient_changes_the_id(field: str) -> None:
    other = make_provenance(**{field: OTHER[field]})

    assert other.version_id(TABLE.identity_digest()) != ID
    assert [line.partition(":")[0] for line in make_provenance().differences(other)] == [field]


def test_format_and_tiles_change_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_provenance().version_id(make_table(7).identity_digest()) != ID
    monkeypatch.setattr(provenance, "FORMAT_VERSION", 2)
    assert make_provenance().version_id(TABLE.identity_digest()) != ID


def test_generation_does_not_change_the_id() -> None:
    assert make_provenance().version_id(make_table(6, generation=2).identity_digest()) == ID


def test_integers_and_floats_of_one_value_are_one_mean() -> None:
    whole, real = make_provenance(mean=(0, 0, 0), std=(1, 1, 1)), make_provenance(mean=(0.0,) * 3, std=(1.0,) * 3)
    assert whole.version_id(b"") == real.version_id(b"")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"depth": 0}, "provenance.depth"),
        ({"width": -8}, "provenance.width"),
        ({"image_size": 64.0}, "provenance.image_size"),
        ({"depth": True}, "provenance.depth"),
        ({"mean": [0.4, 0.4]}, "provenance.mean"),
        ({"std": [0.4, 0.4, "0.4"]}, "provenance.std"),
        ({"std": 0.4}, "provenance.std"),
        ({"mean": [0.4, 0.4, True]}, "provenance.mean"),
        ({"pooling": []}, "provenance.pooling"),
        ({"pooling": "cls"}, "provenance.pooling"),
        ({"pooling": ["cls", "cls"]}, "provenance.pooling"),
        ({"pooling": ["cls", 1]}, "provenance.pooling"),
        ({"weights_sha256": None}, "provenance.weights_sha256"),
        ({"resampling": 2}, "provenance.resampling"),
        ({"precision": 16}, "provenance.precision"),
        ({"colour": "rgb"}, r"unknown \['colour'\]"),
    ],
)
def test_provenance_refuses(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CacheFormatError, match=f"{named}.*make extract"):
        Provenance.from_json(make_provenance().to_json() | change)


@pytest.mark.parametrize("field", [field.name for field in fields(Provenance)])
def test_provenance_refuses_a_missing_field(field: str) -> None:
    raw = make_provenance().to_json()
    del raw[field]
    with pytest.raises(CacheFormatError, match=rf"missing \['{field}'\]"):
        Provenance.from_json(raw)


@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_what_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(CacheFormatError, match="provenance: missing"):
        Provenance.from_json(value)
    with pytest.raises(CacheFormatError, match="recorded: missing"):
        Recorded.from_json(value)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"batch_size": 0}, "recorded.batch_size"),
        ({"batch_size": "16"}, "recorded.batch_size"),
        ({"backbone": None}, "recorded.backbone"),
        ({"identity": 1}, "recorded.identity"),
        ({"libraries": ["zarr"]}, "recorded.libraries"),
        ({"libraries": {"zarr": 3}}, "recorded.libraries"),
        ({"when": "now"}, r"unknown \['when'\]"),
    ],
)
def test_recorded_refuses(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CacheFormatError, match=named):
        Recorded.from_json(make_recorded().to_json() | change)


def test_recorded_reports_only_what_can_move_a_vector() -> None:
    made = make_recorded()
    assert made.differences(replace(made, backbone="x", tiles="y", identity="mtime")) == []
    assert made.differences(replace(made, attention="eager", batch_size=32)) == [
        "attention: sdpa, not eager",
        "batch_size: 16, not 32",
    ]
    assert made.differences(replace(made, hardware="H200", libraries={})) == [
        "hardware: CPU x86_64, not H200",
        "libraries: {'zarr': '3.1.6'}, not {}",
    ]
