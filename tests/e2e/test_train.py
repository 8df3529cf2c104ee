"""The trainer as its user runs it, on caches that the real extraction made: files, figures, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from google.cloud import storage
from safetensors.numpy import load_file
from sklearn import metrics as sk

import train.loop.assemble
from cache_schema import Taxonomy
from tests.checkpoints import make_checkpoint
from tests.planted import CLASSES, Finished, extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train
from train.loop.trainer import Trainer
from train.metrics.decisions import cross_fit, expected_calibration_error, fit_temperature, tune_thresholds

AVERAGES = (
    *("loss", "accuracy", "label_accuracy", "precision_macro", "recall_macro", "f1_macro", "precision_weighted"),
    *("recall_weighted", "f1_weighted", "f1_weighted_tuned", "f1_micro", "map_macro"),
)
CLASS_KEYS = {"name", "support", "precision", "recall", "f1", "ap", "threshold"}
TYPE_TO_CLASS = {type_id: class_id for class_id, type_id, _ in CLASSES.values()}
TOLERANCE = 1e-6
LOGIT_ERROR = 1e-5  # of a float32 logit
UNREADABLE = "images/s03_4.png"
EMPTY = 7
QUICK = ("--epochs", 3, "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles with one unreadable, one artefact and one unknown id; three sets of tiles, a checkpoint and caches."""
    root = tmp_path_factory.mktemp("train")
    seed = fresh_seed()
    backbone = make_checkpoint(root / "checkpoint", seed=seed)
    tiles = plant_tiles(root / "tiles", scenes=13, per_scene=9, seed=seed, empty=EMPTY, bare=True)
    (tiles / UNREADABLE).write_bytes(b"\x89PNG and no more")
    with (tiles / "labels" / "s05_1.txt").open("a") as stream:
        stream.write("75 0.5 0.5 0.1 0.1\n99 0.5 0.5 0.1 0.1\n")
    plant_tiles(root / "val-tiles", scenes=4, per_scene=8, seed=seed + 1, prefix="v", empty=3)
    plant_tiles(root / "test-tiles", scenes=4, per_scene=8, seed=seed + 2, prefix="t", empty=2)
    for name in ("tiles", "val-tiles", "test-tiles"):
        extract_cache(root / name, root / name.replace("tiles", "cache"), backbone)
    return root


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished head run and a fine-tuned one, of all defaults that matter."""
    root = tmp_path_factory.mktemp("work")
    head = run_train(root, "head", "--cache", made / "cache", *QUICK)
    assert head.status == 0, head.err
    (root / "head.out").write_text(head.out)
    finetune = run_train(root, "finetune", "--cache", made / "cache", "--workers", 0, "--epochs", 2, "--device", "cpu")
    assert finetune.status == 0, finetune.err
    (root / "finetune.out").write_text(finetune.out)
    return root


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> Path:
    """A copy of that directory, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "work", symlinks=True))


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


# An independent way from files to figures: zarr, safetensors, label files and scikit-learn; none of the package's code.


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


# The head


def test_a_head_run_leaves_every_file(trained: Path, made: Path) -> None:
    run = trained / "runs" / "head"
    assert run.is_symlink()
    assert os.readlink(run) == "head-001"
    for name in ("config.json", "split.json", "history.jsonl", "metrics.json", "val_logits.safetensors", "report.html"):
        assert (run / name).is_file(), name
    for checkpoint in ("best", "last"):
        assert {"model.safetensors", "sha256"} <= {path.name for path in (run / checkpoint).iterdir()}
    assert list(run.rglob("events.out.tfevents.*"))
    config = read(run / "config.json")
    assert config["config"]["cache"] == str(made / "cache")
    rows = len(names_shown(made / "tiles", read(run / "split.json")["train"])[0])
    assert config["config"]["batch_size"] == (4 if rows >= 80 else 2)  # 1024, halved until an epoch has 20 steps
    assert config["version"] == read(made / "cache" / "current")["version"]
    history = read_lines(run / "history.jsonl")
    assert [line["epoch"] for line in history] == [1, 2, 3]
    for line in history:
        assert {"epoch", "lr", "train_loss", *AVERAGES, "f1_macro_rarest", "map_macro_rarest"} == set(line)
    assert not [path for path in run.rglob("*") if path.name.endswith((".tmp", ".old"))]


def test_metrics_json_has_the_keys_of_the_design(trained: Path) -> None:
    metrics = read(trained / "runs" / "head" / "metrics.json")
    assert set(metrics) == {*AVERAGES, "per_class", "intervals", "variants", "calibration", "reliability", "baselines"}
    assert len(metrics["per_class"]) == 60
    assert all(set(row) == CLASS_KEYS for row in metrics["per_class"])
    assert [row["name"] for row in metrics["per_class"]] == list(Taxonomy.xview().names)
    absent = [row for row in metrics["per_class"] if row["support"] == 0]
    assert len(absent) == 60 - len(CLASSES)
    assert all(row["precision"] is row["recall"] is row["f1"] is row["ap"] is None for row in absent)
    assert all(isinstance(metrics[name], float) for name in AVERAGES)
    variants = {"without Building and Small Car", "with empty tiles", "rarest in training"}
    assert set(metrics["variants"]) == variants


