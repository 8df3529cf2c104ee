"""An independent way from files to figures, with zarr, safetensors and scikit-learn and none of the package's code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from safetensors.numpy import load_file
from sklearn import metrics as sk

from tests.planted import CLASSES, Finished

AVERAGES = (
    *("loss", "accuracy", "label_accuracy", "precision_macro", "recall_macro", "f1_macro", "precision_weighted"),
    *("recall_weighted", "f1_weighted", "f1_weighted_tuned", "f1_micro", "map_macro"),
)
TYPE_TO_CLASS = {type_id: class_id for class_id, type_id, _ in CLASSES.values()}
TOLERANCE = 1e-6
LOGIT_ERROR = 1e-5  # of a float32 logit
UNREADABLE = "images/s03_4.png"
EMPTY = 7
QUICK = ("--epochs", 3, "--device", "cpu")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Every file and link below `root`."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def open_arrays(cache: Path) -> Any:
    version = read(cache / "current")["version"]
    return zarr.open_group(str(cache / f"{version}.zarr"), mode="r")


def read_label_files(tiles: Path, names: list[str]) -> np.ndarray:
    labels = np.zeros((len(names), 60), bool)
    for row, name in enumerate(names):
        path = tiles / "labels" / f"{Path(name).stem}.txt"
        for line in path.read_text().splitlines():
            class_id = TYPE_TO_CLASS.get(int(line.split()[0]))
            if class_id is not None:
                labels[row, class_id] = True
    return labels


def apply_head(tensors: Mapping[str, np.ndarray], inputs: np.ndarray) -> np.ndarray:
    t = {name.removeprefix("head."): tensor.astype(np.float64) for name, tensor in tensors.items()}
    return np.maximum(inputs @ t["0.weight"].T + t["0.bias"], 0) @ t["3.weight"].T + t["3.bias"]


def compute_logits(cache: Path, run: Path, names: list[str], features: tuple[str, ...] = ("cls",)) -> np.ndarray:
    arrays = open_arrays(cache)
    row_of = {str(name): row for row, name in enumerate(arrays["tile"][:])}
    rows = [row_of[name] for name in names]
    inputs = np.concatenate([arrays[name][:][rows] for name in features], axis=1).astype(np.float64)
    return apply_head(load_file(run / "best" / "model.safetensors"), inputs)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def focal(logits: np.ndarray, labels: np.ndarray) -> float:
    right = np.where(labels, sigmoid(logits), sigmoid(-logits))
    return float((-np.where(labels, 0.65, 0.35) * (1 - right) ** 2 * np.log(right)).mean())


def recompute(logits: np.ndarray, labels: np.ndarray, cut: float = 0.0) -> dict[str, float]:
    """What scikit-learn says, deciding at logit `cut`; classes without positives have no part in the averages."""
    probs, preds = sigmoid(logits), logits >= cut
    present = np.flatnonzero(labels.any(axis=0))
    figures = {
        "loss": focal(logits, labels),
        "accuracy": float((preds == labels).all(axis=1).mean()),
        "label_accuracy": float((preds == labels).mean()),
        "f1_micro": float(sk.f1_score(labels.ravel(), preds.ravel())),
        "map_macro": float(np.mean([sk.average_precision_score(labels[:, c], probs[:, c]) for c in present])),
    }
    for average in ("macro", "weighted"):
        scores = sk.precision_recall_fscore_support(
            labels[:, present], preds[:, present], average=average, zero_division=0
        )
        figures |= {
            f"{name}_{average}": float(v) for name, v in zip(("precision", "recall", "f1"), scores[:3], strict=True)
        }
    return figures


def assert_figures(
    metrics: Mapping[str, Any], logits: np.ndarray, labels: np.ndarray, *, left_out: tuple[str, ...] = ()
) -> None:
    """The averages are those of these logits; one that lies within float32's error of 0 may be decided either way."""
    either_way = [recompute(logits, labels, cut) for cut in (0.0, -LOGIT_ERROR, LOGIT_ERROR)]
    assert set(either_way[0]) >= set(AVERAGES) - {"loss", "f1_weighted_tuned"}
    found = {name: metrics[name] for name in either_way[0] if name not in left_out}
    expected = [{name: figures[name] for name in found} for figures in either_way]
    assert any(found == pytest.approx(figures, abs=TOLERANCE) for figures in expected), (found, expected[0])


def names_shown(tiles: Path, names: list[str]) -> tuple[list[str], np.ndarray]:
    """Tiles that show a class, and their labels."""
    labels = read_label_files(tiles, names)
    shown = labels.any(axis=1)
    return [name for name, keep in zip(names, shown, strict=True) if keep], labels[shown]


def assert_refused(result: Finished, message: str) -> None:
    """One `error: ` line that says so, and no traceback."""
    assert result.status == 1, result.out + result.err
    assert len(result.errors) == 1, result.err
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.out + result.err
