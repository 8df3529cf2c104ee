"""Evaluate the logits of a set of tiles: metrics, thresholds, calibration and intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.layout import BoolArray
from train.data.labels import LabelledRows
from train.data.rare import TITLE as RAREST
from train.model.loss import LossConfig

from .decisions import Bin, Decisions, FloatArray, bin_decisions, cross_fit, measure_distance
from .figures import COMPARED, FIGURES
from .intervals import bootstrap_intervals, intervals_to_json
from .scores import Metrics, compute_metrics
from .side_by_side import format_interval, format_per_class, format_summary, format_table

DOMINANT_CLASSES = ("Building", "Small Car")
"""Present in nearly every xView tile, so they outweigh the rest in a weighted mean."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """A baseline on one set of rows.

    Attributes:
        basis: the rows it was made from, in words.
        metrics: the averages of `compute_metrics`.
        thresholds: (C,) float32, tuned on these rows or given.
    """

    basis: str
    metrics: Metrics
    thresholds: FloatArray


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The figures of a model on one set of tiles.

    Attributes:
        metrics: of the tiles that show a class; of all tiles if empty ones are kept.
        variants: the same for other rows or classes: `with empty tiles`, `without Building and Small Car` (each only if
            it differs) and `rarest in training`.
        intervals: 95 % bootstrap intervals over scenes.
        decisions: temperature and thresholds, given or fitted on all these rows.
        calibration: the `temperature`, and the expected calibration error before (`ece_before`) and after it
            (`ece_after`; fitted on other scenes if it was not given).
        reliability: the binned decisions behind the two errors, `before` and `after`.
        baselines: by name, on the same rows.
    """

    metrics: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    intervals: dict[str, tuple[float, float]]
    decisions: Decisions
    calibration: dict[str, float | None]
    reliability: dict[str, list[Bin]]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.metrics,
            "intervals": intervals_to_json(self.intervals),
            "variants": self.variants,
            "calibration": self.calibration,
            "reliability": self.reliability,
            "baselines": {name: {"basis": b.basis, **b.metrics} for name, b in self.baselines.items()},
        }


def compute_loss(logits: Tensor, labels: BoolArray, loss: LossConfig) -> float | None:
    """Compute the mean loss over all tiles and classes; None without tiles."""
    if not len(logits):
        return None
    return float(loss(logits, torch.from_numpy(labels).float()).double().mean())


def score_epoch(logits: Tensor, rows: LabelledRows, counted: BoolArray, *, loss: LossConfig) -> dict[str, Any]:
    """Compute the metrics at threshold 0.5 on the rows where `counted` (n,) is true."""
    logits, labels = logits[torch.from_numpy(counted)], rows.labels[counted]
    mean = compute_loss(logits, labels, loss)
    return compute_metrics(logits.sigmoid().numpy(), labels, rows.class_names, loss=mean)


def evaluate_rows(
    logits: Tensor,
    rows: LabelledRows,
    counted: BoolArray,
    *,
    loss: LossConfig,
    decisions: Decisions | None = None,
    rarest: tuple[int, ...] = (),
    seed: int = 0,
) -> Evaluation:
    """Compute everything that metrics.json holds about n rows, except the baselines.

    Figures at threshold 0.5 and average precision use the plain sigmoid, without the temperature.

    Args:
        logits: (n, C) float32.
        rows: their labels and scenes.
        counted: (n,) bool, the rows of the main figures; the others are empty tiles.
        decisions: fitted on other rows, as for a test set; None fits them here, cross-fitted by scene for
            `f1_weighted_tuned` and `ece_after`.
        rarest: columns of the classes rarest in training, for a separate variant.
        seed: of folds and resampling.
    """
    fitted = Decisions.fit(logits.numpy()[counted], rows.labels[counted]) if decisions is None else decisions

    def read(chosen: BoolArray) -> tuple[FloatArray, BoolArray]:
        """Return calibrated probabilities and tuned decisions, fitted without the rows' own scenes."""
        mine = logits.numpy()[chosen]
        if decisions is not None:
            return decisions.calibrate(mine), decisions.decide(mine)
        return cross_fit(mine, rows.labels[chosen], rows.scenes[chosen], seed=seed)

    def score(chosen: BoolArray, preds_tuned: BoolArray, columns: Sequence[int] | None = None) -> Metrics:
        """Compute the metrics of some rows, of all classes or as if only those in `columns` existed."""
        mine, labels = logits[torch.from_numpy(chosen)], rows.labels[chosen]
        kept = list(range(len(rows.class_names)) if columns is None else columns)
        return compute_metrics(
            mine.sigmoid().numpy()[:, kept],
            labels[:, kept],
            [rows.class_names[c] for c in kept],
            preds_tuned=preds_tuned[:, kept],
            thresholds=fitted.thresholds[kept],
            loss=compute_loss(mine, labels, loss) if len(kept) == len(rows.class_names) else None,
        )

    calibrated, preds_tuned = read(counted)
    variants = {}
    others = [c for c, name in enumerate(rows.class_names) if name not in DOMINANT_CLASSES]
    if 0 < len(others) < len(rows.class_names):
        variants[f"without {' and '.join(DOMINANT_CLASSES)}"] = score(counted, preds_tuned, others)
    if rarest:
        variants[RAREST] = score(counted, preds_tuned, sorted(rarest))
    if not counted.all():
        everything = np.ones(len(rows), bool)
        variants["with empty tiles"] = score(everything, read(everything)[1])
    probs, labels = logits.sigmoid().numpy()[counted], rows.labels[counted]
    reliability = {"before": bin_decisions(probs, labels), "after": bin_decisions(calibrated, labels)}
    calibration = {
        "temperature": fitted.temperature,
        **{f"ece_{when}": measure_distance(bins) for when, bins in reliability.items()},
    }
    intervals = bootstrap_intervals(probs, labels, rows.scenes[counted], seed=seed)
    return Evaluation(score(counted, preds_tuned), variants, intervals, fitted, calibration, reliability)


def describe_evaluation(evaluation: Evaluation, *, per_class: bool = False) -> str:
    """Format the summary of an evaluation."""
    intervals = ", ".join(
        f"{FIGURES[key].describe(evaluation.metrics[key])} {format_interval(interval, 4)}"
        for key, interval in evaluation.intervals.items()
        if evaluation.metrics[key] is not None
    )
    text = format_summary(evaluation.metrics, evaluation.variants)
    text += f"\n95 % intervals over scenes: {intervals}\n{describe_calibration(evaluation.calibration)}"
    if evaluation.baselines:
        rows = [["baselines", *(FIGURES[key].title for key in COMPARED), ""]]
        models = [("this model", evaluation.metrics, "")]
        models += [(name, baseline.metrics, baseline.basis) for name, baseline in evaluation.baselines.items()]
        for name, metrics, basis in models:
            rows.append([name, *(FIGURES[key].format(metrics[key]) for key in COMPARED), basis])
        text += "\n\n" + "\n".join(format_table(rows, "<" + ">" * len(COMPARED) + "<"))
    return f"{text}\n\n{format_per_class(evaluation.metrics)}" if per_class else text


def describe_calibration(calibration: Mapping[str, float | None]) -> str:
    """Describe on one line the temperature and the calibration error before and after it."""
    ece, temperature = FIGURES["ece"], FIGURES["temperature"].describe(calibration["temperature"])
    before, after = (ece.format(calibration[key]) for key in ("ece_before", "ece_after"))
    return f"{temperature}: {ece.title} {before} before, {after} after"
