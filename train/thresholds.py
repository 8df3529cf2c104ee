"""Decision thresholds tuned for F1, and decisions by thresholds that never saw the scene they decide on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]

UNTUNED = 0.5


def tune_thresholds(probs: FloatArray, labels: BoolArray) -> npt.NDArray[np.float32]:
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
    probs: FloatArray, labels: BoolArray, scenes: npt.NDArray[Any], *, folds: int = 5, seed: int = 0
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


def _check(probs: FloatArray, labels: BoolArray) -> npt.NDArray[np.float32]:
    """The probabilities as float32, once both arrays are known to be sound."""
    if probs.ndim != 2 or labels.shape != probs.shape or labels.dtype != np.bool_:
        raise ValueError(f"labels must be bool {probs.shape}, as (N, C) probs: got {labels.dtype} {labels.shape}")
    # NaN fails both comparisons, so this refuses it too.
    if not bool(((probs >= 0) & (probs <= 1)).all()):
        raise ValueError("probabilities must lie in 0..1: found NaN or a value outside")
    return probs.astype(np.float32)
