"""The end of the long tail: the ten classes with the fewest training tiles, and how a model does on them."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.layout import BoolArray
from train.config import ClassWeights

Float64Array = npt.NDArray[np.float64]

TITLE = "rarest in training"

COUNT = 10


def find_rarest(train_labels: BoolArray, val_labels: BoolArray, count: int = COUNT) -> npt.NDArray[np.intp]:
    """Columns of the `count` rarest classes of a split, rarest first; equal ones in column order.

    Only classes that both sides show: without a training tile nothing was learned, without a validation tile nothing
    can be measured. They depend on the split alone, so runs on one split are compared on the same classes.

    Args:
        train_labels: (n, C) bool.
        val_labels: (m, C) bool, the rows that are scored.
    """
    support = train_labels.sum(axis=0)
    shown = np.flatnonzero((support > 0) & val_labels.any(axis=0))
    return np.asarray(shown[np.argsort(support[shown], kind="stable")][:count])


def describe_rarest(train_labels: BoolArray, rarest: Iterable[int], names: Sequence[str]) -> str:
    """A line for the user: which classes they are, and how many tiles train each."""
    return f"{TITLE}: " + (", ".join(f"{names[c]} {train_labels[:, c].sum():,}" for c in rarest) or "no class to score")


BETA = 0.999
"""Of the effective number: positives beyond some 1 / (1 - BETA) of a class bring next to nothing new."""

MAX_WEIGHT = 10.0


def compute_class_weights(labels: BoolArray, scheme: ClassWeights) -> npt.NDArray[np.float32]:
    """How much a positive of each class counts, from 1 to 10.

    A class of the average size and every larger one keep weight 1: weights down to 0.1 took weighted F1 from 0.751 to
    0.731 and 0.718 on that tail, where these took it to 0.761 and 0.766. Ten times is the most, or a class of two tiles
    would steer the head.

    Args:
        labels: (n, C) bool, of the training rows.
        scheme: `balanced` weighs by the inverse of the number n_c of positives; `effective` by that of the effective
            number (1 - BETA**n_c) / (1 - BETA) of Cui, Jia, Lin, Song, Belongie: "Class-Balanced Loss Based on
            Effective Number of Samples", CVPR 2019, proposition 1: close to n_c for a small class, at most 1000.

    Returns:
        (C,) float32; 1 for a class without a positive, which takes no part in the average.
    """
    support = labels.sum(axis=0).astype(np.float64)
    present = support > 0
    weights = np.ones(len(support), np.float32)
    if scheme == "none" or not present.any():
        return weights
    size = support if scheme == "balanced" else (1 - BETA**support) / (1 - BETA)
    weights[present] = np.clip(size[present].mean() / size[present], 1, MAX_WEIGHT)
    return weights


def weigh_positives(losses: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """(B, C) losses, those of positives times their class's weight: labels (B, C) bool, weights (C,)."""
    return torch.where(labels, losses * weights, losses)


def describe_weights(labels: BoolArray, names: Sequence[str], scheme: ClassWeights) -> tuple[str, ...]:
    """Lines for the user: how far the weights reach, and which classes could have none."""
    if scheme == "none":
        return ()
    weights, support = compute_class_weights(labels, scheme), labels.sum(axis=0)
    raised = int((weights > 1).sum())
    lines = [
        f"class weights, {scheme}: positives of {raised} of {len(names)} classes count up to {weights.max():.1f} x"
    ]
    absent = [names[c] for c in np.flatnonzero(support == 0).tolist()]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        lines.append(
            f"class weights: {len(absent)} classes without a training tile keep weight 1: "
            + ", ".join(absent[:5])
            + more
        )
    return tuple(lines)


def compute_repeat_factors(labels: BoolArray, threshold: float) -> Float64Array:
    """(n,) how often each tile is shown an epoch, on average, at least 1.

    A class that the share f of tiles shows has the factor `max(1, sqrt(threshold / f))`; a tile has the largest of its
    classes, 1 without any.

    Args:
        labels: (n, C) bool, of the training rows.
        threshold: share of tiles, 0 to 1, below which a class is repeated.
    """
    share = np.maximum(labels.mean(axis=0), np.finfo(np.float64).tiny)  # of a class no tile shows nothing is repeated
    of_class = np.maximum(1.0, np.sqrt(threshold / share))
    return np.asarray(np.where(labels, of_class, 1.0).max(axis=1, initial=1.0))


def describe_repeats(labels: BoolArray, names: Sequence[str], threshold: float) -> str:
    """A line for the user: how much longer an epoch is, and what is repeated most."""
    factors = compute_repeat_factors(labels, threshold)
    repeated = int((factors > 1).sum())
    line = (
        f"repeat factor {threshold:g}: {repeated:,} of {len(labels):,} tiles are shown more than once, "
        f"an epoch has some {factors.sum():,.0f}"
    )
    if not repeated:
        return f"{line}; every class is on more than that share of tiles: a higher --repeat-factor would repeat some"
    support = labels.sum(axis=0)
    rarest = int(np.argmin(np.where(support > 0, support, len(labels) + 1)))
    return f"{line}; {names[rarest]}, on {support[rarest]:,}, {factors.max():.1f} x"
