"""Audit a split for leaks: validation tiles that nearly equal a training tile."""

from dataclasses import dataclass
from typing import Any

import torch

from train.data.labels import LabelledRows

from .neighbours import Neighbours

NEAR_DUPLICATE = 0.99
"""Cosine from which two vectors count as near-duplicates."""
_LISTED = 50


@dataclass(frozen=True)
class LeakAudit:
    """Near-duplicates across the split.

    Attributes:
        threshold: cosine from which a pair counts.
        train, val: number of tiles compared.
        of_train: number of training tiles; more than `train` if only a sample was compared, to bound the time.
        val_tiles: validation tiles with a near-duplicate among the compared training tiles.
        pairs: number of near-duplicate pairs.
        closest: each validation tile with its nearest training tile, by falling cosine, at most 50.
    """

    threshold: float
    train: int
    of_train: int
    val: int
    val_tiles: int
    pairs: int
    closest: tuple[dict[str, Any], ...]

    def describe(self) -> str:
        """Describe the audit on one line for the summary."""
        drawn = f" (drawn from {self.of_train:,})" if self.train < self.of_train else ""
        text = (
            f"leak audit: {self.val_tiles:,} of {self.val:,} validation tiles have a near-duplicate (cosine "
            f"{self.threshold} or more) among {self.train:,} training tiles{drawn}"
        )
        if self.val_tiles:
            first = self.closest[0]
            text += f", such as {first['val']} and {first['train']} ({first['cosine']:.4f}): see audit.json"
        return text


def audit_split(train: LabelledRows, val: LabelledRows, neighbours: Neighbours) -> LeakAudit:
    """Audit a split from the training rows nearest to each validation row, found with threshold `NEAR_DUPLICATE`."""
    nearest = neighbours.cosine[:, 0]
    order = torch.argsort(nearest, descending=True, stable=True)[:_LISTED]
    closest = [
        {
            "cosine": round(float(nearest[i]), 6),
            "val": str(val.tiles[i]),
            "train": str(train.tiles[int(neighbours.row[i, 0])]),
        }
        for i in order.tolist()
    ]
    return LeakAudit(
        NEAR_DUPLICATE,
        neighbours.searched,
        len(train),
        len(val),
        int((nearest >= NEAR_DUPLICATE).sum()),
        neighbours.near,
        tuple(closest),
    )
