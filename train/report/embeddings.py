"""Map a sample of validation tiles to two dimensions by their cached vectors."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from cache_schema import Version

MOST_POINTS = 1500
MOST_OF_A_BLOCK = 64
"""Bounds the reads: a sample of scattered tiles must not read all blocks of a large cache."""
LEAST_POINTS = 12
_COMPONENTS = 50
_PERPLEXITY = 30.0


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """n points.

    Attributes:
        chosen: (n,) int64 indices into the given rows.
        points: (n, 2) float64.
        method: how the map was made, in words.
    """

    chosen: npt.NDArray[np.int64]
    points: npt.NDArray[np.float64]
    method: str


def draw_sample(rows: npt.NDArray[np.int64], block_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw at most 1,500 indices into `rows`, ascending: block by block in random order, at most 64 from a block."""
    rng = np.random.default_rng(seed)
    blocks = rows // block_rows
    chosen: list[int] = []
    for block in rng.permutation(np.unique(blocks)).tolist():
        here = np.flatnonzero(blocks == block)
        most = min(MOST_OF_A_BLOCK, MOST_POINTS - len(chosen)) if len(rows) > MOST_POINTS else len(here)
        chosen += rng.permutation(here)[:most].tolist()
    return np.sort(np.array(chosen, np.int64))


def make_map(version: Version, rows: npt.NDArray[np.int64], features: str, seed: int) -> EmbeddingMap:
    """Compute the t-SNE of a sample of rows (van der Maaten & Hinton, "Visualizing Data using t-SNE", JMLR 9 (2008)).

    Args:
        version: holds the vectors; every block read is checked against its commit.
        rows: (n,) int64 of its table, 12 or more.
        features: pooled arrays, joined by `+`.
        seed: of the sample and of the map.

    Raises:
        CacheError: a block is damaged or cannot be read.
    """
    chosen = draw_sample(rows, version.layout.block_rows, seed)
    vectors = _read_vectors(version, rows[chosen], features.split("+"))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    components = min(_COMPONENTS, *vectors.shape)
    perplexity = min(_PERPLEXITY, (len(chosen) - 1) / 3)
    reduced = PCA(components, random_state=seed).fit_transform(vectors)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    drawn = "" if len(chosen) == len(rows) else f" drawn from {len(rows):,}, at most {MOST_OF_A_BLOCK} from a block"
    method = (
        f"t-SNE by scikit-learn (perplexity {perplexity:.3g}, seed {seed}) of the {components} main components of "
        f"the vectors, normalised to length 1; {len(chosen):,} validation tiles{drawn}"
    )
    return EmbeddingMap(chosen, np.asarray(points, np.float64), method)


def _read_vectors(version: Version, rows: npt.NDArray[np.int64], names: list[str]) -> npt.NDArray[np.float32]:
    """Read (n, F) float32 vectors, with one block in memory at a time."""
    vectors = np.empty((len(rows), version.layout.width * len(names)), np.float32)
    blocks = rows // version.layout.block_rows
    for block in np.unique(blocks).tolist():
        here = np.flatnonzero(blocks == block)
        values = version.read_trusted(block)
        inside = rows[here] - version.layout.block_slice(block).start
        vectors[here] = np.concatenate([values.pooled[name][inside] for name in names], axis=1)
    return vectors
