"""One training run, from a cache to a run directory.

The cached path (`unfreeze` 0) and the streamed one differ in two things only: where a batch comes from, and whether the
classifier holds a backbone. Split, loop, metrics, checkpoints and report are the same.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from cache_schema import ProvenanceError, Version, open_cache
from extract.agreement import Asked
from extract.backbone import follow_links
from extract.distributed import Ranks, join_ranks
from extract.plan import find_cached_checkpoint
from extract.stop import Stopped, stop_on_signals

from .baselines import compare
from .batches import Tiles
from .cached import open_cached_tiles
from .checkpoint import CheckpointMeta, LoadedCheckpoint, load_best, save_checkpoint
from .config import TrainConfig
from .determinism import deterministic_algorithms
from .errors import CheckpointError, TrainError
from .evaluation import describe_evaluation, evaluate_rows, predict_logits, score_epoch
from .finetune import TileStream, check_finetuning, check_head, plan_prefixes
from .loop import Trainer, ValidationSet, choose_batch_size, load_tensors
from .memory import agree_on_budget
from .model import Classifier, Head
from .prefix import check_room
from .rarest import find_rarest
from .resume import load_last, recover_run
from .rows import LabelledCache
from .rundir import RunDirectory
from .sets import Sets, read_sets
from .shards import describe_shards
from .siblings import compare_with_plain, save_val_logits
from .step import use_amp

MakeTiles = Callable[[LabelledCache], Tiles]


@dataclass(frozen=True, eq=False)
class Start:
    """What rank 0 decides before training: where files go, and which state to go on from."""

    run: RunDirectory
    resume: LoadedCheckpoint | None
    notes: tuple[str, ...]

    def outline(self) -> Self:
        """The same without the state itself."""
        return replace(self, resume=self.resume and self.resume.outline())


def run_training(config: TrainConfig) -> dict[str, Any] | None:
    """Train as configured and leave a run directory.

    Returns:
        on the main rank `run`, where it lies, `best_epoch`, and what its `metrics` and `test_metrics` files hold.

    Raises:
        TileprobeError: whatever a user can mend; nothing of an earlier run is touched.
        Stopped: SIGTERM or SIGINT came; one line has said what a resumed run goes on from.
    """
    command = "train finetune" if config.unfreeze else "train head"
    with stop_on_signals(), join_ranks(config.device, Asked.of(command, config)) as ranks:
        start = None
        try:
            resolved, head, notes = ranks.run_on_main(lambda: resolve_config(config))
            config = resolved.on_node_of(config)
            config = replace(config, memory_budget=config.memory_budget or agree_on_budget(ranks))
            sets = read_sets(config, ranks)
            config = replace(config, batch_size=choose_batch_size(len(sets.train.rows), config.batch_size))
            start = ranks.run_on_main(lambda: open_run(config, head, sets), tell=Start.outline)
            for line in (*sets.notes, *notes, *start.notes):
                _say(ranks, line)
            with deterministic_algorithms(config.deterministic):
                return _train(config, start, head, sets, ranks)
        except Stopped as stop:
            if ranks.is_main:
                print(_describe_stop(stop, start, config.epochs), file=sys.stderr, flush=True)
            raise


def _train(
    config: TrainConfig, start: Start, head: LoadedCheckpoint | None, sets: Sets, ranks: Ranks
) -> dict[str, Any] | None:
    """From the state decided on to a finished run."""
    trainer, make_tiles = prepare_training(config, start.run, sets, ranks, head=None if start.resume else head)
    if start.resume is not None:
        trainer.restore(start.resume)
    trainer.fit(lambda line: _say(ranks, line))
    folds = None
    if sets.whole is not None:
        from .folds import cross_validate  # which trains its heads by what is in this room

        folds = cross_validate(config, sets.whole, start.run, ranks, lambda line: _say(ranks, line))
    lines = folds.describe() if folds else ()
    return finish_run(config, start.run, sets, trainer.classifier, make_tiles, ranks, lines)


def _describe_stop(stop: Stopped, start: Start | None, epochs: int) -> str:
    if start is None:
        return f"stopped by {stop} before the run began"
    try:
        meta = load_last(start.run.path)[0].meta
        saved, begun = meta.epoch, meta.begun.steps
    except CheckpointError:
        saved = begun = 0
    steps = f" and {begun:,} steps of the next" if begun else ""
    return f"stopped by {stop}: {saved} of {epochs} epochs{steps} of {start.run} are saved; --resume goes on from there"


def _say(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        print(line, flush=True)


def resolve_config(config: TrainConfig) -> tuple[TrainConfig, LoadedCheckpoint | None, tuple[str, ...]]:
    """The settings a run really uses: a resumed run's own, or completed from the head it starts from."""
    if config.resume:
        run = RunDirectory.resume(config.run)
        stored = run.read_config()
        if not stored.val_cache:
            # A split file may be lost, with the machine it was on; another release may split otherwise.
            stored = replace(stored, data=replace(stored.data, split_file=run.split_file))
        return config.resume_from(stored), None, ()
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


