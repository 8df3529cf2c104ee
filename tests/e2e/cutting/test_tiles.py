"""Every tile and label line is what a plain second implementation says."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extract.tiles.listing import list_tiles
from extract.tiles.source import open_source
from tests.e2e.cutting.cutting import assert_agrees, cut_plainly, options, read_boxes, read_labels, tile
from tests.planted import fresh_seed
from tests.raw_xview import (
    MISSING_SCENE,
    UNKNOWN_ID,
    UNLABELLED_SCENE,
    RawXView,
    make_feature,
    write_geojson,
    write_geotiff,
)
from tests.tiles import draw_pixels, list_tree


@pytest.mark.parametrize("size, stride, least", [(128, 128, 0.25), (96, 61, 0.6), (512, 300, 0.0)])
def test_every_tile_and_line_is_what_a_plain_second_implementation_says(
    raw: RawXView, tmp_path: Path, size: int, stride: int, least: float
) -> None:
    finished = tile(
        tmp_path, *options(raw, "out", "--size", size, "--stride", stride, "--min-visibility", least, "--workers", 1)
    )
    assert finished.status == 0, finished.err
    wanted = cut_plainly(raw.images, raw.labels, size, stride, least)
    assert_agrees(tmp_path / "out", wanted)
    lines = [line for _, found in wanted.values() for line in found or ()]
    empty = sum(found == [] for _, found in wanted.values())
    assert f"{len(wanted)} of {size} px" in finished.out
    assert f"{len(lines):,} label lines; {empty} tiles with an empty label" in finished.out


def test_random_boxes_over_random_scenes(tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    (tmp_path / "images").mkdir()
    features = []
    for number in range(4):
        height, width = (int(side) for side in rng.integers(40, 200, 2))
        write_geotiff(tmp_path / "images" / f"{number}.tif", draw_pixels(rng, height, width), None, None)
        for _ in range(60):
            x0, y0 = (int(side) for side in rng.integers(-60, 220, 2))
            x1, y1 = (start + int(length) for start, length in zip((x0, y0), rng.integers(-5, 150, 2), strict=True))
            features.append(make_feature(f"{number}.tif", int(rng.integers(11, 95)), f"{x0},{y0},{x1},{y1}"))
    write_geojson(tmp_path / "labels.geojson", features)
    for size, stride in ((64, 64), (50, 33)):
        least = round(float(rng.random()), 2)
        raw = RawXView(tmp_path / "images", tmp_path / "labels.geojson", ())
        out = f"out{size}"
        finished = tile(
            tmp_path, *options(raw, out, "--size", size, "--stride", stride, "--min-visibility", least, "--workers", 1)
        )
        assert finished.status == 0, finished.err
        assert_agrees(tmp_path / out, cut_plainly(raw.images, raw.labels, size, stride, least))


def test_rectangles_drawn_at_known_places_are_found_where_the_labels_say(tmp_path: Path) -> None:
    """A colour for each class, so the pixels of a label's place must be all of that colour."""
    rng = np.random.default_rng(fresh_seed())
    colours = {18: (255, 0, 0), 73: (0, 255, 0), 86: (0, 0, 255)}
    scene = rng.integers(60, 120, (400, 500, 3), np.uint8)
    features = []
    for cell in range(20):  # a rectangle each, so that none lies over another
        y, x = 100 * (cell // 5), 100 * (cell % 5)
        label_id = int(rng.choice(list(colours)))
        x0, y0 = x + int(rng.integers(0, 40)), y + int(rng.integers(0, 40))
        x1, y1 = x0 + int(rng.integers(8, 60)), y0 + int(rng.integers(8, 60))
        scene[y0:y1, x0:x1] = colours[label_id]
        features.append(make_feature("7.tif", label_id, f"{x0},{y0},{x1},{y1}"))
    (tmp_path / "images").mkdir()
    write_geotiff(tmp_path / "images" / "7.tif", scene, None, None, compress="lzw")
    write_geojson(tmp_path / "a.geojson", features)
    raw = RawXView(tmp_path / "images", tmp_path / "a.geojson", ())
    assert tile(tmp_path, *options(raw, "out", "--size", 128, "--stride", 90, "--workers", 1)).status == 0
    shown: Counter[int] = Counter()
    for path in (tmp_path / "out" / "labels").iterdir():
        with Image.open(tmp_path / "out" / "images" / f"{path.stem}.png") as image:
            pixels = np.asarray(image)
        named = np.zeros((128, 128), bool)
        for label_id, cx, cy, w, h in read_labels(path.read_bytes()):
            left, top, right, bottom = (round(128 * edge) for edge in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
            assert (pixels[top:bottom, left:right] == colours[label_id]).all()
            named[top:bottom, left:right] = True
            shown[label_id] += 1
        # What is coloured and has no line is the small rest of a box that most of is elsewhere.
        coloured = np.isin(pixels.max(axis=2), 255)
        assert (coloured & ~named).sum() < 0.25 * 60 * 60 * 4
    assert shown.total() >= len(features)


def test_what_is_dropped_is_counted_and_the_numbers_add_up(raw: RawXView, tmp_path: Path) -> None:
    said = tile(tmp_path, *options(raw, "out", "--size", 128, "--dry-run")).out
    everything = json.loads(raw.labels.read_text())["features"]
    for count, words in (
        (raw.defects["artefact"], "ids 75 and 82"),
        (raw.defects["bounds"], "bounds_imcoords are not four numbers"),
        (raw.defects["empty"], "box is empty or inverted"),
        (raw.defects["no image"], "image_id names no file"),
        (raw.defects["no id"], "type_id is no number"),
        (raw.defects["no properties"], "no properties"),
        (raw.defects["repeated"], "repeats another feature"),
        (raw.defects["no file"], "their scene has no file"),
    ):
        assert re.search(rf"^ +{count} dropped: {words}", said, re.M), (count, words)
    dropped = sum(
        int(found.replace(",", "")) for found in re.findall(r"^ +([\d,]+) dropped: (?!outside|no tile)", said, re.M)
    )
    boxes = sum(len(found) for name, found in read_boxes(raw.labels).items() if name in raw.scenes)
    assert f"features  {len(everything)} in" in said
    assert re.search(rf"^boxes     {boxes}$", said, re.M)
    assert len(everything) == dropped + boxes
    assert f"1 with features but without a file, skipped: {MISSING_SCENE}\n" in said
    assert re.search(rf"1 without features: .*: {UNLABELLED_SCENE}\n", said)
    assert f"are not xView types: {UNKNOWN_ID} (" in said
    assert "2 other files are skipped" in said


def test_a_dry_run_writes_nothing_and_says_what_the_real_one_does(raw: RawXView, tmp_path: Path) -> None:
    before = list_tree(raw.images.parent)
    dry = tile(tmp_path, *options(raw, "out", "--size", 128, "--dry-run"))
    assert (dry.status, list(tmp_path.iterdir()), list_tree(raw.images.parent)) == (0, [], before)
    wet = tile(tmp_path, *options(raw, "out", "--size", 128, "--workers", 1))
    assert wet.out.rpartition("\ncut ")[0] == dry.out.rpartition("\ndry run: ")[0]
    estimate = float(re.search(r"about ([\d,.]+) MiB", dry.out)[1].replace(",", ""))  # type: ignore[index]
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "images").iterdir()) / 2**20
    assert abs(estimate - size) < 0.3 * size + 1
    assert (
        "0 scenes to cut, 9 are in out already" in tile(tmp_path, *options(raw, "out", "--size", 128, "--dry-run")).out
    )


