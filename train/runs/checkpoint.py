"""Checkpoints: weights in safetensors, optimiser state that loads without pickle, and a sha256 of each file.

A checkpoint is a directory, written under a temporary name and renamed when it is complete. A flipped byte would load
silently, so digests are checked first; if `last` is damaged, `previous` is used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_schema import LabelIds
from train.errors import CheckpointError, first_line

_WEIGHTS, _META, _OPTIMIZER, _DIGESTS = "model.safetensors", "checkpoint.json", "optimizer.pt", "sha256"


@dataclass(frozen=True)
class Begun:
    """Progress of an unfinished epoch.

    Attributes:
        steps: steps taken in it.
        summed_loss: sum over their rows and all classes, over all ranks.
        clipped: steps whose gradient was clipped.
    """

    steps: int = 0
    summed_loss: float = 0.0
    clipped: int = 0


@dataclass(frozen=True)
class CheckpointMeta:
    """Description of the tensors of a checkpoint.

    Attributes:
        epoch: number of finished epochs.
        unfreeze: trained layers; 0 for a head alone.
        features: pooled arrays that the head was trained on.
        hidden, dropout: of the head; a head with `hidden` 0 is linear.
        class_ids, class_names: C each, in the order of the logits.
        reading: how raw label ids were read, `type` or `class`.
        thresholds: C decision thresholds tuned on the validation rows; empty before the first evaluation.
        backbone, image_size, precision, weights_sha256: of the embeddings that it was trained on.
        best: best value of the selecting metric so far, None before the first evaluation.
        best_epoch: the epoch that reached it.
        temperature: divisor of the logits, fitted on the validation rows; thresholds apply after the division.
        begun: progress of the next epoch.
    """

    epoch: int
    unfreeze: int
    features: tuple[str, ...]
    hidden: int
    dropout: float
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    reading: LabelIds
    thresholds: tuple[float, ...]
    backbone: str
    image_size: int
    precision: str
    weights_sha256: str
    best: float | None = None
    best_epoch: int | None = None
    temperature: float = 1.0
    begun: Begun = Begun()

    def at_epoch(self, epoch: int, best: float | None, best_epoch: int | None, begun: Begun = Begun()) -> Self:
        return replace(self, epoch=epoch, best=best, best_epoch=best_epoch, begun=begun)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Tensors by name, their description, and the optimiser's state if it was saved."""

    tensors: dict[str, Tensor]
    meta: CheckpointMeta
    optimizer: dict[str, Any] | None

    def outline(self) -> Self:
        """Return a copy with tensors on the meta device, for ranks that receive the values later, one by one."""
        optimizer = self.optimizer
        if optimizer is not None:
            state = {number: _outline(held) for number, held in optimizer["state"].items()}
            optimizer = {**optimizer, "state": state}
        return replace(self, tensors=_outline(self.tensors), optimizer=optimizer)


def _outline(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def save_checkpoint(
    directory: Path, tensors: dict[str, Tensor], meta: CheckpointMeta, optimizer: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint, and keep an older one with optimiser state as `previous`.

    Raises:
        CheckpointError: it cannot be written; the older one is still there.
    """
    try:
        temporary = directory.with_name(directory.name + ".tmp")
        _write(temporary, tensors, meta, optimizer)
        if directory.exists():
            previous = directory.with_name("previous" if optimizer is not None else directory.name + ".old")
            shutil.rmtree(previous, ignore_errors=True)
            directory.rename(previous)
        temporary.rename(directory)
        sync(directory.parent)
        shutil.rmtree(directory.with_name(directory.name + ".old"), ignore_errors=True)
    # torch and safetensors raise their own errors for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {directory}: {first_line(error)}: make room or access, then continue with --resume"
        ) from error


def _write(directory: Path, tensors: dict[str, Tensor], meta: CheckpointMeta, optimizer: dict[str, Any] | None) -> None:
    """Write every file of a checkpoint, digests last, and flush them to the disk."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / _WEIGHTS)
    (directory / _META).write_text(json.dumps(asdict(meta), indent=2) + "\n")
    if optimizer is not None:
        torch.save(optimizer, directory / _OPTIMIZER)
    seal_directory(directory)


def seal_directory(directory: Path) -> None:
    """Write the digest of every file, in the format of `sha256sum -c sha256`, and flush all files to the disk."""
    digests = {file.name: _sha256(file) for file in sorted(directory.iterdir())}
    (directory / _DIGESTS).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    for file in directory.iterdir():
        sync(file)
    sync(directory)


def check_digests(directory: Path, names: Iterable[str], *, ignore: str = "") -> None:
    """Compare every file of a directory sealed by `seal_directory` with its digest; `ignore` is a pattern of names.

    Raises:
        CheckpointError: a file was changed, or has no digest.
        OSError: a file is missing, of the list or of `names`.
    """
    lines = (directory / _DIGESTS).read_text().splitlines()
    digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    # All files are checked, since a truncated list of digests names only some of them.
    for name in {*names, *digests, *(file.name for file in directory.iterdir())} - {_DIGESTS}:
        if not fnmatch(name, ignore) and _sha256(directory / name) != digests.get(name):
            raise CheckpointError(f"{directory / name} does not match its sha256: it is damaged")


def load_checkpoint(directory: Path) -> LoadedCheckpoint:
    """Load a checkpoint after checking its digests.

    Raises:
        CheckpointError: it is missing, truncated, changed, or from another release.
    """
    found = directory if directory.exists() else directory.with_name(directory.name + ".old")
    try:
        check_digests(found, [_WEIGHTS, _META])
        raw = json.loads((found / _META).read_text())
        for name in ("features", "class_ids", "class_names", "thresholds"):
            raw[name] = tuple(raw[name])
        meta = CheckpointMeta(**{**raw, "begun": Begun(**raw.get("begun", {}))})
        optimizer = _load_optimizer(found / _OPTIMIZER) if (found / _OPTIMIZER).exists() else None
        return LoadedCheckpoint(load_file(found / _WEIGHTS), meta, optimizer)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint in {directory}: {error.filename} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{found} cannot be read as a checkpoint: {error}") from error


def _load_optimizer(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # On damaged bytes the unpickler raises many kinds of errors (IndexError, RuntimeError, EOFError, ...).
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    return state


def load_best(run: Path) -> LoadedCheckpoint:
    """Load the best epoch of a run.

    Raises:
        CheckpointError: it is missing or damaged; the message says how to restore it.
    """
    try:
        return load_checkpoint(run / "best")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: continue that run with --resume, which repairs it if it can, or train again"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
