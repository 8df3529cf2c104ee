"""Repeat-factor sampling: tiles of rare classes are shown more than once an epoch.

Gupta, Dollár, Girshick: "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019, section 5.2.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_schema.layout import BoolArray
from extract.distributed import Ranks

from .batches import epoch_order, take_share
from .rows import LabelledRows

Float64Array = npt.NDArray[np.float64]


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


def draw_repeats(factors: Float64Array, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """(n,) how often each tile is shown in this epoch: its factor, rounded up with the probability of its fraction.

    Depends on seed and epoch alone, so every rank draws the same, whatever their number.
    """
    whole = np.floor(factors)
    up = np.random.default_rng([seed, epoch]).random(len(factors)) < factors - whole
    return (whole + up).astype(np.int64)


def draw_epoch(rows: LabelledRows, seed: int, epoch: int) -> Tensor:
    """(m,) int64, the rows of an epoch in their order, each as often as it is to be shown; m is `count_epoch`."""
    if rows.repeat_factors is None:
        return epoch_order(len(rows), seed, epoch)
    repeats = draw_repeats(rows.repeat_factors, seed, epoch)
    shown = torch.from_numpy(np.repeat(np.arange(len(rows)), repeats))
    return shown[epoch_order(len(shown), seed, epoch)]


def share_epoch(
    rows: LabelledRows, ranks: Ranks, *, batch_size: int, seed: int, epoch: int, first_step: int
) -> list[tuple[Tensor, int]]:
    """This rank's share of every global batch of an epoch, from `first_step` on, and how many rows the batch has over
    all ranks. The batches depend on seed and epoch alone; a share of a short last one may be empty."""
    order = draw_epoch(rows, seed, epoch)
    batches = order.split(batch_size)[first_step:] if len(order) else ()
    return [(take_share(batch, ranks), len(batch)) for batch in batches]


def count_epoch(rows: LabelledRows, seed: int, epoch: int) -> int:
    """Tiles shown in an epoch, repeated ones as often as they are."""
    return len(rows) if rows.repeat_factors is None else int(draw_repeats(rows.repeat_factors, seed, epoch).sum())


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
