"""Prepare fine-tuning: check backbone, tiles and starting head, and stream tiles through the backbone of the cache."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from cache_schema import Version
from extract.backbone.checkpoint import Checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.provenance import find_cached_checkpoint
from extract.ranks.group import Ranks
from extract.tiles.feed import TileFeed
from extract.tiles.source import open_source
from train.data.labels import LabelledCache
from train.data.prefix import PrefixCache, PrefixTiles, compute_slots, plan_slots
from train.data.streaming import Index, StreamedTiles, check_tiles_unchanged
from train.errors import CheckpointError, TrainError
from train.model.augment import NO_AUGMENTATION, Augmentation
from train.runs.checkpoint import CheckpointMeta

from .step_zero import StepZero


def check_finetuning(caches: Sequence[LabelledCache], unfreeze: int) -> None:
    """Check, before anything is written, that the last `unfreeze` layers can be trained on these sets, training first.

    Raises:
        TrainError: there are fewer layers, or the tiles are not those of the cache.
        ProvenanceError: the backbone found is not the one that made the cache.
    """
    version = caches[0].version
    checkpoint = find_cached_checkpoint(version)
    if not 1 <= unfreeze <= checkpoint.depth:
        raise TrainError(
            f"UNFREEZE={unfreeze}: {checkpoint.name} has {checkpoint.depth} layers: "
            "choose 1 to that many, or 0 for the cached head"
        )
    for tiles in sorted({cache.version.recorded.tiles for cache in caches}):
        check_tiles_unchanged(open_source(tiles), [cache for cache in caches if cache.version.recorded.tiles == tiles])


def check_head(meta: CheckpointMeta, cache: LabelledCache) -> None:
    """Check that a head was trained on the embeddings and classes of this cache.

    Raises:
        CheckpointError: it was trained with another backbone, image size or class list, or on fine-tuned layers.
    """
    provenance = cache.version.provenance
    if meta.unfreeze:
        raise CheckpointError(
            f"the head was trained with {meta.unfreeze} unfrozen layers, so it does not fit the cache's embeddings: "
            "give a run of `make train-head`"
        )
    if meta.weights_sha256 != provenance.weights_sha256 or meta.image_size != provenance.image_size:
        raise CheckpointError(
            f"the head was trained on {meta.backbone} at {meta.image_size} px, the cache is of "
            f"{cache.version.recorded.backbone} at {provenance.image_size} px: "
            "run `make train-head` on this cache first"
        )
    if meta.class_names != cache.rows.class_names:
        raise CheckpointError(
            f"the head knows {len(meta.class_names)} classes, this run {len(cache.rows.class_names)}, or others: "
            "use the same --taxonomy and --exclude, or run `make train-head` first"
        )


def plan_prefixes(
    train: LabelledCache, val: LabelledCache, scratch: str, unfreeze: int, views: int
) -> list[tuple[PrefixCache, Index]]:
    """Return the prefix caches of the training and validation set, one per version, each with the slots it needs."""
    checkpoint = find_cached_checkpoint(train.version)
    versions = {cache.version.id: cache.version for cache in (train, val)}
    prefixes = [PrefixCache(scratch, version, checkpoint, unfreeze, views) for version in versions.values()]
    rows = [
        [[cache.rows.index] if cache.version.id == prefix.version else [] for cache in (train, val)]
        for prefix in prefixes
    ]
    return [(prefix, plan_slots(prefix, *mine)) for prefix, mine in zip(prefixes, rows, strict=True)]


class TileStream:
    """Streams every set of a run through one backbone, with one feed for each source of tiles."""

    def __init__(
        self,
        version: Version,
        checkpoint: Checkpoint,
        ranks: Ranks,
        *,
        workers: int | None,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        precision: Any = version.provenance.precision
        self.backbone = Backbone.load(checkpoint, precision=precision, device=ranks.device)
        self._version = version
        self._checkpoint = checkpoint
        self._ranks = ranks
        self._workers = ranks.choose_workers(workers)
        self._augmentation = augmentation
        self._feeds: dict[str, TileFeed] = {}
        self._prefixes: dict[str, PrefixCache] = {}

    def unfreeze(self, layers: int, *, checkpointing: bool, amp: bool) -> None:
        """Run step 0, then make the last `layers` trainable.

        Raises:
            StepZeroError: streamed embeddings are not the cache's.
            BackboneError: there are fewer layers.
        """
        ranks, tiles = self._ranks, self._version.recorded.tiles
        step_zero = StepZero(self._version, open_source(tiles), self._open_feed(tiles), self._checkpoint)
        ranks.say(ranks.run_on_main(lambda: step_zero.check_reproduction(self.backbone)))
        trained = self.backbone.unfreeze_last(layers, checkpointing=checkpointing)
        ranks.say(ranks.run_on_main(lambda: step_zero.check_training_precision(self.backbone, amp=amp)))
        count = sum(parameter.numel() for parameter in self.backbone.parameters() if parameter.requires_grad)
        size = f"{len(trained)} tensors ({count:,} parameters)"
        ranks.say(f"training {size}: the last {layers} layers and the final norm")

    def keep_prefix(self, train: LabelledCache, val: LabelledCache, scratch: str, *, batch: int) -> None:
        """Run the frozen layers over these sets once and store the result; `build` reads it from then on.

        Raises:
            TrainError: the disk is full, or a tile has changed.
        """
        views = self._augmentation.count_views()
        for prefix, slots in plan_prefixes(train, val, scratch, self.backbone.trained_layers, views):
            tiles = self._stream(train if train.version.id == prefix.version else val)
            compute = partial(compute_slots, self.backbone, tiles, views=views, batch=batch)
            started = time.perf_counter()
            count = prefix.fill(slots, compute, batch=batch, ranks=self._ranks)
            seconds = time.perf_counter() - started
            self._ranks.say(
                f"prefix cache {prefix.folder}: {len(np.unique(slots // views)):,} tiles"
                + (f", {count:,} of their views computed by this rank in {seconds:,.0f} s" if count else ", all there")
            )
            self._prefixes[prefix.version] = prefix

    def build(self, cache: LabelledCache) -> StreamedTiles | PrefixTiles:
        """Make the tiles of a set: stored tokens if all of its rows are there, else pixel values from the source."""
        prefix = self._prefixes.get(cache.version.id)
        if prefix is None or len(prefix.find_missing(cache.rows.index * prefix.views)):
            return self._stream(cache)
        return PrefixTiles(cache, prefix, self._ranks, eval_batch=self._version.recorded.batch_size)

    def _stream(self, cache: LabelledCache) -> StreamedTiles:
        return StreamedTiles(
            cache,
            self._open_feed(cache.version.recorded.tiles),
            self._checkpoint,
            self._ranks,
            dtype=self.backbone.dtype,
            eval_batch=self._version.recorded.batch_size,
            augmentation=self._augmentation,
        )

    def _open_feed(self, tiles: str) -> TileFeed:
        if tiles not in self._feeds:
            pin = self._ranks.device.type == "cuda"
            self._feeds[tiles] = TileFeed(open_source(tiles), workers=self._workers, pin_memory=pin)
        return self._feeds[tiles]
