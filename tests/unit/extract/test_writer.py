"""Batches to blocks in a real cache on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_schema import (
    LABEL_ID_COLUMNS,
    BlockValues,
    CacheRoot,
    IntegrityError,
    Provenance,
    Recorded,
    Status,
    StorageError,
    TileTable,
    Version,
)
from extract.tiles.batch import TileBatch
from extract.writer import BlockWriter
from tests.planted import fresh_seed

ROWS, WIDTH, BATCH = 600, 8, 96


@pytest.fixture
def version(tmp_path: Path) -> Version:
    zeros = np.zeros(ROWS, np.int64)
    table = TileTable(
        tile=np.array([f"images/{i:04d}.png" for i in range(ROWS)], np.dtypes.StringDType()),
        size=zeros,
        crc32c=zeros.astype(np.uint32),
        generation=zeros,
        label_size=zeros,
        label_crc32c=zeros.astype(np.uint32),
    )
    provenance = Provenance("0" * 64, 1, WIDTH, 64, (0.0,) * 3, (1.0,) * 3, "none", ("cls", "patch_mean"), "float32")
    recorded = Recorded("test", "tiles", "mtime", BATCH, "none", "none", {})
    return CacheRoot(str(tmp_path / "cache")).create_version(table, provenance, recorded)


@pytest.fixture
def vectors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(fresh_seed())
    return {name: rng.normal(size=(ROWS, WIDTH)).astype(np.float16) for name in ("cls", "patch_mean")}


def make_batch(rows: range) -> TileBatch:
    label_ids = np.zeros((len(rows), LABEL_ID_COLUMNS), "<u2")
    label_ids[np.arange(len(rows)), np.array(rows) % LABEL_ID_COLUMNS] = 1
    status = np.full(len(rows), Status.EMBEDDED, np.uint8)
    return TileBatch(np.array(rows), [], status, label_ids, 0, (), 0.0, 0.0)


def batches_of(version: Version, blocks: list[int]) -> list[range]:
    slices = [version.layout.block_slice(block) for block in blocks]
    return [range(i, min(i + BATCH, rows.stop)) for rows in slices for i in range(rows.start, rows.stop, BATCH)]


def add(writer: BlockWriter, version: Version, vectors: dict[str, np.ndarray], rows: range) -> None:
    """One batch; the first of a block begins it."""
    block, offset = divmod(rows.start, version.layout.block_rows)
    if offset == 0:
        where = version.layout.block_slice(block)
        writer.begin(block, BlockValues.make_blank(version.layout, where.stop - where.start))
    part = {name: torch.from_numpy(values[rows.start : rows.stop]) for name, values in vectors.items()}
    writer.add(make_batch(rows), part)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_blocks_in_any_order(version: Version, vectors: dict[str, np.ndarray], order: list[int]) -> None:
    with BlockWriter(version) as writer:
        for rows in batches_of(version, order):
            add(writer, version, vectors, rows)
    assert version.committed().tolist() == [True] * 3
    stored = version.read_rows()
    assert stored.embedded.all()
    for name, values in vectors.items():
        np.testing.assert_array_equal(stored.pooled[name], values)
    np.testing.assert_array_equal(stored.label_ids.argmax(axis=1), np.arange(ROWS) % LABEL_ID_COLUMNS)
    assert (stored.label_ids.sum(axis=1) == 1).all()


def test_incomplete_block_stays_pending(version: Version, vectors: dict[str, np.ndarray]) -> None:
    with BlockWriter(version) as writer:
        for rows in batches_of(version, [1, 0])[:-1]:
            add(writer, version, vectors, rows)
    assert version.committed().tolist() == [False, True, False]


def test_block_in_writing_is_finished_when_the_run_fails(version: Version, vectors: dict[str, np.ndarray]) -> None:
    with pytest.raises(KeyError, match="something else"), BlockWriter(version) as writer:
        for rows in batches_of(version, [0]):
            add(writer, version, vectors, rows)
        raise KeyError("something else")
    assert version.committed().tolist() == [True, False, False]
    assert version.check_block(0) is None


@pytest.mark.parametrize("blocks", [[0], [0, 1]], ids=["at the end", "at the next block"])
def test_what_writing_met_is_not_lost(version: Version, vectors: dict[str, np.ndarray], blocks: list[int]) -> None:
    vectors["cls"][7, 3] = np.inf
    with pytest.raises(IntegrityError, match="cls of row 7 is not finite in float16"), BlockWriter(version) as writer:
        for rows in batches_of(version, blocks):
            add(writer, version, vectors, rows)
    assert not version.committed().any()


def test_disk_that_refuses(version: Version, vectors: dict[str, np.ndarray], tmp_path: Path) -> None:
    folder = next((tmp_path / "cache").glob("*.zarr")) / "cls"
    shutil.rmtree(folder / "c", ignore_errors=True)
    (folder / "c").write_bytes(b"a file where the chunks' folder should be")
    with (
        pytest.raises(StorageError, match="choose another CACHE; what is committed stays"),
        BlockWriter(version) as writer,
    ):
        for rows in batches_of(version, [0]):
            add(writer, version, vectors, rows)
    assert not version.committed().any()
