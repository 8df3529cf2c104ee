"""Put a training together: model, sets and trainer."""

from collections.abc import Callable

import torch

from extract.backbone.provenance import find_cached_checkpoint
from extract.ranks.group import Ranks
from train.config import TrainConfig
from train.data.batches import Tiles
from train.data.cached import open_cached_tiles
from train.data.labels import LabelledCache
from train.data.sets import Sets
from train.metrics.evaluation import score_epoch
from train.metrics.figures import FIGURES
from train.model.classifier import Classifier, Head
from train.model.shards import describe_shards, load_tensors
from train.runs.checkpoint import CheckpointMeta, LoadedCheckpoint
from train.runs.directory import RunDirectory

from .finetune import TileStream
from .step import use_amp
from .trainer import Trainer
from .validation import ValidationSet, predict_logits

MakeTiles = Callable[[LabelledCache], Tiles]


def prepare_training(
    config: TrainConfig, run: RunDirectory, sets: Sets, ranks: Ranks, *, head: LoadedCheckpoint | None = None
) -> tuple[Trainer, MakeTiles]:
    """Make the trainer, and the function that makes the tiles of a set.

    The classifier starts from `head` where there is one. On the streamed path it holds the backbone, once step 0 has
    passed.
    """
    version = sets.train.version
    features = tuple(config.features.split("+"))
    make_tiles: MakeTiles = lambda cache: open_cached_tiles(cache, ranks)  # noqa: E731
    backbone = None
    if config.unfreeze:
        checkpoint = ranks.run_on_main(lambda: find_cached_checkpoint(version))
        augmentation = config.make_augmentation()
        for line in augmentation.describe():
            ranks.say(line)
        stream = TileStream(version, checkpoint, ranks, workers=config.workers, augmentation=augmentation)
        stream.unfreeze(config.unfreeze, checkpointing=config.grad_checkpoint, amp=use_amp(config.amp, ranks.device))
        if config.cache_prefix:
            # Use the batch shape of a training step: another shape rounds differently.
            share = -(-config.batch_size // ranks.world_size)
            stream.keep_prefix(sets.train, sets.val, config.scratch, batch=-(-share // config.accumulate))
        backbone, make_tiles = stream.backbone, stream.build
    meta = make_meta(config, sets.train)
    classifier = Classifier(make_head(meta, version.layout.width, config.seed), backbone, features).to(ranks.device)
    if head is not None:
        load_tensors(classifier, head.tensors)
        _compare_cached_and_streamed(config, classifier, make_tiles, sets, ranks)
    if config.shard:
        ranks.say(describe_shards(ranks))
    val = ValidationSet(make_tiles(sets.val), sets.val.rows, sets.counted)
    return Trainer(classifier, make_tiles(sets.train), val, config, meta, run, ranks), make_tiles


def make_head(meta: CheckpointMeta, width: int, seed: int) -> Head:
    """Make a new head; the same on every rank and in every run of a seed."""
    torch.manual_seed(seed)
    return Head(width * len(meta.features), len(meta.class_ids), hidden=meta.hidden, dropout=meta.dropout)


def make_meta(config: TrainConfig, cache: LabelledCache) -> CheckpointMeta:
    """Describe what the checkpoints of this run belong to, as before its first epoch."""
    provenance, rows = cache.version.provenance, cache.rows
    return CheckpointMeta(
        epoch=0,
        unfreeze=config.unfreeze,
        features=tuple(config.features.split("+")),
        hidden=config.hidden_width,
        dropout=config.dropout,
        class_ids=rows.class_ids,
        class_names=rows.class_names,
        reading=rows.reading,
        thresholds=(),
        backbone=cache.version.recorded.backbone,
        image_size=provenance.image_size,
        precision=provenance.precision,
        weights_sha256=provenance.weights_sha256,
    )


def _compare_cached_and_streamed(
    config: TrainConfig, classifier: Classifier, make_tiles: MakeTiles, sets: Sets, ranks: Ranks
) -> None:
    """Print the mAP of the starting head on cached vectors and on streamed tiles."""
    on_cache = Classifier(classifier.head, None, classifier.features)
    figures = []
    for model, tiles in ((on_cache, open_cached_tiles(sets.val, ranks)), (classifier, make_tiles(sets.val))):
        logits = predict_logits(model, tiles, ranks, amp=use_amp(config.amp, ranks.device))
        if logits is not None:
            scored = score_epoch(logits, sets.val.rows, sets.counted, loss=config.make_loss())
            figures.append(FIGURES["map_macro"].format(scored["map_macro"]))
    if figures:
        title = FIGURES["map_macro"].title
        ranks.say(f"step 0: {title} of the starting head: cached {figures[0]}, streamed {figures[1]}")
