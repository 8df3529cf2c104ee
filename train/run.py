"""One training run, from a cache to a run directory.

The cached path (`unfreeze` 0) and the streamed one differ in two things only: where a batch comes from, and whether the
classifier holds a backbone. Split, loop, metrics, checkpoints and report are the same.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cache_schema import ProvenanceError, Version, open_cache
from extract.distributed import Ranks, join_ranks
from extract.plan import find_cached_checkpoint
from extract.stop import Stopped, stop_on_signals

from .batches import Tiles
from .bucket import is_bucket
from .cached import CachedTiles
from .checkpoint import CheckpointMeta, LoadedCheckpoint, load_best, save_checkpoint
from .config import TrainConfig
from .errors import CheckpointError, TrainError
from .evaluation import Evaluation, describe_evaluation, evaluate_rows, predict_logits, score_epoch
from .finetune import TileStream, check_finetuning, check_head
from .loop import Trainer, ValidationSet, choose_batch_size, load_tensors, use_amp
from .model import Classifier, Head
from .report import write_report
from .resume import load_last, recover_run
from .rows import LabelledCache
from .rundir import RunDirectory
from .sets import Sets, read_sets

MakeTiles = Callable[[LabelledCache], Tiles]


@dataclass(frozen=True, eq=False)
class Start:
    """What rank 0 decides before training: where files go, and which state to go on from."""

    run: RunDirectory
    resume: LoadedCheckpoint | None
    notes: tuple[str, ...]


def run_training(config: TrainConfig) -> None:
    """Train as configured and leave a run directory.

    Raises:
        TileprobeError: whatever a user can mend; nothing of an earlier run is touched.
        Stopped: SIGTERM or SIGINT came; one line has said what a resumed run goes on from.
    """
    with stop_on_signals(), join_ranks(config.device) as ranks:
        start = None
        try:
            config, head, notes = ranks.run_on_main(lambda: _resolve(config))
            sets = ranks.run_everywhere(lambda: read_sets(config))
            config = replace(config, batch_size=choose_batch_size(len(sets.train.rows), config.batch_size))
            start = ranks.run_on_main(lambda: open_run(config, head, sets))
            for line in (*sets.notes, *notes, *start.notes):
                _say(ranks, line)
            _train(config, start, head, sets, ranks)
        except Stopped as stop:
            if ranks.is_main:
                print(_describe_stop(stop, start, config.epochs), file=sys.stderr, flush=True)
            raise


def _train(config: TrainConfig, start: Start, head: LoadedCheckpoint | None, sets: Sets, ranks: Ranks) -> None:
    """From the state decided on to a finished run."""
    trainer, make_tiles = _prepare(config, start.run, sets, ranks)
    if start.resume is not None:
        trainer.restore(start.resume)
    elif head is not None:
        load_tensors(trainer.classifier, head.tensors)
        _compare_cached_and_streamed(trainer, make_tiles, sets, ranks)
    trainer.fit(lambda line: _say(ranks, line))
    finish_run(config, start.run, sets, trainer.classifier, make_tiles, ranks)


def _describe_stop(stop: Stopped, start: Start | None, epochs: int) -> str:
    if start is None:
        return f"stopped by {stop} before the run began"
    try:
        saved = load_last(start.run.path)[0].meta.epoch
    except CheckpointError:
        saved = 0
    return f"stopped by {stop}: {saved} of {epochs} epochs of {start.run} are saved; --resume goes on from there"


def _say(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        print(line, flush=True)


def _resolve(config: TrainConfig) -> tuple[TrainConfig, LoadedCheckpoint | None, tuple[str, ...]]:
    """The settings a run really uses: a resumed run's own, or completed from the head it starts from."""
    if config.resume:
        run = RunDirectory.resume(config.run)
        stored = run.read_config()
        if stored.data.split_file and is_bucket(str(run)) and not is_bucket(stored.data.split_file):
            # The machine that had that file may be lost, the run's own split is in the bucket.
            stored = replace(stored, data=replace(stored.data, split_file=run.split_file))
        return replace(stored, run=config.run, resume=True, device=config.device, workers=config.workers), None, ()
    found = _find_head(config) if config.unfreeze else None
    if found is None:
        return config, None, ("no cached head to start from: the head starts at random",) if config.unfreeze else ()
    run, head = found
    stored = run.read_config()
    data, split = config.data, "its own split"
    if stored.cache == config.cache and not data.split_file and not config.val_cache:
        version = open_cache(config.cache, allow_unsealed=config.allow_unsealed).id
        if run.read_version() != version:
            raise CheckpointError(
                f"{run} was trained on version {run.read_version()} of {config.cache}, which holds {version} now: "
                "run `make train-head` again"
            )
        # Another split would validate on tiles the head was trained on.
        if stored.val_cache:
            data, split, config = stored.data, stored.val_cache, replace(config, val_cache=stored.val_cache)
        else:
            data, split = replace(stored.data, split_file=run.split_file), "the split of that run"
    features = "+".join(head.meta.features)
    config = replace(config, data=data, features=features, head_run=str(run), **_describe_shape(head.meta))
    return config, head, (f"head starts from {run}, best epoch {head.meta.epoch}; validates on {split}",)


