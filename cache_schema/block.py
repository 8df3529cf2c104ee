"""The values of one block of rows: the unit of writing, committing and trusting."""

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
    Float16Array,
    Layout,
    Status,
    UInt8Array,
    UInt16Array,
)

_STORABLE_STATUS = [status for status in Status if status != Status.PENDING]


@dataclass(frozen=True, eq=False)
class BlockValues:
    """The values of one block of n rows, as they are digested and stored.

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
        """Values of `rows` rows that are all pending: what a missing chunk reads as."""
        return cls(
            pooled={name: np.full((rows, layout.width), np.nan, POOLED_DTYPE) for name in layout.pooling},
            label_ids=np.zeros((rows, LABEL_ID_COLUMNS), LABEL_IDS_DTYPE),
            status=np.full(rows, Status.PENDING, STATUS_DTYPE),
        )

    def digest(self, pooling: tuple[str, ...]) -> bytes:
        """sha256 over the little-endian values: pooled arrays in order, label ids, status."""
        digest = hashlib.sha256()
        for name in pooling:
            digest.update(np.ascontiguousarray(self.pooled[name], POOLED_DTYPE).tobytes())
        digest.update(np.ascontiguousarray(self.label_ids, LABEL_IDS_DTYPE).tobytes())
        digest.update(np.ascontiguousarray(self.status, STATUS_DTYPE).tobytes())
        return digest.digest()

    def refuse_unstorable(self, layout: Layout, rows: slice) -> None:
        """Check that these can be the values of `rows`.

        Raises:
            IntegrityError: shapes, dtypes or status codes that are not the layout's, an embedding that does not fit
                float16 (inf or NaN), or vectors in rows that were not embedded.
        """
        self._refuse_other_shapes(layout, rows.stop - rows.start)
        codes = np.setdiff1d(self.status, _STORABLE_STATUS)
        if len(codes):
            raise IntegrityError(f"status holds {codes.tolist()}: a committed row is {_STORABLE_STATUS[0]:d} or above")
        embedded = np.asarray(self.status == Status.EMBEDDED)
        for name in layout.pooling:
            vectors = self.pooled[name]
            broken = np.flatnonzero(embedded & ~np.isfinite(vectors).all(axis=1))
            if len(broken):
                raise IntegrityError(
                    f"{name} of row {rows.start + broken[0]} is not finite in float16: nothing of its block was stored"
                )
            if not np.isnan(vectors[~embedded]).all():
                raise IntegrityError(f"{name} holds values in rows whose status says they were not embedded")

    def _refuse_other_shapes(self, layout: Layout, n: int) -> None:
        expected: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {}
        expected |= dict.fromkeys(layout.pooling, ((n, layout.width), POOLED_DTYPE))
        expected |= {"label_ids": ((n, LABEL_ID_COLUMNS), LABEL_IDS_DTYPE), "status": ((n,), STATUS_DTYPE)}
        arrays: dict[str, npt.NDArray[Any]] = dict(self.pooled)
        arrays |= {"label_ids": self.label_ids, "status": self.status}
        for name, (shape, dtype) in expected.items():
            if name not in arrays or arrays[name].shape != shape or arrays[name].dtype != dtype:
                raise IntegrityError(f"array {name} of a block must be {dtype} {shape}")
