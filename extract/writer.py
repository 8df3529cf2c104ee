"""Blocks on their way to the cache."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cache_schema import BlockValues, Version

from .batch import TileBatch


class BlockWriter:
    """Collects batches into blocks and writes each in a thread, while the next one is computed.

    Leaving the context waits for the block in writing; an incomplete block is abandoned, and stays pending.

    Attributes:
        wait_s: seconds that `add` and leaving waited for a write.
    """

    def __init__(self, version: Version) -> None:
        self._version = version
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        self._batches: list[TileBatch] = []
        self._vectors: list[dict[str, Tensor]] = []
        self.wait_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        started = time.perf_counter()
        self._pool.shutdown()
        self.wait_s += time.perf_counter() - started
        if self._writing and error is None:
            self._writing.result()

    def add(self, batch: TileBatch, vectors: dict[str, Tensor]) -> None:
        """Take one batch; batches of a block come in row order.

        The vectors of a block leave the device together, once it is complete. Waits besides only while the previous
        block is still written.

        Raises:
            CacheError: what writing the previous block met.
        """
        self._batches.append(batch)
        self._vectors.append(vectors)
        block = int(batch.rows[0]) // self._version.layout.block_rows
        if int(batch.rows[-1]) + 1 < self._version.layout.block_slice(block).stop:
            return
        values = BlockValues(
            pooled={name: torch.cat([part[name] for part in self._vectors]).cpu().numpy() for name in vectors},
            label_ids=np.concatenate([part.label_ids for part in self._batches]),
            status=np.concatenate([part.status for part in self._batches]),
        )
        self._batches, self._vectors = [], []
        if self._writing:
            started = time.perf_counter()
            self._writing.result()
            self.wait_s += time.perf_counter() - started
        self._writing = self._pool.submit(self._version.write_block, block, values)
