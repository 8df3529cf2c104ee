"""A cache of format version 1, as it was written once, must keep opening with the same values."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache_schema import CacheRoot, Provenance, Recorded, open_cache
from cache_schema.upkeep.verify import verify_version
from tests.caches import fill_cache
from tests.golden.plain_reader import read_cache

V1 = Path(__file__).parent / "v1"
VERSION = "75c05b08f714bdc49c57"
COMMIT = "2f3ec44414dfd70b91c0cbe22ba3ab03f98b937e8733c57ebf347b8778ad4e77"
SEAL = "a5f4a77dc3b87e5c7867184821fccf1cddf6bedf3734d8ba8e2180f09a0473c6"
IDENTITY = "b1fe8de435b3c5c96b4808569e7fe8314bed316ef78e0dbf2470d55e89c6eea0"

TILES = [
    "images/1052_0_0.png",
    "images/1052_0_1.png",
    "images/1052_1_0.png",
    "images/1052_1_1.png",
    "images/2210_0_0.tif",
    "images/2210_0_1.tif",
    "images/Zürich_0_0.jpg",
    "images/sub/7_0_0.png",
    "images/İzmir 東_0_0.png",
    "images/🛰_0_0.png",
]
COLUMNS = {
    "size": [300001, 300002, 0, 300004, 2147483653, 300006, 300007, 300008, 300009, 300010],
    "crc32c": [1, 2147483648, 0, 4294967295, 5, 6, 7, 8, 9, 10],
    "generation": list(range(1700000000000001, 1700000000000011)),
    "label_size": [120, 0, 35, -1, 35, 70, 2147483655, 35, -1, 4000000],
    "label_crc32c": [11, 0, 13, 0, 15, 16, 4294967290, 18, 0, 20],
}
STATUS = [1, 1, 2, 1, 1, 1, 1, 4, 1, 1]
NAN = float("nan")
CLS = [
    [-2.0, -1.875, -1.75, -1.625],
    [-1.0, -0.875, -0.75, -0.625],
    [NAN, NAN, NAN, NAN],
    [1.0, 1.125, 1.25, 1.375],
    [65504.0, -65504.0, 2**-24, -0.0],
    [3.0, 3.125, 3.25, 3.375],
    [4.0, 4.125, 4.25, 4.375],
    [NAN, NAN, NAN, NAN],
    [6.0, 6.125, 6.25, 6.375],
    [7.0, 7.125, 7.25, 7.375],
]
PATCH_MEAN = [
    [0.0, 1.0, 2.0, 3.0],
    [-0.25, 0.75, 1.75, 2.75],
    [NAN, NAN, NAN, NAN],
    [-0.75, 0.25, 1.25, 2.25],
    [-1.0, 0.0, 1.0, 2.0],
    [-1.25, -0.25, 0.75, 1.75],
    [-1.5, -0.5, 0.5, 1.5],
    [NAN, NAN, NAN, NAN],
    [-2.0, -1.0, 0.0, 1.0],
    [-2.25, -1.25, -0.25, 0.75],
]
LABEL_IDS = {
    (0, 18): 3,
    (0, 73): 1,
    (4, 75): 1,
    (5, 11): 2,
    (6, 18): 65535,
    (6, 127): 4,
    (7, 94): 1,
    (9, 0): 65535,
    (9, 126): 1,
}
PROVENANCE = {
    "weights_sha256": "5f" * 32,
    "depth": 2,
    "width": 4,
    "image_size": 32,
    "mean": [0.43, 0.411, 0.296],
    "std": [0.213, 0.156, 1.0],
    "resampling": "bilinear-antialias",
    "pooling": ["cls", "patch_mean"],
    "precision": "float32",
}
RECORDED = {
    "backbone": "golden",
    "tiles": "gs://bucket/tiles",
    "identity": "crc32c",
    "batch_size": 4,
    "attention": "sdpa",
    "hardware": "CPU x86_64",
    "libraries": {"numpy": "2.4.6", "zarr": "3.1.6"},
}


def assert_golden_values(cls: Any, patch_mean: Any, label_ids: Any, status: Any) -> None:
    np.testing.assert_array_equal(cls, np.array(CLS, np.float16), strict=True)
    np.testing.assert_array_equal(patch_mean, np.array(PATCH_MEAN, np.float16), strict=True)
    assert np.signbit(cls[4, 3]), "-0.0"
    assert {tuple(place): int(label_ids[tuple(place)]) for place in np.argwhere(label_ids).tolist()} == LABEL_IDS
    assert (label_ids.shape, label_ids.dtype) == ((10, 128), np.uint16)
    assert status.tolist() == STATUS


def test_cache_schema_opens_it() -> None:
    version = open_cache(str(V1))

    assert version.id == VERSION
    assert version.sealed
    assert version.provenance == Provenance.from_json(PROVENANCE)
    assert version.recorded == Recorded.from_json(RECORDED)
    assert verify_version(version).lines == ()
    rows = version.read_rows()
    assert_golden_values(rows.pooled["cls"], rows.pooled["patch_mean"], rows.label_ids, rows.status)
    assert rows.embedded.tolist() == [status == 1 for status in STATUS]
    table = version.read_table()
    assert table.tile.tolist() == TILES
    assert {name: getattr(table, name).tolist() for name in COLUMNS} == COLUMNS
    assert table.labelled.tolist() == [size != -1 for size in COLUMNS["label_size"]]
    assert table.identity_digest().hex() == IDENTITY
    assert version.provenance.version_id(bytes.fromhex(IDENTITY)) == VERSION


def test_a_reader_written_from_the_text_agrees() -> None:
    cache = read_cache(V1)

    assert cache.version == VERSION
    assert cache.attributes["provenance"] == PROVENANCE
    assert cache.attributes["recorded"] == RECORDED
    assert [commit.hex() for commit in cache.commits] == [COMMIT]
    assert cache.arrays["seal"].tobytes().hex() == SEAL
    assert cache.valid == [status == 1 for status in STATUS]
    assert cache.arrays["tile"] == TILES
    assert {name: cache.arrays[name].tolist() for name in COLUMNS} == COLUMNS
    assert_golden_values(*(cache.arrays[name] for name in ("cls", "patch_mean", "label_ids", "status")))


def test_zarr_alone_reads_it() -> None:
    group: Any = zarr.open_group(V1 / f"{VERSION}.zarr", mode="r")

    assert_golden_values(*(group[name][:] for name in ("cls", "patch_mean", "label_ids", "status")))
    assert group["tile"][:].tolist() == TILES
    assert group["commit"][0].tobytes().hex() == COMMIT
    assert group["seal"][:].tobytes().hex() == SEAL


@pytest.mark.parametrize("rows", [1, 256, 300, 800])
def test_the_text_holds_for_what_is_written_today(tmp_path: Path, rows: int) -> None:
    version = fill_cache(str(tmp_path), rows, mean=(0, 0.5, 1e-5), resampling="bikubisch-größer")
    plain, rows_read = read_cache(tmp_path), open_cache(str(tmp_path)).read_rows()

    assert plain.version == version
    assert plain.valid == rows_read.embedded.tolist()
    for name in ("cls", "patch_mean"):
        assert plain.arrays[name].tobytes() == rows_read.pooled[name].tobytes()
    assert plain.arrays["label_ids"].tobytes() == rows_read.label_ids.tobytes()


def test_rewriting_the_golden_table_gives_the_same_id(tmp_path: Path) -> None:
    """Today's writer, given the golden tiles and provenance, finds the golden version instead of making another."""
    shutil.copytree(V1, tmp_path / "cache")
    cache = open_cache(str(tmp_path / "cache"))
    root = CacheRoot(str(tmp_path / "cache"))

    found = root.create_version(cache.read_table(), cache.provenance, cache.recorded)
    assert found.id == VERSION
    assert found.sealed
    assert root.versions() == [VERSION]
