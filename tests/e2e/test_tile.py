"""`python -m extract tile`, as its users start it: every tile and every label line against a plain second opinion."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from google.cloud import storage
from PIL import Image

from extract.__main__ import run as extract_command_line
from extract.cutting.output import DirectoryPlace
from extract.tiles.labels import parse_labels
from extract.tiles.listing import list_tiles
from extract.tiles.source import open_source
from tests.planted import Finished, fresh_seed, run_here
from tests.raw_xview import (
    MISSING_SCENE,
    UNKNOWN_ID,
    UNLABELLED_SCENE,
    RawXView,
    make_feature,
    make_raw_xview,
    write_geojson,
    write_geotiff,
)
from tests.tiles import draw_pixels, list_tree

Labels = list[tuple[int, float, float, float, float]]
LEFT_BESIDE = ["tiling/lock", "tiling/unfinished"]


def tile(cwd: Path, *arguments: object) -> Finished:
    return run_here(extract_command_line, cwd, "tile", *arguments)


def options(raw: RawXView, out: object, *more: object) -> tuple[object, ...]:
    return ("--images", raw.images, "--labels", raw.labels, "--out", out, *more)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> RawXView:
    return make_raw_xview(tmp_path_factory.mktemp("raw"), size=300)


# The second opinion: whole scenes through Pillow, boxes as masks of pixels, places found by walking.


def walk(length: int, size: int, stride: int) -> list[int]:
    starts = [0]
    while starts[-1] + size < length:
        starts.append(min(starts[-1] + stride, length - size))
    return starts


def read_boxes(labels: Path) -> dict[str, list[tuple[int, int, int, int, int]]]:
    """Boxes by file name, with whole numbers as coordinates; what is not in order is left out."""
    boxes: dict[str, list[tuple[int, int, int, int, int]]] = {}
    for feature in json.loads(labels.read_text())["features"]:
        try:
            properties = feature["properties"]
            found = boxes.setdefault(properties["image_id"].replace(".tif", ""), [])
            left, top, right, bottom = (int(part) for part in properties["bounds_imcoords"].split(","))
            label_id = properties["type_id"]
            if type(label_id) is not int or label_id < 0 or label_id in (75, 82) or left >= right or top >= bottom:
                continue
            box = (label_id, left, top, right, bottom)
            found += [box] if box not in found else []
        except (TypeError, AttributeError, ValueError, KeyError):
            continue
    return boxes


def cut_plainly(
    images: Path, labels: Path, size: int, stride: int, least: float
) -> dict[str, tuple[npt.NDArray[np.uint8], Labels | None]]:
    """Pixels and label lines of every tile, by its name."""
    boxes = read_boxes(labels)
    tiles = {}
    for path in images.glob("[!.]*.tif"):
        with Image.open(path) as image:
            scene = np.asarray(image.convert("RGB"))
        height, width = scene.shape[:2]
        for row, top in enumerate(walk(height, size, stride)):
            for column, left in enumerate(walk(width, size, stride)):
                pixels = scene[top : top + size, left : left + size]
                lines: Labels | None = None if path.stem not in boxes else []
                for label_id, x0, y0, x1, y1 in boxes.get(path.stem, ()):
                    mask = np.zeros((height, width), bool)
                    mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
                    part = mask[top : top + size, left : left + size]
                    most = min(x1 - x0, part.shape[1]) * min(y1 - y0, part.shape[0])
                    if part.any() and part.sum() / most >= least:
                        ys, xs = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
                        w, h = (xs[-1] + 1 - xs[0]) / part.shape[1], (ys[-1] + 1 - ys[0]) / part.shape[0]
                        lines.append((label_id, xs[0] / part.shape[1] + w / 2, ys[0] / part.shape[0] + h / 2, w, h))
                tiles[f"{path.stem}_{row}_{column}"] = (pixels, lines)
    return tiles


def read_labels(data: bytes) -> Labels:
    assert not parse_labels(data).malformed
    fields = [line.split() for line in data.decode("ascii").splitlines()]
    return [(int(label_id), *map(float, numbers)) for label_id, *numbers in fields]  # type: ignore[misc]


def assert_agrees(out: Path, wanted: dict[str, tuple[npt.NDArray[np.uint8], Labels | None]]) -> None:
    """Names and pixels exactly; label lines in order, to the 6th decimal that is written."""
    assert {path.stem for path in (out / "images").iterdir()} == set(wanted)
    assert {path.stem for path in (out / "labels").iterdir()} == {
        name for name, (_, lines) in wanted.items() if lines is not None
    }
    for name, (pixels, lines) in wanted.items():
        with Image.open(out / "images" / f"{name}.png") as image:
            assert (image.mode, image.format) == ("RGB", "PNG")
            assert np.array_equal(np.asarray(image), pixels), name
        if lines is not None:
            found = read_labels((out / "labels" / f"{name}.txt").read_bytes())
            assert len(found) == len(lines), name
            assert np.allclose(found, lines, rtol=0, atol=1e-6) if lines else found == [], name


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


def digest_tree(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in list_tree(root) if (root / name).is_file()}


def test_a_second_run_cuts_what_has_changed_and_nothing_else(tmp_path: Path) -> None:
    raw = make_raw_xview(tmp_path / "raw", size=200, numbers=(5, 36, 104))
    arguments = options(raw, "out", "--size", 64, "--workers", 1)
    assert "cut 4 scenes" in tile(tmp_path, *arguments).out
    first, out = digest_tree(tmp_path / "out"), tmp_path / "out"
    assert re.search(r"cut 0 scenes .*; 4 existed before", tile(tmp_path, *arguments).out)
    assert digest_tree(out) == first

    (out / "images" / "36_0_1.png").unlink()
    (out / "labels" / "104_2_2.txt").unlink()
    assert "cut 2 scenes" in tile(tmp_path, *arguments).out
    assert digest_tree(out) == first

    # A scene is smaller now, another has other boxes: tiles beyond the new edge must not stay.
    write_geotiff(raw.images / "5.tif", raw.pixels["5"][:70, :100], None, None)
    collection = json.loads(raw.labels.read_text())
    collection["features"].append(make_feature("36.tif", 12, "3,3,60,60"))
    raw.labels.write_text(json.dumps(collection))
    assert "cut 2 scenes" in tile(tmp_path, *arguments).out
    assert_agrees(out, cut_plainly(raw.images, raw.labels, 64, 64, 0.25))
    assert len([name for name in list_tree(out / "tiling" / "done") if name.startswith("5.")]) == 1

    (raw.images / "104.tif").unlink()
    finished = tile(tmp_path, *arguments)
    assert "cut 0 scenes" in finished.out
    assert "1 in out whose file is gone; tiles are kept: 104" in finished.out


def test_a_scene_that_is_cut_again_never_has_labels_without_their_images_nor_a_mark_without_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_raw_xview(tmp_path / "raw", size=200, numbers=(5, 36))
    arguments = options(raw, "out", "--size", 64, "--workers", 1)
    tile(tmp_path, *arguments)
    write_geotiff(raw.images / "5.tif", raw.pixels["5"][:70, :100], None, None)
    seen: list[str] = []
    delete, write = DirectoryPlace.delete, DirectoryPlace.write

    def delete_(place: DirectoryPlace, name: str) -> None:
        delete(place, name)
        seen.append(f"- {name.split('/')[0]}")

    def write_(place: DirectoryPlace, name: str, data: bytes) -> None:
        time.sleep(0.03 * name.startswith("images/"))  # what comes next must wait for it
        write(place, name, data)
        seen.append(f"+ {name.split('/')[0]}")

    monkeypatch.setattr(DirectoryPlace, "delete", delete_)
    monkeypatch.setattr(DirectoryPlace, "write", write_)
    assert "cut 1 scenes" in tile(tmp_path, *arguments).out
    steps = [step for step, _ in groupby(seen)]
    assert steps == ["- tiling", "- labels", "- images", "+ images", "+ labels", "+ tiling"]
    assert Counter(seen)["+ images"] == Counter(seen)["+ labels"] == 4


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


def test_a_damaged_scene_is_named_and_the_others_are_cut(tmp_path: Path) -> None:
    raw = make_raw_xview(tmp_path / "raw", size=200, numbers=(5, 36, 104))
    write_geotiff(raw.images / "36.tif", raw.pixels["36"], None, None, compress="deflate", blockysize=20)
    whole = (raw.images / "36.tif").read_bytes()
    (raw.images / "36.tif").write_bytes(whole[: len(whole) // 2])  # seen only when its pixels are read
    (raw.images / "104.tif").write_bytes(b"II*\0 no raster")
    finished = tile(tmp_path, *options(raw, "out", "--size", 64))
    assert finished.status == 1
    assert "2 of 4 scenes cannot be read: replace or remove them" in finished.errors[0]
    assert re.search(r"^  104: .*104\.tif cannot be opened as a GeoTIFF", finished.out, re.M)
    assert re.search(r"^  36: .*36\.tif is damaged at rows", finished.out, re.M)
    assert {name.split("_")[0] for name in os.listdir(tmp_path / "out" / "labels")} == {"5"}

    (raw.images / "36.tif").write_bytes(whole)
    (raw.images / "104.tif").unlink()
    assert tile(tmp_path, *options(raw, "out", "--size", 64)).status == 0
    assert_agrees(tmp_path / "out", cut_plainly(raw.images, raw.labels, 64, 64, 0.25))


@pytest.fixture
def slow_raw(tmp_path: Path) -> RawXView:
    """Twelve scenes with enough tiles that a signal arrives in the middle."""
    return make_raw_xview(tmp_path / "raw", size=256, numbers=tuple(range(10, 22)))


def start(
    arguments: tuple[object, ...], cwd: Path, env: dict[str, str], *, quickly: bool = False
) -> subprocess.Popen[str]:
    """The command as a process group of its own. Quickly: processes of its pool then need not import the command line,
    and with it torch."""
    how = ["-c", "from extract.__main__ import run; run()"] if quickly else ["-m", "extract"]
    command = [sys.executable, *how, "tile", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **pipes)  # type: ignore[call-overload]


def wait_for_marks(out: Path, number: int) -> None:
    for _ in range(3000):
        if (out / "tiling" / "done").is_dir() and len(os.listdir(out / "tiling" / "done")) >= number:
            return
        time.sleep(0.005)
    raise AssertionError("it got nowhere")


def find_processes(out: Path) -> list[int]:
    """Processes that work in the directory that holds the place."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "cwd") == str(out.parent):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for_end(out: Path) -> None:
    """No process of a pool outlives the one that began it."""
    for _ in range(1000):
        if not find_processes(out):
            return
        time.sleep(0.01)
    raise AssertionError("there are processes left")


