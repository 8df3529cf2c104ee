"""What each rank of a job knows of caches that they read between them, in files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_schema import TileprobeError
from extract.ranks import exchange
from extract.ranks.group import Ranks, join_ranks
from train.config import DataConfig, TrainConfig
from train.data.labels import LabelledCache
from train.data.sets import read_sets
from train.data.vectors import HeldVectors


def read_between(out: str, cache: str, val_cache: str, budget: str) -> None:
    """Write OUT-RANK.npz: what `read` gives on this rank, or the error that ended it.

    Args:
        cache: of the training tiles; `{rank}` in it stands for the rank's number.
    """
    exchange.PIECE_BYTES = 1000  # so that a share goes in many pieces, of which the last is short
    with join_ranks("cpu") as ranks:
        try:
            found = read(cache.format(rank=ranks.rank), val_cache, int(budget), ranks)
        except TileprobeError as error:
            found = {"error": str(error)}
    np.savez(Path(f"{out}-{ranks.rank}.npz"), **found)


def read(cache: str, val_cache: str, budget: int, ranks: Ranks) -> dict[str, Any]:
    """Rows, labels and vectors of both caches; vectors that do not fit the budget are read from each block anew."""
    data = DataConfig(empty="keep")
    config = TrainConfig(cache, "", val_cache=val_cache, memory_budget=budget, batch_size=64, data=data)
    sets = read_sets(config, ranks)
    return {f"train_{k}": v for k, v in describe(sets.train).items()} | {
        f"val_{k}": v for k, v in describe(sets.val).items()
    }


def describe(cache: LabelledCache) -> dict[str, Any]:
    index, vectors = cache.rows.index, cache.vectors
    if isinstance(vectors, HeldVectors):
        found = vectors.gather(torch.from_numpy(index)).numpy()
    else:
        found = np.concatenate([vectors.read(block)[0] for block in range(vectors.layout.blocks)])[index]
    return {"index": index, "labels": cache.rows.labels, "vectors": found}