def _find_head(config: TrainConfig) -> tuple[RunDirectory, LoadedCheckpoint] | None:
    """The cached head to start from: the run asked for, else the newest beside this one, if it is of this cache."""
    beside, slash, _ = config.run.rstrip("/").rpartition("/")
    run = RunDirectory.open(config.head_run) if config.head_run else RunDirectory.find(f"{beside}{slash}head")
    if run is None:
        return None
    head = load_best(run.path)
    if config.head_run is None and run.read_config().cache != config.cache:
        return None
    return run, head


def _describe_shape(meta: CheckpointMeta) -> dict[str, Any]:
    """The settings that give a head of a checkpoint's shape."""
    return {"head": "mlp", "hidden": meta.hidden} if meta.hidden else {"head": "linear"}


def open_run(config: TrainConfig, head: LoadedCheckpoint | None, sets: Sets) -> Start:
    """Rank 0: check what would fail later, then make or reopen the run directory."""
    version = sets.train.version
    if config.backbone and config.backbone != version.recorded.backbone:
        raise ProvenanceError(
            f"{config.cache} was made with BACKBONE={version.recorded.backbone}, not {config.backbone}: "
            f"run `make extract BACKBONE={config.backbone}`, or leave BACKBONE unset"
        )
    check_features(config.features, sets.train)
    if head is not None:
        check_head(head.meta, sets.train)
    if config.unfreeze:
        check_finetuning([cache for cache in (sets.train, sets.val, sets.test) if cache is not None], config.unfreeze)
    if config.resume:
        run = RunDirectory.resume(config.run)
        _refuse_other_tiles(run, config.cache, sets)
        resume, notes = recover_run(run, config.save_every)
        epoch = resume.meta.epoch if resume else 0
        run.cut_history(epoch)
        return Start(run, resume, (*run.notes, *notes, f"resuming {run} after epoch {epoch} of {config.epochs}"))
    run = RunDirectory.create(config.run)
    run.write_json("split.json", sets.split)
    # The settings last: with them the directory is a run, which can be resumed.
    write_settings(run, config, version)
    run.finish()
    return Start(run, None, (f"global batch {config.batch_size}; files go to {run}",))


def check_features(features: str, cache: LabelledCache) -> None:
    """Refuse pooled arrays that the cache does not hold.

    Raises:
        TrainError: names those it holds.
    """
    there = cache.version.layout.pooling
    lacking = [name for name in features.split("+") if name not in there]
    if lacking:
        raise TrainError(
            f"--features {features}: {cache.version.root.url} holds no {', '.join(lacking)}: choose of "
            f"{', '.join(there)}, or run `make extract` again"
        )


def write_settings(run: RunDirectory, config: TrainConfig, version: Version) -> None:
    """config.json: the settings, and what the cache was made from."""
    run.write_json(
        "config.json",
        {
            "config": config.to_json(),
            "version": version.id,
            "provenance": version.provenance.to_json(),
            "recorded": version.recorded.to_json(),
        },
    )


def _refuse_other_tiles(run: RunDirectory, cache: str, sets: Sets) -> None:
    """A run goes on with the rows it began with, or not at all."""
    began, now = run.read_version(), sets.train.version.id
    if began != now:
        raise TrainError(
            f"{run} was trained on version {began} of {cache}, which holds {now} now: start a new run without --resume"
        )
    if run.read_json("split.json") != sets.split:
        raise TrainError(
            f"{run}/split.json is not the split its settings lead to now: another --split-file or VAL_CACHE lies "
            "there: start a new run without --resume"
        )


