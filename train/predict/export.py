"""Export a run as files that need nothing of this package.

    config.json, preprocessor_config.json, model.safetensors    the backbone for transformers, with the run's image
                                                                size, mean and standard deviation
    head.safetensors, head.json                                 the head, and how to read its input and output
    classifier.onnx                                             the whole classifier, pixel values to logits
    sha256                                                      digests for `sha256sum -c sha256`

The trained layers of a fine-tuned run are merged into the weights it started from, all in float32: half precision would
round away small steps of the trained layers, while stored half-precision weights convert to float32 without loss. The
reader chooses the precision to compute in. For a head's run the backbone files are copied unchanged, so a cache made
from the export is the cache that the head was trained on.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_schema.storage.place import is_bucket
from extract.backbone.checkpoint import Checkpoint, find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.provenance import find_other_ingredients
from extract.errors import BackboneError
from extract.ranks.signals import stop_on_signals
from train.errors import CheckpointError, TrainError, first_line
from train.model.classifier import Classifier
from train.runs.checkpoint import seal_directory, sync

from .onnx import check_onnx, relative_difference, require_onnx, write_onnx
from .trained_model import LoadedRun

MAX_DIFFERENCE = 1e-5
"""Tolerance of the logits after reading the export again, relative to the largest or 1."""

_CPU = torch.device("cpu")
_BILINEAR = 2  # Pillow's number
_PIXELS = 3  # random tiles to compare logits on


def run_export(run: str, out: str | None, *, onnx: bool) -> None:
    """Write the best epoch of a run as a self-contained directory, with `onnx` also as ONNX; print how to use it.

    Args:
        out: directory to create; None for `export` in the run.

    Raises:
        TileprobeError: the run is missing or damaged, its backbone is gone or changed, `out` exists, or the export does
            not compute the same logits. Nothing is written then.
        Stopped: SIGTERM or SIGINT came; nothing is written.
    """
    place = _choose_place(run, out)
    if onnx:
        require_onnx()
    with stop_on_signals():
        loaded = LoadedRun.load(run)
        checkpoint = _find_checkpoint(loaded)
        with _write_atomically(place) as directory:
            notes = _export(loaded, checkpoint, directory, onnx=onnx)
    print("\n".join([*notes, f"-> {place}: `make extract BACKBONE={place}` caches its embeddings"]))


def _choose_place(run: str, out: str | None) -> Path:
    if out is not None and is_bucket(out):
        raise TrainError(f"--out {out}: an export must be a local directory; copy it to a bucket afterwards")
    if out is None and is_bucket(run):
        raise TrainError(f"{run} is in a bucket, but an export is a local directory: name one with --out")
    # Resolve the link, which moves on to the next run.
    place = Path(os.path.relpath(Path(run).resolve() / "export")) if out is None else Path(out)
    if place.exists() or place.is_symlink():
        raise TrainError(f"{place} exists and is not overwritten: choose another --out, or remove it")
    return place


@contextmanager
def _write_atomically(out: Path) -> Iterator[Path]:
    """Provide a temporary directory that is sealed and renamed to `out` on success, and removed on failure.

    Raises:
        TrainError: the directory cannot be written.
    """
    temporary = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        seal_directory(temporary)
        temporary.rename(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"cannot write {out}: {first_line(error)}: make room or access, or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _find_checkpoint(loaded: LoadedRun) -> Checkpoint:
    """Find the run's backbone, with the image size, mean and standard deviation that the run used.

    Raises:
        CheckpointError: it is missing, or has changed.
    """
    run, name = loaded.directory, loaded.meta.backbone
    trained_on = run.read_provenance()
    try:
        checkpoint = find_checkpoint(name, trained_on.image_size)
    except BackboneError as error:
        raise CheckpointError(f"{run} was trained on {name}, which must still be there: {error}") from error
    differences = find_other_ingredients(trained_on, checkpoint)
    if differences:
        raise CheckpointError(
            f"{checkpoint.path} is not the backbone that {run} was trained on ({'; '.join(differences)}): "
            "restore the original"
        )
    return checkpoint


def _export(loaded: LoadedRun, checkpoint: Checkpoint, directory: Path, *, onnx: bool) -> list[str]:
    """Write every file except the digests, and return lines for the user."""
    classifier = loaded.make_classifier(_load(checkpoint), checkpoint.width, _CPU)
    size = checkpoint.image_size
    pixels = torch.randn(_PIXELS, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = _compute_logits(classifier, pixels)
    notes = [_write_backbone(loaded, checkpoint, classifier, directory)]
    _write_preprocessor(checkpoint, directory)
    save_file({name: tensor.contiguous() for name, tensor in classifier.head.state_dict().items()}, _head(directory))
    _write_json(directory / "head.json", _describe_head(loaded, find_checkpoint(str(directory))))
    if not loaded.meta.thresholds:
        notes.append("the run was stopped before its end: temperature 1 and thresholds 0.5 are not tuned")
    del classifier  # before the next one is loaded: a large model must not be in memory twice
    classifier = _read_again(loaded, directory)
    worst = relative_difference(_compute_logits(classifier, pixels), expected, of=expected)
    if not worst <= MAX_DIFFERENCE:
        raise TrainError(
            f"the export gives logits that differ from the run's by {worst:.1e} of the largest, more than "
            f"{MAX_DIFFERENCE:.0e}: use the versions of constraints.txt"
        )
    if onnx:
        path = directory / "classifier.onnx"
        write_onnx(classifier, path, pixels[:2])
        worst = check_onnx(path, pixels, expected, batches=(_PIXELS, 1))
        notes.append(f"{path.name}: its logits differ from torch's by at most {worst:.1e} of the largest")
    return notes


def _load(checkpoint: Checkpoint) -> Backbone:
    backbone = Backbone.load(checkpoint, precision="float32", device=_CPU)
    backbone.unpack()
    return backbone


@torch.inference_mode()
def _compute_logits(classifier: Classifier, pixels: Tensor) -> Tensor:
    logits: Tensor = classifier(pixels)
    return logits


def _write_backbone(loaded: LoadedRun, checkpoint: Checkpoint, classifier: Classifier, directory: Path) -> str:
    """Write config.json and the weights, and return a line for the user."""
    run, meta = loaded.directory, loaded.meta
    if meta.unfreeze:
        assert classifier.backbone is not None
        classifier.backbone.save(directory)
        merged = sum(name.startswith("backbone.") for name in loaded.tensors)
        return f"{run}, best epoch {meta.epoch}: {merged} trained tensors merged into {checkpoint.name}, in float32"
    for file in (checkpoint.path / "config.json", *checkpoint.path.glob("*.index.json"), *checkpoint.weight_files):
        shutil.copyfile(file, directory / file.name)
    return f"{run}, best epoch {meta.epoch}: {checkpoint.name} unchanged, since only the head was trained"


def _write_preprocessor(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the backbone's preprocessor settings, replaced by the run's where the run used others."""
    settings = json.loads((checkpoint.path / "preprocessor_config.json").read_text())
    settings |= {
        "do_resize": True,
        "size": {"height": checkpoint.image_size, "width": checkpoint.image_size},
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": checkpoint.mean,
        "image_std": checkpoint.std,
    }
    _write_json(directory / "preprocessor_config.json", settings)


