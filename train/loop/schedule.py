"""How many tiles and steps the epochs of a training have."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

from train.data.batches import count_epoch
from train.data.labels import LabelledRows

MIN_EPOCH_STEPS = 20


def choose_batch_size(rows: int, asked: int) -> int:
    """Return the asked global batch, halved until an epoch has 20 steps."""
    size = asked
    while size > 1 and rows / size < MIN_EPOCH_STEPS:
        size //= 2
    return size


@dataclass(frozen=True)
class Schedule:
    """Tiles and steps of every epoch. Repeated tiles make epochs longer, and not all by as much.

    Attributes:
        tiles: of each epoch.
        batch_size: global.
    """

    tiles: Sequence[int]
    batch_size: int

    @classmethod
    def plan(cls, rows: LabelledRows, *, seed: int, epochs: int, batch_size: int) -> Self:
        """Plan the epochs over these rows."""
        return cls([count_epoch(rows, seed, epoch) for epoch in range(epochs)], batch_size)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate((math.ceil(tiles / self.batch_size) for tiles in self.tiles), initial=0))

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self._ends[-1]

    def number_steps(self, epoch: int) -> range:
        """Return the numbers of an epoch's steps, counted from 0 over all epochs."""
        return range(self._ends[epoch], self._ends[epoch + 1])

    def count_tiles(self, epochs: int, steps: int) -> int:
        """Return how many tiles have been trained after so many epochs, and steps of the next."""
        return sum(self.tiles[:epochs]) + steps * self.batch_size
