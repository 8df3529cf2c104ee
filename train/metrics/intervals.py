"""Compute bootstrap intervals over scenes: how far a figure would move if other scenes had been photographed.

Tiles of a scene resemble each other, so resampling tiles would make every interval too narrow. Whole scenes are drawn
instead: the cluster bootstrap of Field & Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69 (2007), with
the percentile interval of Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. With few scenes
(some 20 or fewer) percentile intervals are known to be still too narrow.

No rows are copied. A resample is a weight per scene: F1 follows from the weighted sums of each scene's counts, and
average precision from its cumulative counts at the thresholds where recall rises.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_schema.layout import BoolArray

from .figures import DECISION_THRESHOLD, KEY_FIGURES
from .scores import Float64Array, FloatArray, average_classes, check_flags, compute_f1, divide

Interval = tuple[float, float]

_CHUNK_CELLS = 1_500_000
"""Cells of the largest temporary array: 12 MB of float64, and about six of them exist at once."""


def bootstrap_intervals(
    probs: FloatArray,
    labels: BoolArray,
    scenes: npt.NDArray[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Compute percentile intervals of the key figures (weighted F1, macro F1, mAP) from resampled scenes.

    Args:
        probs: (N, C) floating, after the sigmoid.
        labels: (N, C) bool.
        scenes: (N,) str or int, the scene of each row.
        resamples: how often to draw as many scenes as there are, with replacement.
        seed: of the draws; the same scenes and seed give the same draws.
        level: coverage, between 0 and 1.

    Returns:
        (low, high) for each of `KEY_FIGURES`, as `compute_metrics` defines them: in each resample the classes without
        positives are left out, and a resample without any positive is skipped. (nan, nan) with fewer than two scenes
        or no positives: the spread is unknown then.

    Raises:
        ValueError: shapes differ, a probability is NaN, or `resamples` or `level` is out of range.
    """
    scene_of, weights = _draw(probs, labels, scenes, resamples, seed, level)
    return _percentiles(score_resamples(probs, labels, scene_of, weights), weights, level)


