"""Rare classes: which they are, how much their positives weigh in the loss, and how often their tiles are repeated.

Three parts: the ten rarest classes, whose figures are reported together; class weights (`--class-weights`); repeat
factors (`--repeat-factor`). Each has a function that describes it in a line for the user.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.cli.text import show_first
from cache_schema.layout import BoolArray
from train.config import ClassWeights

Float64Array = npt.NDArray[np.float64]

TITLE = "rarest in training"
COUNT = 10
BETA = 0.999
"""Of the effective number: beyond about 1 / (1 - BETA) positives, further ones add almost nothing."""
MAX_WEIGHT = 10.0


def find_rarest(train_labels: BoolArray, val_labels: BoolArray, count: int = COUNT) -> npt.NDArray[np.intp]:
    """Return the columns of the `count` rarest training classes, rarest first; ties in column order.

    Only classes with a tile on both sides count: the others cannot be learnt, or cannot be measured. The result depends
    on the split alone, so runs on one split are compared on the same classes.

    Args:
        train_labels: (n, C) bool.
        val_labels: (m, C) bool, the rows that are scored.
    """
    support = train_labels.sum(axis=0)
    shown = np.flatnonzero((support > 0) & val_labels.any(axis=0))
    return np.asarray(shown[np.argsort(support[shown], kind="stable")][:count])


def describe_rarest(train_labels: BoolArray, rarest: Iterable[int], names: Sequence[str]) -> str:
    """Return a line for the user with the rarest classes and their number of training tiles."""
    return f"{TITLE}: " + (", ".join(f"{names[c]} {train_labels[:, c].sum():,}" for c in rarest) or "no class to score")


def compute_class_weights(labels: BoolArray, scheme: ClassWeights) -> npt.NDArray[np.float32]:
    """Return the weight of a positive of each class, 1 to 10.

    Classes of at least average size keep weight 1: weights down to 0.1 lowered weighted F1 from 0.751 to 0.731 and
    0.718 on one long-tailed set, where these raised it to 0.761 and 0.766. The limit of 10 keeps a class of two tiles
    from dominating the head.

    Args:
        labels: (n, C) bool, of the training rows.
        scheme: `balanced` weighs by the inverse of the number n_c of positives; `effective` by that of the effective
            number (1 - BETA**n_c) / (1 - BETA) of Cui, Jia, Lin, Song, Belongie: "Class-Balanced Loss Based on
            Effective Number of Samples", CVPR 2019, proposition 1: close to n_c for a small class, at most 1000.

    Returns:
        (C,) float32; 1 for a class without positives, which is left out of the average size.
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
    """Multiply the losses (B, C) of positives by the weight (C,) of their class; labels are (B, C) bool."""
    return torch.where(labels, losses * weights, losses)


def describe_weights(labels: BoolArray, names: Sequence[str], scheme: ClassWeights) -> tuple[str, ...]:
    """Return lines for the user with the largest weight and the classes that have none."""
    if scheme == "none":
        return ()
    weights, support = compute_class_weights(labels, scheme), labels.sum(axis=0)
    raised = int((weights > 1).sum())
    lines = [
        f"class weights, {scheme}: positives of {raised} of {len(names)} classes count up to {weights.max():.1f} x"
    ]
    absent = [names[c] for c in np.flatnonzero(support == 0).tolist()]
    if absent:
        what = f"class weights: {len(absent)} classes without a training tile keep weight 1: "
        lines.append(what + show_first(absent))
    return tuple(lines)


def compute_repeat_factors(labels: BoolArray, threshold: float) -> Float64Array:
    """Return the mean number of times an epoch shows each tile, (n,), at least 1.

    A class on a share f of the tiles has the factor `max(1, sqrt(threshold / f))`. A tile has the largest factor of its
    classes, or 1 without any.

    Args:
        labels: (n, C) bool, of the training rows.
        threshold: share of tiles, 0 to 1, below which a class is repeated.
    """
    share = np.maximum(labels.mean(axis=0), np.finfo(np.float64).tiny)  # no division by 0 for a class without tiles
    of_class = np.maximum(1.0, np.sqrt(threshold / share))
    return np.asarray(np.where(labels, of_class, 1.0).max(axis=1, initial=1.0))


def describe_repeats(labels: BoolArray, names: Sequence[str], threshold: float) -> str:
    """Return a line for the user with the length of an epoch and the class repeated most."""
    factors = compute_repeat_factors(labels, threshold)
    repeated = int((factors > 1).sum())
    line = (
        f"repeat factor {threshold:g}: {repeated:,} of {len(labels):,} tiles are shown more than once, "
        f"an epoch has about {factors.sum():,.0f}"
    )
    if not repeated:
        return f"{line}; every class is on a larger share of tiles: a higher --repeat-factor would repeat some"
    support = labels.sum(axis=0)
    rarest = int(np.argmin(np.where(support > 0, support, len(labels) + 1)))
    return f"{line}; {names[rarest]}, on {support[rarest]:,}, {factors.max():.1f} x"
