"""What the loop is fed with, cached or streamed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from extract.distributed import Ranks

from .rows import LabelledRows


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        inputs: (b, F) embeddings or (b, 3, S, S) pixel values on the device; b may be 0.
        labels: (b, C) bool on the device.
        rows: (b,) int64, which of the set's rows these are; on the CPU.
        global_size: rows of the batch over all ranks.
    """

    inputs: Tensor
    labels: Tensor
    rows: Tensor
    global_size: int


class Tiles(Protocol):
    """A set of labelled tiles the loop can train or evaluate on.

    Attributes:
        rows: which tiles.
        share: (m,) int64, those that this rank evaluates; the ranks' shares make up the set.
    """

    rows: LabelledRows

    @property
    def share(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's share of every global batch of an epoch, from `first_step` on."""

    def iterate_share(self) -> Iterator[Tensor]:
        """Inputs of the rows in `share`, in its order and unpadded."""


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `rows` that depends on seed and epoch alone, not on ranks or history."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)


def take_share(rows: Tensor, ranks: Ranks) -> Tensor:
    """Every world_size-th of `rows`, beginning at this rank; unlike DistributedSampler, nothing is repeated."""
    return rows[ranks.rank :: ranks.world_size]
