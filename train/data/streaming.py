"""Batches from tiles streamed end to end, through the same feed and transform as extraction."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema import NO_LABEL, Status, TileTable
from extract.backbone.checkpoint import Checkpoint
from extract.backbone.transform import TileTransform
from extract.ranks.group import Ranks
from extract.tiles.batch import TileBatch, TileRequest, make_requests
from extract.tiles.feed import TileFeed
from extract.tiles.listing import list_tiles
from extract.tiles.source import Source
from train.errors import TrainError
from train.model.augment import NO_AUGMENTATION, Augmentation

from .batches import Batch, share_epoch, split_evenly, take_share
from .labels import LabelledCache

Index = npt.NDArray[np.int64]


class StreamedTiles:
    """n labelled rows of a cache, read from where the cache's tiles came from.

    Args:
        cache: which tiles, and their labels; label files are not read again.
        feed: worker processes, shared by the sets of a run.
        checkpoint: of the backbone; gives size, mean and std.
        dtype: of the pixel values.
        eval_batch: tiles per forward pass in evaluation, the cache's own batch size.
        augmentation: of the tiles of an epoch; those that are evaluated are left as they are.
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
        self.rows = cache.rows
        self._table = cache.version.read_table()
        self._labels = torch.from_numpy(cache.rows.labels)
        self._feed = feed
        self._transform = TileTransform(checkpoint.image_size, checkpoint.mean, checkpoint.std)
        self._ranks = ranks
        self._dtype = dtype
        self._eval_batch = eval_batch
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self.rows)

    def iterate_epoch(self, *, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This rank's share of every global batch, in an order that only seed and epoch decide."""
        shares = share_epoch(
            self.rows, self._ranks, batch_size=batch_size, seed=seed, epoch=epoch, first_step=first_step
        )
        # A rank without a row in the last, short batch still takes part in it, with nothing.
        pixels = self._read([share for share, _ in shares])
        for (share, size), plain in zip(shares, pixels, strict=True):
            inputs = self._augment(plain, share, seed, epoch) if len(share) else plain
            yield Batch(inputs, self._labels[share].to(self._ranks.device), share, size)

    @property
    def share(self) -> Tensor:
        """(m,) int64, the rows that this rank evaluates: every world_size-th."""
        return take_share(torch.arange(len(self)), self._ranks)

    def iterate_share(self) -> Iterator[Tensor]:
        """Pixel values of the rows in `share`, unpadded, in as many batches on every rank."""
        return self._read(split_evenly(self.share, len(self), self._eval_batch, self._ranks))

    def _read(self, batches: list[Tensor]) -> Iterator[Tensor]:
        """Pixel values of batches of rows, which may be of none."""
        pixels = self.read_rows([self.rows.index[batch.numpy()] for batch in batches if len(batch)])
        return (next(pixels) if len(batch) else self._no_pixels() for batch in batches)

    def read_rows(self, batches: Sequence[Index]) -> Iterator[Tensor]:
        """Pixel values (b, 3, S, S) of batches of rows of the table, in order."""
        requests = (make_requests(self._table, batch.tolist(), labels=False) for batch in batches)
        for batch in self._feed.read(requests):
            refuse_changed(batch, self._table)
            yield self._transform(batch.images, device=self._ranks.device, dtype=self._dtype)

    def _augment(self, pixels: Tensor, rows: Tensor, seed: int, epoch: int) -> Tensor:
        mean, std = self._transform.mean, self._transform.std
        return self._augmentation.apply(pixels, rows, seed=seed, epoch=epoch, mean=mean, std=std)

    def _no_pixels(self) -> Tensor:
        size = self._transform.image_size
        return torch.empty(0, 3, size, size, device=self._ranks.device, dtype=self._dtype)


def refuse_changed(batch: TileBatch, table: TileTable) -> None:
    """A tile that could be embedded once must still be readable, else rows and labels would fall apart.

    Raises:
        TrainError: naming the tile and what happened to it.
    """
    bad = np.flatnonzero(batch.status != Status.EMBEDDED)
    if len(bad):
        name, status = table.tile[batch.rows[bad[0]]], Status(batch.status[bad[0]])
        raise TrainError(f"{name} {status.reason}, but the cache holds its embedding: run `make extract` again")


def check_tiles_unchanged(source: Source, caches: Sequence[LabelledCache]) -> None:
    """Compare the present listing with the tables of caches made from this source, for the rows in use.

    Raises:
        TrainError: tiles are gone or changed, counted and named.
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
    """Consecutive batches of `rows` of a table, tiles only."""
    for start in range(rows.start, rows.stop, batch_size):
        yield make_requests(table, range(start, min(start + batch_size, rows.stop)), labels=False)
