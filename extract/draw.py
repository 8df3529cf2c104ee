"""The blocks that one rank draws, as batches of tiles to embed."""

import time
from collections.abc import Iterator

import numpy as np

from cache_schema import BlockValues, CacheRoot, Status, Version
from extract.ranks.group import Counter
from extract.tiles.batch import TileRequest, make_requests
from extract.tiles.source import Source

from .earlier import EarlierRows
from .plan import Plan
from .timing import Timing
from .writer import BlockWriter


class BlockDraw:
    """Draws pending blocks: copies the rows that an earlier version knows and makes batches of the others."""

    def __init__(self, version: Version, plan: Plan, source: Source, writer: BlockWriter, timing: Timing) -> None:
        self._version, self._pending = version, plan.pending
        self._writer, self._timing = writer, timing
        self._table = version.read_table()
        self._earlier = None
        if plan.earlier_id:
            earlier = CacheRoot(plan.cache).open_version(plan.earlier_id)
            self._earlier = EarlierRows(earlier, self._table, source)

    def draw_batches(self, draw: Counter, batch_size: int) -> Iterator[list[TileRequest]]:
        """Yield batches of rows to embed. No batch spans two blocks; a block with nothing to embed is written at once.

        Args:
            draw: counter that all ranks share.
            batch_size: tiles per forward pass.
        """
        while (drawn := draw(1) - 1) < len(self._pending):
            missing = self._begin(self._pending[drawn])
            for start in range(0, len(missing), batch_size):
                yield make_requests(self._table, missing[start : start + batch_size])

    def _begin(self, block: int) -> list[int]:
        """Hand the known rows of a block to the writer; return the rows to embed."""
        started = time.perf_counter()
        rows = self._version.layout.block_slice(block)
        values = BlockValues.make_blank(self._version.layout, rows.stop - rows.start)
        if self._earlier:
            self._timing.note_labels(self._earlier.copy(rows, values))
        missing = rows.start + np.flatnonzero(values.status == Status.PENDING)
        self._writer.begin(block, values)
        self._timing.kept += len(values.status) - len(missing)
        self._timing.copy_s += time.perf_counter() - started
        rows_to_do: list[int] = missing.tolist()
        return rows_to_do