def test_json_counts_what_lies_there_afterwards(raw: RawXView, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dry = json.loads(tile(tmp_path, *options(raw, out, "--size", 96, "--dry-run", "--json")).out)
    assert not out.exists()
    real = json.loads(tile(tmp_path, *options(raw, out, "--size", 96, "--json")).out)
    assert dry | {"scenes_cut": len(raw.pixels)} == real
    assert real["tiles"] == len(list((out / "images").iterdir())) > real["scenes"]
    labels = list((out / "labels").iterdir())
    assert real["label_lines"] == sum(len(path.read_text().splitlines()) for path in labels)
    assert (real["scenes_without_features"], real["scenes_without_file"]) == ([UNLABELLED_SCENE], [MISSING_SCENE])
    dropped = ("artefact", "bounds", "empty", "no image", "no id", "no properties", "repeated")
    assert sum(real["dropped_features"].values()) == sum(raw.defects[defect] for defect in dropped)


def test_extraction_reads_what_was_cut(raw: RawXView, tmp_path: Path) -> None:
    tile(tmp_path, *options(raw, "out", "--size", 128, "--workers", 1))
    listing = list_tiles(open_source(str(tmp_path / "out")))
    wanted = cut_plainly(raw.images, raw.labels, 128, 128, 0.25)
    labelled = sorted(f"images/{name}.png" for name, (_, lines) in wanted.items() if lines is not None)
    assert listing.table.tile.tolist() == labelled
    assert (listing.unlabelled, listing.other) == (len(wanted) - len(labelled), 0)
