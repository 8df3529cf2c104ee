"""Find an earlier version whose rows can be kept, and what changed in the bucket since, by comparing tile tables."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from cache_schema import BlockValues, CacheError, CacheRoot, IntegrityError, Provenance, Status, TileTable, Version
from cache_schema.layout import BoolArray
from extract.tiles.batch import LabelBatch, make_requests, read_labels
from extract.tiles.listing import find_names
from extract.tiles.source import CONCURRENT_READS, Source

from .errors import RunError

_LARGEST_LOSS = 0.1
"""Share of an earlier version's rows that may be gone from the bucket; above it, the user must confirm."""


@dataclass(frozen=True, eq=False)
class Changes:
    """A table of N rows compared with an earlier one.

    Attributes:
        row: (N,) int64, row of the same name in the earlier table, -1 if it has none.
        same_tile: (N,) bool, whether size and checksum of the tile are the same.
        same_label: (N,) bool, the same for the label; two missing labels are the same.
        removed: number of rows of the earlier table whose name is not in this one.
    """

    row: npt.NDArray[np.int64]
    same_tile: BoolArray
    same_label: BoolArray
    removed: int

    @cached_property
    def kept(self) -> int:
        """Number of rows without a change."""
        return int((self.same_tile & self.same_label).sum())

    @cached_property
    def relabelled(self) -> int:
        """Number of rows whose label changed, but not the tile."""
        return int((self.same_tile & ~self.same_label).sum())

    def count(self) -> dict[str, int]:
        """Count the `new`, `changed`, `removed`, `relabelled` and `kept` rows."""
        new = int((self.row < 0).sum())
        return {
            "new": new,
            "changed": len(self.row) - new - self.relabelled - self.kept,
            "removed": self.removed,
            "relabelled": self.relabelled,
            "kept": self.kept,
        }

    def describe(self) -> str:
        """Return `12 new, 3 changed, 1 removed, 2 relabelled, 14,982 kept`."""
        return ", ".join(f"{number:,} {what}" for what, number in self.count().items())

    def refuse_loss(self, earlier: Version, tiles: str) -> None:
        """Check that at most a tenth of the earlier rows is gone; more usually means a wrong prefix or an unfinished
        upload.

        Raises:
            RunError: more are gone.
        """
        rows = earlier.layout.rows
        if self.removed > _LARGEST_LOSS * rows:
            raise RunError(
                f"{self.removed:,} of the {rows:,} tiles of version {earlier.id} in {earlier.url} are gone from "
                f"{tiles}: check TILES, or continue without them with ARGS=--yes"
            )


def compare_tables(earlier: TileTable, table: TileTable) -> Changes:
    """Compare two tables, by the names of the tiles."""
    row = find_names(table.tile, earlier.tile)
    same = row >= 0

    def agree(*columns: str) -> BoolArray:
        # Where `row` is -1 any row is compared; `same` is False there.
        equal = [getattr(table, column) == getattr(earlier, column)[row] for column in columns]
        return np.asarray(np.logical_and.reduce([same, *equal]))

    return Changes(
        row=row,
        same_tile=agree("size", "crc32c"),
        same_label=agree("label_size", "label_crc32c"),
        removed=len(earlier) - int(same.sum()),
    )


def find_earlier(
    root: CacheRoot, table: TileTable, provenance: Provenance, identity: str
) -> tuple[Version, Changes] | None:
    """Find the version whose rows can be copied into the one of this table and provenance, and what changed since.

    That is the version in use or, if its provenance differs, the sealed version that shares most rows.

    Args:
        table, provenance: of the version to make.
        identity: what identifies the bytes in `table`, see `Recorded`.

    Returns:
        None if there is none, or if the version to make is in use already or finished without being in use.
    """
    wanted, in_use = provenance.version_id(table.identity_digest()), open_in_use(root)
    if in_use and in_use.id == wanted:
        return None

    def fits(version: Version) -> bool:
        return version.provenance == provenance and version.recorded.identity == identity

    if in_use and fits(in_use):
        candidates = [in_use]
    else:
        sealed = [version for version in _open(root, root.versions()) if fits(version) and version.sealed]
        candidates = [] if wanted in [version.id for version in sealed] else sealed
    compared = [
        (version, compare_tables(earlier, table)) for version in candidates if (earlier := _read_own_table(version))
    ]
    return max(compared, key=lambda pair: pair[1].kept + pair[1].relabelled, default=None)


def _read_own_table(version: Version) -> TileTable | None:
    """Read the table of a version; None if its id does not follow from it."""
    try:
        table = version.read_table()
    except CacheError:
        return None
    return table if version.provenance.version_id(table.identity_digest()) == version.id else None


def open_in_use(root: CacheRoot) -> Version | None:
    """Open the version in use, sealed or being redone; None if there is none, or it cannot be opened."""
    current = root.current()
    return next(_open(root, [current]), None) if current else None


def _open(root: CacheRoot, ids: Sequence[str]) -> Iterator[Version]:
    """Open the versions of `ids`, leaving out those that cannot be opened."""
    for version_id in ids:
        try:
            yield root.open_version(version_id)
        except CacheError:  # no row can be copied from a version that is damaged, removed or half created
            continue


_TRIED_AGAIN = (Status.PENDING, Status.GONE, Status.CHECKSUM_MISMATCH)
"""Status codes of rows that are computed again although the bytes of their tile are the same."""


class EarlierRows:
    """Copies rows of an earlier version whose tile is the same in the table of the version being made.

    Earlier blocks are read on demand. The rows of a block are nearly contiguous in the earlier version, so keeping the
    last two blocks is enough to read each about once.
    """

    def __init__(self, earlier: Version, table: TileTable, source: Source) -> None:
        self._earlier = earlier
        self._table = table
        self._source = source
        self._changes = compare_tables(earlier.read_table(), table)
        self._read = lru_cache(maxsize=2)(self._read_trusted)
        self._threads = ThreadPoolExecutor(CONCURRENT_READS, thread_name_prefix="labels")

    def copy(self, rows: slice, values: BlockValues) -> LabelBatch:
        """Fill in what is known of `rows`: vectors, status and, if the label file is the same, label ids.

        Only rows of a block that agrees with its commit are known; the others stay pending.

        Args:
            rows: of the version being made.
            values: of these rows, blank; filled in place.

        Returns:
            the labels that were read because their file changed.

        Raises:
            SourceError: a label cannot be read.
        """
        same = np.flatnonzero(self._changes.same_tile[rows])
        block, offset = np.divmod(self._changes.row[rows][same], self._earlier.layout.block_rows)
        for number in np.unique(block).tolist():
            known = self._read(number)
            if known is not None:
                _copy_rows(known, offset[block == number], values, same[block == number])
        here = np.flatnonzero(~self._changes.same_label[rows] & (values.status != Status.PENDING))
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