def test_metrics_equal_an_independent_computation(trained: Path, made: Path) -> None:
    run = trained / "runs" / "head"
    metrics = read(run / "metrics.json")
    split = read(run / "split.json")["val"]
    names, labels = names_shown(made / "tiles", split)
    logits = compute_logits(made / "cache", run, names)
    assert_figures(metrics, logits, labels)
    scenes = np.array([Path(name).stem.split("_")[0] for name in names])
    calibrated, crossed = cross_fit(logits.astype(np.float32), labels, scenes)
    for key, probs in (("ece_before", sigmoid(logits)), ("ece_after", calibrated)):
        assert metrics["calibration"][key] == pytest.approx(expected_calibration_error(probs, labels), abs=1e-4)
    support = labels.sum(axis=0)
    present = support > 0
    f1 = sk.f1_score(labels, crossed, average=None, zero_division=0)
    assert metrics["f1_weighted_tuned"] == pytest.approx(
        np.average(f1[present], weights=support[present]), abs=TOLERANCE
    )
    temperature = metrics["calibration"]["temperature"]
    assert temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-4)
    assert temperature == read(run / "best" / "checkpoint.json")["temperature"]
    thresholds = tune_thresholds(sigmoid(logits / temperature).astype(np.float32), labels)
    preds = logits >= 0
    precision, recall, f1, _ = sk.precision_recall_fscore_support(labels, preds, average=None, zero_division=0)
    for c, row in enumerate(metrics["per_class"]):
        assert row["support"] == support[c]
        assert row["threshold"] == pytest.approx(thresholds[c], abs=TOLERANCE)
        if support[c]:
            expected = (precision[c], recall[c], f1[c], sk.average_precision_score(labels[:, c], sigmoid(logits)[:, c]))
            assert tuple(row[key] for key in ("precision", "recall", "f1", "ap")) == pytest.approx(
                expected, abs=TOLERANCE
            )
    # The planted signal is found, or the comparison would be one of noise.
    assert metrics["map_macro"] > 1.2 * labels.mean(axis=0)[present].mean()


def test_variants_equal_an_independent_computation(trained: Path, made: Path) -> None:
    run = trained / "runs" / "head"
    variants = read(run / "metrics.json")["variants"]
    split = read(run / "split.json")["val"]
    labels = read_label_files(made / "tiles", split)
    logits = compute_logits(made / "cache", run, split)
    assert_figures(variants["with empty tiles"], logits, labels)
    shown = labels.any(axis=1)
    kept = [c for c in range(60) if c not in (48, 5)]
    without = variants["without Building and Small Car"]
    # The loss of the classes that are left is not asked for.
    assert_figures(without, logits[shown][:, kept], labels[shown][:, kept], left_out=("loss",))
    assert len(variants["without Building and Small Car"]["per_class"]) == 58


def test_the_split_keeps_scenes_apart_and_holds_every_usable_tile(trained: Path, made: Path) -> None:
    split = read(trained / "runs" / "head" / "split.json")
    assert set(split) == {"train", "val"}
    listed = {f"images/{path.name}" for path in (made / "tiles" / "images").iterdir()}
    assert sorted(split["train"] + split["val"]) == sorted(listed - {UNREADABLE})
    scenes = {side: {Path(name).stem.split("_")[0] for name in names} for side, names in split.items()}
    assert not scenes["train"] & scenes["val"]


def test_the_output_says_what_was_left_out(trained: Path) -> None:
    out = (trained / "head.out").read_text()
    assert "117 rows, label ids read as type ids" in out
    assert "1 tiles are quarantined: left out" in out
    assert "1 instances of annotation artefacts dropped" in out
    assert re.search(r"of all label lines are ignored: no type ids of this class list: 99 \(1x\).*s05_1\.png", out)
    assert "split by scene: " in out
    assert "without Building and Small Car" in out
    assert "files go to runs/head-001" in out


def test_runs_are_not_overwritten(work: Path, made: Path) -> None:
    before = snapshot(work / "runs")
    result = run_train(work, "head", "--cache", made / "cache", "--epochs", 1, "--device", "cpu", "--seed", 3)
    assert result.status == 0, result.err
    after = snapshot(work / "runs")
    assert after.pop("head") == "head-002"
    del before["head"]
    assert before.items() <= after.items()


@pytest.mark.parametrize("empty", ["drop", "val", "keep"])
def test_empty_tiles_are_the_trainers_choice(made: Path, tmp_path: Path, empty: str) -> None:
    """Scene s00 holds the empty tiles: whichever side it is on, its labels are known to hold nothing."""
    result = run_train(tmp_path, "head", "--cache", made / "cache", "--epochs", 1, "--empty", empty, "--device", "cpu")
    assert result.status == 0, result.err
    run = tmp_path / "runs" / "head"
    split = read(run / "split.json")
    shown = {side: len(names_shown(made / "tiles", names)[0]) for side, names in split.items()}
    train_rows = len(split["train"]) if empty == "keep" else shown["train"]
    val_rows = shown["val"] if empty == "drop" else len(split["val"])
    assert f"{train_rows} tiles train, {val_rows} validate" in result.out
    metrics = read(run / "metrics.json")
    names = split["val"] if empty != "drop" else names_shown(made / "tiles", split["val"])[0]
    logits = compute_logits(made / "cache", run, names)
    assert_figures(metrics, logits, read_label_files(made / "tiles", names))
    assert ("with empty tiles" in metrics["variants"]) == (empty == "drop" and shown["val"] < len(split["val"]))
    assert read_lines(run / "timings.jsonl")[0]["tiles"] == train_rows


def test_both_features_double_the_heads_input(made: Path, tmp_path: Path) -> None:
    result = run_train(tmp_path, "head", "--cache", made / "cache", "--features", "cls+patch_mean", *QUICK)
    assert result.status == 0, result.err
    run = tmp_path / "runs" / "head"
    assert load_file(run / "best" / "model.safetensors")["head.0.weight"].shape == (512, 128)
    names, labels = names_shown(made / "tiles", read(run / "split.json")["val"])
    logits = compute_logits(made / "cache", run, names, ("cls", "patch_mean"))
    assert_figures(read(run / "metrics.json"), logits, labels)


def test_a_split_file_is_used_again(work: Path, made: Path, tmp_path: Path) -> None:
    split = work / "runs" / "head" / "split.json"
    arguments = ("head", "--cache", made / "cache", "--seed", 9, "--epochs", 1, "--device", "cpu")
    assert run_train(work, *arguments, "--split-file", split, "--run-dir", "runs/same").status == 0
    assert read(work / "runs" / "same" / "split.json") == read(split)
    assert run_train(work, *arguments, "--run-dir", "runs/other").status == 0
    assert read(work / "runs" / "other" / "split.json") != read(split)


