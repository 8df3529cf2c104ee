"""CSV, JSON lines and GeoJSON agree, and outlines lie where the raster does."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rasterio.transform import Affine

from tests.e2e.predict.predictions import (
    DEGREES,
    GRID,
    ON_CPU,
    UTM33,
    predict,
    read_csv,
    read_lines,
    read_meta,
    write_raster,
)
from tests.planted import fresh_seed
from tests.planted import train as run_train
from train.predict.inputs import find_inputs


def read_geojson(path: Path) -> list[dict[str, Any]]:
    """The features, after a check of what RFC 7946 requires."""
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


def test_make_hands_inputs_and_out_over() -> None:
    arguments = ["VENV=", "RUN=export", "INPUT=a.png dir scene.tif", "OUT=p.geojson", "ARGS=--window 512"]
    done = subprocess.run(
        ["make", "--dry-run", "predict", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert "-m train predict --run-dir 'export'" in done.stdout
    assert "--window 512 --out 'p.geojson' a.png dir scene.tif\n" in done.stdout
    assert "extract demo" not in done.stdout
