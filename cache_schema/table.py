"""The tile table: the tiles of a version and the identity of their bytes, as the listing gives them."""

import hashlib
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from .errors import CacheFormatError
from .layout import BoolArray

NO_LABEL = -1
"""`label_size` of a tile without a label object."""

COLUMN_DTYPES: dict[str, np.dtype[np.generic]] = {
    "size": np.dtype("<i8"),
    "crc32c": np.dtype("<u4"),
    "generation": np.dtype("<i8"),
    "label_size": np.dtype("<i8"),
    "label_crc32c": np.dtype("<u4"),
}
_IDENTITY_COLUMNS = ("size", "crc32c", "label_size", "label_crc32c")


@dataclass(frozen=True, eq=False)
class TileTable:
    """One row per tile, sorted by name, each column of length N.

    Attributes:
        tile: name below TILES, such as `images/1052_3_7.png` (StringDType).
        size: bytes of the tile (int64).
        crc32c: of the tile's bytes (uint32); for a local file, of its modification time.
        generation: object generation, pins the read (int64); for a local file, its modification time in ns.
        label_size: bytes of the label object (int64), -1 where there is none.
        label_crc32c: of the label's bytes (uint32), 0 where there is none.
    """

    tile: npt.NDArray[np.str_]
    size: npt.NDArray[np.int64]
    crc32c: npt.NDArray[np.uint32]
    generation: npt.NDArray[np.int64]
    label_size: npt.NDArray[np.int64]
    label_crc32c: npt.NDArray[np.uint32]

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) != 1:
            raise CacheFormatError(f"the tile table's columns differ in length: {lengths}")
        if len(self) > 1 and not np.all(self.tile[1:] > self.tile[:-1]):
            raise CacheFormatError("the tile table is not sorted by name, or names a tile twice")

    def __len__(self) -> int:
        return len(self.tile)

    @property
    def labelled(self) -> BoolArray:
        """(N,) bool: rows whose tile has a label object."""
        return np.asarray(self.label_size != NO_LABEL)

    def select(self, rows: npt.NDArray[np.integer | np.bool_]) -> Self:
        """Return the same columns at `rows` (a mask, or ascending indices)."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def identity_digest(self) -> bytes:
        """Return the sha256 of all columns but `generation`, which does not change what a version holds."""
        return self._digest(_IDENTITY_COLUMNS)

    def full_digest(self) -> bytes:
        """Return the sha256 of all columns, a part of the seal."""
        return self._digest(tuple(COLUMN_DTYPES))

    def _digest(self, columns: tuple[str, ...]) -> bytes:
        """Hash the names, each after its length so that no two tables give the same bytes; then the columns."""
        digest = hashlib.sha256(len(self).to_bytes(8, "little"))
        for name in self.tile:
            encoded = str(name).encode()
            digest.update(len(encoded).to_bytes(4, "little"))
            digest.update(encoded)
        for column in columns:
            digest.update(np.ascontiguousarray(getattr(self, column), COLUMN_DTYPES[column]).tobytes())
        return digest.digest()
