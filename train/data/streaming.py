"""Batches of tiles streamed through the same feed and transform as in extraction."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema import NO_LABEL, Status, TileTable
from extract.backbone.checkpoint import Checkpoint
from extract.backbone.transform import TileTransform
from extract.ranks.group import Ranks
from extract.tiles.batch import TileRequest, make_requests
from extract.tiles.feed import TileFeed
from extract.tiles.listing import list_tiles
from extract.tiles.source import Source
from train.errors import TrainError
from train.model.augment import NO_AUGMENTATION, Augmentation

from .batches import StridedTiles, split_evenly
from .labels import LabelledCache

Index = npt.NDArray[np.int64]


class StreamedTiles(StridedTiles):
    """n labelled rows of a cache, with pixels read from the tile source of the cache.

    Args:
        cache: the tiles and their labels; label files are not read again.
        feed: worker processes, shared by the sets of a run.
        dtype: dtype of the pixel values.
        eval_batch: tiles per forward pass in evaluation, the batch size the cache was made with.
        augmentation: applied in training, not in evaluation.
    """

    def __init__(
        self,
        cache: LabelledCache,
        feed: TileFeed,
        checkpoint: Checkpoint,
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        eval_batch: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        super().__init__(cache.rows, ranks)
        self._table = cache.version.read_table()
        self._feed = feed
        self._transform = TileTransform(checkpoint.image_size, checkpoint.mean, checkpoint.std)
        self._dtype = dtype
        self._eval_batch = eval_batch
        self._augmentation = augmentation

    def _load_epoch(self, shares: Sequence[Tensor], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        mean, std = self._transform.mean, self._transform.std
        for share, pixels in zip(shares, self._read(shares), strict=True):
            if len(share):
                pixels = self._augmentation.apply(pixels, share, seed=seed, epoch=epoch, mean=mean, std=std)
            yield pixels, self._labels[share].to(self._ranks.device)

    def iterate_share(self) -> Iterator[Tensor]:
        return self._read(split_evenly(self.share, len(self), self._eval_batch, self._ranks))

    def _read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield pixel values of batches of rows; a rank takes part with an empty batch where it has no row."""
        size = self._transform.image_size
        empty = torch.empty(0, 3, size, size, device=self._ranks.device, dtype=self._dtype)
        pixels = self.read_rows([self.rows.index[batch.numpy()] for batch in batches if len(batch)])
        return (next(pixels) if len(batch) else empty for batch in batches)

    def read_rows(self, batches: Sequence[Index]) -> Iterator[Tensor]:
        """Yield pixel values (b, 3, S, S) for batches of table rows, in order.

        Raises:
            TrainError: a tile cannot be read any more.
        """
        requests = (make_requests(self._table, batch.tolist(), labels=False) for batch in batches)
        for batch in self._feed.read(requests):
            bad = np.flatnonzero(batch.status != Status.EMBEDDED)
            if len(bad):  # it was embedded once; leaving it out would misplace the labels of the others
                name, status = self._table.tile[batch.rows[bad[0]]], Status(batch.status[bad[0]])
                raise TrainError(f"{name} {status.reason}, but the cache holds its embedding: run `make extract` again")
            yield self._transform(batch.images, device=self._ranks.device, dtype=self._dtype)


def check_tiles_unchanged(source: Source, caches: Sequence[LabelledCache]) -> None:
    """Check that every used row of caches made from this source still has the same tile and label file.

    Raises:
        TrainError: some are gone or changed; the message counts them and names a few.
    """
    listed = list_tiles(source, unlabelled=True).table
    position = {str(name): i for i, name in enumerate(listed.tile)}
    gone, changed = [], []
    tables = ((cache.version.read_table(), cache.rows.index.tolist()) for cache in caches)
    for cached, row in ((table, row) for table, rows in tables for row in rows):
        name = str(cached.tile[row])
        now = position.get(name)
        if now is None:
            gone.append(name)
        elif cached.size[row] != listed.size[now] or cached.crc32c[row] != listed.crc32c[now]:
            changed.append(name)
        elif listed.label_size[now] == NO_LABEL or cached.label_crc32c[row] != listed.label_crc32c[now]:
            changed.append(f"the label of {name}")
    if gone or changed:
        raise TrainError(
            f"{source.url} is not what the cache was made from: {len(gone):,} tiles gone, {len(changed):,} changed "
            f"(such as {', '.join([*gone, *changed][:3])}): run `make extract` again"
        )


def request_batches(table: TileTable, rows: range, batch_size: int) -> Iterator[list[TileRequest]]:
    """Yield requests for consecutive batches of `rows` of a table, without labels."""
    for start in range(rows.start, rows.stop, batch_size):
        yield make_requests(table, range(start, min(start + batch_size, rows.stop)), labels=False)
