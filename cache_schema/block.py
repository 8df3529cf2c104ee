"""The values of one block of rows, the unit of writing, committing and checking; and of all blocks together."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .errors import IntegrityError
from .layout import (
    LABEL_ID_COLUMNS,
    LABEL_IDS_DTYPE,
    POOLED_DTYPE,
    STATUS_DTYPE,
    BoolArray,
    Float16Array,
    Layout,
    Status,
    UInt8Array,
    UInt16Array,
)

_STORABLE_STATUS = [status for status in Status if status != Status.PENDING]
_ROWS_NAMED = 3


@dataclass(frozen=True, eq=False)
class BlockValues:
    """The values of one block of n rows, as they are hashed and stored.

    Attributes:
        pooled: per pooling (n, D) float16, NaN in rows that are not embedded.
        label_ids: (n, 128) uint16, instances per raw label id.
        status: (n,) uint8, see `Status`.
    """

    pooled: Mapping[str, Float16Array]
    label_ids: UInt16Array
    status: UInt8Array

    @classmethod
    def make_blank(cls, layout: Layout, rows: int) -> Self:
        """Make values of `rows` pending rows, as missing chunks read."""
        return cls(
            pooled={name: np.full((rows, layout.width), np.nan, POOLED_DTYPE) for name in layout.pooling},
            label_ids=np.zeros((rows, LABEL_ID_COLUMNS), LABEL_IDS_DTYPE),
            status=np.full(rows, Status.PENDING, STATUS_DTYPE),
        )

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays by name."""
        return {**self.pooled, "label_ids": self.label_ids, "status": self.status}

    def select(self, rows: slice) -> Self:
        """Return a view of some of the rows."""
        return type(self)({name: v[rows] for name, v in self.pooled.items()}, self.label_ids[rows], self.status[rows])

    def digest(self, layout: Layout) -> bytes:
        """Return the sha256 of the little-endian values: pooled arrays in order, label ids, status."""
        digest = hashlib.sha256()
        for name, (dtype, _) in layout.arrays.items():
            digest.update(np.ascontiguousarray(self.arrays[name], dtype).tobytes())
        return digest.digest()

    def find_contradictions(self, layout: Layout, rows: slice) -> list[str]:
        """List the reasons why these cannot be the values of `rows`, a line each.

        Reasons are shapes or dtypes that differ from the layout, status codes that no committed row has, embeddings
        that do not fit float16 (inf or NaN), and vectors in rows that were not embedded.
        """
        n = rows.stop - rows.start
        lines = [
            f"array {name} of a block must be {dtype} {(n, *row)}"
            for name, (dtype, row) in layout.arrays.items()
            if name not in self.arrays or self.arrays[name].shape != (n, *row) or self.arrays[name].dtype != dtype
        ]
        if lines:
            return lines

        def name_rows(wrong: BoolArray) -> str:
            found = (rows.start + np.flatnonzero(wrong)).tolist()
            more = f" and {len(found) - _ROWS_NAMED} more" if len(found) > _ROWS_NAMED else ""
            return f"{'row' if len(found) == 1 else 'rows'} {', '.join(map(str, found[:_ROWS_NAMED]))}{more}"

        for code in np.setdiff1d(self.status, _STORABLE_STATUS).tolist():
            where = name_rows(np.asarray(self.status == code))
            lines.append(f"array status of {where} is {code}, which no committed row has")
        embedded = np.asarray(self.status == Status.EMBEDDED)
        quarantined = np.isin(self.status, _STORABLE_STATUS) & ~embedded
        for name in layout.pooling:
            broken = embedded & ~_find_finite(self.pooled[name])
            if broken.any():
                lines.append(f"array {name} of {name_rows(broken)} is not finite in float16")
            filled = quarantined & ~np.isnan(self.pooled[name]).all(axis=1)
            if filled.any():
                lines.append(f"array {name} of {name_rows(filled)} holds values, but status says not embedded")
        return lines

    def refuse_unstorable(self, layout: Layout, rows: slice) -> None:
        """Check that these can be the values of `rows`.

        Raises:
            IntegrityError: the first of `find_contradictions`.
        """
        for line in self.find_contradictions(layout, rows):
            raise IntegrityError(f"{line}: nothing of its block was stored")


class CacheRows(BlockValues):
    """The values of all N rows of a version, digests checked; a block that is missing or damaged is pending."""

    @property
    def embedded(self) -> BoolArray:
        return np.asarray(self.status == Status.EMBEDDED)

    @property
    def missing(self) -> int:
        return int((self.status == Status.PENDING).sum())


def _find_finite(vectors: Float16Array) -> BoolArray:
    """Return (n,) bool: rows without infinity or NaN, whose exponents have all bits set.

    NumPy's isfinite takes 7 times as long on float16, for which processors have no instructions.
    """
    exponents = vectors.view("<u2") & np.uint16(0x7C00)
    return np.asarray((exponents != 0x7C00).all(axis=1))
