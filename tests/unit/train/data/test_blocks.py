"""Streaming from blocks: every row once an epoch for any number of ranks, the same order again, damage told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import CacheRoot, IntegrityError, Layout, open_cache
from cache_schema.cli.text import format_bytes, parse_bytes
from cache_schema.layout import Float16Array
from tests.caches import fill_cache
from tests.planted import fresh_seed
from tests.unit.train.data.test_batches import make_ranks, make_rows, make_values
from train.data.blocks import BlockTiles, ShuffleBuffer, map_ahead, plan_epoch
from train.data.memory import StreamingMemory
from train.data.vectors import BlockVectors
from train.errors import TrainError

PLANS = {
    "counts": st.lists(st.integers(0, 40), max_size=30).map(lambda counts: np.array(counts, np.int64)),
    "batch_size": st.integers(1, 50),
    "world_size": st.integers(1, 9),
    "seed": st.integers(0, 2**31 - 1),
    "epoch": st.integers(0, 1000),
}


@settings(max_examples=80, deadline=None)
@given(**PLANS)
def test_ranks_plan_the_same_batches_and_each_block_once(
    counts: np.ndarray, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    plans = [
        plan_epoch(counts, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed, epoch=epoch)
        for rank in range(world_size)
    ]
    assert sorted(block for plan in plans for block in plan.blocks) == np.flatnonzero(counts).tolist()
    steps = -(-int(counts.sum()) // batch_size)
    for own in plans:
        assert len(own.sizes) == steps  # a rank with fewer would leave the others waiting
        assert sum(own.sizes) == counts[own.blocks].sum()
        assert max(own.sizes, default=0) - min(own.sizes, default=0) <= 1
        assert own.global_sizes == plans[0].global_sizes
    assert np.array([own.sizes for own in plans]).sum(axis=0).tolist() == plans[0].global_sizes
    assert max(plans[0].global_sizes, default=0) < batch_size + world_size
    shares = [sum(own.sizes) for own in plans]
    assert max(shares) - min(shares) <= max(counts, default=0)


def test_blocks_come_in_another_order_every_epoch_and_seed() -> None:
    """Of 40 blocks, so that no two orders agree by chance."""
    counts = np.full(40, 5)

    def order(seed: int, epoch: int) -> list[int]:
        return plan_epoch(counts, batch_size=8, rank=0, world_size=1, seed=seed, epoch=epoch).blocks

    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(40))]
    assert order(0, 0) == orders[0]
    assert len({tuple(blocks) for blocks in orders}) == 4


class BlocksInMemory:
    """Stands in for `BlockVectors` where not the reading matters; notes which blocks are read."""

    width = 2

    def __init__(self, rows: int, block_rows: int, buffer_rows: int) -> None:
        self.layout = Layout(rows, 2, ("cls", "patch_mean"), block_rows)
        self.memory = StreamingMemory(buffer_rows, ahead=3)
        self.read_blocks: list[int] = []

    def read(self, block: int) -> list[Float16Array]:
        self.read_blocks.append(block)
        values = make_values(self.layout.block_slice(block)).pooled["cls"]
        return [values[:, :1], values[:, 1:]]


@settings(max_examples=60, deadline=None)
@given(
    used=st.lists(st.booleans(), min_size=1, max_size=120),
    block_rows=st.integers(1, 12),
    batch_size=st.integers(1, 40),
    spare=st.integers(0, 60),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_every_row_comes_once_an_epoch_with_its_own_vector_and_label(
    used: list[bool], block_rows: int, batch_size: int, spare: int, world_size: int, seed: int
) -> None:
    rows = make_rows(np.flatnonzero(used).tolist())

    def read(rank: int, first_step: int = 0) -> tuple[list[Any], BlocksInMemory]:
        vectors: Any = BlocksInMemory(len(used), block_rows, batch_size + 1 + block_rows + spare)
        tiles = BlockTiles(rows, vectors, make_ranks(rank, world_size))
        return list(tiles.iterate_epoch(batch_size=batch_size, seed=seed, epoch=3, first_step=first_step)), vectors

    per_rank, seen, read_blocks = [], [], []
    for rank in range(world_size):
        batches, vectors = read(rank)
        for batch in batches:
            table_rows = rows.index[batch.rows.numpy()]
            assert batch.inputs[:, 0].tolist() == table_rows.tolist()
            assert np.array_equal(batch.labels.numpy(), rows.labels[batch.rows.numpy()])
        for first in (0, len(batches) // 2):  # as a resumed run's
            again = read(rank, first)[0]
            assert [b.rows.tolist() for b in batches[first:]] == [b.rows.tolist() for b in again]
            assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(batches[first:], again, strict=True))
        per_rank.append(batches)
        seen += [row for batch in batches for row in batch.rows.tolist()]
        read_blocks += vectors.read_blocks
    assert sorted(seen) == list(range(len(rows)))
    assert sorted(read_blocks) == sorted({i // block_rows for i in rows.index.tolist()})
    for shares in zip(*per_rank, strict=True):
        assert {share.global_size for share in shares} == {sum(len(share.rows) for share in shares)}


def test_evaluation_reads_each_block_once_and_every_row() -> None:
    rng = np.random.default_rng(fresh_seed())
    rows = make_rows(np.sort(rng.choice(500, 120, replace=False)).tolist())
    for world_size in (1, 2, 3, 80):
        whole, read_blocks = np.full(len(rows), -1.0), []
        for rank in range(world_size):
            vectors: Any = BlocksInMemory(500, 16, 100)
            tiles = BlockTiles(rows, vectors, make_ranks(rank, world_size))
            if len(tiles.share):
                whole[tiles.share] = torch.cat(list(tiles.iterate_share()))[:, 0]
            read_blocks += vectors.read_blocks
        assert whole.tolist() == rows.index.tolist()
        assert len(read_blocks) == len(set(read_blocks))


def test_a_buffer_gives_every_row_the_same_chance() -> None:
    """Each of 12 rows is the first of the draw in 1/12 of 800 trials, within five standard deviations."""
    rng, trials = np.random.default_rng(fresh_seed()), 800
    counts = np.zeros(12)
    for _ in range(trials):
        buffer = ShuffleBuffer(12, 1, rng)
        buffer.add(np.arange(12), [np.arange(12, dtype=np.float16)[:, None]])
        buffer.draw(5)
        rows, vectors = buffer.draw(4)
        assert rows.tolist() == vectors.flatten().tolist()
        counts[rows[0]] += 1
    p = 1 / 12
    assert np.abs(counts - trials * p).max() < 5 * np.sqrt(trials * p * (1 - p))


def test_reading_ahead_keeps_order_and_stays_bounded() -> None:
    begun: list[int] = []
    results = map_ahead(lambda item: begun.append(item) or item, list(range(50)), 4)
    for expected in range(50):
        assert next(results) == expected
        assert len(begun) <= expected + 4
    assert next(results, None) is None


# Memory


@pytest.mark.parametrize(
    "text, size",
    [("1", 1), ("1500", 1500), ("512M", 2**29), ("512m", 2**29), ("1.5G", 3 * 2**29), ("64 K", None), (" 2k ", 2048)],
)
def test_sizes_are_read(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="such as 512M"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "0.1", "-1G", "G", "1T", "1e9", "nan", "1_000", "١", "1.5.2M"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 512M"):
        parse_bytes(text)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 2**45))
def test_a_size_that_is_shown_is_enough_when_typed(size: int) -> None:
    assert size <= parse_bytes(format_bytes(size)) <= max(size + 1, size * 1.11)


@settings(max_examples=100, deadline=None)
@given(
    block_rows=st.sampled_from([256, 4096]),
    width=st.integers(1, 4096),
    features=st.integers(1, 2),
    batch_size=st.integers(1, 4096),
)
def test_the_least_budget_that_an_error_names_works(
    block_rows: int, width: int, features: int, batch_size: int
) -> None:
    layout = Layout(10**6, width, ("cls", "patch_mean"), block_rows)
    with pytest.raises(TrainError, match="--memory-budget 1 is too small .* give at least ") as refused:
        StreamingMemory.divide(1, layout, features, batch_size)
    least = parse_bytes(str(refused.value).rpartition(" ")[2])
    memory = StreamingMemory.divide(least, layout, features, batch_size)
    row = features * width * 2
    assert memory.buffer_rows >= batch_size + block_rows
    assert memory.ahead >= 1
    assert memory.buffer_rows * row + memory.ahead * block_rows * row <= least
    with pytest.raises(TrainError):
        StreamingMemory.divide(int(least * 0.9) - 1, layout, features, batch_size)


# Trust


def test_a_block_that_changed_since_the_scan_is_refused(tmp_path: Path) -> None:
    """Swapped chunks pass Zarr's own checksums."""
    version_id = fill_cache(str(tmp_path), 700)
    version = open_cache(str(tmp_path))
    vectors = BlockVectors(version, ("patch_mean", "cls"), StreamingMemory(300, 2))
    version.scan(vectors.keep)
    pooled = version.read_block(1).pooled
    np.testing.assert_array_equal(vectors.read(1), [pooled["patch_mean"], pooled["cls"]])
    chunks = tmp_path / f"{version_id}.zarr" / "cls" / "c"
    zero, one = ((chunks / name / "0").read_bytes() for name in "01")
    (chunks / "0" / "0").write_bytes(one)
    (chunks / "1" / "0").write_bytes(zero)
    with pytest.raises(IntegrityError, match=r"block 1 of .*its vectors changed since .*cache_schema verify"):
        vectors.read(1)
    (chunks / "2" / "0").write_bytes(b"cut")
    with pytest.raises(IntegrityError, match=r"block 2 of .*array cls cannot be read"):
        vectors.read(2)
    assert CacheRoot(str(tmp_path)).open_version(version_id).read_rows().missing == 700
