"""Load a trained model: the best epoch of a run, or an export."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cache_schema.storage.place import is_bucket
from extract.backbone.checkpoint import Checkpoint, find_checkpoint
from extract.backbone.dinov3 import Backbone
from train.config import TrainConfig
from train.errors import CheckpointError, TrainError
from train.metrics.decisions import Decisions
from train.model.classifier import Classifier, Head
from train.model.shards import load_tensors
from train.runs.checkpoint import CheckpointMeta, check_digests, load_best
from train.runs.directory import RunDirectory


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The trained tensors of a model, by name, and their metadata; the backbone is loaded separately.

    Attributes:
        place: directory it was loaded from.
        amp: whether trained layers compute under autocast; None means wherever the device multiplies bf16.
    """

    place: str
    meta: CheckpointMeta
    tensors: dict[str, torch.Tensor]
    amp: bool | None

    @property
    def decisions(self) -> Decisions:
        """Temperature and thresholds fitted on the validation rows; untuned if the run was stopped before its end."""
        if not self.meta.thresholds:
            return Decisions.untuned(len(self.meta.class_names))
        return Decisions(self.meta.temperature, np.asarray(self.meta.thresholds, np.float32))

    def find_checkpoint(self) -> Checkpoint:
        """Find the backbone it was trained on.

        Raises:
            CheckpointError: the backbone found has other weights.
        """
        checkpoint = find_checkpoint(self.meta.backbone, self.meta.image_size)
        if checkpoint.hash_weights() != self.meta.weights_sha256:
            raise CheckpointError(f"{checkpoint.path} is not the backbone this run was trained on: its weights differ")
        return checkpoint

    def make_head(self, width: int) -> Head:
        """Make an untrained head for a backbone of `width`."""
        meta = self.meta
        return Head(width * len(meta.features), len(meta.class_ids), hidden=meta.hidden, dropout=meta.dropout)

    def make_classifier(self, backbone: Backbone | None, width: int, device: torch.device) -> Classifier:
        """Make the classifier with its trained tensors, in eval mode."""
        meta = self.meta
        if backbone is not None and meta.unfreeze:
            backbone.unfreeze_last(meta.unfreeze)
        classifier = Classifier(self.make_head(width), backbone, meta.features).to(device)
        load_tensors(classifier, self.tensors)
        return classifier.eval()


@dataclass(frozen=True, eq=False)
class LoadedRun(TrainedModel):
    """The best epoch of a run, and the settings it was trained with."""

    directory: RunDirectory
    config: TrainConfig

    @classmethod
    def load(cls, run: str) -> Self:
        directory = RunDirectory.open(run)
        best, config = load_best(directory.path), directory.read_config()
        return cls(str(directory), best.meta, best.tensors, config.amp, directory, config)


@dataclass(frozen=True, eq=False)
class LoadedExport(TrainedModel):
    """An export. It computes as its run did: frozen layers in the run's precision, trained ones from float32."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Load an export after checking its digests; it needs nothing but its directory.

        Raises:
            CheckpointError: it is damaged, incomplete, or was written by another release.
        """
        try:
            # The ONNX graph is not checked: it is as large as everything else, and is not read.
            check_digests(directory, ["head.json", "head.safetensors"], ignore="classifier.onnx*")
            head = json.loads((directory / "head.json").read_text())
            meta, amp = _read_meta(head, directory), head["trained"].get("amp")
            tensors = {f"head.{name}": tensor for name, tensor in load_file(directory / "head.safetensors").items()}
        except CheckpointError as error:
            raise CheckpointError(f"{error}: copy the export again, or run `make export` again") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory} cannot be read as an export ({type(error).__name__}: {error}): run `make export` again"
            ) from error
        loaded = cls(str(directory), meta, tensors, amp)
        return cls(loaded.place, meta, loaded._read_masters(), amp) if meta.unfreeze else loaded

    def find_checkpoint(self) -> Checkpoint:
        """Find the backbone in the export itself, whose digests were checked when it was loaded."""
        return find_checkpoint(self.place, self.meta.image_size)

    def _read_masters(self) -> dict[str, torch.Tensor]:
        """Read the trained tensors in float32, as in a run; loading in half precision would round them."""
        checkpoint, device = self.find_checkpoint(), torch.device("cpu")
        backbone = Backbone.load(checkpoint, precision="float32", device=device)
        return self.make_classifier(backbone, checkpoint.width, device).trained_tensors()


def open_model(run: str) -> TrainedModel:
    """Open a run, given its directory, link or `gs://` URL, or an export, given its directory.

    Raises:
        TileprobeError: there is neither, or it is damaged.
    """
    place = Path(run)
    if is_bucket(run) or not place.is_dir():
        return LoadedRun.load(run)
    if (place / "head.json").is_file():
        return LoadedExport.load(place)
    if not any((place / name).exists() for name in ("best", "split.json", "history.jsonl")):
        raise TrainError(
            f"{run} is neither a run nor an export of one: give a RUN that `make train-head`, `make finetune` or "
            "`make export` wrote"
        )
    return LoadedRun.load(run)


def _read_meta(head: dict[str, Any], directory: Path) -> CheckpointMeta:
    """Convert head.json to the metadata of a run's checkpoint."""
    trained = head["trained"]
    return CheckpointMeta(
        epoch=trained["epoch"],
        unfreeze=trained["unfreeze"],
        features=tuple(head["features"]),
        hidden=head["hidden"],
        dropout=head["dropout"],
        class_ids=tuple(head["class_ids"]),
        class_names=tuple(head["class_names"]),
        reading=head["reading"],
        thresholds=tuple(head["thresholds"]) if head["tuned"] else (),
        backbone=str(directory),
        image_size=head["image_size"],
        precision=trained["precision"],
        weights_sha256=head["weights_sha256"],
        temperature=head["temperature"],
    )
