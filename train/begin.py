"""Decide, check and open what a training run needs before it begins."""

from dataclasses import dataclass, replace
from typing import Any, Self

from cache_schema import ProvenanceError, Version, open_cache
from extract.backbone.checkpoint import follow_links
from train.data.prefix import check_room
from train.data.sets import Sets
from train.loop.finetune import check_finetuning, check_head, plan_prefixes
from train.runs.checkpoint import CheckpointMeta, LoadedCheckpoint, load_best
from train.runs.directory import RunDirectory
from train.runs.resume import recover_run

from .config import TrainConfig
from .errors import CheckpointError, TrainError


@dataclass(frozen=True, eq=False)
class Start:
    """What rank 0 decides before training: where files go, and which state to continue from."""

    run: RunDirectory
    resume: LoadedCheckpoint | None
    notes: tuple[str, ...]

    def outline(self) -> Self:
        """Return the same without the state itself."""
        return replace(self, resume=self.resume and self.resume.outline())


def resolve_config(config: TrainConfig) -> tuple[TrainConfig, LoadedCheckpoint | None, tuple[str, ...]]:
    """Return the settings that a run uses, the head it starts from, and notes for the user.

    A resumed run uses its own settings; a fine-tuning takes split, features and shape from the head it starts from.
    """
    if config.resume:
        run = RunDirectory.resume(config.run)
        stored = run.read_config()
        if not stored.val_cache:
            # The split file may be gone with its machine, and another release may split differently.
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
        # Another split would validate on tiles that the head was trained on.
        if stored.val_cache:
            data, split, config = stored.data, stored.val_cache, replace(config, val_cache=stored.val_cache)
        else:
            data, split = replace(stored.data, split_file=run.split_file), "the split of that run"
    features = "+".join(head.meta.features)
    config = replace(config, data=data, features=features, head_run=str(run), **_describe_shape(head.meta))
    return config, head, (f"head starts from {run}, best epoch {head.meta.epoch}; validates on {split}",)


def _find_head(config: TrainConfig) -> tuple[RunDirectory, LoadedCheckpoint] | None:
    """Return the head to start from: of `head_run`, else of the newest run `head` in the same folder, if it was trained
    on this cache."""
    folder, slash, _ = config.run.rstrip("/").rpartition("/")
    run = RunDirectory.open(config.head_run) if config.head_run else RunDirectory.find(f"{folder}{slash}head")
    if run is None:
        return None
    head = load_best(run.path)
    if config.head_run is None and run.read_config().cache != config.cache:
        return None
    return run, head


def _describe_shape(meta: CheckpointMeta) -> dict[str, Any]:
    """Return the settings that give a head of a checkpoint's shape."""
    return {"head": "mlp", "hidden": meta.hidden} if meta.hidden else {"head": "linear"}


def check_run(config: TrainConfig, head: LoadedCheckpoint | None, sets: Sets) -> tuple[str, ...]:
    """Refuse what would fail later, before anything is written; return notes about free disk space.

    Raises:
        TileprobeError: it cannot.
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
    """Check what would fail later, then make or reopen the run directory. Only rank 0 calls it."""
    room = check_run(config, head, sets)
    if config.resume:
        run = RunDirectory.resume(config.run)
        _refuse_other_tiles(run, config.cache, sets)
        resume, notes = recover_run(run, config.save_every)
        epoch = resume.meta.epoch if resume else 0
        run.cut_history(epoch)
        begun = f", step {resume.meta.begun.steps:,} of the next" if resume and resume.meta.begun.steps else ""
        line = f"resuming {run} after epoch {epoch} of {config.epochs}{begun}"
        return Start(run, resume, (*room, *run.notes, *notes, line))
    run = RunDirectory.create(config.run)
    run.write_json("split.json", sets.split)
    # The settings come last: once they are there, the directory counts as a run that can be resumed.
    write_settings(run, config, sets.train.version)
    run.finish()
    return Start(run, None, (*room, f"global batch {config.batch_size}; files go to {run}"))


def write_settings(run: RunDirectory, config: TrainConfig, version: Version) -> None:
    """Write config.json: the settings, and what the cache was made from."""
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
