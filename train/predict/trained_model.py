"""What was trained, ready to be used: the best epoch of a run, or an export of one that stands alone."""

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
    """What its tensors belong to, and the classifier without its backbone.

    Attributes:
        place: the directory it was loaded from.
        amp: whether its trained layers compute under autocast; None where the device multiplies bf16.
    """

    place: str
    meta: CheckpointMeta
    tensors: dict[str, torch.Tensor]
    amp: bool | None

    @property
    def decisions(self) -> Decisions:
        """Fitted on the run's validation rows; untuned for a run that was stopped before its end."""
        if not self.meta.thresholds:
            return Decisions.untuned(len(self.meta.class_names))
        return Decisions(self.meta.temperature, np.asarray(self.meta.thresholds, np.float32))

    def find_checkpoint(self) -> Checkpoint:
        """The backbone it was trained on.

        Raises:
            CheckpointError: what lies there now has other weights.
        """
        checkpoint = find_checkpoint(self.meta.backbone, self.meta.image_size)
        if checkpoint.hash_weights() != self.meta.weights_sha256:
            raise CheckpointError(f"{checkpoint.path} is not the backbone this run was trained on: its weights differ")
        return checkpoint

    def make_classifier(self, backbone: Backbone | None, width: int, device: torch.device) -> Classifier:
        """The classifier with its trained tensors, in eval mode."""
        meta = self.meta
        if backbone is not None and meta.unfreeze:
            backbone.unfreeze_last(meta.unfreeze)
        head = Head(width * len(meta.features), len(meta.class_ids), hidden=meta.hidden, dropout=meta.dropout)
        classifier = Classifier(head, backbone, meta.features).to(device)
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
    """What `export` wrote. It computes as its run: frozen layers in the run's precision, trained ones from float32."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read an export after checking its digests; nothing else than the directory is needed.

        Raises:
            CheckpointError: it is damaged, incomplete, or another release's.
        """
        try:
            # The ONNX graph is left out: it is as large as the rest, and is not read.
            check_digests(directory, ["head.json", "head.safetensors"], ignore="classifier.onnx*")
            head = json.loads((directory / "head.json").read_text())
            meta, amp = _read_meta(head, directory), head["trained"].get("amp")
            tensors = {f"head.{name}": tensor for name, tensor in load_file(directory / "head.safetensors").items()}
        except CheckpointError as error:
            raise CheckpointError(f"{error}: copy the export again, or make it anew (`make export`)") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory} cannot be read as an export ({type(error).__name__}: {error}): `make export` anew"
            ) from error
        loaded = cls(str(directory), meta, tensors, amp)
        return cls(loaded.place, meta, loaded._read_masters(), amp) if meta.unfreeze else loaded

    def find_checkpoint(self) -> Checkpoint:
        """The export itself; its weights' digest was checked when it was loaded."""
        return find_checkpoint(self.place, self.meta.image_size)

    def _read_masters(self) -> dict[str, torch.Tensor]:
        """The trained tensors in float32, as a run holds them: loaded in half precision they would be rounded."""
        checkpoint, device = self.find_checkpoint(), torch.device("cpu")
        backbone = Backbone.load(checkpoint, precision="float32", device=device)
        return self.make_classifier(backbone, checkpoint.width, device).trained_tensors()


def open_model(run: str) -> TrainedModel:
    """A run, by its directory, link or `gs://` address, or an export of one.

    Raises:
        TileprobeError: neither is there, or it is damaged.
    """
    place = Path(run)
    if is_bucket(run) or not place.is_dir():
        return LoadedRun.load(run)
    if (place / "head.json").is_file():
        return LoadedExport.load(place)
    if not any((place / name).exists() for name in ("best", "split.json", "history.jsonl")):
        raise TrainError(
            f"{run} is neither a run nor an export of one: RUN is what `make train-head`, `make finetune` or "
            "`make export` wrote"
        )
    return LoadedRun.load(run)


def _read_meta(head: dict[str, Any], directory: Path) -> CheckpointMeta:
    """What head.json says, as a checkpoint of a run would."""
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
