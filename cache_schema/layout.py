"""Arrays, dtypes and blocks of rows of a version. README.md in this folder is the normative text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CacheFormatError

FORMAT_VERSION = 1
ATTRIBUTE = "tileprobe"
"""The group attribute that describes the version."""
LABEL_ID_COLUMNS = 128
"""Width of `label_ids`; the last column counts all larger ids and all malformed lines."""

POOLED_DTYPE = np.dtype("<f2")
LABEL_IDS_DTYPE = np.dtype("<u2")
STATUS_DTYPE = np.dtype("u1")
DIGEST_BYTES = 32
TABLE_CHUNK_ROWS = 65_536

Float16Array = npt.NDArray[np.float16]
UInt16Array = npt.NDArray[np.uint16]
UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]


class Status(IntEnum):
    """State of a row. 2 and up are quarantined: the bytes of the tile cannot be embedded."""

    PENDING = 0
    EMBEDDED = 1
    UNDECODABLE = 2
    OVER_LIMIT = 3
    GONE = 4
    CHECKSUM_MISMATCH = 5

    @property
    def quarantined(self) -> bool:
        return self > Status.EMBEDDED

    @property
    def reason(self) -> str:
        return _REASONS[self]


_REASONS = {
    Status.PENDING: "not embedded yet",
    Status.EMBEDDED: "embedded",
    Status.UNDECODABLE: "cannot be decoded as an image",
    Status.OVER_LIMIT: "has more pixels or bytes than the limit",
    Status.GONE: "was listed but is gone",
    Status.CHECKSUM_MISMATCH: "differs from its listing in two fresh reads",
}


def count_blocks(number: int) -> str:
    """Write a number of blocks: `1 block`, `2 blocks`."""
    return f"{number:,} block{'' if number == 1 else 's'}"


def choose_block_rows(rows: int) -> int:
    """Choose the rows of a block. A small block loses little when a run is stopped; a large one makes fewer objects."""
    return 4096 if rows > 1_000_000 else 256


@dataclass(frozen=True)
class Layout:
    """The shape of one version.

    Attributes:
        rows: N, one per tile.
        width: D of every pooled array.
        pooling: names of the pooled arrays, in digest order.
        block_rows: rows of a block, the unit of writing, committing and ownership.
    """

    rows: int
    width: int
    pooling: tuple[str, ...]
    block_rows: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    def block_slice(self, block: int) -> slice:
        """Return the rows of `block`; the last block may be short."""
        if not 0 <= block < self.blocks:
            raise IndexError(f"block {block} of {self.blocks}")
        return slice(block * self.block_rows, min((block + 1) * self.block_rows, self.rows))

    def span(self, blocks: slice) -> slice:
        """Return the rows of adjacent blocks; `blocks` has a start and a stop, and may be empty."""
        return slice(blocks.start * self.block_rows, min(blocks.stop * self.block_rows, self.rows))

    def count_rows(self, blocks: Iterable[int]) -> int:
        """Count the rows of these blocks together."""
        return sum(rows.stop - rows.start for rows in map(self.block_slice, blocks))

    @property
    def arrays(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of a row of each array that blocks are written to, in digest order."""
        pooled = dict.fromkeys(self.pooling, (POOLED_DTYPE, (self.width,)))
        return {**pooled, "label_ids": (LABEL_IDS_DTYPE, (LABEL_ID_COLUMNS,)), "status": (STATUS_DTYPE, ())}

    def block_slices(self) -> Iterator[slice]:
        return (self.block_slice(block) for block in range(self.blocks))


def check_attributes(attributes: Any, url: str, path: str) -> dict[str, Any]:
    """Check the attribute that describes a version, as it was read from the group `path` of the cache at `url`.

    Raises:
        CacheFormatError: it is missing, incomplete, or of a format that this program does not read.
    """
    if not isinstance(attributes, dict) or "format" not in attributes:
        raise CacheFormatError(f"{url}/{path} is a Zarr group, but not a version of a cache: check CACHE")
    if attributes["format"] != FORMAT_VERSION:
        raise CacheFormatError(
            f"{url}: format {attributes['format']}, this program reads {FORMAT_VERSION}: "
            "update it, or run `make extract` again"
        )
    known = {"format", "rows", "block_rows", "provenance", "recorded"}
    counts = (attributes.get("rows"), attributes.get("block_rows"))
    if set(attributes) != known or not all(type(count) is int and count > 0 for count in counts):
        raise CacheFormatError(
            f"{url}/{path}: its attributes are not those of format {FORMAT_VERSION}: it is damaged; "
            "remove it and run `make extract` again"
        )
    return attributes
