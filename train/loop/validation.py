"""Compute the logits of the validation rows."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cache_schema.layout import BoolArray
from extract.ranks.group import Ranks
from train.data.batches import Tiles
from train.data.labels import LabelledRows
from train.model.classifier import Classifier


@torch.inference_mode()
def predict_logits(classifier: Classifier, tiles: Tiles, ranks: Ranks, *, amp: bool) -> Tensor | None:
    """Return the logits of all n tiles in order, (n, C) float32 on the CPU of rank 0; None on the other ranks.

    Each rank computes a share without padding, so no row is counted twice.
    """
    classifier.eval()
    parts = []
    for inputs in tiles.iterate_share():
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=amp, cache_enabled=False):
            logits = classifier(inputs)
        parts.append(logits.float().cpu())
    mine = (tiles.share, torch.cat(parts)) if parts else None
    found = [mine] * ranks.world_size
    dist.gather_object(mine, found if ranks.is_main else None, dst=0)
    if not ranks.is_main:
        return None
    shares = [share for share in found if share is not None]
    whole = torch.empty(len(tiles), shares[0][1].shape[1])
    for rows, logits in shares:
        whole[rows] = logits
    return whole


@dataclass(frozen=True, eq=False)
class ValidationSet:
    """Tiles that select the best epoch.

    Attributes:
        tiles: inputs, empty tiles included.
        rows: labels and scenes.
        counted: (n,) bool, the rows that the main figures count.
    """

    tiles: Tiles
    rows: LabelledRows
    counted: BoolArray
