"""The page's arithmetic against real caches, on disk and in a bucket, and the page against the arithmetic."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from google.cloud import storage
from hypothesis import given
from hypothesis import strategies as st
from transformers import DINOv3ViTConfig

from cache_schema import CacheRoot
from cache_schema.layout import DIGEST_BYTES, TABLE_CHUNK_ROWS
from cache_schema.root import create_arrays
from cache_schema.storage.gcs import GcsObjects
from cache_schema.table import COLUMN_DTYPES
from extract.backbone.checkpoint import count_flop
from tests.benchmarks import arithmetic, scale_page
from tests.benchmarks.arithmetic import ONE_REQUEST_BYTES, Cache, Ramp, Requests, write_s
from tests.caches import WIDTH, make_provenance, make_recorded, make_table, make_values
from tests.proxy import Proxy


def describe_cache(rows: int) -> Cache:
    """What the arithmetic says of a test's cache."""
    names = sum(len(name.encode()) for name in make_table(rows).tile)
    return Cache(rows, WIDTH, len(make_provenance().pooling), names)


def fill_cache(url: str, rows: int) -> Cache:
    """Create, plan, write, recheck and seal a version, as `extract/run.py` has rank 0 do."""
    root = CacheRoot(url)
    version = root.create_version(make_table(rows), make_provenance(), make_recorded())
    version.committed()
    for block in range(version.layout.blocks):
        version.write_block(block, make_values(version.layout, block))
    assert version.read_status().all()
    version.seal()
    root.set_current(version.id)
    return describe_cache(rows)


def list_files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("rows", [255, 1_300])
def test_a_cache_on_disk_has_the_objects_and_bytes_that_the_page_counts(tmp_path: Path, rows: int) -> None:
    cache = fill_cache(str(tmp_path), rows)
    files = list_files(tmp_path)
    chunks = [path for path in files if path.name != "zarr.json" and path.name != "current"]
    assert len(files) == cache.objects
    assert len(chunks) == cache.chunks
    assert sum(path.stat().st_size for path in chunks) == cache.bytes


def test_a_table_of_several_chunks_has_the_objects_and_bytes_that_the_page_counts(tmp_path: Path) -> None:
    cache = describe_cache(TABLE_CHUNK_ROWS + 1)
    store = CacheRoot(str(tmp_path)).store
    create_arrays(store, "v.zarr", make_table(cache.rows), make_provenance(), make_recorded())
    chunks = [path for path in list_files(tmp_path / "v.zarr") if path.name != "zarr.json"]
    of_blocks = cache.blocks * (cache.block_rows * cache.bytes_a_row + DIGEST_BYTES + 4 * cache.chunks_a_block)
    seal = DIGEST_BYTES + 4
    # Creation writes the table alone.
    assert len(chunks) == 2 * (1 + len(COLUMN_DTYPES)) == cache.chunks - cache.blocks * cache.chunks_a_block - 1
    assert sum(path.stat().st_size for path in chunks) == cache.bytes - of_blocks - seal


def test_a_bucket_is_asked_as_often_as_the_page_counts(bucket: storage.Bucket, proxy: Proxy) -> None:
    reads, writes, table_reads, expected = [], [], [], []
    for rows in (200, 900):
        proxy.asked.clear()
        expected.append(Requests.of(fill_cache(f"gs://{bucket.name}/{rows}", rows)))
        paths = [unquote(urlsplit(path).path) for path in proxy.asked]
        reads.append(sum(path.startswith("/download/") for path in paths))
        writes.append(sum(path.startswith("/upload/") for path in paths))
        table_reads.append(sum(path.startswith("/download/") and "/crc32c/c/" in path for path in paths))
    # What a version costs whatever its size drops out of the difference.
    small, large = expected
    assert reads[1] - reads[0] == large.cache_reads - small.cache_reads
    assert writes[1] - writes[0] == large.cache_writes - small.cache_writes
    # Of rank 0's three, the one that plans its blocks is not in `fill_cache`.
    assert table_reads == [2, 2]


def test_an_object_above_8_mib_takes_a_second_request(bucket: storage.Bucket, proxy: Proxy) -> None:
    objects = GcsObjects(f"gs://{bucket.name}")
    for size in (ONE_REQUEST_BYTES, ONE_REQUEST_BYTES + 1):
        objects.write(str(size), bytes(size))
    # The second one of the larger object goes where the first was told to send it.
    asked = [parse_qs(urlsplit(path).query) for path in proxy.asked if path.startswith("/upload/")]
    assert [query["uploadType"] for query in asked] == [["multipart"], ["resumable"]]


def test_a_block_takes_a_round_trip_for_its_chunks_and_one_for_its_commit() -> None:
    assert write_s(ONE_REQUEST_BYTES, 0.05, 1e8) == pytest.approx(2 * 0.05 + 0.08388608)
    assert write_s(ONE_REQUEST_BYTES + 1, 0.05, 1e8) == pytest.approx(3 * 0.05 + 0.08388609)


def test_the_larger_block_starts_above_a_million_rows() -> None:
    assert [Cache(rows).block_rows for rows in (1_000_000, 1_000_001)] == [256, 4096]
    assert [Cache(rows).blocks for rows in (1_000_000, 1_000_001)] == [3907, 245]


def test_the_page_holds_the_tables_that_the_code_makes() -> None:
    text = scale_page.PAGE.read_text()
    assert scale_page.fill_page(text) == text, "run python -m tests.benchmarks.scale_page"
    for table in scale_page.make_tables().values():
        assert table in text


def test_a_page_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        scale_page.fill_page("# Scale\n")


def test_a_ramp_doubles_after_each_period() -> None:
    ramp = Ramp(5000, 1200)
    assert [ramp.count(t) for t in (0, 1, 1200, 1201, 2400)] == [0, 5000, 6e6, 6e6 + 1e4, 18e6]
    assert [ramp.time(n) for n in (0, 5000, 6e6, 6e6 + 1e4, 18e6)] == [0, 1, 1200, 1201, 2400]
    assert Ramp(10, float("inf")).time(1e6) == 1e5
    assert Ramp(10, float("inf")).count(1e5) == 1e6


@given(st.floats(1, 1e4), st.floats(1, 1e4), st.floats(0, 1e9))
def test_a_ramp_is_inverted(per_s: float, doubling_s: float, requests: float) -> None:
    ramp = Ramp(per_s, doubling_s)
    assert ramp.count(ramp.time(requests)) == pytest.approx(requests, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", arithmetic.TILE_FLOP)
def test_operations_of_a_tile_are_those_of_the_architecture(name: str) -> None:
    model, size = name.split(" at ")
    shape = SHAPES[model] | {"num_register_tokens": 4, "patch_size": 16}
    assert arithmetic.TILE_FLOP[name] == pytest.approx(
        count_flop(DINOv3ViTConfig(**shape).to_dict(), int(size)), rel=0.01
    )


SHAPES: dict[str, dict[str, Any]] = {
    "vitl16": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vit7b16": {
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "use_gated_mlp": True,
    },
}


def test_hours_follow_from_the_measured_product() -> None:
    # At its full product an H100 gives vitl16 at 224 some 6,350 tiles/s and no more.
    assert arithmetic.tiles_per_s("vitl16 at 224") / arithmetic.EFFICIENCY == pytest.approx(6_358, rel=1e-3)
    hours = 1e9 * 727e9 / (0.8 * 798e12) / 3600
    assert arithmetic.gpu_hours(1_000_000_000, "vitl16 at 512") == pytest.approx(hours)
