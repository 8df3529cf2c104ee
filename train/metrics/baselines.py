"""Score the baselines that a head has to beat: label frequency, nearest neighbours and a linear probe, on its split."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cache_schema.layout import BoolArray
from train.data.labels import LabelledCache, can_look_up, read_vectors
from train.data.sets import Sets

from .audit import NEAR_DUPLICATE, LeakAudit, audit_split
from .decisions import FloatArray, cross_fitted_preds, tune_thresholds
from .evaluation import Baseline
from .logistic import fit_logistic
from .neighbours import Neighbours, draw_rows, find_neighbours
from .scores import compute_metrics

NEAREST = 10

MOST_PROBE_CELLS = 1.2e9
"""Most rows x features x classes, about 10 s on 2 cores; above it the probe trains on a random sample of the rows."""

_ROWS = 8192

_LEFT_OUT = "baselines and leak audit: skipped, because there are too many vectors to read them again next to training"


class Baselines:
    """All baselines of one training set; `seed` draws the sample if there are too many rows, and the folds."""

    def __init__(self, train: LabelledCache, device: torch.device, seed: int) -> None:
        self._train, self._device, self._seed = train, device, seed
        self._probe = _StandardProbe(train, device, seed)

    def find_neighbours(self, cache: LabelledCache) -> Neighbours:
        """Find the training rows nearest to each row of a set."""
        return find_neighbours(
            cache, self._train, k=NEAREST, threshold=NEAR_DUPLICATE, device=self._device, seed=self._seed
        )

    def score(
        self,
        cache: LabelledCache,
        counted: BoolArray,
        neighbours: Neighbours,
        tuned: Mapping[str, Baseline] | None = None,
    ) -> dict[str, Baseline]:
        """Score each baseline, by name, on the rows of a set where `counted` (n,) is true.

        `neighbours` are those of all its rows; `tuned` are the baselines on another set, whose thresholds to use. None
        tunes them here, cross-fitted by scene.
        """
        rows, labels = cache.rows.select(counted), self._train.rows.labels
        votes = neighbours.vote(labels)[counted]
        frequency = labels.mean(axis=0, dtype=np.float32)
        guesses = {
            "label frequency": (_count(len(labels), len(labels)), np.broadcast_to(frequency, rows.labels.shape)),
            f"{NEAREST} nearest neighbours": (_count(neighbours.searched, len(labels)), votes),
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

    A class that every row shows, or none, gets its frequency as probability.
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
        self._model = fit_logistic(self._standardise(inputs), seen[:, self._fitted])
        self.basis = _count(len(chosen), len(labels))
        if not self._model.converged:
            self.basis += ", stopped before its optimum"

    def predict(self, cache: LabelledCache) -> FloatArray:
        """Return (n, C) probabilities."""
        probs = self._frequency.repeat(len(cache.rows), 1)
        for part in torch.arange(len(cache.rows)).split(_ROWS):
            logits = self._model(self._standardise(read_vectors(cache, part).to(self._device)))
            probs[part.to(self._device)[:, None], self._fitted.nonzero().T] = logits.sigmoid()
        return probs.cpu().numpy()

    def _standardise(self, inputs: Tensor) -> Tensor:
        return (inputs - self._mean) / self._deviation


def _count(used: int, rows: int) -> str:
    return f"{used:,} training tiles" + (f", drawn from {rows:,}" if used < rows else "")


@dataclass(frozen=True, eq=False)
class Comparison:
    """The baselines and the leak audit of a run.

    Attributes:
        val, test: baselines by name on each set; empty without a test set, or if the vectors cannot be read again.
        audit: of the split.
        notes: lines for the summary.
    """

    val: Mapping[str, Baseline] = field(default_factory=dict)
    test: Mapping[str, Baseline] = field(default_factory=dict)
    audit: LeakAudit | None = None
    notes: tuple[str, ...] = ()


def compare(sets: Sets, device: torch.device, seed: int) -> Comparison:
    """Compute the baselines and the leak audit of a run's sets; only a note if there are too many vectors to reread."""
    caches = [cache for cache in (sets.train, sets.val, sets.test) if cache is not None]
    if not can_look_up(*caches):
        return Comparison(notes=(_LEFT_OUT,))
    baselines = Baselines(sets.train, device, seed)
    neighbours = baselines.find_neighbours(sets.val)
    audit = audit_split(sets.train.rows, sets.val.rows, neighbours)
    val, test = baselines.score(sets.val, sets.counted, neighbours), {}
    if sets.test is not None:
        test = baselines.score(sets.test, sets.counted_test, baselines.find_neighbours(sets.test), val)
    return Comparison(val, test, audit, (audit.describe(),))
