"""Batches from cached embeddings: everything in memory, no Python per row."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from extract.distributed import Ranks

from .batches import Batch, take_share
from .rows import LabelledCache
from .sampling import draw_epoch

_EVAL_ROWS = 8192


class CachedTiles:
    """n labelled rows of a cache on the rank's device.

    Every rank holds all rows, so that the order of training does not depend on how many ranks there are.
    """

    def __init__(self, cache: LabelledCache, features: tuple[str, ...], ranks: Ranks) -> None:
        self.rows = cache.rows
        joined = np.concatenate([cache.values.pooled[name][cache.rows.index] for name in features], axis=1)
        self._embeddings = torch.from_numpy(joined).to(ranks.device)
        self._labels = torch.from_numpy(cache.rows.labels).to(ranks.device)
        self._ranks = ranks

    def __len__(self) -> int:
        return len(self._labels)

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """This rank's share of every global batch, in an order that only seed and epoch decide."""
        order = draw_epoch(self.rows, seed, epoch)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            share = take_share(chosen, self._ranks)
            mine = share.to(self._labels.device)
            yield Batch(self._embeddings[mine], self._labels[mine], share, len(chosen))

    def iterate_share(self) -> Iterator[Tensor]:
        """Inputs of every world_size-th row in order, unpadded, for evaluation."""
        share = take_share(torch.arange(len(self)), self._ranks).to(self._labels.device)
        return (self._embeddings[part] for part in share.split(_EVAL_ROWS))
