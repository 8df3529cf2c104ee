"""What lies where in a version: arrays, dtypes, blocks of rows. README.md beside this file is the normative text."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 1
ATTRIBUTE = "tileprobe"
"""The group attribute that holds everything about a version."""
LABEL_ID_COLUMNS = 128
"""Width of `label_ids`; the last column counts every larger id and every malformed line."""

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
    """State of a row. 2 and up are quarantined: the tile's own bytes could not become an embedding."""

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
    """`1 block`, `2 blocks`."""
    return f"{number:,} block{'' if number == 1 else 's'}"


def choose_block_rows(rows: int) -> int:
    """Rows of a block: small ones keep a preempted run's loss small, large ones keep the object count small."""
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
        """Rows of `block`; the last one may be short."""
        if not 0 <= block < self.blocks:
            raise IndexError(f"block {block} of {self.blocks}")
        return slice(block * self.block_rows, min((block + 1) * self.block_rows, self.rows))

    def span(self, blocks: slice) -> slice:
        """Rows of blocks that lie side by side, `blocks` with start and stop; there may be none."""
        return slice(blocks.start * self.block_rows, min(blocks.stop * self.block_rows, self.rows))

    def block_slices(self) -> Iterator[slice]:
        return (self.block_slice(block) for block in range(self.blocks))
