"""Checkpoints: weights in safetensors, optimiser state that loads without pickle, a sha256 beside each file.

A checkpoint is a directory, written whole under a temporary name and renamed. A flipped byte in either file would
load silently, so digests are checked first; a damaged `last` falls back to `previous`.
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
    """How far an epoch has come that is not over.

    Attributes:
        steps: taken in it.
        summed_loss: of their rows and all classes, over all ranks.
        clipped: those whose gradient was clipped.
    """

    steps: int = 0
    summed_loss: float = 0.0
    clipped: int = 0


@dataclass(frozen=True)
class CheckpointMeta:
    """What the tensors beside it belong to.

    Attributes:
        epoch: epochs finished.
        unfreeze: trained layers; 0 for a head alone.
        features: pooled arrays the head was trained on.
        hidden, dropout: of the head; `hidden` 0 is a linear one.
        class_ids, class_names: C each, in the order of the logits.
        reading: how raw label ids were read, `type` or `class`.
        thresholds: C decision thresholds tuned on the validation rows; empty before the first evaluation.
        backbone, image_size, precision, weights_sha256: of the embeddings it was trained on.
        best: best value of the selecting metric so far, None before the first evaluation.
        best_epoch: when it was reached.
        temperature: what logits are divided by, fitted on the validation rows; thresholds are for what that gives.
        begun: of the next epoch.
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
    """Tensors by name, what they belong to, and the optimiser's state where it was saved."""

    tensors: dict[str, Tensor]
    meta: CheckpointMeta
    optimizer: dict[str, Any] | None

    def outline(self) -> Self:
        """The same with tensors on the meta device, names and shapes alone: for ranks that are sent the values later,
        one by one."""
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
    """Write `directory` whole, keeping the one that was there as `previous` when it is a resumable one.

    Raises:
        CheckpointError: it cannot be written; what was there before is still there.
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
    # torch and safetensors have errors of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {directory}: {first_line(error)}: make room or access, then continue with --resume"
        ) from error


def _write(directory: Path, tensors: dict[str, Tensor], meta: CheckpointMeta, optimizer: dict[str, Any] | None) -> None:
    """Write every file of a checkpoint, digests last, and have them on the disk before it returns."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / _WEIGHTS)
    (directory / _META).write_text(json.dumps(asdict(meta), indent=2) + "\n")
    if optimizer is not None:
        torch.save(optimizer, directory / _OPTIMIZER)
    seal_directory(directory)


def seal_directory(directory: Path) -> None:
    """Write the digest of every file, as `sha256sum -c sha256` reads them, and have all on the disk."""
    digests = {file.name: _sha256(file) for file in sorted(directory.iterdir())}
    (directory / _DIGESTS).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    for file in directory.iterdir():
        sync(file)
    sync(directory)


def check_digests(directory: Path, names: Iterable[str], *, spared: str = "") -> None:
    """Compare every file of a sealed directory with its digest.

    Args:
        directory: that `seal_directory` wrote.
        names: files that must be there.
        spared: pattern of names that are not looked at.

    Raises:
        CheckpointError: a file is altered, or has no digest.
        OSError: one is missing.
    """
    lines = (directory / _DIGESTS).read_text().splitlines()
    digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    # A list of digests that was cut short would vouch for nothing.
    for name in {*names, *digests, *(file.name for file in directory.iterdir())} - {_DIGESTS}:
        if not fnmatch(name, spared) and _sha256(directory / name) != digests.get(name):
            raise CheckpointError(f"{directory / name} does not match its sha256: it is damaged")


def load_checkpoint(directory: Path) -> LoadedCheckpoint:
    """Read a checkpoint after checking its digests.

    Raises:
        CheckpointError: missing, cut short, altered, or of another release.
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
    # The unpickler raises what it pleases on bytes that are no checkpoint (IndexError, RuntimeError, EOFError, ...).
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    return state


def load_best(run: Path) -> LoadedCheckpoint:
    """The best epoch of a run.

    Raises:
        CheckpointError: it is missing or damaged; the message says how to get it back.
    """
    try:
        return load_checkpoint(run / "best")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}: continue that run with --resume, which mends it if it can, or train anew"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file or directory on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
