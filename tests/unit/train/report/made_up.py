"""Decisions, rows and a finished run of made-up logits, with hostile names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.caches import make_provenance, make_recorded
from train.config import TrainConfig
from train.data.labels import LabelledRows
from train.metrics.evaluation import evaluate_rows
from train.model.loss import LossConfig
from train.runs.directory import RunDirectory
from train.runs.val_logits import save_val_logits

NAMES = (
    "<script>alert(1)</script>",
    "roof & \"pool\" 'x'",
    "plain",
    "<img src=x onerror=y>",
    "Bäume_$a$",
    "never seen",
)


def draw_decisions(rng: np.random.Generator, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities with ties, labels and decisions."""
    labels = rng.random((rows, classes)) < rng.uniform(0.05, 0.6, classes)
    probs = ((rng.random(labels.shape) + labels).clip(0, 1.6) / 1.7).round(2).astype(np.float32)
    return probs, labels, probs >= rng.uniform(0.2, 0.8, classes).astype(np.float32)


def make_rows(labels: np.ndarray, names: tuple[str, ...]) -> LabelledRows:
    n = len(labels)
    return LabelledRows(
        index=np.arange(n),
        tiles=np.array([f"images/<b>{i // 8}_{i % 8}.png" for i in range(n)], np.dtypes.StringDType()),
        scenes=np.array([f"s{i // 8}" for i in range(n)]),
        labels=labels,
        reading="class",
        class_ids=tuple(range(len(names))),
        class_names=names,
        notes=(),
    )


def make_run(
    root: Path, rng: np.random.Generator, *, rows: int = 40, names: tuple[str, ...] = NAMES, **settings: Any
) -> RunDirectory:
    """What the trainer leaves, of made-up logits; the last class has no positive."""
    config = TrainConfig(cache="gs://bucket/<i>cache</i>", run="r", **settings)
    run = RunDirectory.create(str(root / "head"))
    labels = rng.random((rows, len(names))) < np.geomspace(0.6, 0.05, len(names))
    labels[:, -1] = False
    labels[:, 0] |= ~labels.any(axis=1)
    logits = torch.from_numpy((rng.normal(size=labels.shape) + 2.0 * labels - 1).astype(np.float32))
    made = make_rows(labels, names)
    recorded = make_recorded(backbone="</td><script>2")
    written = {"config": config.to_json(), "version": "ab", "provenance": make_provenance().to_json()}
    run.write_json("config.json", {**written, "recorded": recorded.to_json()})
    run.write_json("split.json", {"train": [], "val": made.tiles.tolist()})
    evaluation = evaluate_rows(logits, made, np.ones(rows, bool), loss=LossConfig())
    run.write_json("metrics.json", evaluation.to_json())
    save_val_logits(run, made, logits)
    for epoch in (1, 2):
        figures = {"train_loss": 0.1 / epoch, "loss": 0.2, "f1_weighted": 0.5, "f1_macro": 0.4, "map_macro": None}
        run.append_history({"epoch": epoch, **figures})
    return run
