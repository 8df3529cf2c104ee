"""Caches of planted vectors, written without a backbone: classes in a long tail that hyperplanes separate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cache_schema import LABEL_ID_COLUMNS, BlockValues, CacheRoot, Layout, Status, TileTable
from tests.caches import make_provenance, make_recorded
from train.vectors import HeldVectors

CLASSES = 60
TYPE_IDS = (73, 86, 18, 19, 15, 11, 12, 13)
"""Raw label ids, xView type ids, of the classes from the commonest to the rarest."""


def plant_vectors(
    rng: np.random.Generator, rows: int, *, width: int = 16, shares: tuple[float, float] = (0.4, 0.1)
) -> tuple[np.ndarray, np.ndarray]:
    """(n, width) float16 vectors, and (n, 8) bool labels that a hyperplane per class separates with some room on either
    side; shares fall from the first to the second number. Every row shows a class."""
    directions = rng.standard_normal((width, len(TYPE_IDS)))
    vectors = rng.standard_normal((40 * rows, width)).astype(np.float16)
    scores = vectors.astype(np.float64) @ (directions / np.linalg.norm(directions, axis=0))
    shown = np.geomspace(*shares, len(TYPE_IDS))
    limits = np.array([np.quantile(scores[:, c], 1 - share) for c, share in enumerate(shown)])
    labels = scores > limits
    kept = np.flatnonzero(labels.any(axis=1) & (np.abs(scores - limits) > 0.15).all(axis=1))[:rows]
    assert len(kept) == rows
    return vectors[kept], labels[kept]


def hold(vectors: np.ndarray) -> HeldVectors:
    """(n, D) vectors as a run holds those of a version of n rows."""
    nothing: Any = None
    version: Any = SimpleNamespace(layout=Layout(len(vectors), vectors.shape[1], ("cls",), len(vectors)))
    held = HeldVectors(version, ("cls",), torch.device("cpu"))
    held.keep(0, BlockValues({"cls": vectors.astype(np.float16)}, nothing, nothing))
    return held


def write_cache(cache: Path, vectors: np.ndarray, labels: np.ndarray, *, per_scene: int = 20) -> Path:
    """A sealed cache of n tiles `images/0000_00.png`, … in scenes of `per_scene`, whose label files say `labels`."""
    n, width = vectors.shape
    number = np.arange(n)
    table = TileTable(
        tile=np.array([f"images/{i // per_scene:04}_{i % per_scene:02}.png" for i in number], np.dtypes.StringDType()),
        size=1000 + number,
        crc32c=number.astype(np.uint32),
        generation=number,
        label_size=40 + number,
        label_crc32c=number.astype(np.uint32),
    )
    label_ids = np.zeros((n, LABEL_ID_COLUMNS), np.uint16)
    label_ids[:, list(TYPE_IDS)] = labels
    root = CacheRoot(str(cache))
    version = root.create_version(table, make_provenance(width=width), make_recorded())
    for block in range(version.layout.blocks):
        own = version.layout.block_slice(block)
        status = np.full(own.stop - own.start, Status.EMBEDDED, np.uint8)
        pooled = dict.fromkeys(version.layout.pooling, vectors[own])
        version.write_block(block, BlockValues(pooled, label_ids[own], status))
    version.seal()
    root.set_current(version.id)
    return cache


def plant_cache(url: str, *, rows: int, width: int, seed: int, tiles_a_scene: int = 12) -> str:
    """A sealed cache: `cls`, a noisier `patch_mean`, and labels, as class ids, that follow `cls` by a linear rule."""
    rng = np.random.default_rng(seed)
    number = np.arange(rows)
    names = sorted(f"images/{row // tiles_a_scene:05}_{row % tiles_a_scene}.png" for row in range(rows))
    table = TileTable(
        tile=np.array(names, np.dtypes.StringDType()),
        size=1000 + number,
        crc32c=number.astype(np.uint32),
        generation=number,
        label_size=40 + number,
        label_crc32c=number.astype(np.uint32),
    )
    root = CacheRoot(url)
    version = root.create_version(table, make_provenance(width=width), make_recorded())
    rule, bias = rng.standard_normal((width, CLASSES)) / np.sqrt(width), np.linspace(0, -3, CLASSES)
    for block, part in enumerate(version.layout.block_slices()):
        count = part.stop - part.start
        vectors = rng.standard_normal((count, width)).astype(np.float32)
        noisier = vectors + rng.standard_normal(vectors.shape).astype(np.float32)
        label_ids = np.zeros((count, LABEL_ID_COLUMNS), np.uint16)
        label_ids[:, :CLASSES] = 3 * vectors @ rule + bias + rng.logistic(size=(count, CLASSES)) > 0
        pooled = {"cls": vectors.astype(np.float16), "patch_mean": noisier.astype(np.float16)}
        version.write_block(block, BlockValues(pooled, label_ids, np.full(count, Status.EMBEDDED, np.uint8)))
    version.seal()
    root.set_current(version.id)
    return url
