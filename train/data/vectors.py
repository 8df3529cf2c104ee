"""A version's vectors, held on a device or left in the cache.

Either is filled by the one scan that also reads labels and checks digests: before training, the ranks of a job read a
cache once between them. Each keeps the blocks of its share, and the exchange afterwards gives it those of the others.
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
    """(N, F) float16 on a device, shared by all sets of a run; rows of blocks that were not kept mean nothing.

    Args:
        version: whose rows.
        features: pooled arrays, joined in this order.
        device: where they live.
    """

    def __init__(self, version: Version, features: tuple[str, ...], device: torch.device) -> None:
        self._layout = version.layout
        self._features = features
        width = version.layout.width * len(features)
        self._vectors = torch.empty(version.layout.rows, width, dtype=torch.float16, device=device)

    @property
    def device(self) -> torch.device:
        """Where they live."""
        return self._vectors.device

    def keep(self, block: int, values: BlockValues) -> None:
        """Take a block's vectors; any thread may."""
        columns = self._vectors[self._layout.block_slice(block)].split(self._layout.width, dim=1)
        for column, name in zip(columns, self._features, strict=True):
            column.copy_(torch.from_numpy(values.pooled[name]))

    def exchange(self, shares: Sequence[slice], ranks: Ranks) -> None:
        """Get the blocks that the other ranks kept, `shares[i]` those of rank i; all of them must call this."""
        exchange(self._vectors, [self._layout.span(share) for share in shares], ranks)

    def gather(self, rows: Tensor) -> Tensor:
        """(len(rows), F) float16 copies of rows of the table; `rows` is int64 on the same device."""
        return self._vectors.index_select(0, rows)


class BlockVectors:
    """Vectors that stay in the cache and are read block by block, as often as they are needed.

    A commit's digest covers arrays that are not read again, so each block's vectors are compared with a digest of
    themselves, taken when the whole block was found to agree with its commit.

    Args:
        version: whose blocks.
        features: pooled arrays, joined in this order.
        memory: how many blocks to read ahead, and how many rows to shuffle.
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
        """F, of the joined features."""
        return self.layout.width * len(self._features)

    def keep(self, block: int, values: BlockValues) -> None:
        """Remember what a block's vectors are; any thread may."""
        self._digests[block] = np.frombuffer(_digest([values.pooled[name] for name in self._features]), np.uint8)

    def exchange(self, shares: Sequence[slice], ranks: Ranks) -> None:
        """Get the digests that the other ranks kept, `shares[i]` those of rank i; all of them must call this."""
        exchange(torch.from_numpy(self._digests), shares, ranks)

    def read(self, block: int) -> list[Float16Array]:
        """A block's vectors: for each feature (rows of the block, D) float16, side by side F columns.

        Raises:
            IntegrityError: they cannot be read, or are not what they were when the block was kept.
        """
        try:
            parts = self._read(block)
            if _digest(parts) != self._digests[block].tobytes():
                raise IntegrityError("its vectors are not what they were when the run began")
        except IntegrityError as error:
            raise IntegrityError(
                f"block {block} of {self._url}: {error}: `python -m cache_schema verify {self._url}` says what is "
                "wrong with it; the checkpoints are as they were"
            ) from error
        return parts


Vectors = HeldVectors | BlockVectors


@dataclass(frozen=True)
class Residence:
    """Where the vectors of a run's caches live.

    Attributes:
        features: pooled arrays, joined in this order.
        device: of the vectors that are held.
        size: bytes of all vectors.
        budget: bytes they may take.
        batch_size: rows of a global batch at most.
        held: whether they are held in memory, else they stay in the cache.
    """

    features: tuple[str, ...]
    device: torch.device
    size: int
    budget: int
    batch_size: int
    held: bool

    @classmethod
    def choose(cls, config: TrainConfig, versions: Sequence[Version], device: torch.device) -> Self:
        """Hold vectors where all of them fit. Fine-tuning looks at them once, so it never does."""
        features = tuple(config.features.split("+"))
        size = sum(version.layout.rows * version.layout.width * len(features) * 2 for version in versions)
        budget = config.memory_budget or choose_budget(device)
        return cls(features, device, size, budget, config.batch_size, held=not config.unfreeze and size <= budget)

    def place(self, version: Version) -> Vectors:
        """Where one cache's vectors go, still empty.

        Raises:
            TrainError: the budget is too small to stream them.
        """
        if self.held:
            return HeldVectors(version, self.features, self.device)
        memory = StreamingMemory.divide(self.budget, version.layout, len(self.features), self.batch_size)
        return BlockVectors(version, self.features, memory)

    def describe(self, vectors: Vectors) -> str:
        """A line for the user; `vectors` are those of the training rows."""
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