def check_run(config: TrainConfig, head: LoadedCheckpoint | None, sets: Sets) -> tuple[str, ...]:
    """Refuse what would fail later, before anything is written; returns what to say of the room on disk.

    Raises:
        TileprobeError: the run cannot be made.
    """
    version = sets.train.version
    if config.backbone and follow_links(config.backbone) != follow_links(version.recorded.backbone):
        raise ProvenanceError(
            f"{config.cache} was made with BACKBONE={version.recorded.backbone}, not {config.backbone}: "
            f"run `make extract BACKBONE={config.backbone}`, or leave BACKBONE unset"
        )
    if head is not None:
        check_head(head.meta, sets.train)
    if config.unfreeze:
        check_finetuning([cache for cache in (sets.train, sets.val, sets.test) if cache is not None], config.unfreeze)
    if not (config.cache_prefix and config.unfreeze):
        return ()
    views = config.make_augmentation().count_views()
    prefixes = plan_prefixes(sets.train, sets.val, config.scratch, config.unfreeze, views)
    return (check_room(prefixes, agreed=config.large_prefix),)


def open_run(config: TrainConfig, head: LoadedCheckpoint | None, sets: Sets) -> Start:
    """Rank 0: check what would fail later, then make or reopen the run directory."""
    room = check_run(config, head, sets)
    if config.resume:
        run = RunDirectory.resume(config.run)
        _refuse_other_tiles(run, config.cache, sets)
        resume, notes = recover_run(run, config.save_every)
        epoch = resume.meta.epoch if resume else 0
        run.cut_history(epoch)
        begun = f", step {resume.meta.begun.steps:,} of the next" if resume and resume.meta.begun.steps else ""
        return Start(
            run, resume, (*room, *run.notes, *notes, f"resuming {run} after epoch {epoch} of {config.epochs}{begun}")
        )
    run = RunDirectory.create(config.run)
    run.write_json("split.json", sets.split)
    # The settings last: with them the directory is a run, which can be resumed.
    write_settings(run, config, sets.train.version)
    run.finish()
    return Start(
        run,
        None,
        (
            *room,
            f"global batch {config.batch_size}; files go to {run}",
        ),
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
            f"{run}/split.json does not hold the tiles there are now: another VAL_CACHE lies there: start a new run "
            "without --resume"
        )


