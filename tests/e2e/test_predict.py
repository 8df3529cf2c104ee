"""`predict` as a user starts it: on files, directories, buckets and rasters, by runs and exports, to three formats."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from google.cloud import storage
from PIL import Image
from rasterio.transform import Affine
from safetensors.numpy import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModel

from extract.ranks.group import join_ranks
from extract.timing import Timing
from tests.checkpoints import MEAN, STD, make_checkpoint
from tests.planted import Finished, extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train
from train.model.classifier import Classifier
from train.predict.inference import Target, Task, score
from train.predict.inputs import find_inputs
from train.predict.trained_model import open_model

SIZE = 64
PROBS = 1e-4
SAME = 1e-5
DEGREES = 1e-9
ON_CPU = ("--device", "cpu", "--workers", 0)
GRID = ("--window", 64, "--stride", 48)
SCENE = (200, 150)
"""Height and width: 4 x 3 windows of that grid, the last ones moved inward."""
TOPS, LEFTS = (0, 48, 96, 136), (0, 48, 86)
UTM33 = Affine(0.3, 0, 500_123.4, 0, -0.3, 5_000_000)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head on a float32 cache and a run fine-tuned from another on a bf16 one, both exported; odd tiles; a scene."""
    root = tmp_path_factory.mktemp("predict")
    seed = fresh_seed()
    checkpoint = make_checkpoint(root / "checkpoint", seed=seed)
    plant_tiles(root / "tiles", scenes=6, per_scene=5, seed=seed)
    extract_cache(root / "tiles", root / "cache", checkpoint)
    extract_cache(root / "tiles", root / "half", checkpoint, precision="bf16")
    for command, *options in (
        ("head", "--cache", "cache", "--epochs", 3, "--features", "cls+patch_mean"),
        ("head", "--cache", "half", "--epochs", 1, "--run-dir", "runs/half"),
        # Large steps: weights that were rounded must show.
        ("finetune", "--cache", "half", "--head-run", "runs/half", "--unfreeze", 2, "--epochs", 1, "--workers", 0,
         "--backbone-lr", 3e-3),
    ):  # fmt: skip
        done = run_train(root, command, *options, "--device", "cpu")
        assert done.status == 0, done.err
    for run in ("head", "finetune"):
        done = run_train(root, "export", "--run-dir", f"runs/{run}", "--out", f"exports/{run}", "--no-onnx")
        assert done.status == 0, done.err
    rng = np.random.default_rng(seed)
    (root / "odd").mkdir()
    for number in range(37):  # a batch of 32, and one of 5
        height, width = (int(n) for n in rng.integers(30, 120, 2))
        write_image(root / "odd" / f"{number:02d}.png", rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    pixels = rng.integers(0, 256, (*SCENE, 3), dtype=np.uint8)
    write_raster(root / "scene.tif", pixels, crs="EPSG:32633", transform=UTM33)
    (root / "windows").mkdir()
    for row, top in enumerate(TOPS):
        for column, left in enumerate(LEFTS):
            write_image(root / "windows" / f"{row}_{column}.png", pixels[top : top + 64, left : left + 64])
    return root


def write_image(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def write_raster(path: Path, pixels: np.ndarray, **georeferencing: Any) -> Path:
    height, width, bands = pixels.shape
    shape = {"height": height, "width": width, "count": bands, "dtype": pixels.dtype}
    with rasterio.open(path, "w", driver="GTiff", photometric="RGB", **shape, **georeferencing) as raster:
        raster.write(np.moveaxis(pixels, -1, 0))
    return path


def predict(root: Path, *arguments: object, run: str = "runs/head", out: str = "p.csv") -> Finished:
    options = ("--workers", 0) if "--workers" not in arguments else ()
    done = run_train(root, "predict", "--run-dir", run, "--out", out, "--device", "cpu", *options, *arguments)
    assert done.status == 0, done.err
    return done


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_probs(root: Path, name: str = "p.csv") -> np.ndarray:
    rows = read_csv(root / name)
    names = list(rows[0])[-60:]
    return np.array([[float(row[name] or "nan") for name in names] for row in rows])


def read_meta(root: Path, run: str = "head") -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((root / "runs" / run / "best" / "checkpoint.json").read_text())
    return meta


@torch.inference_mode()
def compute_probs(root: Path, images: list[np.ndarray]) -> np.ndarray:
    """(n, 60) by transformers, PyTorch's resizing and NumPy, from the checkpoint's and the run's files alone."""
    tensors = []
    for image in images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        pixels = torch.nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        tensors.append((pixels - mean) / std)
    found = AutoModel.from_pretrained(root / "checkpoint").eval()(torch.cat(tensors))
    inputs = torch.cat([found.pooler_output, found.last_hidden_state[:, 5:].mean(dim=1)], dim=1).numpy().astype(float)
    t = load_file(root / "runs" / "head" / "best" / "model.safetensors")
    hidden = np.maximum(inputs @ t["head.0.weight"].T + t["head.0.bias"], 0)
    logits = hidden @ t["head.3.weight"].T + t["head.3.bias"]
    return 1 / (1 + np.exp(-logits / read_meta(root)["temperature"]))


# What is predicted


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


# What a GeoTIFF is taken for


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


# Formats


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_geojson(path: Path) -> list[dict[str, Any]]:
    """The features, after what RFC 7946 says of them has been checked."""
    collection = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(collection) == {"type", "features"}
    assert collection["type"] == "FeatureCollection"
    for feature in collection["features"]:
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert len(ring) == 5
        assert ring[0] == ring[-1]
        assert all(len(position) == 2 and abs(position[0]) <= 180 and abs(position[1]) <= 90 for position in ring)
        x, y = np.array(ring).T
        assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0  # counter-clockwise: the right-hand rule
        assert isinstance(feature["properties"], dict)
    return list(collection["features"])


def test_the_three_formats_agree(work: Path) -> None:
    for suffix in ("csv", "jsonl", "geojson"):
        predict(work, "scene.tif", *GRID, out=f"p.{suffix}")
    rows, lines, features = read_csv(work / "p.csv"), read_lines(work / "p.jsonl"), read_geojson(work / "p.geojson")
    assert len(rows) == len(lines) == len(features) == 12
    names = read_meta(work)["class_names"]
    for row, line, feature in zip(rows, lines, features, strict=True):
        properties = feature["properties"]
        assert row["tile"] == line["tile"] == properties["tile"] == feature["id"]
        assert row["status"] == line["status"] == properties["status"] == "embedded"
        assert (row["preds"].split(";") if row["preds"] else []) == line["preds"] == properties["preds"]
        assert list(line["probs"]) == names
        for name in names:
            assert float(row[name]) == line["probs"][name] == properties[name]
        for edge in ("left", "top", "right", "bottom"):
            assert int(row[edge]) == line["window"][edge] == properties[edge]
        assert line["ring"] == feature["geometry"]["coordinates"][0]


def unproject_utm33(easting: float, northing: float) -> tuple[float, float]:
    """Longitude and latitude on WGS 84: Krüger's series to the fourth order of the third flattening (1912, as in
    Karney, "Transverse Mercator with an accuracy of a few nanometers", J. Geodesy 2011, equations 35 and 36)."""
    f = 1 / 298.257223563
    n = f / (2 - f)
    radius = 6378137 / (1 + n) * (1 + n**2 / 4 + n**4 / 64)
    beta = (
        n / 2 - 2 * n**2 / 3 + 37 * n**3 / 96 - n**4 / 360,
        n**2 / 48 + n**3 / 15 - 437 * n**4 / 1440,
        17 * n**3 / 480 - 37 * n**4 / 840,
        4397 * n**4 / 161280,
    )
    xi, eta = northing / (0.9996 * radius), (easting - 500000) / (0.9996 * radius)
    xi2 = xi - sum(b * math.sin(2 * j * xi) * math.cosh(2 * j * eta) for j, b in enumerate(beta, start=1))
    eta2 = eta - sum(b * math.cos(2 * j * xi) * math.sinh(2 * j * eta) for j, b in enumerate(beta, start=1))
    conformal = math.sin(xi2) / math.cosh(eta2)
    e = math.sqrt(f * (2 - f))
    latitude = math.asin(conformal)
    for _ in range(10):  # from the conformal latitude, by fixed point
        latitude = math.asin(math.tanh(math.atanh(conformal) + e * math.atanh(e * math.sin(latitude))))
    return 15 + math.degrees(math.atan2(math.sinh(eta2), math.cos(xi2))), math.degrees(latitude)


def assert_rings(features: list[dict[str, Any]], corner: Callable[[int, int], tuple[float, float]]) -> None:
    for feature in features:
        left, top, right, bottom = (feature["properties"][edge] for edge in ("left", "top", "right", "bottom"))
        corners = [corner(left, top), corner(left, bottom), corner(right, bottom), corner(right, top)]
        (ring,) = feature["geometry"]["coordinates"]
        start = min(range(4), key=lambda i: math.dist(ring[i], corners[0]))
        found = [ring[(start + i) % 4] for i in range(4)]
        if math.dist(found[1], corners[3]) < math.dist(found[1], corners[1]):  # rows that run northward
            corners[1:] = corners[:0:-1]
        np.testing.assert_allclose(found, corners, rtol=0, atol=DEGREES)


def test_outlines_in_utm_are_where_the_series_puts_them(work: Path) -> None:
    predict(work, "scene.tif", *GRID, out="p.geojson", run="exports/head")
    features = read_geojson(work / "p.geojson")
    assert len(features) == 12
    assert_rings(features, lambda column, row: unproject_utm33(500_123.4 + 0.3 * column, 5_000_000 - 0.3 * row))


def test_outlines_of_many_windows_are_each_in_their_place(work: Path) -> None:
    (scene,) = find_inputs([str(work / "scene.tif")], 8, None).parts
    described = [*scene.describe(True)]
    assert len(described) == 25 * 19
    for row, (tile, window, ring) in enumerate(described):
        assert window is not None
        assert ring is not None
        assert tile == f"{work / 'scene.tif'}#{row // 19}_{row % 19}"
        upper_left = unproject_utm33(500_123.4 + 0.3 * window.left, 5_000_000 - 0.3 * window.top)
        np.testing.assert_allclose(min(ring, key=lambda place: place[0] - place[1]), upper_left, rtol=0, atol=DEGREES)


def test_outlines_in_degrees_are_linear_in_the_pixels(work: Path, tmp_path: Path) -> None:
    """South of the equator and west of Greenwich, also with rows that run northward."""
    pixels = np.random.default_rng(fresh_seed()).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    for name, step in (("north_up", -2e-5), ("south_up", 2e-5)):
        transform = Affine(1e-5, 0, -70.5, 0, step, -33.25)
        write_raster(tmp_path / f"{name}.tif", pixels, crs="EPSG:4326", transform=transform)
        predict(work, tmp_path / f"{name}.tif", *GRID, out=str(tmp_path / f"{name}.geojson"))
        features = read_geojson(tmp_path / f"{name}.geojson")
        assert len(features) == 6
        assert_rings(features, lambda column, row, step=step: (-70.5 + 1e-5 * column, -33.25 + step * row))  # type: ignore[misc]


def test_a_raster_without_place_has_windows_but_no_outline(work: Path, tmp_path: Path) -> None:
    write_raster(tmp_path / "plain.tif", np.zeros((80, 64, 3), np.uint8))
    predict(work, tmp_path / "plain.tif", *GRID, out=str(tmp_path / "p.jsonl"))
    assert [(line["window"]["top"], line["ring"]) for line in read_lines(tmp_path / "p.jsonl")] == [
        (0, None),
        (16, None),
    ]


def test_the_summary_as_json_is_all_of_stdout(work: Path, tmp_path: Path) -> None:
    shutil.copy(work / "odd" / "00.png", tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((work / "odd" / "01.png").read_bytes()[:-40])
    out = tmp_path / "p.jsonl"
    done = predict(work, tmp_path, "--json", out=str(out))
    summary = json.loads(done.out)
    assert (summary["tiles"], summary["unreadable"]) == (2, 1)
    assert summary["reasons"] == {"cannot be decoded as an image": 1}
    assert (summary["out"], summary["thresholds"]) == (str(out), str(tmp_path / "p-thresholds.csv"))
    good, bad = read_lines(out)
    assert summary["positives"] == {name: int(name in good["preds"]) for name in read_meta(work)["class_names"]}
    assert bad == {
        "tile": f"{tmp_path}/b.png", "status": "undecodable", "reason": "cannot be decoded as an image", "preds": None,
        "probs": None,
    }  # fmt: skip
    assert f"{tmp_path}: 2 tiles" in done.err
    assert summary["tiles_per_s"] > 0


def test_what_cannot_be_read_is_a_row_and_counted(work: Path, tmp_path: Path) -> None:
    """A tile, and the windows that lie on a damaged strip of a raster."""
    pixels = np.random.default_rng(fresh_seed()).integers(0, 256, (128, 64, 3), dtype=np.uint8)
    options = {"crs": "EPSG:32633", "transform": UTM33, "compress": "deflate", "blockysize": 64}
    scene = write_raster(tmp_path / "scene.tif", pixels, **options)
    data = bytearray(scene.read_bytes())
    data[-6000:-5000] = bytes(1000)  # of the second strip
    scene.write_bytes(data)
    (tmp_path / "b.png").write_text("text")
    done = predict(work, tmp_path / "b.png", scene, "--window", 64, out=str(tmp_path / "p.csv"))
    rows = read_csv(tmp_path / "p.csv")
    assert [row["status"] for row in rows] == ["undecodable", "embedded", "undecodable"]
    assert [row["Building"] != "" for row in rows] == [False, True, False]
    assert "2 of them could not be read, see column status: 2 cannot be decoded as an image" in done.out
    assert "b.png: quarantined: cannot be decoded as an image (not a PNG, JPEG or TIFF image)\n" in done.out
    assert "scene.tif#1_0: quarantined: cannot be decoded as an image (" in done.out
    predict(work, scene, "--window", 64, out=str(tmp_path / "p.geojson"))
    properties = read_geojson(tmp_path / "p.geojson")[1]["properties"]
    assert (properties["status"], properties["preds"], properties["Building"]) == ("undecodable", None, None)


def test_a_dash_is_the_default_name(work: Path, tmp_path: Path) -> None:
    done = run_train(
        tmp_path, "predict", "--run-dir", work / "exports" / "head", work / "windows", "--out", "-", *ON_CPU
    )
    assert done.status == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions-thresholds.csv", "predictions.csv"]


# Bad input: one line with a remedy, and what was there before is still there


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[object, ...], str]] = {
    "no file": (lambda here: None, ("none.png",), "no file or directory none.png: check INPUT"),
    "no image": (lambda here: (here / "a.txt").write_text(""), ("a.txt",), "a.txt is no image: PNG, JPEG and TIFF"),
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
    "suffix": (lambda here: None, ("odd", "--out", "p.parquet"), "chooses the format: .csv, .jsonl or .geojson"),
    "out in a bucket": (lambda here: None, ("odd", "--out", "gs://b/p.csv"), "a local file, to be copied to a bucket"),
    "out in a file": (lambda here: (here / "f").write_text(""), ("odd", "--out", "f/p.csv"), "choose another --out"),
    "window": (lambda here: None, ("odd", "--window", 0), "--window 0: choose 1 to 8,192 pixels a side"),
    "gaps": (lambda here: None, ("odd", "--window", 64, "--stride", 65), "--stride 65: choose 1 to the window, 64"),
    "nothing": (lambda here: None, (), "give either --tiles or --cache, or to predict, files and directories"),
    "both": (lambda here: None, ("odd", "--tiles", "odd"), "give either --tiles or --cache"),
    "window of tiles": (lambda here: None, ("--tiles", "odd", "--window", 64), "cut GeoTIFFs that are named"),
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


def test_make_hands_inputs_and_out_over() -> None:
    arguments = ["VENV=", "RUN=export", "INPUT=a.png dir scene.tif", "OUT=p.geojson", "ARGS=--window 512"]
    done = subprocess.run(
        ["make", "--dry-run", "predict", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "-m train predict --run-dir 'export'" in done.stdout
    assert "--window 512 --out 'p.geojson' a.png dir scene.tif\n" in done.stdout
    assert "extract demo" not in done.stdout
