"""What a run leaves for people: report.html, one file that opens offline, and TensorBoard events."""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from torch.utils.tensorboard import SummaryWriter

from .config import TrainConfig
from .evaluation import Evaluation
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


def write_report(run: RunDirectory, config: TrainConfig, results: Mapping[str, Evaluation]) -> None:
    """Write report.html and TensorBoard events from what the run directory holds and `results`, by their titles."""
    history = run.read_history()
    _write_events(run, history)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("train", "."), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        title=f"Run {run.path.name}",
        subtitle=(f"last {config.unfreeze} layers and head" if config.unfreeze else "head on cached embeddings")
        + f", cache {config.cache}",
        results=[_tabulate(title, evaluation) for title, evaluation in results.items()],
        curves=_draw_curves(history),
        settings=json.dumps(run.read_json("config.json"), indent=2, ensure_ascii=False),
    )
    (run.path / "report.html").write_text(page)


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
        axis.legend()
    left.set_ylabel("focal loss")
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
