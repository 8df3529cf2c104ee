"""Find the rows of one set nearest to each row of another, by cosine, block by block."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cache_schema.layout import BoolArray
from train.data.labels import LabelledCache, read_vectors

MOST_PRODUCTS = 5e11
"""Most multiplications, about 10 s on 2 cores; above it only a random sample of the rows is searched."""
_QUERIES, _KEYS = 2048, 8192


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest rows of each of q queries, nearest first.

    Attributes:
        cosine: (q, k) float32.
        row: (q, k) int64, indices into the n rows.
        searched: how many of the n rows were searched.
        near: pairs with a cosine of `threshold` or more, over all q x `searched`.
    """

    cosine: Tensor
    row: Tensor
    searched: int
    near: int

    def vote(self, labels: BoolArray) -> npt.NDArray[np.float32]:
        """Return the (q, C) share of the k nearest rows that show each class, from the (n, C) `labels` of all rows."""
        return np.asarray(labels[self.row.numpy()].mean(axis=1, dtype=np.float32))


def find_neighbours(
    queries: LabelledCache,
    among: LabelledCache,
    *,
    k: int,
    threshold: float,
    device: torch.device,
    seed: int = 0,
) -> Neighbours:
    """Find the `k` rows of `among` nearest to each of `queries`; fewer if `among` has fewer.

    Memory is bounded by blocks of 2,048 x 8,192 cosines and their vectors, whatever the sizes.

    Args:
        queries, among: q and n rows of vectors from the same backbone.
        threshold: cosine from which a pair counts as near.
        seed: of the sample if n is too large.
    """
    width = read_vectors(among, torch.arange(1)).shape[1]
    most = max(k, int(MOST_PRODUCTS / max(1, len(queries.rows) * width)))
    keys = draw_rows(len(among.rows), most, seed)
    found, near = [], 0
    for asked in torch.arange(len(queries.rows)).split(_QUERIES):
        query = functional.normalize(read_vectors(queries, asked).to(device))
        best, row = query.new_empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64)
        for part in keys.split(_KEYS):
            cosine = query @ functional.normalize(read_vectors(among, part).to(device)).T
            near += int((cosine >= threshold).sum())
            closest, column = cosine.topk(min(k, len(part)))
            best, row = torch.cat([best, closest], dim=1), torch.cat([row, part[column.cpu()]], dim=1)
            best, column = best.topk(min(k, best.shape[1]))
            row = row.gather(1, column.cpu())
        found.append((best.cpu(), row))
    cosines, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Neighbours(cosines, rows, len(keys), near)


def draw_rows(rows: int, most: int, seed: int) -> Tensor:
    """Draw at most `most` of the row numbers 0..`rows` - 1, int64, ascending; all of them if there are no more."""
    if rows <= most:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:most].sort().values