def _prepare(config: TrainConfig, run: RunDirectory, sets: Sets, ranks: Ranks) -> tuple[Trainer, MakeTiles]:
    """Model, sets and trainer; on the streamed path the backbone too, once step 0 has passed."""
    version = sets.train.version
    features = tuple(config.features.split("+"))
    make_tiles: MakeTiles = lambda cache: CachedTiles(cache, features, ranks)  # noqa: E731
    backbone = None
    if config.unfreeze:
        checkpoint = ranks.run_on_main(lambda: find_cached_checkpoint(version))
        stream = TileStream(version, checkpoint, ranks, workers=config.workers)
        stream.unfreeze(config.unfreeze, amp=use_amp(config, ranks), say=lambda line: _say(ranks, line))
        backbone, make_tiles = stream.backbone, stream.build
    meta = make_meta(config, sets.train)
    head = make_head(meta, version.layout.width, config.seed)
    classifier = Classifier(head, backbone, features).to(ranks.device)
    val = ValidationSet(make_tiles(sets.val), sets.val.rows, sets.counted)
    return Trainer(classifier, make_tiles(sets.train), val, config, meta, run, ranks), make_tiles


def make_head(meta: CheckpointMeta, width: int, seed: int) -> Head:
    """A fresh head; the same for every rank and run of a seed."""
    torch.manual_seed(seed)
    return Head(width * len(meta.features), len(meta.class_ids), hidden=meta.hidden, dropout=meta.dropout)


def make_meta(config: TrainConfig, cache: LabelledCache) -> CheckpointMeta:
    """What a checkpoint of this run belongs to, before its first epoch."""
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


def _compare_cached_and_streamed(trainer: Trainer, make_tiles: MakeTiles, sets: Sets, ranks: Ranks) -> None:
    """The starting head on cached vectors and on streamed tiles, side by side."""
    config, classifier = trainer.config, trainer.classifier
    on_cache = Classifier(classifier.head, None, classifier.features)
    figures = []
    for model, tiles in (
        (on_cache, CachedTiles(sets.val, classifier.features, ranks)),
        (classifier, make_tiles(sets.val)),
    ):
        logits = predict_logits(model, tiles, ranks, amp=use_amp(config, ranks))
        if logits is not None:
            scored = score_epoch(logits, sets.val.rows, sets.counted, loss=config.make_loss())
            figures.append(f"{scored['map_macro']:.4f}")
    if figures:
        _say(ranks, f"step 0: mAP of the starting head: cached {figures[0]}, streamed {figures[1]}")


def finish_run(
    config: TrainConfig, run: RunDirectory, sets: Sets, classifier: Classifier, make_tiles: MakeTiles, ranks: Ranks
) -> None:
    """Score the best epoch on validation and test, complete its checkpoint, write the report, print the summary."""
    best = ranks.run_on_main(lambda: load_best(run.path))
    load_tensors(classifier, best.tensors)
    amp = use_amp(config, ranks)
    val_logits = predict_logits(classifier, make_tiles(sets.val), ranks, amp=amp)
    test_logits = None
    if sets.test is not None:
        test_logits = predict_logits(classifier, make_tiles(sets.test), ranks, amp=amp)
    if val_logits is None:
        return
    loss = config.make_loss()
    val = evaluate_rows(val_logits, sets.val.rows, sets.counted, loss=loss, seed=config.seed)
    save_checkpoint(run.best, best.tensors, replace(best.meta, thresholds=tuple(map(float, val.thresholds))))
    run.write_json("metrics.json", val.to_json())
    results: dict[str, Evaluation] = {f"validation, best epoch {best.meta.epoch}": val}
    if sets.test is not None and test_logits is not None:
        rows = sets.test.rows
        counted = ~rows.empty if config.data.empty == "drop" else np.ones(len(rows), bool)
        test = evaluate_rows(test_logits, rows, counted, loss=loss, thresholds=val.thresholds)
        run.write_json("test_metrics.json", test.to_json())
        results["test, scored once"] = test
    write_report(run, config, results)
    run.finish()
    for title, evaluation in results.items():
        print(f"\n{title}\n{describe_evaluation(evaluation)}")
    print(f"\nrun: {run} (best/, metrics.json, report.html)", flush=True)
