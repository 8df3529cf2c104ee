"""Bad input: one line with a remedy, and what was there before is still there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.predict.predictions import ON_CPU, write_image, write_raster
from tests.planted import train as run_train


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[object, ...], str]] = {
    "no file": (lambda here: None, ("none.png",), "no file or directory none.png: check INPUT"),
    "no image": (lambda here: (here / "a.txt").write_text(""), ("a.txt",), "a.txt is not a PNG, JPEG or TIFF image"),
    "text as image": (
        lambda here: (here / "a.png").write_text("x"),
        ("a.png",),
        "none of 1 tiles could be read, so nothing is written (a.png cannot be decoded as an image (not a PNG",
    ),
    "empty directory": (lambda here: (here / "d").mkdir(), ("d",), "no PNG, JPEG or TIFF images in d"),
    "no raster": (lambda here: (here / "a.tif").write_text("x"), ("a.tif", "--window", 64), "opened as a GeoTIFF"),
    "no place": (
        lambda here: write_raster(here / "a.tif", np.zeros((70, 70, 3), np.uint8)),
        ("a.tif", "--window", 64, "--out", "p.geojson"),
        "a.tif#0_0 is of a raster without coordinate reference system: write .csv or .jsonl instead of p.geojson",
    ),
    "tile to GeoJSON": (
        lambda here: write_image(here / "a.png", np.zeros((9, 9, 3), np.uint8)),
        ("a.png", "--out", "p.geojson"),
        "a.png is a tile, which has no outline: cut GeoTIFFs with --window PIXELS, or write .csv or .jsonl",
    ),
    "16 bits": (
        lambda here: write_raster(here / "a.tif", np.zeros((70, 70, 3), np.uint16)),
        ("a.tif", "--window", 64),
        "gdal_translate -ot Byte",
    ),
    "suffix": (lambda here: None, ("odd", "--out", "p.parquet"), "the suffix must be .csv, .jsonl or .geojson"),
    "out in a bucket": (lambda here: None, ("odd", "--out", "gs://b/p.csv"), "a local file; copy it to a bucket"),
    "out in a file": (lambda here: (here / "f").write_text(""), ("odd", "--out", "f/p.csv"), "choose another --out"),
    "window": (lambda here: None, ("odd", "--window", 0), "--window 0: choose 1 to 8,192 pixels a side"),
    "gaps": (lambda here: None, ("odd", "--window", 64, "--stride", 65), "--stride 65: choose 1 to the window, 64"),
    "nothing": (lambda here: None, (), "give either --tiles or --cache, or for predict files and directories"),
    "both": (lambda here: None, ("odd", "--tiles", "odd"), "give either --tiles or --cache"),
    "window of tiles": (lambda here: None, ("--tiles", "odd", "--window", 64), "apply to GeoTIFFs given as INPUT"),
    "a checkpoint": (
        lambda here: None,
        ("odd", "--run-dir", "checkpoint"),
        "checkpoint is neither a run nor an export",
    ),
    "a directory": (lambda here: None, ("odd", "--run-dir", "odd"), "odd is neither a run nor an export of one"),
    "no run": (lambda here: None, ("odd", "--run-dir", "none"), "no run at none: train one first"),
    "damaged weights": (
        lambda here: damage(here / "export" / "model.safetensors"),
        ("odd", "--run-dir", "export"),
        "export/model.safetensors does not match its sha256: it is damaged: copy the export again",
    ),
    "damaged head": (
        lambda here: damage(here / "export" / "head.json"),
        ("odd", "--run-dir", "export"),
        "export/head.json does not match its sha256",
    ),
    "part of an export": (
        lambda here: (here / "export" / "head.safetensors").unlink(),
        ("odd", "--run-dir", "export"),
        "export cannot be read as an export (FileNotFoundError",
    ),
}


@pytest.mark.parametrize("spoil, arguments, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(
    work: Path, tmp_path: Path, spoil: Callable[[Path], object], arguments: tuple[object, ...], message: str
) -> None:
    for name in ("odd", "checkpoint"):
        (tmp_path / name).symlink_to(work / name)
    shutil.copytree(work / "exports" / "finetune", tmp_path / "export")
    (tmp_path / "p.csv").write_text("kept")
    spoil(tmp_path)
    before = sorted(tmp_path.iterdir())
    run = () if "--run-dir" in arguments else ("--run-dir", work / "exports" / "head")
    out = () if "--out" in arguments else ("--out", "p.csv")
    done = run_train(tmp_path, "predict", *arguments, *run, *out, *ON_CPU)
    assert (done.status, len(done.errors)) == (1, 1), done.err
    assert message in done.errors[0]
    assert "Traceback" not in done.out + done.err
    assert (tmp_path / "p.csv").read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == before
