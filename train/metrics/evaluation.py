"""From a classifier and a set of tiles to logits, and from logits to metrics, thresholds and intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cache_schema.layout import BoolArray
from train.data.labels import LabelledRows
from train.data.rare import TITLE as RAREST
from train.model.loss import LossConfig

from .decisions import Bin, Decisions, FloatArray, bin_decisions, cross_fit, measure_distance
from .figures import (
    DOMINANT_CLASSES,
    Metrics,
    compute_metrics,
    compute_metrics_without,
    format_per_class,
    format_summary,
    without_classes,
)
from .intervals import bootstrap_intervals, intervals_to_json

COMPARED = (
    ("F1 weighted", "f1_weighted"),
    ("F1 weighted, tuned", "f1_weighted_tuned"),
    ("F1 macro", "f1_macro"),
    ("F1 micro", "f1_micro"),
    ("mAP", "map_macro"),
)
"""Figures by which a model and its baselines are put side by side."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is known of a model on one set of tiles.

    Attributes:
        metrics: of the tiles that show a class, or of all where empty ones are kept.
        variants: the same, `with empty tiles` and `without Building and Small Car`, where that differs, and
            `rarest in training`.
        intervals: 95 % bootstrap intervals over scenes.
        decisions: temperature and thresholds, given or fitted on all these rows.
        calibration: the `temperature`, and the expected calibration error before (`ece_before`) and after it
            (`ece_after`; fitted on other scenes where it was not given).
        reliability: the binned decisions that either error is of, `before` and `after`.
        baselines: by name, on the same rows.
    """

    metrics: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    intervals: dict[str, tuple[float, float]]
    decisions: Decisions
    calibration: dict[str, float | None]
    reliability: dict[str, list[Bin]]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    def beside(self, baselines: Mapping[str, Baseline]) -> Self:
        """The same with baselines."""
        return replace(self, baselines=baselines)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.metrics,
            "intervals": intervals_to_json(self.intervals),
            "variants": self.variants,
            "calibration": self.calibration,
            "reliability": self.reliability,
            "baselines": {name: baseline.to_json() for name, baseline in self.baselines.items()},
        }


def compute_loss(logits: Tensor, labels: BoolArray, loss: LossConfig) -> float | None:
    """Mean loss over all tiles and classes; None where there is no tile."""
    if not len(logits):
        return None
    return float(loss(logits, torch.from_numpy(labels).float()).double().mean())


def score_epoch(logits: Tensor, rows: LabelledRows, counted: BoolArray, *, loss: LossConfig) -> dict[str, Any]:
    """Metrics at threshold 0.5 on the rows where `counted` (n,) is true."""
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
    """Everything there is to say about n rows.

    Figures at threshold 0.5 and average precision are of the plain sigmoid, which no temperature changes.

    Args:
        logits: (n, C) float32.
        rows: their labels and scenes.
        counted: (n,) bool, the rows of the main figures; the others are empty tiles.
        loss: whose mean is among the figures.
        decisions: fitted elsewhere, as for a test set; None fits them here, cross-fitted by scene for
            `f1_weighted_tuned` and the calibration error after.
        rarest: columns of the classes rarest in training, for a variant of their own.
        seed: of folds and resampling.
    """
    fitted = Decisions.fit(logits.numpy()[counted], rows.labels[counted]) if decisions is None else decisions

    def read(chosen: BoolArray) -> tuple[FloatArray, BoolArray]:
        """Calibrated probabilities and tuned decisions that did not see their own scene."""
        mine = logits.numpy()[chosen]
        if decisions is not None:
            return decisions.calibrate(mine), decisions.decide(mine)
        return cross_fit(mine, rows.labels[chosen], rows.scenes[chosen], seed=seed)

    def score(chosen: BoolArray, preds_tuned: BoolArray, dropped: tuple[str, ...] = ()) -> dict[str, Any]:
        mine, labels = logits[torch.from_numpy(chosen)], rows.labels[chosen]
        return compute_metrics_without(
            dropped,
            mine.sigmoid().numpy(),
            labels,
            rows.class_names,
            preds_tuned=preds_tuned,
            thresholds=fitted.thresholds,
            loss=None if dropped else compute_loss(mine, labels, loss),
        )

    calibrated, preds_tuned = read(counted)
    variants = {}
    if 0 < len(without_classes(rows.class_names, DOMINANT_CLASSES)) < len(rows.class_names):
        variants[f"without {' and '.join(DOMINANT_CLASSES)}"] = score(counted, preds_tuned, DOMINANT_CLASSES)
    if rarest:
        others = set(range(len(rows.class_names))) - set(rarest)
        variants[RAREST] = score(counted, preds_tuned, tuple(rows.class_names[c] for c in others))
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
    """The summary a person reads."""
    intervals = ", ".join(
        f"{name} {evaluation.metrics[name]:.4f} [{low:.4f}, {high:.4f}]"
        for name, (low, high) in evaluation.intervals.items()
        if evaluation.metrics[name] is not None
    )
    text = format_summary(evaluation.metrics, variants=evaluation.variants)
    text += f"\n95 % intervals over scenes: {intervals}\n{describe_calibration(evaluation.calibration)}"
    if evaluation.baselines:
        text += "\n\n" + "\n".join(format_comparison(evaluation))
    return f"{text}\n\n{format_per_class(evaluation.metrics)}" if per_class else text


def tabulate_comparison(evaluation: Evaluation) -> list[tuple[str, str, list[str]]]:
    """Name, basis and figures in the order of `COMPARED`: the model's own first, then each baseline's."""
    rows = [("this model", "", evaluation.metrics)]
    rows += [(name, baseline.basis, baseline.metrics) for name, baseline in evaluation.baselines.items()]
    return [
        (name, basis, ["n/a" if metrics[key] is None else f"{metrics[key]:.4f}" for _, key in COMPARED])
        for name, basis, metrics in rows
    ]


def format_comparison(evaluation: Evaluation) -> list[str]:
    """The model and the baselines, a line each."""
    lines = [f"{'beside baselines':<23}" + "".join(f"{title:>20}" for title, _ in COMPARED)]
    for name, basis, cells in tabulate_comparison(evaluation):
        lines.append(f"{name:<23}" + "".join(f"{cell:>20}" for cell in cells) + (f"   {basis}" if basis else ""))
    return lines


def describe_calibration(calibration: Mapping[str, float | None]) -> str:
    """One line: the temperature and what it does to the calibration error."""
    before, after = (
        "n/a" if calibration[key] is None else f"{calibration[key]:.4f}" for key in ("ece_before", "ece_after")
    )
    return f"temperature {calibration['temperature']:.3f}: expected calibration error {before} before, {after} after"


@dataclass(frozen=True, eq=False)
class Baseline:
    """A baseline on one set of rows.

    Attributes:
        basis: what it was made of, in words.
        metrics: the averages of `compute_metrics`.
        thresholds: (C,) float32 tuned on these rows, or given.
    """

    basis: str
    metrics: Metrics
    thresholds: FloatArray

    def to_json(self) -> Metrics:
        return {"basis": self.basis, **self.metrics}
