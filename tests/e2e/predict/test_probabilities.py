"""What is predicted, against an independent computation."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.cloud import storage
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from extract.ranks.group import join_ranks
from extract.timing import Timing
from tests.e2e.predict.predictions import (
    GRID,
    LEFTS,
    ON_CPU,
    PROBS,
    SAME,
    SIZE,
    TOPS,
    UTM33,
    compute_probs,
    predict,
    read_csv,
    read_lines,
    read_meta,
    read_probs,
    write_raster,
)
from tests.planted import train as run_train
from train.model.classifier import Classifier
from train.predict.inference import Task, score
from train.predict.target import Target
from train.predict.trained_model import open_model


def test_predictions_are_what_an_independent_computation_gives(work: Path) -> None:
    """Random tiles of random sizes, in a directory without images/ and named one by one."""
    paths = sorted((work / "odd").iterdir())
    expected = compute_probs(work, [np.asarray(Image.open(path)) for path in paths])
    meta = read_meta(work)
    assert meta["temperature"] != 1
    for arguments in (["odd"], [path.relative_to(work) for path in paths]):
        done = predict(work, *arguments)
        rows, probs = read_csv(work / "p.csv"), read_probs(work)
        assert [row["tile"] for row in rows] == [f"odd/{path.name}" for path in paths]
        np.testing.assert_allclose(probs, expected, atol=PROBS)
        decided = [[n for n, p, t in zip(meta["class_names"], r, meta["thresholds"], strict=True) if p >= np.float32(t)]
                   for r in probs]  # fmt: skip
        assert [row["preds"].split(";") if row["preds"] else [] for row in rows] == decided
        assert "37 tiles -> p.csv" in done.out
        assert any(decided)


@contextmanager
def moved_away(*paths: Path) -> Iterator[None]:
    for path in paths:
        path.rename(path.with_name(f"{path.name}-gone"))
    try:
        yield
    finally:
        for path in paths:
            path.with_name(f"{path.name}-gone").rename(path)


@pytest.mark.parametrize("run", ["head", "finetune"])
def test_an_export_alone_predicts_what_its_run_does(work: Path, run: str) -> None:
    predict(work, "odd", "scene.tif", *GRID, run=f"runs/{run}")
    expected = read_probs(work)
    with moved_away(*(work / name for name in ("runs", "cache", "half", "checkpoint", "tiles"))):
        predict(work, "odd", "scene.tif", *GRID, run=f"exports/{run}", out="q.csv")
    np.testing.assert_allclose(read_probs(work, "q.csv"), expected, atol=SAME)
    assert [row["preds"] for row in read_csv(work / "q.csv")] == [row["preds"] for row in read_csv(work / "p.csv")]
    assert (work / "q-thresholds.csv").read_bytes() == (work / "p-thresholds.csv").read_bytes()


def test_an_export_of_a_head_reads_vectors_too(work: Path) -> None:
    predict(work, "--cache", "cache")
    predict(work, "--cache", "cache", run="exports/head", out="q.csv")
    assert (work / "q.csv").read_bytes() == (work / "p.csv").read_bytes()


def test_windows_of_a_raster_are_predicted_as_tiles_cut_by_other_means(work: Path) -> None:
    """Cut by NumPy, written and read by Pillow. In a feed worker, as by default."""
    done = predict(work, "scene.tif", *GRID, "--workers", 1)
    assert "scene.tif: a raster of 150 x 200 px, cut into 12 windows of 64 px, stride 48\n" in done.out
    predict(work, "windows", out="q.csv")
    np.testing.assert_allclose(read_probs(work), read_probs(work, "q.csv"), atol=1e-6)
    rows = read_csv(work / "p.csv")
    places = [(row, column) for row in range(4) for column in range(3)]
    assert [row["tile"] for row in rows] == [f"scene.tif#{row}_{column}" for row, column in places]
    assert [[int(row[edge]) for edge in ("left", "top", "right", "bottom")] for row in rows] == [
        [LEFTS[column], TOPS[row], LEFTS[column] + 64, TOPS[row] + 64] for row, column in places
    ]


def test_eight_views_of_a_window_are_those_of_a_tile(work: Path) -> None:
    predict(work, "scene.tif", *GRID, "--tta", "d4", out="p.jsonl")
    predict(work, "windows", "--tta", "d4", out="q.csv")
    lines = read_lines(work / "p.jsonl")
    np.testing.assert_allclose([list(line["probs"].values()) for line in lines], read_probs(work, "q.csv"), atol=1e-6)
    assert {line["tta"] for line in lines} == {row["tta"] for row in read_csv(work / "q.csv")} == {"d4"}


def test_rows_keep_the_order_of_what_was_named(work: Path) -> None:
    predict(work, "odd/05.png", "scene.tif", "odd/01.png", "windows", "odd/00.png", "--window", 200)
    names = [row["tile"] for row in read_csv(work / "p.csv")]
    windows = [f"windows/{row}_{column}.png" for row in range(4) for column in range(3)]
    assert names == ["odd/05.png", "scene.tif#0_0", "odd/01.png", *windows, "odd/00.png"]
    probs = read_probs(work)
    predict(work, "odd")
    np.testing.assert_allclose(probs[[0, 2, -1]], read_probs(work)[[5, 1, 0]], atol=SAME)
    whole = compute_probs(work, [np.asarray(Image.open(work / "scene.tif"))])
    np.testing.assert_allclose(probs[1:2], whole, atol=PROBS)


@pytest.mark.parametrize("folder", ["images/", ""])
def test_a_bucket_with_and_without_images(work: Path, bucket: storage.Bucket, folder: str) -> None:
    for path in sorted((work / "windows").iterdir())[:3]:
        bucket.blob(f"set/{folder}{path.name}").upload_from_filename(str(path))
    bucket.blob("set/notes.txt").upload_from_string("x")
    url = f"gs://{bucket.name}/set"
    done = predict(work, url, "windows/1_0.png")
    rows = [f"{url}/{folder}0_{column}.png" for column in range(3)]
    assert [row["tile"] for row in read_csv(work / "p.csv")] == [*rows, "windows/1_0.png"]
    probs = read_probs(work)
    predict(work, "windows")
    np.testing.assert_allclose(probs, read_probs(work)[:4], atol=SAME)
    assert (f"{url}: 3 tiles; not read: 1 other files" in done.out) == (folder == "")


def test_rows_are_handed_over_before_the_last_tile_is_read(work: Path, tmp_path: Path) -> None:
    """So a tile that goes away meanwhile is missed, and memory holds a batch, not a bucket."""
    for number in range(70):
        shutil.copy(work / "odd" / "00.png", tmp_path / f"{number:02d}.png")
    with join_ranks("cpu") as ranks:
        model = open_model(str(work / "runs" / "head"))
        task = Task.plan(model, Target(None, None, (str(tmp_path),)), ranks, labels=False, tta="one")
        parts = score(task, ranks, Timing(), workers=0)
        first = next(parts)
        (tmp_path / "69.png").unlink()
        rest = [*parts]
    assert [first.first, *(part.first for part in rest)] == [0, 32, 64]
    assert (rest[-1].status == [1, 1, 1, 1, 1, 4]).all()


def test_every_forward_pass_has_one_shape(work: Path) -> None:
    """As in extraction: what is predicted of a tile does not depend on how many come with it."""
    shapes: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, Classifier):
            shapes.append(tuple(arguments[0].shape))

    with register_module_forward_pre_hook(note):
        predict(work, "odd")  # 37 tiles
        predict(work, "windows", "--tta", "d4")
    assert shapes == [(32, 3, SIZE, SIZE)] * 2 + [(12, 3, SIZE, SIZE)] * 8


def test_a_signal_leaves_what_was_there(work: Path, tmp_path: Path) -> None:
    def stop(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, Classifier):
            assert (tmp_path / "p.csv.tmp").exists()
            os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "p.csv").write_text("kept")
    options = ("--run-dir", work / "exports" / "head", "--out", tmp_path / "p.csv", *ON_CPU)
    with register_module_forward_pre_hook(stop):
        done = run_train(tmp_path, "predict", work / "odd", *options)
    assert done.status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: nothing is written\n" in done.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"p.csv": "kept"}


def test_a_tiff_is_a_raster_when_it_is_large_or_a_window_is_given(work: Path, tmp_path: Path) -> None:
    for name, width in (("small", 2048), ("large", 2049)):
        write_raster(tmp_path / f"{name}.tif", np.zeros((20, width, 3), np.uint8), crs="EPSG:32633", transform=UTM33)
    done = predict(work, tmp_path, out=str(tmp_path / "p.csv"))
    note = (
        f"{tmp_path}: 1 tile, 1 of them .tif: --window PIXELS would cut local ones into windows; a raster of 2,049 x 20"
    )
    assert note in done.out
    assert [row["tile"] for row in read_csv(tmp_path / "p.csv")] == [
        f"{tmp_path}/small.tif", *(f"{tmp_path}/large.tif#0_{column}" for column in range(5))
    ]  # fmt: skip
    (tmp_path / "p.csv").unlink()
    done = predict(work, tmp_path, "--window", 1024, out=str(tmp_path / "p.jsonl"))
    assert f"{tmp_path}: 2 rasters, cut into 5 windows of 1024 px, stride 1024; not read: 1 other files" in done.out
    assert [line["window"]["left"] for line in read_lines(tmp_path / "p.jsonl")] == [0, 1024, 1025, 0, 1024]