def test_a_stopped_tiling_leaves_no_half_scene_and_goes_on(
    slow_raw: RawXView, tmp_path: Path, python_env: dict[str, str]
) -> None:
    """Killed, told to stop, interrupted as from a terminal, each time some scenes further; then left alone. While one
    runs, another is refused."""
    arguments, out = options(slow_raw, "out", "--size", 32, "--workers", 2), tmp_path / "out"
    wanted = cut_plainly(slow_raw.images, slow_raw.labels, 32, 32, 0.25)
    marked: set[str] = set()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(arguments, tmp_path, python_env, quickly=number != signal.SIGINT)
        wait_for_marks(out, len(marked) + 1)
        if number == signal.SIGKILL:
            (line,) = tile(tmp_path, *arguments).errors
            assert "another process cuts tiles into out: wait for it" in line
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        wait_for_end(out)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number
            assert re.search(rf"stopped by {number.name}: \d+ scenes are finished", errors)
            assert "Traceback" not in errors
            assert not os.listdir(out / "tiling" / "unfinished")
        before, marked = marked, {name.split(".")[0] for name in os.listdir(out / "tiling" / "done")}
        assert before < marked
        images, labels = (set(os.listdir(out / folder)) for folder in ("images", "labels"))
        for name in wanted:
            scene = name.split("_")[0]
            # A scene that has one label has all its images; one that has its mark has everything.
            if scene in marked:
                assert f"{name}.png" in images
                assert f"{name}.txt" in labels or scene == UNLABELLED_SCENE
            if f"{name}.txt" in labels:
                assert {f"{other}.png" for other in wanted if other.startswith(f"{scene}_")} <= images
    assert len(marked) < 13
    assert re.search(rf"; {len(marked)} existed before", tile(tmp_path, *arguments).out)
    assert_agrees(out, wanted)
    assert not os.listdir(out / "tiling" / "unfinished")


