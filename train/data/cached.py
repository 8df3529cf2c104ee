"""Batches of cached vectors: from memory where they fit, else from the blocks of the cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from extract.ranks.group import Ranks

from .batches import StridedTiles, Tiles, take_share
from .blocks import BlockTiles
from .labels import LabelledCache, LabelledRows
from .vectors import HeldVectors

_EVAL_ROWS = 8192


def open_cached_tiles(cache: LabelledCache, ranks: Ranks) -> Tiles:
    """Open the rows of a cache for the loop, with vectors from memory or from blocks."""
    if isinstance(cache.vectors, HeldVectors):
        return CachedTiles(cache.rows, cache.vectors, ranks)
    return BlockTiles(cache.rows, cache.vectors, ranks)


class CachedTiles(StridedTiles):
    """n labelled rows whose vectors are on the rank's device; no Python per row, and no copy except a batch's.

    Every rank holds all rows, so the training order does not depend on the number of ranks.
    """

    def __init__(self, rows: LabelledRows, vectors: HeldVectors, ranks: Ranks) -> None:
        super().__init__(rows, ranks)
        self._vectors = vectors
        self._index = torch.from_numpy(rows.index).to(ranks.device)
        self._labels = self._labels.to(ranks.device)

    def _load_epoch(self, shares: Sequence[Tensor], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # One transfer for the whole epoch: one per batch would make the device wait for the host each time.
        on_device = torch.cat([torch.arange(0), *shares]).to(self._ranks.device)
        for mine in on_device.split([len(share) for share in shares]):
            inputs = self._vectors.gather(self._index.index_select(0, mine))
            yield inputs, self._labels.index_select(0, mine)

    def iterate_share(self) -> Iterator[Tensor]:
        return (self._vectors.gather(rows) for rows in take_share(self._index, self._ranks).split(_EVAL_ROWS))
