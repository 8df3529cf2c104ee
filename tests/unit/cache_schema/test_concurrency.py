"""Processes that write one version at a time: a block is either whole or pending."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier

import numpy as np

from cache_schema import CacheRoot, Status, open_cache
from tests.caches import make_provenance, make_recorded, make_table, make_values

ROWS = 1100  # 5 blocks, the last one short
BLOCKS = range(5)


def write_blocks(url: str, version_id: str, blocks: Sequence[int], seed: int, start: Barrier) -> None:
    version = CacheRoot(url).open_version(version_id, read_only=False)
    values = [make_values(version.layout, block, seed=seed) for block in blocks]
    for block, part in zip(blocks, values, strict=True):
        start.wait(60)
        version.write_block(block, part)


def run_writers(url: str, version_id: str, shares: Sequence[Sequence[int]]) -> None:
    # Spawned: a forked child could inherit zarr's event loop in mid-air.
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(len(shares))
    writers = [
        context.Process(target=write_blocks, args=(url, version_id, blocks, seed, start))
        for seed, blocks in enumerate(shares)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0


def test_different_blocks_at_once(cache_url: str) -> None:
    version = CacheRoot(cache_url).create_version(make_table(ROWS), make_provenance(), make_recorded())
    run_writers(cache_url, version.id, [[0, 2], [1, 3]])

    assert version.committed().tolist() == [True, True, True, True, False]
    assert [version.check_block(block) for block in range(4)] == [None] * 4
    for block, seed in ((0, 0), (2, 0), (1, 1), (3, 1)):
        expected = make_values(version.layout, block, seed=seed)
        assert version.read_block(block).digest(version.layout) == expected.digest(version.layout)


def test_the_same_blocks_at_once_with_different_values(cache_url: str) -> None:
    version = CacheRoot(cache_url).create_version(make_table(ROWS), make_provenance(), make_recorded())
    run_writers(cache_url, version.id, [list(BLOCKS)] * 2)

    rows = version.read_rows()
    for block in BLOCKS:
        where = version.layout.block_slice(block)
        whole = {make_values(version.layout, block, seed=seed).digest(version.layout) for seed in (0, 1)}
        stored = version.read_block(block)
        # Two writers may leave a mixture behind. What counts is that it is never taken for a block.
        if stored.digest(version.layout) in whole and version.check_block(block) is None:
            assert rows.pooled["cls"][where].tobytes() == stored.pooled["cls"].tobytes()
        else:
            assert (rows.status[where] == Status.PENDING).all()
            assert np.isnan(rows.pooled["cls"][where]).all()
            version.write_block(block, make_values(version.layout, block))
    version.seal()
    assert open_cache(cache_url, version=version.id).read_rows().missing == 0
