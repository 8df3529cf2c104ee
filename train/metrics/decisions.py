"""From logits to probabilities and decisions: a temperature, then a threshold for each class.

Thresholds apply to calibrated probabilities, here and in every file that holds both. Fitting and scoring on the same
rows would flatter a model, so `cross_fit` scores each scene by what was fitted on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.model_selection import GroupKFold

from cache_schema.layout import BoolArray

FloatArray = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating[Any]]

UNTUNED = 0.5

Bin = dict[str, Any]
"""One part of 0..1: `count` of decisions, mean probability `prob`, and `positive`, the share that is there; the latter
two None where it is empty."""
COLDEST, HOTTEST = 0.1, 10.0
"""Where the search ends: rows that a model separates without error would want a temperature of 0."""
BINS = 15
_STEPS = 60


def tune_thresholds(probs: Floats, labels: BoolArray) -> npt.NDArray[np.float32]:
    """Per class, the threshold `t` whose decision `prob >= t` has the highest F1 on these rows.

    The optimum of F1 over a ranking lies at one of its cuts (Lipton, Elkan, Naryanaswamy: "Optimal Thresholding of
    Classifiers to Maximize F1 Measure", ECML 2014), so all cuts are scored at once from the sorted probabilities. `t`
    lies midway between the two distinct probabilities it separates (between the smallest and 0 when every row is
    positive), because there it is least sensitive to small changes. Of equal optima the highest threshold is taken.

    Args:
        probs: (N, C) floating in 0..1; compared as float32, so decide on float32 probabilities too.
        labels: (N, C) bool.

    Returns:
        (C,) float32; 0.5 for a class with no positives, where any other value would be arbitrary.

    Raises:
        ValueError: the shapes differ, or a probability is not in 0..1.
    """
    probs = _check(probs, labels)
    rows, classes = probs.shape
    if rows == 0:
        return np.full(classes, UNTUNED, dtype=np.float32)
    order = np.argsort(-probs, axis=0, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=0)
    hits = np.cumsum(np.take_along_axis(labels, order, axis=0), axis=0)
    predicted = np.arange(1, rows + 1)[:, None]
    f1 = 2 * hits / (predicted + hits[-1])
    # A cut between equal probabilities cannot be made.
    f1[:-1][ranked[:-1] == ranked[1:]] = -1.0
    cut = np.argmax(f1, axis=0)
    upper = ranked[cut, np.arange(classes)]
    below = np.vstack([ranked[1:], np.zeros((1, classes), dtype=np.float32)])
    lower = below[cut, np.arange(classes)]
    middle = ((upper.astype(np.float64) + lower) / 2).astype(np.float32)
    # Between neighbouring floats the middle rounds to one of them, perhaps to the one that must stay below.
    middle = np.where(middle > lower, middle, upper)
    return np.where(hits[-1] > 0, middle, np.float32(UNTUNED)).astype(np.float32)


def cross_fitted_preds(
    probs: Floats, labels: BoolArray, scenes: npt.NDArray[Any], *, folds: int = 5, seed: int = 0
) -> BoolArray:
    """Decisions on every row by thresholds tuned on the rows of other scenes only.

    Thresholds tuned and scored on the same rows flatter the model; cross-fitting scores the tuning itself. Scenes stay
    whole, since neighbouring tiles of a scene overlap. Which scenes share a fold depends on their names and `seed`.

    Args:
        probs: (N, C) floating in 0..1; compared as float32.
        labels: (N, C) bool.
        scenes: (N,) str or int, the scene of each row.
        folds: at least 2; with fewer scenes, each is a fold of its own.
        seed: of the assignment of scenes to folds.

    Returns:
        (N, C) bool. With a single scene there is nothing to tune on: the decision is `probs >= 0.5`.

    Raises:
        ValueError: the shapes differ, a probability is not in 0..1, or `folds` is less than 2.
    """
    probs = _check(probs, labels)
    if scenes.shape != (len(probs),):
        raise ValueError(f"scenes {scenes.shape} must be ({len(probs)},)")
    preds = probs >= np.float32(UNTUNED)
    for others, own in split_scenes(scenes, folds, seed):
        preds[own] = probs[own] >= tune_thresholds(probs[others], labels[others])
    return preds


def split_scenes(
    scenes: npt.NDArray[Any], folds: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """The rows of all other folds and those of its own, for each fold of whole scenes; nothing for a single scene.

    Args:
        scenes: (N,) str or int; which of them share a fold depends on their names and `seed`.
        folds: at least 2; with fewer scenes, each is a fold of its own.

    Raises:
        ValueError: `folds` is less than 2.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    names, scene_of = np.unique(scenes, return_inverse=True)  # scikit-learn does not take StringDType
    folds = min(folds, len(names))
    if folds >= 2:
        splitter = GroupKFold(n_splits=folds, shuffle=True, random_state=seed)
        yield from splitter.split(scene_of, groups=scene_of)


def _check(probs: Floats, labels: BoolArray) -> npt.NDArray[np.float32]:
    """The probabilities as float32, once both arrays are known to be sound."""
    if probs.ndim != 2 or labels.shape != probs.shape or labels.dtype != np.bool_:
        raise ValueError(f"labels must be bool {probs.shape}, as (N, C) probs: got {labels.dtype} {labels.shape}")
    # NaN fails both comparisons, so this refuses it too.
    if not bool(((probs >= 0) & (probs <= 1)).all()):
        raise ValueError("probabilities must lie in 0..1: found NaN or a value outside")
    return probs.astype(np.float32)


def fit_temperature(logits: Floats, labels: BoolArray) -> float:
    """The temperature T, 0.1 to 10, whose probabilities `sigmoid(logits / T)` have the least binary cross-entropy.

    The cross-entropy is convex in 1 / T, so Newton's steps on its derivative, kept inside the bracket known so far,
    find the only minimum.

    Args:
        logits: (N, C) floating.
        labels: (N, C) bool.

    Returns:
        T; 1 without rows.

    Raises:
        ValueError: the shapes differ, or a logit is not finite.
    """
    if logits.shape != labels.shape or labels.dtype != np.bool_:
        raise ValueError(f"labels must be bool {logits.shape}, as the logits: got {labels.dtype} {labels.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite: leave rows without an embedding out")
    if not logits.size:
        return 1.0
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels).double()
    low, high, inverse = 1 / HOTTEST, 1 / COLDEST, 1.0
    for _ in range(_STEPS):
        probs = torch.sigmoid(inverse * z)
        slope = float(((probs - y) * z).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        curvature = float((probs * (1 - probs) * z * z).mean())
        wanted = inverse - slope / curvature if curvature > 0 else low
        before, inverse = inverse, wanted if low < wanted < high else (low + high) / 2
        if abs(inverse - before) <= 1e-10 * before:
            break
    return 1 / inverse


def expected_calibration_error(probs: Floats, labels: BoolArray, bins: int = BINS) -> float | None:
    """Mean distance of probability and frequency, over all N x C decisions in `bins` equal parts of 0..1.

    Guo et al., equation 3, with the probability of the class being there as the confidence: each bin's distance
    between its mean probability and its share of positives, weighted by how many decisions it holds.

    Returns:
        0 to 1; None without rows.
    """
    return measure_distance(bin_decisions(probs, labels, bins))


def bin_decisions(probs: Floats, labels: BoolArray, bins: int = BINS) -> list[Bin]:
    """What a reliability diagram shows: all N x C decisions in `bins` equal parts of 0..1, lowest first.

    A probability on an edge belongs to the part above it, and 1 to the last.
    """
    p = probs.ravel().astype(np.float64)
    bin_of = np.minimum((p * bins).astype(np.intp), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    expected = np.bincount(bin_of, weights=p, minlength=bins)
    found = np.bincount(bin_of, weights=labels.ravel(), minlength=bins)
    return [
        {"count": n, "prob": e / n if n else None, "positive": f / n if n else None}
        for n, e, f in zip(count.tolist(), expected.tolist(), found.tolist(), strict=True)
    ]


def measure_distance(bins: Sequence[Bin]) -> float | None:
    """The expected calibration error of binned decisions; None where there are none."""
    total = sum(part["count"] for part in bins)
    far = sum(part["count"] * abs(part["prob"] - part["positive"]) for part in bins if part["count"])
    return far / total if total else None


@dataclass(frozen=True, eq=False)
class Decisions:
    """How a model's logits are read.

    Attributes:
        temperature: what logits are divided by before the sigmoid.
        thresholds: (C,) float32, the least probability that decides for a class.
    """

    temperature: float
    thresholds: FloatArray

    @classmethod
    def untuned(cls, classes: int) -> Self:
        """Temperature 1 and thresholds 0.5."""
        return cls(1.0, np.full(classes, UNTUNED, np.float32))

    @classmethod
    def fit(cls, logits: FloatArray, labels: BoolArray) -> Self:
        """Temperature and thresholds of (N, C) rows; threshold 0.5 for a class without positives."""
        temperature = fit_temperature(logits, labels)
        return cls(temperature, tune_thresholds(calibrate(logits, temperature), labels))

    def calibrate(self, logits: FloatArray) -> FloatArray:
        """(N, C) probabilities; NaN where a logit is."""
        return calibrate(logits, self.temperature)

    def decide(self, logits: FloatArray) -> BoolArray:
        """(N, C) decisions; NaN decides for nothing."""
        return np.asarray(self.calibrate(logits) >= self.thresholds)


def calibrate(logits: FloatArray, temperature: float) -> FloatArray:
    """`sigmoid(logits / temperature)` as float32; at temperature 1 the plain sigmoid, bit for bit."""
    probs: FloatArray = (torch.from_numpy(logits) / temperature).sigmoid().numpy()
    return probs


def cross_fit(
    logits: FloatArray, labels: BoolArray, scenes: npt.NDArray[Any], *, folds: int = 5, seed: int = 0
) -> tuple[FloatArray, BoolArray]:
    """Probabilities and decisions of every row by what was fitted on the rows of other scenes only.

    Args:
        logits: (N, C) float32, finite.
        labels: (N, C) bool.
        scenes: (N,) str or int.
        folds, seed: see `split_scenes`.

    Returns:
        (N, C) float32 and (N, C) bool. With a single scene there is nothing to fit on: temperature 1, thresholds 0.5.
    """
    untuned = Decisions.untuned(logits.shape[1])
    probs, preds = untuned.calibrate(logits), untuned.decide(logits)
    for others, own in split_scenes(scenes, folds, seed):
        fitted = Decisions.fit(logits[others], labels[others])
        probs[own], preds[own] = fitted.calibrate(logits[own]), fitted.decide(logits[own])
    return probs, preds