# Sets of their own, and evaluating what was trained


@pytest.fixture(scope="module")
def with_sets(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that validate on VAL_CACHE and are scored on TEST_CACHE: the head, and fine-tuning from it."""
    root = tmp_path_factory.mktemp("sets")
    caches = ("--cache", made / "cache", "--test-cache", made / "test-cache", "--device", "cpu")
    head = run_train(root, "head", *caches, "--val-cache", made / "val-cache", "--epochs", 3)
    assert head.status == 0, head.err
    finetune = run_train(root, "finetune", *caches, "--epochs", 1, "--workers", 0, "--unfreeze", 2)
    assert finetune.status == 0, finetune.err
    (root / "finetune.out").write_text(finetune.out)
    return root


def test_sets_of_their_own_are_scored(with_sets: Path, made: Path) -> None:
    run = with_sets / "runs" / "head"
    split = read(run / "split.json")
    assert len(split["train"]) == 117 - 1
    assert {Path(name).stem[0] for name in split["val"]} == {"v"}
    for file, tiles in (("metrics.json", "val-tiles"), ("test_metrics.json", "test-tiles")):
        listed = sorted(f"images/{path.name}" for path in (made / tiles / "images").iterdir())
        names, labels = names_shown(made / tiles, listed)
        assert 0 < len(names) < len(listed)
        logits = compute_logits(made / tiles.replace("tiles", "cache"), run, names)
        metrics = read(run / file)
        assert_figures(metrics, logits, labels)
        if file == "test_metrics.json":  # with the thresholds of the validation rows
            thresholds = [row["threshold"] for row in read(run / "metrics.json")["per_class"]]
            assert [row["threshold"] for row in metrics["per_class"]] == thresholds
            present = labels.any(axis=0)
            temperature = read(run / "best" / "checkpoint.json")["temperature"]
            assert metrics["calibration"]["temperature"] == temperature
            tuned = sigmoid(logits / temperature).astype(np.float32) >= np.array(thresholds, np.float32)
            f1 = sk.f1_score(labels[:, present], tuned[:, present], average="weighted", zero_division=0)
            assert metrics["f1_weighted_tuned"] == pytest.approx(f1, abs=TOLERANCE)


def test_finetuning_validates_where_its_head_did(with_sets: Path) -> None:
    head, finetune = (read(with_sets / "runs" / name / "split.json") for name in ("head", "finetune"))
    assert head == finetune
    assert "validates on" in (with_sets / "finetune.out").read_text()


def parse_summary(out: str) -> tuple[dict[str, float | None], dict[str, list[str]]]:
    """The column of all classes, and the cells of each class in the last table."""
    names = {
        "loss": "loss",
        "subset accuracy": "accuracy",
        "label accuracy": "label_accuracy",
        "mAP": "map_macro",
        "F1 weighted": "f1_weighted",
        "F1 weighted, tuned": "f1_weighted_tuned",
        "F1 macro": "f1_macro",
        "F1 micro": "f1_micro",
        "precision weighted": "precision_weighted",
        "precision macro": "precision_macro",
        "recall weighted": "recall_weighted",
        "recall macro": "recall_macro",
    }
    figures: dict[str, float | None] = {}
    lines = out.splitlines()
    for line in lines:
        title = line[:22].strip()
        if title in names and names[title] not in figures:
            cell = line[22:].split()[0]
            figures[names[title]] = None if cell == "n/a" else float(cell)
    start = max(i for i, line in enumerate(lines) if line.startswith("class "))
    classes = {" ".join(line.split()[:-6]): line.split()[-6:] for line in lines[start + 1 :] if len(line.split()) > 6}
    return figures, classes


@pytest.mark.parametrize("run", ["head", "finetune"])
@pytest.mark.parametrize("target", ["--cache", "--tiles"])
def test_evaluating_gives_the_figures_of_training(with_sets: Path, made: Path, run: str, target: str) -> None:
    """Exact to the four printed digits, except where a head trained on float16 vectors sees streamed ones: there a tile
    may change places in a ranking or cross a threshold, and the loss is compared closely, the rest loosely."""
    loose = (run, target) == ("head", "--tiles")
    where = made / ("test-cache" if target == "--cache" else "test-tiles")
    result = run_train(
        with_sets, "evaluate", "--run-dir", f"runs/{run}", target, where, "--workers", 0, "--device", "cpu"
    )
    assert result.status == 0, result.err
    metrics = read(with_sets / "runs" / run / "test_metrics.json")
    figures, classes = parse_summary(result.out)
    assert set(figures) == set(AVERAGES)
    for name in AVERAGES:
        assert figures[name] == pytest.approx(metrics[name], abs=0.06 if loose and name != "loss" else 1.01e-4), name
    assert list(classes) == [row["name"] for row in metrics["per_class"]]
    for row in metrics["per_class"]:
        f1, ap, precision, recall, support, threshold = classes[row["name"]]
        assert int(support) == row["support"]
        assert float(threshold) == pytest.approx(row["threshold"], abs=1e-3)
        for cell, key in ((f1, "f1"), (ap, "ap"), (precision, "precision"), (recall, "recall")):
            assert (cell == "n/a") == (row[key] is None)
            assert loose or cell == "n/a" or float(cell) == pytest.approx(row[key], abs=1.01e-3)
    assert "warning" not in result.out


@pytest.mark.parametrize("run", ["head", "finetune"])
@pytest.mark.parametrize("target", ["cache", "tiles"])
def test_scoring_training_tiles_is_worth_a_warning(trained: Path, made: Path, run: str, target: str) -> None:
    result = run_train(
        trained, "evaluate", "--run-dir", f"runs/{run}", f"--{target}", made / target, "--workers", 0, "--device", "cpu"
    )
    assert result.status == 0, result.err
    split = read(trained / "runs" / run / "split.json")
    seen = len(names_shown(made / "tiles", split["train"])[0])
    scored = seen + len(names_shown(made / "tiles", split["val"])[0])
    assert 0 < seen < scored
    warnings = [line for line in result.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: {seen} of the {scored} tiles scored here trained this run")


# Predictions


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    return header, rows


@pytest.mark.parametrize("run", ["head", "finetune"])
@pytest.mark.parametrize("target", ["cache", "tiles"])
def test_predictions(trained: Path, made: Path, tmp_path: Path, run: str, target: str) -> None:
    out = tmp_path / "deep" / "predictions.csv"
    result = run_train(
        trained, "predict", "--run-dir", f"runs/{run}", f"--{target}", made / target, "--out", out, "--workers", 0,
        "--device", "cpu",
    )  # fmt: skip
    assert result.status == 0, result.err
    assert f"117 tiles -> {out}" in result.out
    assert "1 of them could not be read" in result.out
    header, rows = read_csv(out)
    names = list(Taxonomy.xview().names)
    assert header == ["tile", "status", "preds", *names]
    tiles = sorted(f"images/{path.name}" for path in (made / "tiles" / "images").iterdir())
    assert [row[0] for row in rows] == tiles
    _, thresholds = read_csv(out.with_name("predictions-thresholds.csv"))
    assert [(row[0], row[1]) for row in thresholds] == [(str(i), name) for i, name in enumerate(names)]
    limits = [float(row[2]) for row in thresholds]
    tuned = [row["threshold"] for row in read(trained / "runs" / run / "metrics.json")["per_class"]]
    assert limits == pytest.approx(tuned, abs=1e-7)
    readable = [row for row in rows if row[0] != UNREADABLE]
    for row in readable:
        assert row[1] == "embedded"
        decided = [name for name, p, limit in zip(names, row[3:], limits, strict=True) if float(p) >= limit]
        assert row[2] == ";".join(decided)
    assert any(row[2] for row in readable)
    (blank,) = [row for row in rows if row[0] == UNREADABLE]
    assert blank[1:] == ["undecodable", "", *[""] * 60]
    if run == "head":  # the streamed vectors are those of the cache up to float16, that is to some 1e-3 of a logit
        temperature = read(trained / "runs" / "head" / "best" / "checkpoint.json")["temperature"]
        logits = compute_logits(made / "cache", trained / "runs" / "head", [row[0] for row in readable])
        expected = sigmoid(logits / temperature)
        found = np.array([[float(cell) for cell in row[3:]] for row in readable])
        np.testing.assert_allclose(found, expected, atol=1e-6 if target == "cache" else 2e-3 / min(temperature, 1))


def test_predictions_of_both_runs_differ(trained: Path, made: Path, tmp_path: Path) -> None:
    tables = []
    for run in ("head", "finetune"):
        arguments = ("--run-dir", f"runs/{run}", "--tiles", made / "test-tiles", "--workers", 0, "--device", "cpu")
        assert run_train(trained, "predict", *arguments, "--out", tmp_path / f"{run}.csv").status == 0
        tables.append([[float(cell) for cell in row[3:]] for row in read_csv(tmp_path / f"{run}.csv")[1]])
    assert np.abs(np.subtract(*tables)).max() > 1e-3


def test_predicting_needs_no_labels_and_survives_any_name(trained: Path, made: Path, tmp_path: Path) -> None:
    odd = ['a,b "c".png', "line\nbreak_1.png", "ünï;code_2.png", "=1+1.png"]
    (tmp_path / "tiles" / "images").mkdir(parents=True)
    for name in odd:
        shutil.copy(made / "tiles" / "images" / "s01_1.png", tmp_path / "tiles" / "images" / name)
    out = tmp_path / "p.csv"
    arguments = (
        "--run-dir",
        "runs/head",
        "--tiles",
        tmp_path / "tiles",
        "--out",
        out,
        "--workers",
        0,
        "--device",
        "cpu",
    )
    result = run_train(trained, "predict", *arguments)
    assert result.status == 0, result.err
    header, rows = read_csv(out)
    assert [row[0] for row in rows] == sorted(f"images/{name}" for name in odd)
    assert all(len(row) == len(header) for row in rows)
    probs = np.array([[float(cell) for cell in row[3:]] for row in rows])
    np.testing.assert_allclose(probs, probs[:1].repeat(4, axis=0), atol=1e-5)  # the same picture four times


def test_predictions_that_cannot_be_written_are_an_error(trained: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("--run-dir", "runs/head", "--cache", made / "val-cache", "--out", tmp_path / "file" / "p.csv")
    assert_refused(run_train(trained, "predict", *arguments), "choose another --out")


# Fine-tuning


class RecordingTrainer(Trainer):
    """Notes every tensor of the classifier, and what its frozen part gives, before and after training."""

    seen: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
    frozen: tuple[torch.Tensor, torch.Tensor]

    def fit(self, note: Any) -> None:
        before, features = self._note()
        super().fit(note)
        after, features_after = self._note()
        type(self).seen, type(self).frozen = (before, after), (features, features_after)

    def _note(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        tensors = [*self.classifier.named_parameters(), *self.classifier.named_buffers()]
        pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        assert self.classifier.backbone is not None
        with torch.no_grad():
            frozen = self.classifier.backbone.run_prefix(pixels)
        return {name: tensor.detach().clone() for name, tensor in tensors}, frozen


@pytest.mark.parametrize("unfreeze", [3, 1, 4])
def test_exactly_the_asked_tensors_change(
    work: Path, made: Path, monkeypatch: pytest.MonkeyPatch, unfreeze: int
) -> None:
    monkeypatch.setattr(train.loop.assemble, "Trainer", RecordingTrainer)
    arguments = ("--cache", made / "cache", "--unfreeze", unfreeze, "--epochs", 2, "--workers", 0, "--device", "cpu")
    result = run_train(work, "finetune", *arguments)
    assert result.status == 0, result.err
    before, after = RecordingTrainer.seen
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    depth = 4
    layer = re.compile(r"backbone\.vit\.(?:model\.)?layer\.(\d+)\.")
    in_layers = {name: int(match[1]) for name in before if (match := layer.match(name))}
    assert set(in_layers.values()) == set(range(depth))
    expected = {name for name, number in in_layers.items() if number >= depth - unfreeze}
    assert len(expected) > 15 * unfreeze  # of the others some weights may have no names, see extract/backbone/onednn.py
    expected |= {"backbone.vit.norm.weight", "backbone.vit.norm.bias"}
    expected |= {f"head.{name}" for name in ("0.weight", "0.bias", "3.weight", "3.bias")}
    assert changed == expected
    assert torch.equal(*RecordingTrainer.frozen)
    # It began with the checkpoint's own weights and the best cached head, and last/ holds what it ended with.
    stored = load_file(made / "checkpoint" / "model.safetensors")
    for name, tensor in before.items():
        short = name.removeprefix("backbone.vit.")
        for candidate in (short, short.removeprefix("model.")):
            if candidate in stored:
                np.testing.assert_array_equal(tensor.numpy(), stored[candidate])
                break
        else:
            assert name.startswith("head.") or "rope" in name or "inv_freq" in name, name
    head = load_file(work / "runs" / "head" / "best" / "model.safetensors")
    for name, value in head.items():
        np.testing.assert_array_equal(before[name].numpy(), value)
    last = load_file(work / "runs" / "finetune" / "last" / "model.safetensors")
    assert set(last) == expected
    for name, value in last.items():
        np.testing.assert_array_equal(after[name].numpy(), value)
    assert f"training {len(expected) - 4} tensors" in result.out


def test_fine_tuning_goes_on_with_a_linear_head_and_another_loss(made: Path, tmp_path: Path) -> None:
    """The head's shape is the checkpoint's, whatever the options say; the loss is the one asked for."""
    run_options = ("--cache", made / "cache", "--epochs", 1, "--device", "cpu")
    head = run_train(tmp_path, "head", *run_options, "--head", "linear", "--loss", "bce")
    assert head.status == 0, head.err
    finetune = run_train(tmp_path, "finetune", *run_options, "--workers", 0, "--unfreeze", 1, "--loss", "asymmetric")
    assert finetune.status == 0, finetune.err
    runs = tmp_path / "runs"
    for name in ("head", "finetune"):
        tensors = load_file(runs / name / "best" / "model.safetensors")
        assert {key for key in tensors if key.startswith("head.")} == {"head.0.weight", "head.0.bias"}
    config = read(runs / "finetune" / "config.json")["config"]
    assert (config["head"], config["loss"]) == ("linear", "asymmetric")
    names, labels = names_shown(made / "tiles", read(runs / "head" / "split.json")["val"])
    arrays = open_arrays(made / "cache")
    row_of = {str(name): row for row, name in enumerate(arrays["tile"][:])}
    t = load_file(runs / "head" / "best" / "model.safetensors")
    logits = arrays["cls"][:][[row_of[name] for name in names]].astype(float) @ t["head.0.weight"].T + t["head.0.bias"]
    entropy = np.logaddexp(0, np.where(labels, -logits, logits)).mean()
    assert read(runs / "head" / "metrics.json")["loss"] == pytest.approx(entropy, abs=TOLERANCE)
    used = run_train(tmp_path, "predict", "--run-dir", "runs/head", "--cache", made / "cache", "--device", "cpu")
    assert used.status == 0, used.err


def test_finetuning_starts_from_the_head_and_says_so(trained: Path) -> None:
    out = (trained / "finetune.out").read_text()
    best = read(trained / "runs" / "head" / "best" / "checkpoint.json")["epoch"]
    assert f"head starts from runs/head-001, best epoch {best}; validates on the split of that run" in out
    assert read(trained / "runs" / "head" / "split.json") == read(trained / "runs" / "finetune" / "split.json")
    match = re.search(r"step 0: (\d+) rows streamed again differ from the cache by at most (\S+) of their norm", out)
    assert match
    assert float(match[2]) <= 1e-3
    match = re.search(r"step 0: in training precision their median cosine is (\S+)", out)
    assert match
    assert float(match[1]) >= 0.999
    match = re.search(r"step 0: mAP of the starting head: cached (\S+), streamed (\S+)\n", out)
    assert match
    expected = read_lines(trained / "runs" / "head" / "history.jsonl")[best - 1]["map_macro"]
    assert float(match[1]) == pytest.approx(expected, abs=1e-4)
    # Vectors go through float16 into the cache only: in a ranking of some 20 tiles two may change places.
    assert float(match[2]) == pytest.approx(expected, abs=0.06)
    config = read(trained / "runs" / "finetune" / "config.json")["config"]
    assert (config["lr"], config["backbone_lr"], config["unfreeze"]) == (1e-4, 1e-5, 3)


def test_a_head_that_does_not_fit_is_refused(work: Path, made: Path) -> None:
    before = snapshot(work / "runs")
    arguments = ("finetune", "--cache", made / "cache", "--workers", 0, "--device", "cpu", "--epochs", 1)
    fine_tuned = ("--head-run", "runs/finetune")
    assert_refused(run_train(work, *arguments, *fine_tuned), "3 unfrozen layers.*make train-head")
    assert_refused(run_train(work, *arguments, "--head-run", "runs/nowhere"), "no run at runs/nowhere")
    taxonomy = work / "classes.csv"
    names = Taxonomy.xview().names
    taxonomy.write_text("class_id,type_id,name\n" + "".join(f"{i},{i + 40},{n} 2\n" for i, n in enumerate(names)))
    split = ("--split-file", work / "runs" / "head" / "split.json", "--taxonomy", taxonomy, "--label-ids", "type")
    assert_refused(run_train(work, *arguments, *split), "TaxonomyError|label lines are ignored|classes")
    exclude = ("--split-file", work / "runs" / "head" / "split.json", "--exclude", "48")
    assert_refused(run_train(work, *arguments, *exclude), "the head knows 60 classes, this run 59")
    assert snapshot(work / "runs") == before


def test_more_layers_than_there_are_is_an_error(work: Path, made: Path) -> None:
    before = snapshot(work / "runs")
    for unfreeze in (5, -1):
        arguments = ("--cache", made / "cache", "--unfreeze", unfreeze, "--workers", 0, "--device", "cpu")
        assert_refused(run_train(work, "finetune", *arguments), f"UNFREEZE={unfreeze}: .* has 4 layers")
    assert snapshot(work / "runs") == before


def test_unfreezing_nothing_is_the_cached_path(made: Path, tmp_path: Path) -> None:
    same = (
        "--cache",
        made / "cache",
        "--epochs",
        2,
        "--lr",
        1e-3,
        "--batch-size",
        8,
        "--warmup",
        0.1,
        "--device",
        "cpu",
    )
    assert run_train(tmp_path, "head", *same).status == 0
    result = run_train(tmp_path, "finetune", "--unfreeze", 0, *same)
    assert result.status == 0, result.err
    assert "step 0" not in result.out
    histories = [(tmp_path / "runs" / run / "history.jsonl").read_bytes() for run in ("head", "finetune")]
    assert histories[0] == histories[1]
    assert all(
        name.startswith("head.") for name in load_file(tmp_path / "runs" / "finetune" / "last" / "model.safetensors")
    )


def test_the_gated_mlp_of_the_7b_fine_tunes(made: Path, tmp_path: Path) -> None:
    backbone = make_checkpoint(tmp_path / "gated", seed=fresh_seed(), use_gated_mlp=True)
    cache = extract_cache(made / "val-tiles", tmp_path / "cache", backbone, precision="bf16")
    few = ("--scene-regex", r"(?P<scene>\d_\d)$", "--workers", 0, "--device", "cpu")
    result = run_train(tmp_path, "finetune", "--cache", cache, "--unfreeze", 2, "--epochs", 1, *few)
    assert result.status == 0, result.err
    assert "no cached head to start from: the head starts at random" in result.out
    tensors = load_file(tmp_path / "runs" / "finetune" / "best" / "model.safetensors")
    assert sum("gate_proj.weight" in name for name in tensors) == 2
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_step_zero_refuses_vectors_of_other_weights(made: Path, tmp_path: Path) -> None:
    """Another checkpoint's vectors under this one's name, as if the store had been written by hand."""
    cache = Path(shutil.copytree(made / "cache", tmp_path / "cache"))
    other = extract_cache(
        made / "tiles", tmp_path / "other", make_checkpoint(tmp_path / "checkpoint", seed=fresh_seed()),
    )  # fmt: skip
    version, foreign = (read(Path(path) / "current")["version"] for path in (cache, other))
    for name in ("cls", "patch_mean", "commit"):
        shutil.rmtree(cache / f"{version}.zarr" / name)
        shutil.copytree(tmp_path / "other" / f"{foreign}.zarr" / name, cache / f"{version}.zarr" / name)
    arguments = ("--cache", cache, "--epochs", 1, "--workers", 0, "--device", "cpu")
    result = run_train(tmp_path, "finetune", *arguments)
    assert_refused(result, "streamed embeddings differ from the cache's by .* of their norm")
    assert not (tmp_path / "runs" / "finetune" / "best").exists()


def test_other_weights_in_the_checkpoints_place_are_refused(made: Path, tmp_path: Path) -> None:
    backbone = Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))
    cache = extract_cache(made / "tiles", tmp_path / "cache", backbone)
    assert run_train(tmp_path, "head", "--cache", cache, "--epochs", 1, "--device", "cpu").status == 0
    make_checkpoint(backbone, seed=fresh_seed())
    before = snapshot(tmp_path / "runs")
    result = run_train(tmp_path, "finetune", "--cache", cache, "--workers", 0, "--device", "cpu")
    assert_refused(result, "is not what made .*weights_sha256.*make extract")
    # A run on tiles needs that backbone; on the cache it does not.
    assert_refused(run_train(tmp_path, "evaluate", "--tiles", made / "tiles", "--workers", 0), "its weights differ")
    assert run_train(tmp_path, "evaluate", "--cache", cache, "--device", "cpu").status == 0
    assert snapshot(tmp_path / "runs") == before


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("what", ["tile changed", "tile gone", "label changed"])
def test_tiles_that_are_not_the_caches_are_refused(
    work: Path, made: Path, tmp_path: Path, side: str, what: str
) -> None:
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))  # modification times are kept
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    assert run_train(work, "head", "--cache", cache, "--epochs", 1, "--device", "cpu").status == 0
    names, _ = names_shown(tiles, read(work / "runs" / "head" / "split.json")[side])
    victim, label = tiles / names[-1], tiles / "labels" / f"{Path(names[-1]).stem}.txt"
    if what == "tile changed":
        data = bytearray(victim.read_bytes())
        data[-20] ^= 1  # the same size: only its time tells
        victim.write_bytes(data)
    elif what == "tile gone":
        victim.unlink()
    else:
        label.write_text("")
    before = snapshot(work / "runs")
    result = run_train(work, "finetune", "--cache", cache, "--workers", 0, "--device", "cpu")
    expected = "1 tiles gone, 0 changed" if what == "tile gone" else "0 tiles gone, 1 changed"
    assert_refused(result, f"{expected} .*{re.escape(names[-1])}.*make extract")
    assert snapshot(work / "runs") == before


# The original script's way


@pytest.mark.parametrize("size", [64, 224])
def test_like_original(made: Path, tmp_path: Path, size: int) -> None:
    cache = extract_cache(made / "tiles", tmp_path / "cache", made / "checkpoint", image_size=size)
    result = run_train(
        tmp_path, "head", "--cache", cache, "--like-original", "--seed", 3, "--epochs", 1, "--device", "cpu"
    )
    if size != 224:
        assert_refused(result, "--like-original needs a cache of 224 px.*is of 64 px.*make extract IMAGE_SIZE=224")
        assert not (tmp_path / "runs").exists()
        return
    assert result.status == 0, result.err
    run = tmp_path / "runs" / "head"
    split, metrics = read(run / "split.json"), read(run / "metrics.json")
    assert (len(split["val"]), len(split["train"])) == (23, 93)  # 20 % of 116
    names = sorted(split["train"] + split["val"])
    chosen = np.random.default_rng(42).permutation(116)[:23]
    assert sorted(split["val"]) == sorted(names[i] for i in chosen)
    assert len(metrics["per_class"]) == 58
    assert not {"Building", "Small Car"} & {row["name"] for row in metrics["per_class"]}
    kept = [c for c in range(60) if c not in (48, 5)]
    labels = read_label_files(made / "tiles", split["val"])[:, kept]
    shown = labels.any(axis=1)
    logits = compute_logits(Path(cache), run, [n for n, keep in zip(split["val"], shown, strict=True) if keep])
    assert_figures(metrics, logits, labels[shown])
    assert "neighbours leak" in result.out


# Bad input: one line, a status, nothing written


def assert_refused(result: Finished, message: str) -> None:
    """One `error: ` line that says so, and no traceback."""
    assert result.status == 1, result.out + result.err
    assert len(result.errors) == 1, result.err
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.out + result.err


def test_training_without_a_cache_names_extraction(tmp_path: Path, python_env: dict[str, str]) -> None:
    for command in ("head", "finetune"):
        assert_refused(run_train(tmp_path, command), "make extract")
    assert_refused(run_train(tmp_path, "head", "--cache", "cache/none"), "cache/none.*make extract|no .*cache/none")
    assert_refused(run_train(tmp_path, "evaluate", "--tiles", tmp_path), "make train-head")
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-m", "train", "head"]
    finished = subprocess.run(command, cwd=tmp_path, env=python_env, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 1
    assert finished.stderr == "error: no cache was written yet: run `make extract` first, or set CACHE\n"


@pytest.mark.parametrize(
    "command, options, message",
    [
        ("head", ("--backbone", "vitl16"), "made with BACKBONE=.*checkpoint, not vitl16.*make extract BACKBONE=vitl16"),
        ("finetune", ("--backbone", "vitl16"), "was made with BACKBONE=.*checkpoint, not vitl16"),
        ("head", ("--val-cache", "OTHER"), "hold different embeddings .*weights_sha256.*extract both"),
        ("head", ("--test-cache", "OTHER"), "hold different embeddings"),
        ("head", ("--val-cache", "SAME"), "VAL_CACHE is the training cache itself"),
        ("head", ("--val-cache", "COPY"), "holds the very tiles of"),
        ("head", ("--label-ids", "class"), "no class ids of this class list.*--label-ids"),
        ("head", ("--scene-regex", r"^(?P<scene>\d+)$"), "116 tile names do not fit --scene-regex.*images/s00_0.png"),
        ("head", ("--scene-regex", "s(.*)"), r"no group \(\?P<scene>"),
        ("head", ("--scene-regex", "(?P<scene>"), "not a regular expression"),
        ("head", ("--scene-regex", r"^(?P<scene>s)"), "only 1 scenes.*VAL_CACHE"),
        ("head", ("--split-file", "nowhere.json"), "nowhere.json is not a split.json"),
        ("head", ("--taxonomy", "nowhere.csv"), "cannot read the class list nowhere.csv"),
        ("head", ("--exclude", "77"), "--exclude 77: class ids of 0 to 59"),
        ("head", ("--features", "mean"), "--features mean: choose of cls, patch_mean"),
        ("head", ("--val-fraction", "1.5"), "--val-fraction 1.5"),
        ("head", ("--lr", "-1"), "--lr -1.0: above 0"),
        ("head", ("--lr", "1e30", "--epochs", "2"), "lower --lr"),
        ("head", ("--run-dir", "gs://bucket"), "RUN=gs://bucket names no run"),
        ("head", ("--run-dir", "runs"), "runs is a directory, not a link"),
        ("head", ("--resume", "--run-dir", "runs/nowhere"), "no run at runs/nowhere"),
        ("finetune", ("--unfreeze", "9"), "UNFREEZE=9"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_everything(
    work: Path, made: Path, tmp_path: Path, command: str, options: tuple[str, ...], message: str
) -> None:
    if "OTHER" in options:
        backbone = make_checkpoint(tmp_path / "checkpoint", seed=fresh_seed())
        extract_cache(made / "val-tiles", tmp_path / "other", backbone)
    if "COPY" in options:
        shutil.copytree(made / "cache", tmp_path / "copy")
    places = {"OTHER": tmp_path / "other", "COPY": tmp_path / "copy", "SAME": made / "cache"}
    before = {path: data for path, data in snapshot(work / "runs").items() if path != "head"}
    result = run_train(
        work, command, "--cache", made / "cache", "--device", "cpu", *(places.get(option, option) for option in options)
    )
    assert_refused(result, message)
    after = snapshot(work / "runs")
    assert before.items() <= after.items()
    if "lower --lr" not in message:
        assert {path for path in after if path != "head"} == set(before)


def test_class_ids_where_type_ids_are_meant(made: Path, tmp_path: Path) -> None:
    tiles = plant_tiles(tmp_path / "tiles", scenes=6, per_scene=4, seed=fresh_seed(), ids="class")
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    refused = run_train(tmp_path, "head", "--cache", cache, "--label-ids", "type", "--epochs", 1)
    assert_refused(refused, "no type ids of this class list: .*--label-ids")
    assert not (tmp_path / "runs").exists()
    detected = run_train(tmp_path, "head", "--cache", cache, "--epochs", 1, "--device", "cpu")
    assert detected.status == 0, detected.err
    assert "label ids read as class ids" in detected.out
    supports = {row["name"]: row["support"] for row in read(tmp_path / "runs" / "head" / "metrics.json")["per_class"]}
    assert {name for name, support in supports.items() if support} == set(CLASSES)
    # The same ids in a validation set are read as the training cache was, so a mixture cannot pass unnoticed.
    mixed = run_train(tmp_path, "head", "--cache", made / "cache", "--val-cache", cache, "--epochs", 1)
    assert_refused(mixed, "no type ids of this class list")


def test_labels_that_fit_neither_reading_show_their_histogram(made: Path, tmp_path: Path) -> None:
    tiles = plant_tiles(tmp_path / "tiles", scenes=6, per_scene=4, seed=fresh_seed())
    for number, path in enumerate(sorted((tiles / "labels").iterdir())):
        path.write_text(f"{18 if number % 2 else 19} 0.5 0.5 0.1 0.1\n")
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    result = run_train(tmp_path, "head", "--cache", cache)
    assert result.status == 1
    assert "cannot tell type ids from class ids" in result.err
    assert "18:12 19:12 other:0" in result.err
    assert "--label-ids" in result.err


def test_an_unfinished_cache_is_refused_unless_it_is_asked_for(made: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made / "cache", tmp_path / "cache"))
    version = read(cache / "current")["version"]
    group = zarr.open_group(str(cache / f"{version}.zarr"), mode="r+")
    group["commit"][0] = 0
    result = run_train(tmp_path, "head", "--cache", cache, "--epochs", 1)
    assert_refused(result, "117 rows of .* are missing or damaged.*make extract.*--allow-unsealed")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_resumed_on_another_version_of_its_cache(made: Path, tmp_path: Path) -> None:
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    assert run_train(tmp_path, "head", "--cache", cache, "--epochs", 1, "--device", "cpu").status == 0
    (tiles / "images" / "s02_2.png").unlink()
    extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    before = snapshot(tmp_path / "runs")
    refused = run_train(tmp_path, "head", "--resume", "--device", "cpu")
    assert_refused(refused, "was trained on version .* which holds .* now: start a new run")
    refused = run_train(tmp_path, "finetune", "--cache", cache, "--workers", 0, "--device", "cpu")
    assert_refused(refused, "was trained on version .*make train-head")
    assert snapshot(tmp_path / "runs") == before


def test_a_damaged_best_checkpoint_is_refused(work: Path, made: Path) -> None:
    path = work / "runs" / "head" / "best" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_refused(run_train(work, "predict", "--cache", made / "cache"), "does not match its sha256")
    arguments = ("--cache", made / "cache", "--workers", 0, "--device", "cpu")
    assert_refused(run_train(work, "finetune", *arguments), "does not match its sha256")
    assert not (work / "predictions.csv").exists()


def test_evaluating_a_cache_of_another_backbone_is_refused(trained: Path, made: Path, tmp_path: Path) -> None:
    cache = extract_cache(made / "val-tiles", tmp_path / "cache", made / "checkpoint", precision="bf16")
    assert_refused(run_train(trained, "evaluate", "--cache", cache), "in bf16, the run is of .* in float32.*--tiles")
    assert_refused(run_train(trained, "evaluate"), "give either --tiles or --cache")
    assert_refused(run_train(trained, "evaluate", "--tiles", "x", "--cache", "y"), "give either --tiles or --cache")
    assert_refused(run_train(trained, "evaluate", "--tiles", tmp_path / "none"), "no directory .*none: check TILES")


# The bucket


def test_the_whole_way_through_a_bucket(bucket: storage.Bucket, made: Path, tmp_path: Path) -> None:
    for path in sorted((made / "tiles").rglob("*")):
        if path.is_file():
            bucket.blob(f"set/{path.relative_to(made / 'tiles').as_posix()}").upload_from_filename(str(path))
    tiles = f"gs://{bucket.name}/set"
    cache = extract_cache(tiles, f"gs://{bucket.name}/cache", made / "checkpoint")
    result = run_train(tmp_path, "head", "--cache", cache, *QUICK)
    assert result.status == 0, result.err
    run = tmp_path / "runs" / "head"
    names, labels = names_shown(made / "tiles", read(run / "split.json")["val"])
    assert_figures(read(run / "metrics.json"), compute_logits(made / "cache", run, names), labels)
    arguments = ("--cache", cache, "--epochs", 1, "--workers", 0, "--unfreeze", 1, "--device", "cpu")
    result = run_train(tmp_path, "finetune", *arguments)
    assert result.status == 0, result.err
    assert "validates on the split of that run" in result.out
    result = run_train(tmp_path, "evaluate", "--run-dir", "runs/finetune", "--tiles", f"{tiles}/", "--workers", 0)
    assert result.status == 0, result.err
    assert "warning: " in result.out
    shown = names_shown(made / "tiles", read(run / "split.json")["train"])[0]
    used, unused = shown[0], next(name for name in read(run / "split.json")["train"] if name not in shown)
    other = str(made / "tiles" / shown[1])
    # Step 0 embeds rows that training leaves out, too, and one of them that has changed is no fault of the rest.
    bucket.blob(f"set/{unused}").upload_from_filename(other)
    result = run_train(tmp_path, "finetune", *arguments)
    assert result.status == 0, result.err
    bucket.blob(f"set/{used}").upload_from_filename(other)
    assert_refused(
        run_train(tmp_path, "finetune", *arguments), rf"0 tiles gone, 1 changed \(such as {re.escape(used)}\)"
    )
