"""From logits to probabilities and decisions: a temperature, then a threshold for each class.

Thresholds apply to calibrated probabilities, here and in every file that holds both. Fitting and scoring on the same
rows would flatter a model, so `cross_fit` scores each scene by what was fitted on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from cache_schema.layout import BoolArray

from .calibration import fit_temperature
from .thresholds import UNTUNED, split_scenes, tune_thresholds

FloatArray = npt.NDArray[np.float32]


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
