"""What changed in the bucket since an earlier version was made, and which version that is: by the two tables alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cache_schema import CacheError, CacheRoot, Provenance, TileTable, Version
from cache_schema.layout import BoolArray

from .errors import RunError
from .listing import find_names

_LARGEST_LOSS = 0.1
"""Share of an earlier version's rows that may be gone from the bucket before that needs a word of the user's."""


@dataclass(frozen=True, eq=False)
class Changes:
    """A table of N rows beside an earlier one.

    Attributes:
        row: (N,) int64, row of the same name in the earlier table, -1 where there is none.
        same_tile: (N,) bool, rows whose tile has the earlier one's size and checksum.
        same_label: (N,) bool, the same of its label; none is the same as none.
        removed: rows of the earlier table whose name is not in this one.
    """

    row: npt.NDArray[np.int64]
    same_tile: BoolArray
    same_label: BoolArray
    removed: int

    @cached_property
    def kept(self) -> int:
        """Rows with nothing changed."""
        return int((self.same_tile & self.same_label).sum())

    @cached_property
    def relabelled(self) -> int:
        """Rows of which only the label changed."""
        return int((self.same_tile & ~self.same_label).sum())

    def count(self) -> dict[str, int]:
        """How many rows are `new`, `changed`, `removed`, `relabelled` and `kept`."""
        new = int((self.row < 0).sum())
        return {
            "new": new,
            "changed": len(self.row) - new - self.relabelled - self.kept,
            "removed": self.removed,
            "relabelled": self.relabelled,
            "kept": self.kept,
        }

    def describe(self) -> str:
        """`12 new, 3 changed, 1 removed, 2 relabelled, 14,982 kept`."""
        return ", ".join(f"{number:,} {what}" for what, number in self.count().items())

    def refuse_loss(self, earlier: Version, tiles: str) -> None:
        """Check that no more than a tenth of the earlier rows is gone: most often that is another prefix, or an
        upload that is not finished.

        Raises:
            RunError: more are gone.
        """
        rows = earlier.layout.rows
        if self.removed > _LARGEST_LOSS * rows:
            raise RunError(
                f"{self.removed:,} of the {rows:,} tiles of version {earlier.id} in {earlier.root.url} are gone from "
                f"{tiles}: check TILES, or go on without them with ARGS=--yes"
            )


def compare_tables(earlier: TileTable, table: TileTable) -> Changes:
    """What became of the rows of `earlier`, and where those of `table` come from."""
    row = find_names(table.tile, earlier.tile)
    same = row >= 0

    def agree(*columns: str) -> BoolArray:
        # Row -1 is some row, whatever it says: there is none of that name.
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
    """The version beside the one of this table and provenance whose rows can be taken over, and what changed since.

    That is the version in use; if it was made from something else, the sealed one that shares most rows.

    Args:
        root: the cache.
        table, provenance: of the version to make.
        identity: what stands for bytes in `table`, see `Recorded`.

    Returns:
        None where there is none, or where the version to make is in use already or finished without being in use.
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
        (version, compare_tables(earlier, table)) for version in candidates if (earlier := read_own_table(version))
    ]
    return max(compared, key=lambda pair: pair[1].kept + pair[1].relabelled, default=None)


def read_own_table(version: Version) -> TileTable | None:
    """The table of a version if it is the one its id was made from, else None."""
    try:
        table = version.read_table()
    except CacheError:
        return None
    return table if version.provenance.version_id(table.identity_digest()) == version.id else None


def open_in_use(root: CacheRoot) -> Version | None:
    """The version in use, sealed or being redone; None where there is none that can be opened."""
    current = root.current()
    return next(_open(root, [current]), None) if current else None


def _open(root: CacheRoot, ids: Sequence[str]) -> Iterator[Version]:
    """Those of `ids` that can be opened."""
    for version_id in ids:
        try:
            yield root.open_version(version_id)
        except CacheError:  # nothing can be taken over from a version that is damaged, removed or half created
            continue
