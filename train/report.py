"""What a run leaves for people: report.html, one file that opens offline, and TensorBoard events."""

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from cache_schema.layout import BoolArray

from .config import TrainConfig
from .evaluation import COMPARED, Evaluation, describe_calibration, tabulate_comparison
from .rows import LabelledRows
from .rundir import RunDirectory

_FIGURES = (
    ("F1 weighted", "f1_weighted"),
    ("F1 weighted, tuned thresholds", "f1_weighted_tuned"),
    ("F1 macro", "f1_macro"),
    ("F1 micro", "f1_micro"),
    ("mAP", "map_macro"),
    ("precision weighted", "precision_weighted"),
    ("recall weighted", "recall_weighted"),
    ("label accuracy", "label_accuracy"),
    ("subset accuracy", "accuracy"),
    ("loss", "loss"),
)


def write_report(
    run: RunDirectory,
    config: TrainConfig,
    results: Mapping[str, Evaluation],
    notes: Sequence[str] = (),
    folds: Sequence[str] = (),
) -> None:
    """Write report.html and TensorBoard events from what the run directory holds.

    Args:
        run, config: the run.
        results: by their titles.
        notes: lines about the split.
        folds: lines of a cross-validation.
    """
    history = run.read_history()
    _write_events(run, history)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("train", "."), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        title=f"Run {run.path.name}",
        subtitle=(f"last {config.unfreeze} layers and head" if config.unfreeze else "head on cached embeddings")
        + f", cache {config.cache}",
        results=[_tabulate(title, evaluation) for title, evaluation in results.items()],
        notes=notes,
        folds="\n".join(folds),
        curves=_draw_curves(history) if history else None,
        settings=json.dumps(run.read_json("config.json"), indent=2, ensure_ascii=False),
    )
    (run.path / "report.html").write_text(page)


def draw_tiles(path: Path, images: Sequence[npt.NDArray[np.uint8]], rows: LabelledRows, preds: BoolArray) -> None:
    """Save a picture of n tiles, each with its classes and what a model says of it.

    Args:
        path: PNG to write.
        images: n (H, W, 3) uint8.
        rows: their names and labels.
        preds: (n, C) bool decisions.
    """
    columns = 4
    height = -(-len(images) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4 * columns, 4.6 * height), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, tile, labels, decided in zip(axes.flat, images, rows.tiles, rows.labels, preds, strict=False):
        axis.imshow(image)
        right = bool((labels == decided).all())
        lines = [str(tile), f"truth: {_name(rows, labels)}", f"says: {_name(rows, decided)}"]
        text = "\n".join(textwrap.fill(line, 44) for line in lines)
        axis.set_title(text, fontsize=9, loc="left", color="#14532d" if right else "#7f1d1d", parse_math=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _name(rows: LabelledRows, chosen: BoolArray) -> str:
    return ", ".join(rows.class_names[c] for c in np.flatnonzero(chosen)) or "nothing"


def _tabulate(title: str, evaluation: Evaluation) -> dict[str, Any]:
    columns = {"all classes": evaluation.metrics, **evaluation.variants}
    return {
        "title": title,
        "columns": list(columns),
        "figures": [
            {"name": name, "cells": [_format(column[key]) for column in columns.values()]} for name, key in _FIGURES
        ],
        "intervals": "95 % bootstrap intervals over scenes: "
        + ", ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in evaluation.intervals.items()),
        "calibration": describe_calibration(evaluation.calibration),
        "compared": [name for name, _ in COMPARED],
        "comparison": tabulate_comparison(evaluation) if evaluation.baselines else [],
        "classes": sorted(evaluation.metrics["per_class"], key=lambda row: -row["support"]),
    }


def _format(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _draw_curves(history: list[dict[str, Any]]) -> str:
    """Loss on the left, validation figures on the right, as base64 PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    epochs = [line["epoch"] for line in history]
    for axis, names in (
        (left, {"train_loss": "training", "loss": "validation"}),
        (right, {"f1_weighted": "F1 weighted", "f1_macro": "F1 macro", "map_macro": "mAP"}),
    ):
        for key, label in names.items():
            axis.plot(epochs, [line[key] for line in history], label=label)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    left.set_ylabel("loss")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _write_events(run: RunDirectory, history: list[dict[str, Any]]) -> None:
    with SummaryWriter(str(run.path / "tensorboard")) as writer:
        for line in history:
            for name, value in line.items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, line["epoch"])