def bootstrap_difference(
    probs: FloatArray,
    baseline_probs: FloatArray,
    labels: BoolArray,
    scenes: npt.NDArray[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Compute percentile intervals of model minus baseline, both scored on the same resampled scenes.

    Pairing removes what makes a scene hard for both, so this can separate two models whose own intervals overlap. An
    interval that holds 0 does not separate them. Arguments, result and errors are those of `bootstrap_intervals`.
    """
    scene_of, weights = _draw(probs, labels, scenes, resamples, seed, level)
    if baseline_probs.shape != probs.shape:
        raise ValueError(f"baseline_probs {baseline_probs.shape} and probs {probs.shape} must be of the same rows")
    own, baseline = (score_resamples(each, labels, scene_of, weights) for each in (probs, baseline_probs))
    return _percentiles({key: own[key] - baseline[key] for key in KEY_FIGURES}, weights, level)


def intervals_to_json(intervals: Mapping[str, Interval]) -> dict[str, list[float] | None]:
    """Return the intervals as JSON holds them: null instead of NaN."""
    return {name: None if math.isnan(low) else [low, high] for name, (low, high) in intervals.items()}


def score_resamples(
    probs: FloatArray,
    labels: BoolArray,
    scene_of: npt.NDArray[np.intp],
    weights: npt.NDArray[Any],
    *,
    preds: BoolArray | None = None,
) -> dict[str, Float64Array]:
    """Score every resample: weighted F1, macro F1 and mAP.

    Args:
        probs: (N, C) floating.
        labels: (N, C) bool.
        scene_of: (N,) integers 0..S-1, the scene of each row.
        weights: (R, S), how often each scene was drawn.
        preds: (N, C) bool decisions; by default `probs >= 0.5`.

    Returns:
        For each key (R,) float64; NaN where a resample has no positive of any class.
    """
    preds = probs >= DECISION_THRESHOLD if preds is None else preds
    check_flags(probs.shape, labels=labels, preds=preds)
    if np.isnan(probs).any():
        raise ValueError("probabilities hold NaN: leave rows without an embedding out")
    weights = weights.astype(np.float64)
    support, predicted, hits = (
        weights @ _sum_by_scene(flags, scene_of, weights.shape[1]) for flags in (labels, preds, preds & labels)
    )
    f1 = compute_f1(hits, predicted, support)
    ap = np.stack([_average_precision(p, y, scene_of, weights) for p, y in zip(probs.T, labels.T, strict=True)], axis=1)
    present = support > 0
    return {
        "f1_weighted": average_classes(f1, support),
        "f1_macro": average_classes(f1, present),
        "map_macro": average_classes(ap, present),
    }


def _average_precision(
    probs: FloatArray, labels: BoolArray, scene_of: npt.NDArray[np.intp], weights: Float64Array
) -> Float64Array:
    """Compute the (R,) average precision of one class as scikit-learn does: rows of equal probability enter together.

    Precision counts only where recall rises, which is at the distinct probabilities of the positives.
    """
    total = np.zeros(len(weights))
    reached = np.zeros((len(weights), 1))
    for seen, found in _cumulate_by_scene(probs, labels, scene_of, weights.shape):
        hits = weights @ found
        gained = np.diff(hits, axis=1, prepend=reached)
        total += np.einsum("rk,rk->r", divide(hits, weights @ seen), gained)
        reached = hits[:, -1:]
    return divide(total, reached[:, 0])


def _cumulate_by_scene(
    probs: FloatArray, labels: BoolArray, scene_of: npt.NDArray[np.intp], shape: tuple[int, ...]
) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Yield, for chunks of K descending thresholds, (S, K) rows and (S, K) positives of each scene at or above each."""
    resamples, scene_count = shape
    thresholds = np.unique(probs[labels])[::-1]
    # A row counts from the first threshold that it reaches; rows below all thresholds never count.
    step = np.searchsorted(-thresholds, -probs, side="left")
    seen = found = np.zeros((scene_count, 1))
    size = max(1, _CHUNK_CELLS // max(resamples, scene_count))
    for start in range(0, len(thresholds), size):
        width = min(size, len(thresholds) - start)
        inside = (step >= start) & (step < start + width)
        cell = scene_of * width + step - start
        entered, hits = (
            np.bincount(cell[rows], minlength=scene_count * width).reshape(scene_count, width)
            for rows in (inside, inside & labels)
        )
        seen, found = seen[:, -1:] + entered.cumsum(axis=1), found[:, -1:] + hits.cumsum(axis=1)
        yield seen, found


def _sum_by_scene(flags: BoolArray, scene_of: npt.NDArray[np.intp], scene_count: int) -> Float64Array:
    """Count the set flags of each scene: (S, C) float64."""
    rows, columns = np.nonzero(flags)
    cells = np.bincount(scene_of[rows] * flags.shape[1] + columns, minlength=scene_count * flags.shape[1])
    return cells.reshape(scene_count, flags.shape[1]).astype(np.float64)


def _draw(
    probs: FloatArray, labels: BoolArray, scenes: npt.NDArray[Any], resamples: int, seed: int, level: float
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    """Return the (N,) scene number of each row and (R, S) how often each scene is drawn."""
    if labels.ndim != 2 or probs.shape != labels.shape or scenes.shape != labels.shape[:1]:
        raise ValueError(f"probs {probs.shape} and labels {labels.shape} must be (N, C), scenes {scenes.shape} (N,)")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be positive and level within 0..1: got {resamples} and {level}")
    names, scene_of = np.unique(scenes, return_inverse=True)
    count = len(names)
    if count == 0:
        return scene_of, np.zeros((resamples, 0), dtype=np.int64)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return scene_of, weights.astype(np.int64)


def _percentiles(scores: dict[str, Float64Array], weights: npt.NDArray[Any], level: float) -> dict[str, Interval]:
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = {}
    for key, values in scores.items():
        known = values[~np.isnan(values)]
        low, high = np.quantile(known, tails) if len(known) and weights.shape[1] > 1 else (np.nan, np.nan)
        intervals[key] = (float(low), float(high))
    return intervals
