"""Calibration: how far probabilities are from frequencies, and one temperature that brings them closer.

Guo, Pleiss, Sun, Weinberger: "On Calibration of Modern Neural Networks", ICML 2017, with the independent sigmoids of
multi-label classification in the place of the softmax. A temperature changes no ranking and no decision at 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_schema.layout import BoolArray

FloatArray = npt.NDArray[np.floating[Any]]
Bin = dict[str, Any]
"""One part of 0..1: `count` of decisions, mean probability `prob`, and `positive`, the share that is there; the latter
two None where it is empty."""

COLDEST, HOTTEST = 0.1, 10.0
"""Where the search ends: rows that a model separates without error would want a temperature of 0."""
BINS = 15
_STEPS = 60


def fit_temperature(logits: FloatArray, labels: BoolArray) -> float:
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


def expected_calibration_error(probs: FloatArray, labels: BoolArray, bins: int = BINS) -> float | None:
    """Mean distance of probability and frequency, over all N x C decisions in `bins` equal parts of 0..1.

    Guo et al., equation 3, with the probability of the class being there as the confidence: each bin's distance
    between its mean probability and its share of positives, weighted by how many decisions it holds.

    Returns:
        0 to 1; None without rows.
    """
    return measure_distance(bin_decisions(probs, labels, bins))


def bin_decisions(probs: FloatArray, labels: BoolArray, bins: int = BINS) -> list[Bin]:
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
