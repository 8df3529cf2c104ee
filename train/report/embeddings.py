"""A 2-D map of a sample of validation tiles by their cached vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from cache_schema import Version

MOST_POINTS = 1500
MOST_OF_A_BLOCK = 64
"""So that a sample of tiles that are scattered over a large cache does not read all of it."""
LEAST_POINTS = 12
_COMPONENTS = 50
_PERPLEXITY = 30.0


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """n points.

    Attributes:
        chosen: (n,) int64 of the rows that were asked for.
        points: (n, 2) float64.
        method: how the plane was made, in words.
    """

    chosen: npt.NDArray[np.int64]
    points: npt.NDArray[np.float64]
    method: str


def draw_sample(rows: npt.NDArray[np.int64], block_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices into `rows`, ascending: 1,500 at most, block by block in random order, 64 of a block at most."""
    rng = np.random.default_rng(seed)
    blocks = rows // block_rows
    chosen: list[int] = []
    for block in rng.permutation(np.unique(blocks)).tolist():
        here = np.flatnonzero(blocks == block)
        most = min(MOST_OF_A_BLOCK, MOST_POINTS - len(chosen)) if len(rows) > MOST_POINTS else len(here)
        chosen += rng.permutation(here)[:most].tolist()
    return np.sort(np.array(chosen, np.int64))


def make_map(version: Version, rows: npt.NDArray[np.int64], features: str, seed: int) -> EmbeddingMap:
    """t-SNE of a sample of rows (van der Maaten & Hinton, "Visualizing Data using t-SNE", JMLR 9 (2008)).

    Args:
        version: whose vectors; every block that is read is checked against its commit.
        rows: (n,) int64 of its table, 12 or more.
        features: pooled arrays, joined by `+`.
        seed: of the sample and of the map.

    Raises:
        CacheError: a block cannot be read, or is damaged.
    """
    chosen = draw_sample(rows, version.layout.block_rows, seed)
    vectors = _read_vectors(version, rows[chosen], features.split("+"))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    components = min(_COMPONENTS, *vectors.shape)
    perplexity = min(_PERPLEXITY, (len(chosen) - 1) / 3)
    reduced = PCA(components, random_state=seed).fit_transform(vectors)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    drawn = "" if len(chosen) == len(rows) else f" drawn from {len(rows):,}, at most {MOST_OF_A_BLOCK} of a block"
    method = (
        f"The t-SNE of scikit-learn (perplexity {perplexity:.3g}, seed {seed}) of the {components} main components of "
        f"the vectors at length 1; {len(chosen):,} validation tiles{drawn}"
    )
    return EmbeddingMap(chosen, np.asarray(points, np.float64), method)


def _read_vectors(version: Version, rows: npt.NDArray[np.int64], names: list[str]) -> npt.NDArray[np.float32]:
    """(n, F) float32, one block in memory at a time."""
    vectors = np.empty((len(rows), version.layout.width * len(names)), np.float32)
    blocks = rows // version.layout.block_rows
    for block in np.unique(blocks).tolist():
        here = np.flatnonzero(blocks == block)
        values = version.read_trusted(block)
        inside = rows[here] - version.layout.block_slice(block).start
        vectors[here] = np.concatenate([values.pooled[name][inside] for name in names], axis=1)
    return vectors
