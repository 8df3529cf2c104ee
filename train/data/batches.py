"""Batches of labelled tiles for the training loop, and the order in which an epoch shows the rows.

`Tiles` is what the loop sees. `StridedTiles` is the base of the sets that share out a batch by row;
`blocks.BlockTiles` shares out whole blocks instead. The order of an epoch depends on seed and epoch alone, so it is the
same for any number of ranks and after a resume.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        rows: (b,) int64 on the CPU, positions in the set.
        global_size: rows of the batch over all ranks.
    """

    inputs: Tensor
    labels: Tensor
    rows: Tensor
    global_size: int


class Tiles(ABC):
    """A set of labelled tiles, its `rows`, to train or evaluate on, shared between ranks."""

    def __init__(self, rows: LabelledRows, ranks: Ranks) -> None:
        self.rows = rows
        self._labels = torch.from_numpy(rows.labels)
        self._ranks = ranks

    def __len__(self) -> int:
        return len(self.rows)

    @property
    @abstractmethod
    def share(self) -> Tensor:
        """(m,) int64 rows that this rank evaluates; the shares of all ranks make up the set."""

    @abstractmethod
    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's share of every global batch of an epoch, from `first_step` on."""

    @abstractmethod
    def iterate_share(self) -> Iterator[Tensor]:
        """Yield the inputs of the rows in `share`, in order and unpadded.

        Inputs of a backbone come in the same number of batches on every rank.
        """


class StridedTiles(Tiles):
    """Tiles of which each rank takes every world_size-th row, of a training batch and of the evaluated set."""

    @property
    def share(self) -> Tensor:
        return take_share(torch.arange(len(self)), self._ranks)

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's share of every global batch from `first_step` on; that of a short last one may be empty."""
        order = draw_epoch(self.rows, seed, epoch)
        batches = order.split(batch_size)[first_step:] if len(order) else ()
        shares = [take_share(batch, self._ranks) for batch in batches]
        loaded = self._load_epoch(shares, seed, epoch)
        for batch, share, (inputs, labels) in zip(batches, shares, loaded, strict=True):
            yield Batch(inputs, labels, share, len(batch))

    @abstractmethod
    def _load_epoch(self, shares: Sequence[Tensor], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels, on the device, for each share of a training batch."""


def take_share(rows: Tensor, ranks: Ranks) -> Tensor:
    """Take every world_size-th of `rows` for this rank; unlike DistributedSampler, this repeats no row."""
    return rows[ranks.rank :: ranks.world_size]


def split_evenly(share: Tensor, total: int, size: int, ranks: Ranks) -> list[Tensor]:
    """Split a rank's share of `total` rows into parts of `size`, the same number of parts on every rank.

    Ranks that hold a model in shards must run every forward pass together, so the last part may be empty. Where shares
    are uneven, as with blocks, a larger share has larger parts.
    """
    count = max(1, -(-total // (ranks.world_size * size)))
    mine = max(size, -(-len(share) // count))
    return [share[part * mine : (part + 1) * mine] for part in range(count)]


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation of `rows` that depends on seed and epoch alone, not on ranks or earlier epochs."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)


def draw_repeats(factors: Float64Array, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Draw how often the epoch shows each tile, (n,): its factor, rounded up with the probability of its fraction.

    The draw depends on seed and epoch alone, so all ranks agree whatever their number.
    """
    whole = np.floor(factors)
    up = np.random.default_rng([seed, epoch]).random(len(factors)) < factors - whole
    return (whole + up).astype(np.int64)


def draw_epoch(rows: LabelledRows, seed: int, epoch: int) -> Tensor:
    """Draw the rows of an epoch in order, (m,) int64, repeated rows as often as drawn; m is `count_epoch`."""
    if rows.repeat_factors is None:
        return epoch_order(len(rows), seed, epoch)
    repeats = draw_repeats(rows.repeat_factors, seed, epoch)
    shown = torch.from_numpy(np.repeat(np.arange(len(rows)), repeats))
    return shown[epoch_order(len(shown), seed, epoch)]


def count_epoch(rows: LabelledRows, seed: int, epoch: int) -> int:
    """Count the tiles that an epoch shows, repeats included."""
    return len(rows) if rows.repeat_factors is None else int(draw_repeats(rows.repeat_factors, seed, epoch).sum())
