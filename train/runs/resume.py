"""Recover a stopped run: its newest undamaged checkpoint, with the history and best epoch that belong to it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from train.errors import CheckpointError

from .checkpoint import LoadedCheckpoint, load_checkpoint, save_checkpoint
from .directory import RunDirectory

_START_OVER = "start a new run without --resume"


def recover_run(run: RunDirectory, save_every: int) -> tuple[LoadedCheckpoint | None, tuple[str, ...]]:
    """Load the state to continue from, and repair the run where possible.

    A damaged `last/` is renamed `last.damaged/`, so that the next save does not keep it as `previous/`. A damaged
    `best/` is replaced if another checkpoint is of the same epoch.

    Returns:
        the checkpoint, None if the run was stopped before its first; and a line for the user about each defect.

    Raises:
        CheckpointError: no checkpoint is undamaged, or the best epoch or the history is lost.
    """
    if not run.last.exists() and not (run.path / "previous").exists() and len(_read_epochs(run)) <= save_every:
        return None, (f"{run} was stopped before its first checkpoint: it begins again",)
    checkpoint, fallen_back = load_last(run.path)
    if _read_epochs(run)[: checkpoint.meta.epoch] != list(range(1, checkpoint.meta.epoch + 1)):
        raise CheckpointError(
            f"cannot resume {run}: history.jsonl does not hold the {checkpoint.meta.epoch} epochs its checkpoint does: "
            + _START_OVER
        )
    repaired = _repair_best(run, checkpoint)
    if fallen_back and run.last.exists():
        aside = run.path / "last.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        run.last.rename(aside)
    return checkpoint, (*fallen_back, *repaired)


def load_last(run: Path) -> tuple[LoadedCheckpoint, tuple[str, ...]]:
    """Load the newest undamaged checkpoint of a run that can be resumed, and a line if it is not the last one.

    Raises:
        CheckpointError: there is none.
    """
    last, previous = run / "last", run / "previous"
    try:
        return load_checkpoint(last), ()
    except CheckpointError as error:
        reason = str(error)
    try:
        checkpoint = load_checkpoint(previous)
    except CheckpointError as error:
        raise CheckpointError(f"cannot resume {run}: {reason}; {error}: {_START_OVER}") from error
    return checkpoint, (f"{reason}; continuing from {previous}, of epoch {checkpoint.meta.epoch}",)


def _repair_best(run: RunDirectory, checkpoint: LoadedCheckpoint) -> tuple[str, ...]:
    epoch = checkpoint.meta.best_epoch
    if epoch is None:
        return ()
    try:
        load_checkpoint(run.best)
    except CheckpointError as error:
        reason = str(error)
    else:
        return ()
    for held in (run.last, run.path / "previous"):
        try:
            source = load_checkpoint(held)
        except CheckpointError:
            continue
        if source.meta.epoch == epoch and not source.meta.begun.steps:
            shutil.rmtree(run.best, ignore_errors=True)
            save_checkpoint(run.best, source.tensors, replace(source.meta, thresholds=(), temperature=1.0))
            return (f"{reason}; replaced by {held}, which is of the best epoch, {epoch}",)
    raise CheckpointError(
        f"cannot resume {run}: {reason}; no other checkpoint is of the best epoch, {epoch}: {_START_OVER}"
    )


def _read_epochs(run: RunDirectory) -> list[int | None]:
    """Read the epoch of each line of the history; None for a line that is damaged."""
    epochs: list[int | None] = []
    for line in run.history.read_bytes().splitlines() if run.history.exists() else ():
        try:
            epoch = json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):
            epoch = None
        epochs.append(epoch if isinstance(epoch, int) else None)
    return epochs
