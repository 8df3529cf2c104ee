"""Rank the configurations of a sweep, and estimate what the best one is worth.

The best of many is partly lucky, so its own figures flatter it. Epoch and configuration are therefore chosen again on
all but one fold of the validation scenes and scored on that fold, as in
Varma & Simon, "Bias in error estimation when using cross-validation for model selection", BMC Bioinformatics 7 (2006).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from train.config import TrainConfig
from train.metrics.decisions import split_scenes
from train.metrics.figures import FIGURES, KEY_FIGURES
from train.metrics.scores import Float64Array, average_classes, compute_f1
from train.metrics.side_by_side import format_table

from .grid import describe_command, describe_loss

FOLDS = 5
SHOWN = 10

CountArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HeadResult:
    """A trained head.

    Attributes:
        config: with its seed.
        best_epoch: the first epoch with the highest weighted F1, counted from 1.
        figures: the `KEY_FIGURES` of that epoch.
        others: (K,) for each fold, the best weighted F1 of any epoch on all other folds.
        own: (K, 2, C) hits and predicted rows on that fold in that epoch.
        tensors: of the best epoch; None if they were not kept.
    """

    config: TrainConfig
    best_epoch: int
    figures: dict[str, float]
    others: Float64Array
    own: CountArray
    tensors: dict[str, Tensor] | None

    def to_json(self) -> dict[str, Any]:
        return {"seed": self.config.seed, "best_epoch": self.best_epoch, **self.figures}


@dataclass(frozen=True, eq=False)
class Ranked:
    """A configuration with the heads of its seeds, at least one."""

    heads: tuple[HeadResult, ...]

    @property
    def config(self) -> TrainConfig:
        return self.heads[0].config

    def mean(self, key: str) -> float:
        return float(np.mean([head.figures[key] for head in self.heads]))

    def spread(self, key: str) -> float | None:
        """Return the standard deviation over seeds; None with a single seed."""
        values = [head.figures[key] for head in self.heads]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def to_json(self, rank: int) -> dict[str, Any]:
        config = self.config
        return {
            "rank": rank,
            **{key: self.mean(key) for key in KEY_FIGURES},
            **{f"{key}_spread": self.spread(key) for key in KEY_FIGURES},
            "features": config.features,
            "head": config.head,
            "loss": describe_loss(config),
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "seeds": len(self.heads),
            "command": describe_command(config),
        }


def assign_folds(scenes: npt.NDArray[Any], seed: int) -> npt.NDArray[np.intp]:
    """Assign each of n rows to one of at most `FOLDS` folds, counted from 0; a scene is in one fold."""
    fold = np.zeros(len(scenes), np.intp)
    for k, (_, own) in enumerate(split_scenes(scenes, FOLDS, seed)):
        fold[own] = k
    return fold


def score_counts(counts: CountArray, support: CountArray) -> tuple[Float64Array, Float64Array]:
    """Compute weighted and macro F1 as `compute_metrics` defines them.

    Args:
        counts: (…, 2, C) for each class, the positives found, then the rows predicted.
        support: (…, C) positive rows.

    Returns:
        (…,) each; 0 without a positive of any class.
    """
    f1 = compute_f1(counts[..., 0, :], counts[..., 1, :], support)
    return average_classes(f1, support, empty=0.0), average_classes(f1, support > 0, empty=0.0)


def choose_epochs(history: CountArray, support: CountArray) -> tuple[Float64Array, CountArray]:
    """Choose, for each fold, the epoch that is best on the other folds.

    Args:
        history: (E, K, 2, C) counts of a head.
        support: (K, C).

    Returns:
        (K,) weighted F1 of that epoch on the other folds, and (K, 2, C) its counts on the fold itself.
    """
    elsewhere = history.sum(axis=1, keepdims=True) - history
    weighted, _ = score_counts(elsewhere, support.sum(axis=0) - support)
    epochs, folds = weighted.argmax(axis=0), np.arange(len(support))
    return weighted[epochs, folds], history[epochs, folds]


def rank_configurations(results: Sequence[HeadResult], failed: Sequence[TrainConfig]) -> list[Ranked]:
    """Sort configurations by mean weighted F1, best first, leaving out those with a diverged head.

    Args:
        results: heads, those of the first seed first.
        failed: configurations, with their seeds, whose head diverged.
    """
    heads: dict[TrainConfig, list[HeadResult]] = {}
    for result in results:
        heads.setdefault(_without_seed(result.config), []).append(result)
    for config in failed:
        heads.pop(_without_seed(config), None)
    ranked = [Ranked(tuple(of_seeds)) for of_seeds in heads.values()]
    return sorted(ranked, key=lambda entry: -entry.mean("f1_weighted"))


def cross_fit(ranked: Sequence[Ranked], support: CountArray) -> dict[str, float] | None:
    """Score the winner by weighted and macro F1, chosen each time on the other folds; None with a single fold.

    Args:
        ranked: every configuration, of equally many seeds.
        support: (K, C).
    """
    if len(support) < 2:
        return None
    others = np.stack([np.mean([head.others for head in entry.heads], axis=0) for entry in ranked])
    winners = others.argmax(axis=0)
    seeds = min(len(entry.heads) for entry in ranked)
    counts = np.stack([sum(ranked[winner].heads[s].own[k] for k, winner in enumerate(winners)) for s in range(seeds)])
    weighted, macro = score_counts(counts, support.sum(axis=0))
    return {"f1_weighted": float(weighted.mean()), "f1_macro": float(macro.mean())}


def format_ranking(ranked: Sequence[Ranked]) -> str:
    """Format the best configurations, one a line: mean and spread over seeds, and their settings."""
    rows = [["", *(FIGURES[key].title for key in KEY_FIGURES), "features", "head", "loss", "lr", "weight decay"]]
    for i, entry in enumerate(ranked[:SHOWN], start=1):
        config = entry.config
        figures = [_format_spread(entry, key) for key in KEY_FIGURES]
        settings = [config.features, config.head, describe_loss(config), f"{config.lr:g}", f"{config.weight_decay:g}"]
        rows.append([str(i), *figures, *settings])
    return "\n".join(format_table(rows))


def _format_spread(entry: Ranked, key: str) -> str:
    mean, spread = FIGURES[key].format(entry.mean(key)), entry.spread(key)
    return mean if spread is None else f"{mean} ± {FIGURES[key].format(spread)}"


def _without_seed(config: TrainConfig) -> TrainConfig:
    return replace(config, seed=0)