def prepare_training(
    config: TrainConfig, run: RunDirectory, sets: Sets, ranks: Ranks, *, head: LoadedCheckpoint | None = None
) -> tuple[Trainer, MakeTiles]:
    """Model, sets and trainer; on the streamed path the backbone too, once step 0 has passed, and from a trained head
    if there is one."""
    version = sets.train.version
    features = tuple(config.features.split("+"))
    make_tiles: MakeTiles = lambda cache: open_cached_tiles(cache, ranks)  # noqa: E731
    backbone = None
    if config.unfreeze:
        checkpoint = ranks.run_on_main(lambda: find_cached_checkpoint(version))
        augmentation = config.make_augmentation()
        for line in augmentation.describe():
            _say(ranks, line)
        stream = TileStream(version, checkpoint, ranks, workers=config.workers, augmentation=augmentation)
        stream.unfreeze(
            config.unfreeze,
            checkpointing=config.grad_checkpoint,
            amp=use_amp(config, ranks),
            say=lambda line: _say(ranks, line),
        )
        if config.cache_prefix:
            # In the shape that a step computes: another would round differently.
            share = -(-config.batch_size // ranks.world_size)
            stream.keep_prefix(
                sets.train,
                sets.val,
                config.scratch,
                batch=-(-share // config.accumulate),
                say=lambda line: _say(ranks, line),
            )
        backbone, make_tiles = stream.backbone, stream.build
    meta = make_meta(config, sets.train)
    classifier = Classifier(make_head(meta, version.layout.width, config.seed), backbone, features).to(ranks.device)
    if head is not None:
        load_tensors(classifier, head.tensors)
        _compare_cached_and_streamed(config, classifier, make_tiles, sets, ranks)
    if config.shard:
        _say(ranks, describe_shards(ranks))
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


def _compare_cached_and_streamed(
    config: TrainConfig, classifier: Classifier, make_tiles: MakeTiles, sets: Sets, ranks: Ranks
) -> None:
    """The starting head on cached vectors and on streamed tiles, side by side."""
    on_cache = Classifier(classifier.head, None, classifier.features)
    figures = []
    for model, tiles in (
        (on_cache, open_cached_tiles(sets.val, ranks)),
        (classifier, make_tiles(sets.val)),
    ):
        logits = predict_logits(model, tiles, ranks, amp=use_amp(config, ranks))
        if logits is not None:
            scored = score_epoch(logits, sets.val.rows, sets.counted, loss=config.make_loss())
            figures.append(f"{scored['map_macro']:.4f}")
    if figures:
        _say(ranks, f"step 0: mAP of the starting head: cached {figures[0]}, streamed {figures[1]}")


def finish_run(
    config: TrainConfig,
    run: RunDirectory,
    sets: Sets,
    classifier: Classifier,
    make_tiles: MakeTiles,
    ranks: Ranks,
    folds: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Score the best epoch on validation and test, complete its checkpoint, write the report, print the summary.

    Returns:
        what `run_training` does.
    """
    best = ranks.run_on_main(lambda: load_best(run.path), tell=LoadedCheckpoint.outline)
    load_tensors(classifier, best.tensors, ranks)
    amp = use_amp(config, ranks)
    val_logits = predict_logits(classifier, make_tiles(sets.val), ranks, amp=amp)
    test_logits = None
    if sets.test is not None:
        test_logits = predict_logits(classifier, make_tiles(sets.test), ranks, amp=amp)
    if val_logits is None:
        return None
    beside = None if config.unfreeze else compare(sets, ranks.device, config.seed)
    rarest = tuple(find_rarest(sets.train.rows.labels, sets.val.rows.labels[sets.counted]).tolist())
    val = evaluate_rows(
        val_logits,
        sets.val.rows,
        sets.counted,
        loss=config.make_loss(),
        rarest=rarest,
        seed=config.seed,
    )
    fitted = val.decisions
    meta = replace(best.meta, thresholds=tuple(map(float, fitted.thresholds)), temperature=fitted.temperature)
    save_checkpoint(run.best, best.tensors, meta)
    save_val_logits(run, sets.val.rows, val_logits)
    results = {f"validation, best epoch {best.meta.epoch}": val.beside(beside.val if beside else {})}
    if sets.test is not None and test_logits is not None:
        test = evaluate_rows(
            test_logits,
            sets.test.rows,
            sets.counted_test,
            loss=config.make_loss(),
            decisions=fitted,
            rarest=rarest,
        )
        results["test, scored once"] = test.beside(beside.test if beside else {})
    written = dict(zip(("metrics", "test_metrics"), (each.to_json() for each in results.values()), strict=False))
    for name, metrics in written.items():
        run.write_json(f"{name}.json", metrics)
    if beside and beside.audit:
        run.write_json("audit.json", beside.audit.to_json())
    notes = beside.notes if beside else ()
    from .report import write_events, write_report  # which take a second that only rank 0 has to spend

    write_events(run)
    write_report(run)
    run.finish()
    for title, evaluation in results.items():
        print(f"\n{title}\n{describe_evaluation(evaluation)}")
    for line in (*folds, *notes, *compare_with_plain(run, config, sets, val_logits)):
        print(line)
    print(f"\nrun: {run} (best/, metrics.json, report.html, model_card.md)", flush=True)
    return {"run": str(run), "best_epoch": best.meta.epoch, **written}
