"""Rows of an earlier version, taken over by the version in making."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cache_schema import BlockValues, IntegrityError, Status, TileTable, Version
from cache_schema.layout import BoolArray

from .batch import LabelBatch, make_requests, read_labels
from .changes import compare_tables
from .source import CONCURRENT_READS, Source

_TRIED_AGAIN = (Status.PENDING, Status.GONE, Status.CHECKSUM_MISMATCH)
"""What the tile's bytes, which are the same, do not settle."""


class EarlierRows:
    """Rows of an earlier version whose tile is the same in the table of the one in making.

    Blocks are read one at a time, when they are asked for: rows of a block are nearly contiguous in the earlier
    version, so the last two blocks read are enough to read each about once.
    """

    def __init__(self, earlier: Version, table: TileTable, source: Source) -> None:
        self._earlier = earlier
        self._table = table
        self._source = source
        self._changes = compare_tables(earlier.read_table(), table)
        self._read = lru_cache(maxsize=2)(self._read_trusted)
        self._threads = ThreadPoolExecutor(CONCURRENT_READS, thread_name_prefix="labels")

    def copy(self, rows: slice, values: BlockValues) -> LabelBatch:
        """Fill in what is known of `rows`: vectors, status and, where the label file is the same, label ids. Only rows
        of a block that agrees with its commit count as known; the others stay pending.

        Args:
            rows: of the version in making.
            values: of these rows, blank; filled in place.

        Returns:
            the labels that had to be read, because their file changed since.

        Raises:
            SourceError: a label cannot be read.
        """
        same = np.flatnonzero(self._changes.same_tile[rows])
        block, offset = np.divmod(self._changes.row[rows][same], self._earlier.layout.block_rows)
        for number in np.unique(block).tolist():
            known = self._read(number)
            if known is not None:
                _copy_rows(known, offset[block == number], values, same[block == number])
        return self._relabel(rows, values, ~self._changes.same_label[rows] & (values.status != Status.PENDING))

    def _relabel(self, rows: slice, values: BlockValues, changed: BoolArray) -> LabelBatch:
        here = np.flatnonzero(changed)
        requests = make_requests(self._table, (rows.start + here).tolist())
        labels = read_labels(self._source, self._threads, requests)
        values.label_ids[here] = labels.label_ids
        return labels

    def _read_trusted(self, block: int) -> BlockValues | None:
        try:
            return self._earlier.read_trusted(block)
        except IntegrityError:
            return None


def _copy_rows(
    known: BlockValues, there: npt.NDArray[np.int64], values: BlockValues, here: npt.NDArray[np.int64]
) -> None:
    settled = ~np.isin(known.status[there], _TRIED_AGAIN)
    there, here = there[settled], here[settled]
    for name, vectors in known.pooled.items():
        values.pooled[name][here] = vectors[there]
    values.label_ids[here] = known.label_ids[there]
    values.status[here] = known.status[there]
