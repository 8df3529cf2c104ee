"""Batches from cached vectors: from memory where they fit, else from the cache's blocks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from extract.ranks.group import Ranks

from .batches import Batch, Tiles, share_epoch, take_share
from .blocks import BlockTiles
from .labels import LabelledCache, LabelledRows
from .vectors import HeldVectors

_EVAL_ROWS = 8192


def open_cached_tiles(cache: LabelledCache, ranks: Ranks) -> Tiles:
    """The cache's rows for the loop, from wherever their vectors are."""
    if isinstance(cache.vectors, HeldVectors):
        return CachedTiles(cache.rows, cache.vectors, ranks)
    return BlockTiles(cache.rows, cache.vectors, ranks)


class CachedTiles:
    """n labelled rows of a cache on the rank's device; no Python per row, and no copy besides a batch's.

    Every rank holds all rows, so that the order of training does not depend on how many ranks there are.
    """

    def __init__(self, rows: LabelledRows, vectors: HeldVectors, ranks: Ranks) -> None:
        self.rows = rows
        self._vectors = vectors
        self._index = torch.from_numpy(rows.index).to(ranks.device)
        self._labels = torch.from_numpy(rows.labels).to(ranks.device)
        self._ranks = ranks

    def __len__(self) -> int:
        return len(self.rows)

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's share of every global batch, in an order that only seed and epoch decide."""
        shares = share_epoch(
            self.rows, self._ranks, batch_size=batch_size, seed=seed, epoch=epoch, first_step=first_step
        )
        # One transfer for the whole epoch: with one a batch, the device would wait for the host each time.
        on_device = torch.cat([torch.arange(0), *(share for share, _ in shares)]).to(self._labels.device)
        parts = on_device.split([len(share) for share, _ in shares])
        for (share, size), mine in zip(shares, parts, strict=True):
            inputs = self._vectors.gather(self._index.index_select(0, mine))
            yield Batch(inputs, self._labels.index_select(0, mine), share, size)

    @property
    def share(self) -> Tensor:
        """(m,) int64, the rows that this rank evaluates: every world_size-th."""
        return take_share(torch.arange(len(self)), self._ranks)

    def iterate_share(self) -> Iterator[Tensor]:
        """Inputs of the rows in `share`, unpadded."""
        return (self._vectors.gather(rows) for rows in take_share(self._index, self._ranks).split(_EVAL_ROWS))
