"""Vectors of any rows of a set, a few at a time, for what looks at a set beside the training loop."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import LabelledCache

MOST_BYTES = 1 << 30
"""Largest sets that are looked at: what is read once an epoch is not to be read again for a comparison."""


def read_vectors(cache: LabelledCache, features: tuple[str, ...], chosen: Tensor) -> Tensor:
    """Some rows of a set, their features joined.

    Args:
        cache: n rows.
        features: names of pooled arrays.
        chosen: (b,) int64, which of the n.

    Returns:
        (b, F) float32 on the CPU.
    """
    rows = cache.rows.index[chosen.numpy()]
    return torch.cat([torch.from_numpy(cache.values.pooled[name][rows]).float() for name in features], dim=1)


def can_look_up(features: tuple[str, ...], *caches: LabelledCache) -> bool:
    """Whether the sets are small enough to be read beside training."""
    rows = sum(len(cache.rows) for cache in caches)
    return rows * len(features) * caches[0].version.layout.width * 2 <= MOST_BYTES
