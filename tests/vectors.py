"""Caches of planted vectors, written without a backbone: classes in a long tail that hyperplanes separate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cache_schema import LABEL_ID_COLUMNS, BlockValues, Layout
from tests.caches import write_rows
from train.config import TrainConfig
from train.data.labels import LabelledRows
from train.data.vectors import HeldVectors
from train.runs.checkpoint import CheckpointMeta

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
    tiles = np.array([f"images/{i // per_scene:04}_{i % per_scene:02}.png" for i in range(len(vectors))])
    label_ids = np.zeros((len(vectors), LABEL_ID_COLUMNS), np.uint16)
    label_ids[:, list(TYPE_IDS)] = labels
    write_rows(str(cache), tiles, {"cls": vectors, "patch_mean": vectors}, label_ids)
    return cache


def make_meta(rows: LabelledRows, config: TrainConfig) -> CheckpointMeta:
    """What a checkpoint of a head on these rows belongs to, where there is no cache to ask."""
    return CheckpointMeta(
        epoch=0,
        unfreeze=0,
        features=("cls",),
        hidden=config.hidden,
        dropout=config.dropout,
        class_ids=rows.class_ids,
        class_names=rows.class_names,
        reading=rows.reading,
        thresholds=(),
        backbone="demo",
        image_size=64,
        precision="float32",
        weights_sha256="",
    )
