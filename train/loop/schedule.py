"""Count the tiles and steps of a training's epochs."""

import math
from itertools import accumulate

from train.data.batches import count_epoch
from train.data.labels import LabelledRows

MIN_EPOCH_STEPS = 20


def choose_batch_size(rows: int, asked: int) -> int:
    """Return the asked global batch, halved until an epoch has 20 steps."""
    size = asked
    while size > 1 and rows / size < MIN_EPOCH_STEPS:
        size //= 2
    return size


class Schedule:
    """Tiles and steps of every epoch. Repeated tiles make epochs longer, and not all by as much.

    Attributes:
        tiles: of each epoch.
        steps: of all epochs together.
    """

    def __init__(self, rows: LabelledRows, *, seed: int, epochs: int, batch_size: int) -> None:
        self.tiles = [count_epoch(rows, seed, epoch) for epoch in range(epochs)]
        self._batch_size = batch_size
        self._ends = list(accumulate((math.ceil(tiles / batch_size) for tiles in self.tiles), initial=0))
        self.steps = self._ends[-1]

    def number_steps(self, epoch: int) -> range:
        """Return the numbers of an epoch's steps, counted from 0 over all epochs."""
        return range(self._ends[epoch], self._ends[epoch + 1])

    def count_tiles(self, epochs: int, steps: int) -> int:
        """Return how many tiles have been trained after so many epochs, and steps of the next."""
        return sum(self.tiles[:epochs]) + steps * self._batch_size
