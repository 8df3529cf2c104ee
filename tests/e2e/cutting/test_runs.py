"""A tiling that is repeated, damaged or stopped, and one into a bucket."""

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

import pytest
from google.cloud import storage

from cache_schema.storage.objects import DirectoryObjects
from tests.e2e.cutting.cutting import LEFT_BESIDE, assert_agrees, cut_plainly, digest_tree, options, tile
from tests.raw_xview import (
    UNLABELLED_SCENE,
    RawXView,
    make_feature,
    make_raw_xview,
    write_geotiff,
)
from tests.tiles import list_tree


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
    delete, write = DirectoryObjects.delete, DirectoryObjects.write

    def delete_(place: DirectoryObjects, name: str) -> None:
        delete(place, name)
        seen.append(f"- {name.split('/')[0]}")

    def write_(place: DirectoryObjects, name: str, data: bytes) -> None:
        time.sleep(0.03 * name.startswith("images/"))  # what comes next must wait for it
        write(place, name, data)
        seen.append(f"+ {name.split('/')[0]}")

    monkeypatch.setattr(DirectoryObjects, "delete", delete_)
    monkeypatch.setattr(DirectoryObjects, "write", write_)
    assert "cut 1 scenes" in tile(tmp_path, *arguments).out
    steps = [step for step, _ in groupby(seen)]
    assert steps == ["- tiling", "- labels", "- images", "+ images", "+ labels", "+ tiling"]
    assert Counter(seen)["+ images"] == Counter(seen)["+ labels"] == 4


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
    code = "import sys, extract.cutting.workers; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=python_env, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


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


def test_make_tile(raw: RawXView, tmp_path: Path) -> None:
    shown = subprocess.run(
        ["make", "-n", "tile", "IMAGES=a dir", "LABELS=b", "OUT=gs://c/d", "ARGS=--dry-run", "VENV="],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "-m extract tile --images 'a dir' --labels 'b' --out 'gs://c/d' --dry-run" in shown
