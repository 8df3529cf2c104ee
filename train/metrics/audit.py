"""Leak audit: tiles on one side of the split that are all but the same as a tile on the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from train.data.labels import LabelledRows

from .neighbours import Neighbours

NEAR_DUPLICATE = 0.99
"""Cosine from which two vectors count as those of the same picture."""
_LISTED = 50


@dataclass(frozen=True)
class LeakAudit:
    """Near-duplicates across the split.

    Attributes:
        threshold: cosine from which a pair is one.
        train, val: tiles compared.
        of_train: tiles that train; more than `train` where some were drawn to bound the time.
        val_tiles: validation tiles with a near-duplicate among those compared.
        pairs: all pairs there are.
        closest: pairs of a train and a val tile by falling cosine, each val tile once: the nearest, 50 at most.
    """

    threshold: float
    train: int
    of_train: int
    val: int
    val_tiles: int
    pairs: int
    closest: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """One line for the summary."""
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
    """Read the audit off the training rows nearest to each validation row, found with the threshold of this room."""
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
