"""What the loop is fed with, cached or streamed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from extract.ranks.group import Ranks

from .labels import LabelledRows
from .rare import Float64Array


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
        """Inputs of the rows in `share`, in its order and unpadded; what a backbone is to run on, in as many batches on
        every rank."""


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `rows` that depends on seed and epoch alone, not on ranks or history."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)


def take_share(rows: Tensor, ranks: Ranks) -> Tensor:
    """Every world_size-th of `rows`, beginning at this rank; unlike DistributedSampler, nothing is repeated."""
    return rows[ranks.rank :: ranks.world_size]


def split_evenly(share: Tensor, total: int, size: int, ranks: Ranks) -> list[Tensor]:
    """A rank's share of `total` rows in parts of `size`, on every rank as many as an even share has, so that the last
    may hold nothing: ranks that share out a model's weights compute together or not at all. Where shares are not even,
    as those of streamed blocks, a larger one has larger parts."""
    count = max(1, -(-total // (ranks.world_size * size)))
    mine = max(size, -(-len(share) // count))
    return [share[part * mine : (part + 1) * mine] for part in range(count)]


def draw_repeats(factors: Float64Array, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """(n,) how often each tile is shown in this epoch: its factor, rounded up with the probability of its fraction.

    Depends on seed and epoch alone, so every rank draws the same, whatever their number.
    """
    whole = np.floor(factors)
    up = np.random.default_rng([seed, epoch]).random(len(factors)) < factors - whole
    return (whole + up).astype(np.int64)


def draw_epoch(rows: LabelledRows, seed: int, epoch: int) -> Tensor:
    """(m,) int64, the rows of an epoch in their order, each as often as it is to be shown; m is `count_epoch`."""
    if rows.repeat_factors is None:
        return epoch_order(len(rows), seed, epoch)
    repeats = draw_repeats(rows.repeat_factors, seed, epoch)
    shown = torch.from_numpy(np.repeat(np.arange(len(rows)), repeats))
    return shown[epoch_order(len(shown), seed, epoch)]


def share_epoch(
    rows: LabelledRows, ranks: Ranks, *, batch_size: int, seed: int, epoch: int, first_step: int
) -> list[tuple[Tensor, int]]:
    """This rank's share of every global batch of an epoch, from `first_step` on, and how many rows the batch has over
    all ranks. The batches depend on seed and epoch alone; a share of a short last one may be empty."""
    order = draw_epoch(rows, seed, epoch)
    batches = order.split(batch_size)[first_step:] if len(order) else ()
    return [(take_share(batch, ranks), len(batch)) for batch in batches]


def count_epoch(rows: LabelledRows, seed: int, epoch: int) -> int:
    """Tiles shown in an epoch, repeated ones as often as they are."""
    return len(rows) if rows.repeat_factors is None else int(draw_repeats(rows.repeat_factors, seed, epoch).sum())
