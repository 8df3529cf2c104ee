"""From what a sweep's heads got right in every epoch to a ranked table, and to what its best one is worth.

The best of many is chosen for its luck too, so its own figures flatter it. The same choices, of the epoch and of the
configuration, are therefore made again on all but one fold of the validation scenes and scored on that fold, as in
Varma & Simon, "Bias in error estimation when using cross-validation for model selection", BMC Bioinformatics 7 (2006).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold
from torch import Tensor

from train.config import TrainConfig

from .grid import describe_command, describe_loss

FOLDS = 5
KEYS = ("f1_weighted", "f1_macro", "map_macro")
_TITLES = ("weighted F1", "macro F1", "mAP")
SHOWN = 10

CountArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HeadResult:
    """A trained head.

    Attributes:
        config: with its seed.
        best_epoch: the first with the highest weighted F1, from 1.
        figures: of that epoch, by `KEYS`.
        others: (K,) weighted F1 on all folds but one, each of the best epoch there.
        own: (K, 2, C) hits and decisions on that one fold in that epoch.
        tensors: of the best epoch, where they are kept.
    """

    config: TrainConfig
    best_epoch: int
    figures: dict[str, float]
    others: FloatArray
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
        """Standard deviation over seeds; None of a single one."""
        values = [head.figures[key] for head in self.heads]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def to_json(self, rank: int) -> dict[str, Any]:
        config = self.config
        return {
            "rank": rank,
            **{key: self.mean(key) for key in KEYS},
            **{f"{key}_spread": self.spread(key) for key in KEYS},
            "features": config.features,
            "head": config.head,
            "loss": describe_loss(config),
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "seeds": len(self.heads),
            "command": describe_command(config),
        }


def assign_folds(scenes: npt.NDArray[Any], seed: int) -> npt.NDArray[np.intp]:
    """(n,) fold of each row, 0 to `FOLDS` - 1 or fewer; a scene is in one fold."""
    names, scene_of = np.unique(scenes, return_inverse=True)
    fold = np.zeros(len(scenes), np.intp)
    if len(names) > 1:
        splitter = GroupKFold(n_splits=min(FOLDS, len(names)), shuffle=True, random_state=seed)
        for k, (_, own) in enumerate(splitter.split(scene_of, groups=scene_of)):
            fold[own] = k
    return fold


def score_counts(counts: CountArray, support: CountArray) -> tuple[FloatArray, FloatArray]:
    """Weighted and macro F1, as `compute_metrics` defines them.

    Args:
        counts: (…, 2, C): per class, positives found, and rows it was decided for.
        support: (…, C) positives there are.

    Returns:
        (…,) each; 0 where there is no positive of any class.
    """
    hits, marked = counts[..., 0, :], counts[..., 1, :]
    f1 = 2 * hits / np.maximum(marked + support, 1)
    present = support > 0
    weighted = (f1 * support).sum(axis=-1) / np.maximum(support.sum(axis=-1), 1)
    return weighted, (f1 * present).sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)


def choose_epochs(history: CountArray, support: CountArray) -> tuple[FloatArray, CountArray]:
    """Per fold, the epoch that is best on the other folds.

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
    """Configurations by their mean weighted F1, best first; without those of which a head diverged.

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
    """Weighted and macro F1 of the winner, chosen on the other folds each time; None with a single fold.

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
    """The best configurations, one a line: mean and spread over seeds, and what they are."""
    header = ["", *_TITLES, "features", "head", "loss", "lr", "weight decay"]
    lines = [header]
    for i, entry in enumerate(ranked[:SHOWN], start=1):
        config = entry.config
        figures = [_format(entry.mean(key), entry.spread(key)) for key in KEYS]
        what = [config.features, config.head, describe_loss(config), f"{config.lr:g}", f"{config.weight_decay:g}"]
        lines.append([str(i), *figures, *what])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _format(mean: float, spread: float | None) -> str:
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"


def _without_seed(config: TrainConfig) -> TrainConfig:
    return replace(config, seed=0)