def _describe_head(loaded: LoadedRun, exported: Checkpoint) -> dict[str, Any]:
    """Describe the head for its user: input, shape, classes, and how to decide from its logits."""
    meta, decisions = loaded.meta, loaded.decisions
    return {
        "features": meta.features,
        "width": exported.width * len(meta.features),
        "hidden": meta.hidden,
        "dropout": meta.dropout,
        "class_ids": meta.class_ids,
        "class_names": meta.class_names,
        "reading": meta.reading,
        "temperature": decisions.temperature,
        "thresholds": decisions.thresholds.tolist(),
        "tuned": bool(meta.thresholds),
        "image_size": meta.image_size,
        "weights_sha256": exported.hash_weights(),
        "trained": {
            "run": str(loaded.directory),
            "epoch": meta.epoch,
            "unfreeze": meta.unfreeze,
            "precision": meta.precision,
            "amp": loaded.amp,
            "backbone": meta.backbone,
            "weights_sha256": meta.weights_sha256,
        },
    }


def _read_again(loaded: LoadedRun, directory: Path) -> Classifier:
    """Load the classifier from the written files alone, with nothing trainable."""
    checkpoint = find_checkpoint(str(directory))
    head = loaded.make_head(checkpoint.width)
    head.load_state_dict(load_file(_head(directory)))
    return Classifier(head, _load(checkpoint), loaded.meta.features).eval().requires_grad_(False)


def _head(directory: Path) -> Path:
    return directory / "head.safetensors"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