def test_a_process_that_cuts_loads_no_torch(python_env: dict[str, str]) -> None:
    """It would cost each of them more seconds than a small scene."""
    code = "import sys, extract.cutting.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=python_env, check=False).returncode == 0


def test_a_bucket_gets_the_same_objects(raw: RawXView, tmp_path: Path, bucket: storage.Bucket) -> None:
    place = f"gs://{bucket.name}/xview/train"
    arguments = options(raw, place, "--size", 128, "--workers", 2)
    finished = tile(tmp_path, *arguments)
    assert finished.status == 0, finished.err
    tile(tmp_path, *options(raw, "out", "--size", 128, "--workers", 1))
    here = {name: data for name, data in digest_tree(tmp_path / "out").items() if name not in LEFT_BESIDE}
    there = {blob.name.removeprefix("xview/train/"): blob for blob in bucket.list_blobs()}
    assert set(there) == set(here)
    assert all(there[name].download_as_bytes() == here[name] for name in list(here)[::7])
    assert all(there[name].crc32c for name in there)
    assert re.search(r"cut 0 scenes .*; 9 existed before", tile(tmp_path, *arguments).out)
    bucket.blob("xview/train/labels/5_0_0.txt").delete()
    assert "cut 1 scenes" in tile(tmp_path, *arguments).out
    assert bucket.blob("xview/train/labels/5_0_0.txt").exists()
    (line,) = tile(tmp_path, *options(raw, place, "--size", 64)).errors
    assert "was cut with other settings" in line


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
        ((*images, *labels, *out, "--min-visibility", 1.5), "--min-visibility 1.5: a share between 0 and 1"),
        ((*images, *labels, *out, "--workers", 0), "--workers 0: choose 1"),
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


def test_make_tile(raw: RawXView, tmp_path: Path) -> None:
    shown = subprocess.run(
        ["make", "-n", "tile", "IMAGES=a dir", "LABELS=b", "OUT=gs://c/d", "ARGS=--dry-run", "VENV="],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "-m extract tile --images 'a dir' --labels 'b' --out 'gs://c/d' --dry-run" in shown
