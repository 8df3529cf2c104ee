"""Turn logits into probabilities by a temperature, and probabilities into decisions by a threshold for each class.

Thresholds apply to calibrated probabilities, here and in every file that holds both. Fitting and scoring on the same
rows would flatter a model, so `cross_fit` scores each scene by a temperature and thresholds fitted on the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from sklearn.model_selection import GroupKFold

from cache_schema.layout import BoolArray

from .figures import DECISION_THRESHOLD
from .scores import check_flags, compute_f1

FloatArray = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating[Any]]

Bin = dict[str, Any]
"""One part of 0..1: the `count` of decisions in it, their mean probability `prob`, and `positive`, the share of them
whose class is present; the last two are None when the part is empty."""
COLDEST, HOTTEST = 0.1, 10.0
"""Bounds of the temperature: without them, rows that a model separates without error would drive it to 0."""
BINS = 15


def tune_thresholds(probs: Floats, labels: BoolArray) -> npt.NDArray[np.float32]:
    """Find, for each class, the threshold `t` whose decision `prob >= t` has the highest F1 on these rows.

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
        return np.full(classes, DECISION_THRESHOLD, dtype=np.float32)
    order = np.argsort(-probs, axis=0, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=0)
    hits = np.cumsum(np.take_along_axis(labels, order, axis=0), axis=0)
    predicted = np.arange(1, rows + 1)[:, None]
    f1 = compute_f1(hits, predicted, hits[-1])
    # A cut between equal probabilities cannot be made.
    f1[:-1][ranked[:-1] == ranked[1:]] = -1.0
    cut = np.argmax(f1, axis=0)
    upper = ranked[cut, np.arange(classes)]
    below = np.vstack([ranked[1:], np.zeros((1, classes), dtype=np.float32)])
    lower = below[cut, np.arange(classes)]
    middle = ((upper.astype(np.float64) + lower) / 2).astype(np.float32)
    # Between neighbouring floats the middle rounds to one of them, perhaps to the one that must stay below.
    middle = np.where(middle > lower, middle, upper)
    return np.where(hits[-1] > 0, middle, np.float32(DECISION_THRESHOLD)).astype(np.float32)


def cross_fitted_preds(
    probs: Floats, labels: BoolArray, scenes: npt.NDArray[Any], *, folds: int = 5, seed: int = 0
) -> BoolArray:
    """Decide on every row by thresholds tuned on the rows of other scenes only.

    Thresholds tuned and scored on the same rows flatter the model; cross-fitting scores the tuning itself. Scenes stay
    whole, since neighbouring tiles of a scene overlap.

    Args:
        probs: (N, C) floating in 0..1; compared as float32.
        labels: (N, C) bool.
        scenes, folds, seed: see `split_scenes`.

    Returns:
        (N, C) bool. A single scene leaves no other rows to tune on: the decision is `probs >= 0.5`.

    Raises:
        ValueError: the shapes differ, a probability is not in 0..1, or `folds` is less than 2.
    """
    probs = _check(probs, labels)
    if scenes.shape != (len(probs),):
        raise ValueError(f"scenes {scenes.shape} must be ({len(probs)},)")
    preds = probs >= np.float32(DECISION_THRESHOLD)
    for others, own in split_scenes(scenes, folds, seed):
        preds[own] = probs[own] >= tune_thresholds(probs[others], labels[others])
    return preds


