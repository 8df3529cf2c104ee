"""Caches of made-up vectors and labels, written block by block as extraction would, in a fraction of its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import LABEL_ID_COLUMNS
from cache_schema.layout import BoolArray
from extract.ranks.group import Ranks
from tests.caches import write_rows
from train.config import TrainConfig
from train.data.sets import Sets, read_sets


def name_tiles(sizes: list[int], *, prefix: str = "s") -> np.ndarray:
    """Names, ascending, of the tiles of scenes of these sizes; `images/s003_0007.png` is of scene `s003`."""
    return np.array([f"images/{prefix}{s:04}_{i:04}.png" for s, size in enumerate(sizes) for i in range(size)])


def write_cache(
    path: Path, tiles: np.ndarray, vectors: np.ndarray, labels: BoolArray, *, status: np.ndarray | None = None
) -> str:
    """Write a sealed cache whose label ids are class ids.

    Args:
        path: of the cache.
        tiles: (n,) names, ascending.
        vectors: (n, D) `cls`; `patch_mean` is the same, negated.
        labels: (n, C) bool of the classes 0 to C - 1.
        status: (n,) uint8, by default all embedded.
    """
    label_ids = np.zeros((len(tiles), LABEL_ID_COLUMNS), np.uint16)
    label_ids[:, : labels.shape[1]] = labels
    return write_rows(str(path), tiles, {"cls": vectors, "patch_mean": -vectors}, label_ids, status=status)


def write_taxonomy(path: Path, classes: int) -> str:
    """A class list of `class 0`, `class 1`, …"""
    path.write_text("class_id,name\n" + "".join(f"{c},class {c}\n" for c in range(classes)))
    return str(path)


def open_sets(config: TrainConfig) -> Sets:
    """The sets of a run, in memory."""
    return read_sets(config, Ranks.alone())


def plant_labels(rng: np.random.Generator, scenes: np.ndarray, classes: int) -> BoolArray:
    """(n, C) long-tailed labels that cluster by scene: class 0 in over half of the tiles, the last in a few."""
    _, scene_of = np.unique(scenes, return_inverse=True)
    frequency = 0.6 * np.exp(-np.linspace(0, 4.5, classes))
    lean = rng.gamma(0.5, 2.0, (scene_of.max() + 1, classes))
    return np.asarray(rng.random((len(scenes), classes)) < np.clip(frequency * lean, 0, 0.95)[scene_of])


def plant_vectors(rng: np.random.Generator, labels: BoolArray, width: int, *, signal: float = 2.0) -> np.ndarray:
    """(n, width) float32: noise of deviation 1, and for each class a direction of its own."""
    directions: Any = np.linalg.qr(rng.normal(size=(width, width)))[0][: labels.shape[1]]
    return np.asarray(rng.normal(size=(len(labels), width)) + signal * labels @ directions, np.float32)
