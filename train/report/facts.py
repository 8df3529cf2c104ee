"""Read the files of a run directory for the report and the model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cache_schema.layout import BoolArray
from extract.tiles.scenes import find_scenes
from train.config import TrainConfig
from train.errors import TrainError
from train.metrics.decisions import Decisions
from train.runs.directory import RunDirectory
from train.runs.val_logits import VAL_LOGITS

FloatArray = npt.NDArray[np.float32]
Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The n validation tiles of the main figures, and the run's predictions for them.

    Attributes:
        rows: (n,) int64, rows of their cache's table.
        tiles: (n,) names.
        scenes: number of their scenes.
        labels: (n, C) bool.
        probs: (n, C) float32, the plain sigmoid of the logits, by which average precision and F1 are computed.
        calibrated: (n, C) float32, after the temperature.
        preds: (n, C) bool, the decisions of `predict`: calibrated probability at or above the class's threshold.
    """

    rows: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.str_]
    scenes: int
    labels: BoolArray
    probs: FloatArray
    calibrated: FloatArray
    preds: BoolArray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Facts:
    """A finished run.

    Attributes:
        run: its directory.
        settings: config.json; `config` is the same, parsed.
        metrics, test_metrics: of the best epoch; the latter is None without a test set.
        history: a dictionary for each epoch.
        epoch: the best epoch; None if unknown.
        audit, folds: as the run wrote them; None if it did not.
        evidence: None if the run kept no validation logits; `lacking` says why.
    """

    run: RunDirectory
    settings: Json
    config: TrainConfig
    metrics: Json
    test_metrics: Json | None
    history: list[Json]
    epoch: int | None
    audit: Json | None
    folds: Json | None
    evidence: Evidence | None
    lacking: str

    @classmethod
    def read(cls, run: RunDirectory) -> Self:
        """Read a run.

        Raises:
            TrainError: it is not finished, or one of its files cannot be read.
        """
        config, metrics = run.read_config(), _read_optional(run, "metrics.json")
        if metrics is None:
            raise TrainError(f"{run} has no metrics.json: it was stopped before its end: continue it with --resume")
        try:
            found = _read_evidence(run, config, metrics)
        except (KeyError, TypeError) as error:
            raise TrainError(f"{run}/metrics.json is from another release: {error}: train again") from error
        return cls(
            run,
            run.read_json("config.json"),
            config,
            metrics,
            _read_optional(run, "test_metrics.json"),
            run.read_history(),
            (_read_optional(run, "best/checkpoint.json") or {}).get("epoch"),
            _read_optional(run, "audit.json"),
            _read_optional(run, "folds.json"),
            found if isinstance(found, Evidence) else None,
            found if isinstance(found, str) else "",
        )

    @cached_property
    def class_names(self) -> list[str]:
        """Return the C names, in the order of the logits."""
        return [row["name"] for row in self.metrics["per_class"]]

    @property
    def title(self) -> str:
        """Say in words which parts were trained."""
        if self.config.unfreeze:
            return f"the last {self.config.unfreeze} layers and the head"
        return "a head on cached embeddings"

    @property
    def val_cache(self) -> tuple[str, str | None]:
        """Return the cache that holds the validation rows, and its version if the run recorded it."""
        return (self.config.val_cache, None) if self.config.val_cache else (self.config.cache, self.settings["version"])


def _read_optional(run: RunDirectory, name: str) -> Json | None:
    found: Json | None = run.read_json(name) if (run.path / name).is_file() else None
    return found


def _read_evidence(run: RunDirectory, config: TrainConfig, metrics: Json) -> Evidence | str:
    """Return the validation rows of the main figures, or the reason why there are none."""
    try:
        kept = load_file(run.path / VAL_LOGITS)
    except (OSError, SafetensorError):
        return f"the run has no readable {VAL_LOGITS}"
    if "labels" not in kept:
        return f"{VAL_LOGITS} holds no labels: it is from an earlier release; train again"
    logits, labels = kept["logits"], kept["labels"].astype(bool)
    tiles = np.array(run.read_json("split.json")["val"], np.dtypes.StringDType())
    counted = labels.any(axis=1) if config.data.empty == "drop" else np.ones(len(labels), bool)
    support = [row["support"] for row in metrics["per_class"]]
    if not len(tiles) == len(logits) == len(labels) or labels[counted].sum(axis=0).tolist() != support:
        return f"{VAL_LOGITS}, split.json and metrics.json are not from the same run"
    logits, labels, tiles = logits[counted], labels[counted], tiles[counted]
    thresholds = np.array([row["threshold"] for row in metrics["per_class"]], np.float32)
    decisions = Decisions(metrics["calibration"]["temperature"], thresholds)
    calibrated = decisions.calibrate(logits)
    return Evidence(
        rows=kept["rows"][counted],
        tiles=tiles,
        scenes=len(set(find_scenes(tiles, config.data.scene_regex).tolist())),
        labels=labels,
        probs=Decisions.untuned(logits.shape[1]).calibrate(logits),
        calibrated=calibrated,
        preds=np.asarray(calibrated >= thresholds),
    )


def join_names(names: Sequence[str], chosen: BoolArray) -> str:
    """Join the names of the classes where `chosen` (C,) is true."""
    return ", ".join(names[c] for c in np.flatnonzero(chosen).tolist()) or "nothing"