def split_scenes(
    scenes: npt.NDArray[Any], folds: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """Yield, for each fold of whole scenes, the rows of the other folds and its own rows; nothing for a single scene.

    Args:
        scenes: (N,) str or int; which of them share a fold depends on their names and `seed`.
        folds: at least 2; with fewer scenes, each scene is a fold.

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
    """Check both arrays and return the probabilities as float32."""
    check_flags(probs.shape, labels=labels)
    # NaN fails both comparisons, so this refuses it too.
    if not bool(((probs >= 0) & (probs <= 1)).all()):
        raise ValueError("probabilities must lie in 0..1: found NaN or a value outside")
    return probs.astype(np.float32)


def fit_temperature(logits: Floats, labels: BoolArray) -> float:
    """Find the temperature T, 0.1 to 10, whose `sigmoid(logits / T)` has the least binary cross-entropy.

    The cross-entropy is convex in 1 / T, so the root of its derivative is the only minimum. Brent's method
    ("Algorithms for Minimization without Derivatives", 1973, chapter 4) finds it, unless it lies outside the bounds.

    Args:
        logits: (N, C) floating.
        labels: (N, C) bool.

    Returns:
        T; 1 without rows.

    Raises:
        ValueError: the shapes differ, or a logit is not finite.
    """
    check_flags(logits.shape, labels=labels)
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite: leave rows without an embedding out")
    if not logits.size:
        return 1.0
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels).double()

    def slope(inverse: float) -> float:
        return float(((torch.sigmoid(inverse * z) - y) * z).mean())

    if slope(1 / HOTTEST) >= 0:
        return HOTTEST
    if slope(1 / COLDEST) <= 0:
        return COLDEST
    return float(1 / brentq(slope, 1 / HOTTEST, 1 / COLDEST, xtol=1e-12, rtol=1e-10))


def bin_decisions(probs: Floats, labels: BoolArray, bins: int = BINS) -> list[Bin]:
    """Sort all N x C decisions into `bins` equal parts of 0..1, lowest first, as a reliability diagram shows them.

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
    """Compute the expected calibration error of binned decisions, 0 to 1; None without decisions.

    Equation 3 of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, with the probability that the class
    is present as the confidence: each bin's distance between its mean probability and its share of positives, weighted
    by the number of its decisions.
    """
    total = sum(part["count"] for part in bins)
    far = sum(part["count"] * abs(part["prob"] - part["positive"]) for part in bins if part["count"])
    return far / total if total else None


@dataclass(frozen=True, eq=False)
class Decisions:
    """How to turn a model's logits into decisions.

    Attributes:
        temperature: divides the logits before the sigmoid.
        thresholds: (C,) float32, the lowest probability at which a class is predicted.
    """

    temperature: float
    thresholds: FloatArray

    @classmethod
    def untuned(cls, classes: int) -> Self:
        """Return temperature 1 and thresholds 0.5."""
        return cls(1.0, np.full(classes, DECISION_THRESHOLD, np.float32))

    @classmethod
    def fit(cls, logits: FloatArray, labels: BoolArray) -> Self:
        """Fit temperature and thresholds on (N, C) rows; threshold 0.5 for a class without positives."""
        temperature = fit_temperature(logits, labels)
        return cls(temperature, tune_thresholds(calibrate(logits, temperature), labels))

    def calibrate(self, logits: FloatArray) -> FloatArray:
        """Return (N, C) probabilities; NaN where a logit is NaN."""
        return calibrate(logits, self.temperature)

    def decide(self, logits: FloatArray) -> BoolArray:
        """Return (N, C) decisions; NaN predicts no class."""
        return np.asarray(self.calibrate(logits) >= self.thresholds)


def calibrate(logits: FloatArray, temperature: float) -> FloatArray:
    """Compute `sigmoid(logits / temperature)` in float32; at temperature 1 the plain sigmoid, bit for bit."""
    probs: FloatArray = (torch.from_numpy(logits) / temperature).sigmoid().numpy()
    return probs


def cross_fit(
    logits: FloatArray, labels: BoolArray, scenes: npt.NDArray[Any], *, folds: int = 5, seed: int = 0
) -> tuple[FloatArray, BoolArray]:
    """Calibrate and decide on every row by a temperature and thresholds fitted on the rows of other scenes only.

    Args:
        logits: (N, C) float32, finite.
        labels: (N, C) bool.
        scenes, folds, seed: see `split_scenes`.

    Returns:
        (N, C) float32 and (N, C) bool. A single scene leaves no other rows to fit on: temperature 1, thresholds 0.5.
    """
    untuned = Decisions.untuned(logits.shape[1])
    probs, preds = untuned.calibrate(logits), untuned.decide(logits)
    for others, own in split_scenes(scenes, folds, seed):
        fitted = Decisions.fit(logits[others], labels[others])
        probs[own], preds[own] = fitted.calibrate(logits[own]), fitted.decide(logits[own])
    return probs, preds
