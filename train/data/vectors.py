"""The vectors of a cache version, held on a device or left in the cache.

The scan that reads labels and checks digests also fills `HeldVectors` or `BlockVectors`. The ranks of a job share one
scan: each keeps the blocks of its share, then all exchange what they kept.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cache_schema import BlockValues, IntegrityError, Version
from cache_schema.cli.text import format_bytes
from cache_schema.layout import DIGEST_BYTES, Float16Array
from extract.ranks.exchange import exchange
from extract.ranks.group import Ranks
from train.config import TrainConfig

from .memory import StreamingMemory, choose_budget


class HeldVectors:
    """(N, F) float16 vectors of a version on a device, shared by all sets of a run; `features` are joined in order.

    Rows of blocks not kept are undefined.
    """

    def __init__(self, version: Version, features: tuple[str, ...], device: torch.device) -> None:
        self._layout = version.layout
        self._features = features
        width = version.layout.width * len(features)
        self._vectors = torch.empty(version.layout.rows, width, dtype=torch.float16, device=device)

    def keep(self, block: int, values: BlockValues) -> None:
        """Copy a block's vectors to the device; thread-safe for different blocks."""
        columns = self._vectors[self._layout.block_slice(block)].split(self._layout.width, dim=1)
        for column, name in zip(columns, self._features, strict=True):
            column.copy_(torch.from_numpy(values.pooled[name]))

    def exchange(self, shares: Sequence[slice], ranks: Ranks) -> None:
        """Receive the blocks that other ranks kept, `shares[i]` from rank i; every rank must call this."""
        exchange(self._vectors, [self._layout.span(share) for share in shares], ranks)

    def gather(self, rows: Tensor) -> Tensor:
        """Return (len(rows), F) float16 copies of table rows (int64)."""
        return self._vectors.index_select(0, rows.to(self._vectors.device))


class BlockVectors:
    """Vectors that stay in the cache and are read block by block in every epoch.

    A commit's digest also covers arrays that are not read again. So the scan, which checks whole blocks against their
    commits, takes a digest of the vectors alone, and every later read is compared with that.

    Args:
        features: pooled arrays, joined in this order.
        memory: number of blocks to read ahead and of rows to shuffle.
    """

    def __init__(self, version: Version, features: tuple[str, ...], memory: StreamingMemory) -> None:
        self.layout = version.layout
        self.memory = memory
        self._url = version.url
        self._features = features
        self._digests = np.zeros((version.layout.blocks, DIGEST_BYTES), np.uint8)
        self._read = version.open_pooled(features)

    @property
    def width(self) -> int:
        """F, the length of the joined features."""
        return self.layout.width * len(self._features)

    def keep(self, block: int, values: BlockValues) -> None:
        """Keep the digest of a block's vectors; thread-safe for different blocks."""
        self._digests[block] = np.frombuffer(_digest([values.pooled[name] for name in self._features]), np.uint8)

    def exchange(self, shares: Sequence[slice], ranks: Ranks) -> None:
        """Receive the digests that other ranks kept, `shares[i]` from rank i; every rank must call this."""
        exchange(torch.from_numpy(self._digests), shares, ranks)

    def read(self, block: int) -> list[Float16Array]:
        """Read a block's vectors, one (rows of the block, D) float16 array per feature.

        Raises:
            IntegrityError: they cannot be read, or changed since the scan.
        """
        try:
            parts = self._read(block)
            if _digest(parts) != self._digests[block].tobytes():
                raise IntegrityError("its vectors changed since the run began")
        except IntegrityError as error:
            raise IntegrityError(
                f"block {block} of {self._url}: {error}: run `python -m cache_schema verify {self._url}` to see what "
                "is wrong; the checkpoints are unaffected"
            ) from error
        return parts


Vectors = HeldVectors | BlockVectors


@dataclass(frozen=True)
class Residence:
    """Decides whether the vectors of a run's caches are held in memory or stay in the cache.

    Attributes:
        features: pooled arrays, joined in this order.
        device: device for vectors held in memory.
        size: bytes of all vectors.
        budget: bytes they may take.
        batch_size: largest number of rows in a global batch.
        held: true if they are held in memory.
    """

    features: tuple[str, ...]
    device: torch.device
    size: int
    budget: int
    batch_size: int
    held: bool

    @classmethod
    def choose(cls, config: TrainConfig, versions: Sequence[Version], device: torch.device) -> Self:
        """Hold the vectors if all of them fit; never for fine-tuning, which reads them once."""
        features = tuple(config.features.split("+"))
        size = sum(version.layout.rows * version.layout.width * len(features) * 2 for version in versions)
        budget = config.memory_budget or choose_budget(device)
        return cls(features, device, size, budget, config.batch_size, held=not config.unfreeze and size <= budget)

    def place(self, version: Version) -> Vectors:
        """Make the empty container for the vectors of one version.

        Raises:
            TrainError: the budget is too small to stream them.
        """
        if self.held:
            return HeldVectors(version, self.features, self.device)
        memory = StreamingMemory.divide(self.budget, version.layout, len(self.features), self.batch_size)
        return BlockVectors(version, self.features, memory)

    def describe(self, vectors: Vectors) -> str:
        """Return a line for the user; `vectors` are those of the training rows."""
        if isinstance(vectors, HeldVectors):
            return f"vectors are held in memory: {format_bytes(self.size)}, the budget is {format_bytes(self.budget)}"
        return (
            f"vectors stay in the cache: {format_bytes(self.size)}, the budget is {format_bytes(self.budget)}; blocks "
            f"are read in every epoch and shuffled {vectors.memory.buffer_rows:,} rows at a time"
        )


def _digest(parts: Sequence[Float16Array]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    return digest.digest()
