"""The whole way a newcomer goes, by the targets of the Makefile: raw xView, a bucket, a cache, two runs, predictions of
a GeoTIFF, and a report."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from google.cloud import storage

from cache_schema import RawLabels, Taxonomy, open_cache
from tests.planted import train as run_train
from tests.raw_xview import UNLABELLED_SCENE, RawXView, make_raw_xview

PROJECT_ROOT = Path(__file__).parents[2]
SIZE, STRIDE = 128, 120

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path, gcs_server: str) -> Make:
    """`make TARGET VARIABLES` of a checkout in an empty directory, with this very Python; what it printed."""
    for name in ("Makefile", "extract", "train", "cache_schema"):
        (tmp_path / name).symlink_to(PROJECT_ROOT / name)

    # What a make above left there would have this one name the directories it enters.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

    def run(target: str, *variables: str) -> str:
        command = ["make", target, "VENV=", f"PYTHON={sys.executable}", "NPROC=1", *variables]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False, env=env)
        assert done.returncode == 0, f"{target}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    return run


def read_labels(bucket: storage.Bucket, prefix: str) -> dict[str, set[int]]:
    """Type ids on each tile that has a label object."""
    blobs = list(bucket.list_blobs(prefix=f"{prefix}/labels/"))
    return {
        Path(blob.name).stem: {int(line.split()[0]) for line in blob.download_as_text().splitlines()} for blob in blobs
    }


def test_raw_xview_to_a_report(tmp_path: Path, bucket: storage.Bucket, make: Make) -> None:
    raw: RawXView = make_raw_xview(tmp_path / "raw", size=400)
    tiles = f"gs://{bucket.name}/xview/train"

    make(
        "tile", f"IMAGES={raw.images}", f"LABELS={raw.labels}", f"OUT={tiles}", f"ARGS=--size {SIZE} --stride {STRIDE}"
    )
    cut = read_labels(bucket, "xview/train")
    assert {name.split("_")[0] for name in cut} == set(raw.scenes)

    checks = json.loads(make("doctor", f"TILES={tiles}", "BACKBONE=demo", "ARGS=--json"))["checks"]
    assert {check["status"] for check in checks} <= {"ok", "warning"}, checks

    said = make("extract", f"TILES={tiles}", "BACKBONE=demo", "CACHE=cache/tiles")
    assert "tiles/s" in said
    cache = open_cache(str(tmp_path / "cache" / "tiles"))
    table, rows = cache.read_table(), cache.read_rows()
    assert [Path(name).stem for name in table.tile.tolist()] == sorted(cut)
    taxonomy = Taxonomy.xview()
    labels = taxonomy.decode(RawLabels.pack(rows.label_ids), "type").labels
    assert taxonomy.type_ids is not None
    for name, found in zip(table.tile.tolist(), labels, strict=True):
        ids = {taxonomy.type_ids[c] for c in np.flatnonzero(found)}
        assert ids == cut[Path(name).stem] & set(taxonomy.type_ids), name

    make("train-head", "CACHE=cache/tiles", "ARGS=--epochs 20 --label-ids type")
    make("finetune", "CACHE=cache/tiles", "UNFREEZE=1", "ARGS=--epochs 1 --lr 1e-3 --label-ids type")
    metrics = json.loads((tmp_path / "runs" / "head" / "metrics.json").read_text())
    assert metrics["map_macro"] > metrics["baselines"]["label frequency"]["map_macro"]

    scene = raw.images / f"{UNLABELLED_SCENE}.tif"  # nobody has labelled it
    windows = f"--window {SIZE} --stride {STRIDE}"
    make("predict", "RUN=runs/finetune", f"INPUT={scene}", "OUT=windows.geojson", f"ARGS={windows}")
    # A second time by the target's command, without another start.
    again = ("predict", "--run-dir", "runs/finetune", *windows.split(), "--out", "windows.csv", scene)
    predicted = run_train(tmp_path, *again)
    assert predicted.status == 0, predicted.err
    features = json.loads((tmp_path / "windows.geojson").read_text())["features"]
    with (tmp_path / "windows.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    with rasterio.open(scene) as raster:
        across, down = (len(range(0, extent - SIZE, STRIDE)) + 1 for extent in (raster.width, raster.height))
    assert len(features) == len(lines) == across * down
    for feature, line in zip(features, lines, strict=True):
        assert feature["properties"]["tile"] == line["tile"]
        assert feature["properties"]["Building"] == pytest.approx(float(line["Building"]), abs=1e-6)
        assert -180 <= feature["geometry"]["coordinates"][0][0][0] <= 180

    make("report", "RUN=runs/head")
    reported = run_train(tmp_path, "report", "--run-dir", "runs/finetune")
    assert reported.status == 0, reported.err
    for run in ("head", "finetune"):
        page = (tmp_path / "runs" / run / "report.html").read_text()
        figure = json.loads((tmp_path / "runs" / run / "metrics.json").read_text())["f1_weighted"]
        assert f"{figure:.3f}" in page
        assert "data:image/" in page  # of tiles
        assert not re.search(r"""(?:src|href)=["']https?://""", re.sub(r"<a [^>]*>", "", page))
        assert (tmp_path / "runs" / run / "model_card.md").read_text().startswith("---\n")
