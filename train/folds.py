"""Grouped cross-validation: K heads, each trained without one fold of scenes, say of every row what they make of it.

Nothing is chosen on the rows that score: a fold's head trains all its epochs, and its last one counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extract.distributed import Ranks

from .cached import CachedTiles
from .config import TrainConfig
from .evaluation import predict_logits
from .loop import Trainer, ValidationSet, choose_batch_size, use_amp
from .model import Classifier
from .rows import LabelledCache
from .rundir import RunDirectory
from .scenes import fold_rows


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """What heads say of rows they were not trained on.

    Attributes:
        fold: (n,) int64, the fold of each row: its scene was held out of that fold's head.
        logits: (n, C) float32 of that head.
    """

    fold: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]


def predict_out_of_fold(
    config: TrainConfig, cache: LabelledCache, ranks: Ranks, *, folds: int, say: Callable[[str], None]
) -> OutOfFold | None:
    """Train `folds` heads on cached vectors and predict every row by the head that has not seen its scene.

    Args:
        config: of each head: features, epochs, learning rate and so on; empty tiles train only if it keeps them.
        cache: n usable rows, split and empty tiles included; all ranks hold the same.
        ranks: all call this together.
        folds: 2 or more.
        say: takes a line an fold.

    Returns:
        the predictions in the order of `cache.rows`, on rank 0; None on the others.

    Raises:
        SplitError: fewer scenes than folds.
        TrainError: a fold's training failed.
    """
    raise NotImplementedError
