"""Blocks on their way to the cache."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np

from cache_schema import BlockValues, Version
from cache_schema.layout import Float16Array

from .batch import TileBatch


class BlockWriter:
    """Collects batches into blocks and writes each in a thread, while the next one is computed.

    Leaving the context waits for the block in writing; an incomplete block is abandoned, and stays pending.
    """

    def __init__(self, version: Version) -> None:
        self._version = version
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        self._batches: list[TileBatch] = []
        self._vectors: list[dict[str, Float16Array]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._pool.shutdown()
        if self._writing and error is None:
            self._writing.result()

    def add(self, batch: TileBatch, vectors: dict[str, Float16Array]) -> None:
        """Take one batch; batches of a block come in row order. Waits only while the previous block is still written.

        Raises:
            CacheError: what writing the previous block met.
        """
        self._batches.append(batch)
        self._vectors.append(vectors)
        block = int(batch.rows[0]) // self._version.layout.block_rows
        if int(batch.rows[-1]) + 1 < self._version.layout.block_slice(block).stop:
            return
        values = BlockValues(
            pooled={name: np.concatenate([part[name] for part in self._vectors]) for name in vectors},
            label_ids=np.concatenate([part.label_ids for part in self._batches]),
            status=np.concatenate([part.status for part in self._batches]),
        )
        self._batches, self._vectors = [], []
        if self._writing:
            self._writing.result()
        self._writing = self._pool.submit(self._version.write_block, block, values)
