"""From a classifier and a set of tiles to logits, and from logits to metrics, thresholds and intervals."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from cache_schema.layout import BoolArray
from extract.distributed import Ranks

from .batches import Tiles
from .intervals import bootstrap_intervals
from .loss import LossConfig
from .metrics import (
    DOMINANT_CLASSES,
    compute_metrics,
    compute_metrics_without,
    format_per_class,
    format_summary,
    without_classes,
)
from .model import Classifier
from .rows import LabelledRows
from .thresholds import cross_fitted_preds, tune_thresholds


@torch.inference_mode()
def predict_logits(classifier: Classifier, tiles: Tiles, ranks: Ranks, *, amp: bool) -> Tensor | None:
    """Logits of all n tiles in order, (n, C) float32 on the CPU of rank 0; None on the others.

    Each rank computes an unpadded share, so no row is counted twice.
    """
    classifier.eval()
    parts = []
    for inputs in tiles.iterate_share():
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=amp):
            logits = classifier(inputs)
        parts.append(logits.float().cpu())
    mine = torch.cat(parts) if parts else None
    shares: list[Tensor | None] = [mine] * ranks.world_size
    dist.gather_object(mine, shares if ranks.is_main else None, dst=0)
    if not ranks.is_main:
        return None
    classes = next(share.shape[1] for share in shares if share is not None)
    whole = torch.empty(len(tiles), classes)
    for rank, share in enumerate(shares):
        if share is not None:
            whole[rank :: ranks.world_size] = share
    return whole


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is known of a model on one set of tiles.

    Attributes:
        metrics: of the tiles that show a class, or of all where empty ones are kept.
        variants: the same, `with empty tiles` and `without Building and Small Car`, where that differs.
        intervals: 95 % bootstrap intervals over scenes.
        thresholds: (C,) tuned on all these rows.
    """

    metrics: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    intervals: dict[str, tuple[float, float]]
    thresholds: npt.NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        intervals = {name: None if math.isnan(low) else [low, high] for name, (low, high) in self.intervals.items()}
        return {**self.metrics, "intervals": intervals, "variants": self.variants}


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
    thresholds: npt.NDArray[np.float32] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Everything there is to say about n rows.

    Args:
        logits: (n, C) float32.
        rows: their labels and scenes.
        counted: (n,) bool, the rows of the main figures; the others are empty tiles.
        loss: whose mean is among the figures.
        thresholds: (C,) tuned elsewhere, as for a test set; None tunes them here, cross-fitted by scene for
            `f1_weighted_tuned`.
        seed: of folds and resampling.
    """
    probs = logits.sigmoid().numpy()
    tuned = tune_thresholds(probs[counted], rows.labels[counted]) if thresholds is None else thresholds

    def score(chosen: BoolArray, dropped: tuple[str, ...] = ()) -> dict[str, Any]:
        mine, labels = probs[chosen], rows.labels[chosen]
        crossed = cross_fitted_preds(mine, labels, rows.scenes[chosen], seed=seed) if thresholds is None else None
        mean = compute_loss(logits[torch.from_numpy(chosen)], labels, loss)
        return compute_metrics_without(
            dropped,
            mine,
            labels,
            rows.class_names,
            preds_tuned=mine >= tuned if crossed is None else crossed,
            thresholds=tuned,
            loss=None if dropped else mean,
        )

    variants = {}
    if 0 < len(without_classes(rows.class_names, DOMINANT_CLASSES)) < len(rows.class_names):
        variants[f"without {' and '.join(DOMINANT_CLASSES)}"] = score(counted, DOMINANT_CLASSES)
    if not counted.all():
        variants["with empty tiles"] = score(np.ones(len(rows), bool))
    intervals = bootstrap_intervals(probs[counted], rows.labels[counted], rows.scenes[counted], seed=seed)
    return Evaluation(score(counted), variants, intervals, tuned)


def describe_evaluation(evaluation: Evaluation, *, per_class: bool = False) -> str:
    """The summary a person reads."""
    intervals = ", ".join(
        f"{name} {evaluation.metrics[name]:.4f} [{low:.4f}, {high:.4f}]"
        for name, (low, high) in evaluation.intervals.items()
        if evaluation.metrics[name] is not None
    )
    text = format_summary(evaluation.metrics, variants=evaluation.variants)
    text += f"\n95 % intervals over scenes: {intervals}"
    return f"{text}\n\n{format_per_class(evaluation.metrics)}" if per_class else text
