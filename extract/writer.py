"""Write blocks to the cache, while the next ones are computed."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cache_schema import BlockValues, Status, Version
from extract.tiles.batch import TileBatch

_log = logging.getLogger(__name__)


@dataclass
class _BegunBlock:
    """A block that still misses `missing` rows, and the batches that have come."""

    values: BlockValues
    missing: int
    batches: list[TileBatch] = field(default_factory=list)
    vectors: list[dict[str, Tensor]] = field(default_factory=list)

    def complete(self, first_row: int) -> BlockValues:
        """Return the values of the block, with the rows of its batches filled in."""
        rows = np.concatenate([batch.rows for batch in self.batches]) - first_row
        for name, stored in self.values.pooled.items():
            stored[rows] = torch.cat([part[name] for part in self.vectors]).cpu().numpy()
        self.values.label_ids[rows] = np.concatenate([batch.label_ids for batch in self.batches])
        self.values.status[rows] = np.concatenate([batch.status for batch in self.batches])
        return self.values


class BlockWriter:
    """Collects batches into blocks, and writes each block in a thread while the next one is computed.

    Leaving the context waits for the block being written; an incomplete block is dropped and stays pending.

    Attributes:
        wait_s: seconds that `begin`, `add` and leaving the context waited for a write.
    """

    def __init__(self, version: Version) -> None:
        self._version = version
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        self._begun: dict[int, _BegunBlock] = {}
        self.wait_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        started = time.perf_counter()
        self._pool.shutdown()
        self.wait_s += time.perf_counter() - started
        if self._writing and error is None:
            self._writing.result()

    def begin(self, block: int, values: BlockValues) -> None:
        """Take a block whose pending rows come in batches; write it now if it has none.

        Raises:
            CacheError: writing the previous block failed.
        """
        missing = int((values.status == Status.PENDING).sum())
        if missing:
            self._begun[block] = _BegunBlock(values, missing)
        else:
            self._write(block, values)

    def add(self, batch: TileBatch, vectors: dict[str, Tensor]) -> None:
        """Take one batch of pending rows of a block that was begun.

        The vectors of a block are copied from the device together, once it is complete. Waits if the previous block is
        still being written.

        Raises:
            CacheError: writing the previous block failed.
        """
        block = int(batch.rows[0]) // self._version.layout.block_rows
        begun = self._begun[block]
        begun.batches.append(batch)
        begun.vectors.append(vectors)
        begun.missing -= len(batch)
        if begun.missing:
            return
        del self._begun[block]
        self._write(block, begun.complete(self._version.layout.block_slice(block).start))

    def _write(self, block: int, values: BlockValues) -> None:
        if self._writing:
            started = time.perf_counter()
            self._writing.result()
            self.wait_s += time.perf_counter() - started
        self._writing = self._pool.submit(self._store, block, values)

    def _store(self, block: int, values: BlockValues) -> None:
        started = time.perf_counter()
        self._version.write_block(block, values)
        _log.debug("block %d: %d rows committed in %.2f s", block, len(values.status), time.perf_counter() - started)
