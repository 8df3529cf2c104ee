"""Reading annotations: against json.load on random files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import extract.cutting.annotations
from extract.cutting.annotations import Defect, read_annotations, read_features
from extract.errors import AnnotationError
from tests.raw_xview import make_feature, write_geojson

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@settings(max_examples=50)
@given(
    st.lists(VALUES),
    st.dictionaries(st.text().filter(lambda name: name != "features"), VALUES, max_size=3),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.integers(1, 40),
)
def test_features_are_what_json_reads_however_the_file_is_cut_into_chunks(
    tmp_path_factory: pytest.TempPathFactory,
    features: list[object],
    others: dict[str, object],
    indent: str | int | None,
    escaped: bool,
    chunk: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "features.json"
    text = json.dumps({**others, "features": features, "last": others}, indent=indent, ensure_ascii=escaped)
    path.write_bytes(text.encode("utf-8", "surrogatepass") if escaped else text.encode("utf-8", "replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract.cutting.annotations, "_CHUNK_CHARACTERS", chunk)
        assert list(read_features(path)) == json.loads(path.read_text(encoding="utf-8"))["features"]


def test_a_feature_is_a_box_of_its_scene_or_a_counted_defect(tmp_path: Path) -> None:
    labels = tmp_path / "labels.geojson"
    features = [
        make_feature("7.tif", 18, "1,2,3,4"),
        make_feature("7.tif", 18.0, " 5 ,6.5,+7,8e0"),
        make_feature("8.TIFF", 99, "-1,-2,3,4"),
        make_feature("7.tif", 18, "1,2,3,4"),
        make_feature("7.tif", 19, "1,2,3,4"),
        make_feature("9.tif", 75, "1,2,3,4"),
        *(make_feature("7.tif", bad, "1,2,3,4") for bad in (True, 18.5, 1e9, -1, "18", None, [18])),
        *(
            make_feature("7.tif", 18, bad)
            for bad in ("1,2,3,inf", "1_0,2,33,4", "٣,2,9,4", "1,2,3,1e99", "1,2,3,4,5", [])
        ),
        *(make_feature("7.tif", 18, bad) for bad in ("1,2,1,4", "3,2,1,4", "1,4,3,2")),
        *(make_feature(bad, 18, "1,2,3,4") for bad in ("", ".tif", "a/7.tif", "/7.tif", 7, None)),
        *(None, 5, [], {}, {"properties": None}, {"properties": [1]}),
    ]
    write_geojson(labels, features)
    found = read_annotations(labels)
    assert {name: boxes.tolist() for name, boxes in found.boxes.items()} == {
        "7": [[18, 1, 2, 3, 4], [18, 5, 6.5, 7, 8], [19, 1, 2, 3, 4]],
        "8": [[99, -1, -2, 3, 4]],
        "9": [],
    }
    assert found.features == len(features)
    assert found.dropped == {
        Defect.REPEATED: 1,
        Defect.ARTEFACT: 1,
        Defect.NO_ID: 7,
        Defect.NO_BOUNDS: 6,
        Defect.NO_AREA: 3,
        Defect.NO_SCENE: 6,
        Defect.NO_PROPERTIES: 6,
    }
    assert found.examples[Defect.NO_ID] == "feature 7 of 7.tif"
    assert found.examples[Defect.NO_PROPERTIES] == f"feature {len(features) - 5}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "no json",
        '{"type": "FeatureCollection"}',
        '{"features": 5}',
        '{"features": {"a": 1}}',
        '{"features": [{"a": 1}, {"a"',
        '{"features": [{"a": 1}]',
        '{"features": [' + "[" * 100_000,
        '{"features": [' + "9" * 10_000 + "]}",
        '{"features": [nonsense]}',
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_collection_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(
        AnnotationError, match=r"a\.geojson is not a GeoJSON FeatureCollection .*LABELS is xView"
    ) as caught:
        read_annotations(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_other_files_are_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00" * 99)
    with pytest.raises(AnnotationError, match="is not a GeoJSON"):
        read_annotations(tmp_path / "bytes")
    with pytest.raises(AnnotationError, match="Is a directory"):
        read_annotations(tmp_path)
    with pytest.raises(AnnotationError, match="No such file"):
        read_annotations(tmp_path / "none")


def test_what_is_larger_than_any_feature_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract.cutting.annotations, "MAX_VALUE_CHARACTERS", 5000)
    monkeypatch.setattr(extract.cutting.annotations, "_CHUNK_CHARACTERS", 100)
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"features": ["x" * 4000]}))
    assert list(read_features(path)) == ["x" * 4000]
    path.write_text(json.dumps({"features": ["x" * 50_000]}))
    with pytest.raises(AnnotationError, match="is not a GeoJSON"):
        list(read_features(path))


def test_boxes_are_a_few_numbers_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = []
    for i in range(2000):
        left, top, width, height = rng.integers(1, 3000, 4).tolist()
        features.append(make_feature(f"{i % 7}.tif", 18, f"{left},{top},{left + width},{top + height}"))
    write_geojson(tmp_path / "a.geojson", features)
    found = read_annotations(tmp_path / "a.geojson")
    assert sum(boxes.nbytes for boxes in found.boxes.values()) == 40 * (2000 - found.dropped[Defect.REPEATED])
