"""What a head has to beat: the labels' frequencies, the nearest neighbours, and a linear probe, on the same split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_schema.layout import BoolArray
from train.data.labels import LabelledCache, can_look_up, read_vectors
from train.data.sets import Sets

from .audit import NEAR_DUPLICATE, LeakAudit, audit_split
from .decisions import FloatArray, cross_fitted_preds, tune_thresholds
from .evaluation import Baseline
from .figures import compute_metrics
from .logistic import LinearProbe, fit_logistic
from .neighbours import Neighbours, draw_rows, find_neighbours

NEAREST = 10

MOST_PROBE_CELLS = 1.2e9
"""Rows x features x classes at most, some 10 s on 2 cores: beyond, rows are drawn at random."""

_ROWS = 8192

_LEFT_OUT = "baselines and leak audit: left out, the vectors are too many to look at beside training"


class Baselines:
    """All baselines of one training set.

    Args:
        train: n rows to learn from.
        device: to compute on.
        seed: of the rows drawn where there are too many, and of folds.
    """

    def __init__(self, train: LabelledCache, device: torch.device, seed: int) -> None:
        self._train, self._device, self._seed = train, device, seed
        self._probe = _StandardProbe(train, device, seed)

    def find_neighbours(self, cache: LabelledCache) -> Neighbours:
        """The training rows nearest to each of a set."""
        return find_neighbours(
            cache,
            self._train,
            k=NEAREST,
            threshold=NEAR_DUPLICATE,
            device=self._device,
            seed=self._seed,
        )

    def score(
        self,
        cache: LabelledCache,
        counted: BoolArray,
        neighbours: Neighbours,
        tuned: Mapping[str, Baseline] | None = None,
    ) -> dict[str, Baseline]:
        """Figures of each baseline, by its name, on the rows of a set where `counted` (n,) is true.

        Args:
            cache: the set.
            neighbours: of all its rows.
            tuned: on another set, for thresholds; without, they are tuned here and scored cross-fitted by scene.
        """
        rows, labels = cache.rows.select(counted), self._train.rows.labels
        frequency = labels.mean(axis=0, dtype=np.float32)
        guesses = {
            "label frequency": (_count(len(labels), len(labels)), np.broadcast_to(frequency, rows.labels.shape)),
            f"{NEAREST} nearest neighbours": (
                _count(neighbours.searched, len(labels)),
                neighbours.vote(labels)[counted],
            ),
            "linear probe": (self._probe.basis, self._probe.predict(cache.select(counted))),
        }
        scored = {}
        for name, (basis, probs) in guesses.items():
            if tuned is None:
                thresholds = tune_thresholds(probs, rows.labels)
                preds = cross_fitted_preds(probs, rows.labels, rows.scenes, seed=self._seed)
            else:
                thresholds = tuned[name].thresholds
                preds = probs >= thresholds
            metrics = compute_metrics(probs, rows.labels, rows.class_names, preds_tuned=preds, loss=None)
            scored[name] = Baseline(basis, {k: v for k, v in metrics.items() if k != "per_class"}, thresholds)
        return scored


class _StandardProbe:
    """Logistic regression with scikit-learn's default penalty, on features of mean 0 and deviation 1.

    A class that every row shows, or none, is given its frequency.
    """

    def __init__(self, train: LabelledCache, device: torch.device, seed: int) -> None:
        labels = train.rows.labels
        width = read_vectors(train, torch.arange(1)).shape[1]
        chosen = draw_rows(len(labels), int(MOST_PROBE_CELLS / (width * labels.shape[1])), seed)
        self._device = device
        inputs = read_vectors(train, chosen).to(device)
        seen = torch.from_numpy(labels[chosen.numpy()]).to(device)
        self._frequency = seen.float().mean(dim=0)
        self._fitted = (self._frequency > 0) & (self._frequency < 1)
        self._mean, deviation = inputs.mean(dim=0), inputs.std(dim=0, correction=0)
        self._deviation = torch.where(deviation > 0, deviation, 1.0)
        self._model: LinearProbe = fit_logistic(self._standardise(inputs), seen[:, self._fitted])
        self.basis = _count(len(chosen), len(labels)) + ("" if self._model.converged else ", not at its optimum yet")

    def predict(self, cache: LabelledCache) -> FloatArray:
        """(n, C) probabilities."""
        probs = self._frequency.repeat(len(cache.rows), 1)
        for part in torch.arange(len(cache.rows)).split(_ROWS):
            inputs = read_vectors(cache, part).to(self._device)
            probs[part.to(self._device)[:, None], self._fitted.nonzero().T] = self._model(
                self._standardise(inputs)
            ).sigmoid()
        return probs.cpu().numpy()

    def _standardise(self, inputs: Tensor) -> Tensor:
        return (inputs - self._mean) / self._deviation


def _count(used: int, rows: int) -> str:
    return f"{used:,} training tiles" + (f", drawn from {rows:,}" if used < rows else "")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What stands beside a head's own figures.

    Attributes:
        val, test: baselines on either set by name; none without a test set, or where vectors are not at hand.
        audit: of the split.
        notes: lines for the summary.
    """

    val: Mapping[str, Baseline]
    test: Mapping[str, Baseline]
    audit: LeakAudit | None
    notes: tuple[str, ...]


def compare(sets: Sets, device: torch.device, seed: int) -> Comparison:
    """Baselines and leak audit of a run's sets; a line instead where their vectors are too many to look at again."""
    caches = [cache for cache in (sets.train, sets.val, sets.test) if cache is not None]
    if not can_look_up(*caches):
        return Comparison({}, {}, None, (_LEFT_OUT,))
    baselines = Baselines(sets.train, device, seed)
    neighbours = baselines.find_neighbours(sets.val)
    audit = audit_split(sets.train.rows, sets.val.rows, neighbours)
    val, test = baselines.score(sets.val, sets.counted, neighbours), {}
    if sets.test is not None:
        test = baselines.score(sets.test, sets.counted_test, baselines.find_neighbours(sets.test), val)
    return Comparison(val, test, audit, (audit.describe(),))
