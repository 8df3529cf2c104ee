"""Vectors of any rows of a set, a few at a time, for what looks at a set beside the training loop."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import LabelledCache
from .vectors import HeldVectors


def read_vectors(cache: LabelledCache, chosen: Tensor) -> Tensor:
    """Some rows of a set whose vectors are held, see `can_look_up`.

    Args:
        cache: n rows.
        chosen: (b,) int64 on the CPU, which of the n.

    Returns:
        (b, F) float32 on the device that holds them, the run's features joined.
    """
    assert isinstance(cache.vectors, HeldVectors)
    index = torch.from_numpy(cache.rows.index[chosen.numpy()])
    return cache.vectors.gather(index.to(cache.vectors.device)).float()


def can_look_up(*caches: LabelledCache) -> bool:
    """Whether the vectors are held: what is read from the cache once an epoch is not to be read again to compare."""
    return all(isinstance(cache.vectors, HeldVectors) for cache in caches)
