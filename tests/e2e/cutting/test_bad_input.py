"""Bad input gets a line that names the remedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.cutting.cutting import digest_tree, options, tile
from tests.raw_xview import (
    RawXView,
    make_feature,
    write_geojson,
    write_geotiff,
)
from tests.tiles import list_tree


def test_other_settings_or_other_tiles_in_the_same_place_are_refused(raw: RawXView, tmp_path: Path) -> None:
    assert tile(tmp_path, *options(raw, "out", "--size", 128, "--workers", 1)).status == 0
    before = digest_tree(tmp_path / "out")
    for changed in (("--size", 64), ("--size", 128, "--stride", 100), ("--size", 128, "--min-visibility", 0.5)):
        finished = tile(tmp_path, *options(raw, "out", *changed))
        assert finished.status == 1
        (line,) = finished.errors
        assert "--size 128, --stride 128, --min-visibility 0.25" in line
        assert line.endswith("give the same, or choose another OUT")
    assert digest_tree(tmp_path / "out") == before
    (tmp_path / "foreign" / "images").mkdir(parents=True)
    (tmp_path / "foreign" / "images" / "a.png").touch()
    (line,) = tile(tmp_path, *options(raw, "foreign")).errors
    assert "tiles that were not cut by this command: choose another OUT" in line
    assert list_tree(tmp_path / "foreign") == ["images", "images/a.png"]


@pytest.fixture
def bad_inputs(raw: RawXView, tmp_path: Path) -> list[tuple[tuple[Any, ...], str]]:
    (tmp_path / "none").mkdir()
    (tmp_path / "twice").mkdir()
    for name in ("1.tif", "1.TIFF"):
        write_geotiff(tmp_path / "twice" / name, np.zeros((9, 9, 3), np.uint8), None, None)
    (tmp_path / "file").touch()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / os.fsdecode(b"\xff\n.tif")).touch()
    write_geojson(tmp_path / "others.geojson", [make_feature("999.tif", 18, "1,2,3,4")])
    images, labels, out = ("--images", raw.images), ("--labels", raw.labels), ("--out", "out")
    return [
        ((*labels, *out), "IMAGES is not set: give IMAGES="),
        ((*images, *out), "LABELS is not set: give IMAGES="),
        ((*images, *labels), "OUT is not set: give IMAGES="),
        (
            ("--images", "nowhere", *labels, *out),
            "cannot list nowhere: No such file or directory: IMAGES is a directory",
        ),
        (("--images", "file", *labels, *out), "cannot list file: Not a directory: IMAGES is a directory"),
        (("--images", "none", *labels, *out), "no .tif files in none: IMAGES is a directory of them"),
        (("--images", "odd", *labels, *out), r"'odd/\udcff\n.tif' has characters not allowed in tile names: rename it"),
        (("--images", "twice", *labels, *out), "name the same scene: remove one"),
        ((*images, "--labels", "nowhere", *out), "cannot read nowhere: No such file or directory: LABELS is"),
        ((*images, "--labels", raw.images / "readme.txt", *out), "is not a GeoJSON FeatureCollection"),
        ((*images, "--labels", "others.geojson", *out), "check IMAGES and LABELS"),
        ((*images, *labels, "--out", "s3://bucket/a"), "OUT is gs://bucket/prefix or a local directory"),
        ((*images, *labels, "--out", "gs://user:secret@bucket/a"), "user or password in it: leave them out"),
        ((*images, *labels, "--out", "gs://a"), "names no bucket: write gs://bucket/prefix"),
        ((*images, *labels, "--out", "file"), "file: Not a directory: check OUT"),
        ((*images, *labels, *out, "--size", 0), "--size 0: choose 1 to 8,192"),
        ((*images, *labels, *out, "--stride", 513), "--stride 513: choose 1 to 512, the tile size"),
        ((*images, *labels, *out, "--min-visibility", 1.5), "--min-visibility 1.5: a share of a box, 0 to 1"),
        ((*images, *labels, *out, "--workers", 0), "--workers 0: at least 1"),
    ]


def test_bad_input_gets_a_line_that_names_the_remedy(
    bad_inputs: list[tuple[tuple[Any, ...], str]], tmp_path: Path
) -> None:
    for arguments, words in bad_inputs:
        for dry in ((), ("--dry-run",)):
            finished = tile(tmp_path, *arguments, *dry)
            assert finished.status == 1, arguments
            (line,) = finished.errors
            assert words in line, (words, line)
            assert "secret" not in line
            assert "Traceback" not in finished.err
            assert not (tmp_path / "out" / "images").exists()


def test_a_bucket_that_is_not_there_is_named(raw: RawXView, tmp_path: Path, gcs_server: str) -> None:
    (line,) = tile(tmp_path, *options(raw, "gs://no-such-bucket/a")).errors
    assert "no bucket no-such-bucket" in line
    assert "check the name in OUT" in line
