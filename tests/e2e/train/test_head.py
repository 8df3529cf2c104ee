"""`train head` as its user runs it: files, figures, splits."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn import metrics as sk

from cache_schema import Taxonomy
from tests.e2e.train.recompute import (
    AVERAGES,
    QUICK,
    TOLERANCE,
    UNREADABLE,
    assert_figures,
    assert_refused,
    compute_logits,
    names_shown,
    read,
    read_label_files,
    read_lines,
    sigmoid,
    snapshot,
)
from tests.planted import CLASSES, extract_cache
from tests.planted import train as run_train
from train.metrics.decisions import bin_decisions, cross_fit, fit_temperature, measure_distance, tune_thresholds

CLASS_KEYS = {"name", "support", "precision", "recall", "f1", "ap", "threshold"}


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
        error = measure_distance(bin_decisions(probs, labels))
        assert metrics["calibration"][key] == pytest.approx(error, abs=1e-4)
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
    """Another split than the seed draws: two scenes change sides."""
    arguments = ("head", "--cache", made / "cache", "--seed", 9, "--epochs", 1, "--device", "cpu")
    assert run_train(work, *arguments, "--run-dir", "runs/drawn").status == 0
    drawn = read(work / "runs" / "drawn" / "split.json")
    changing = {Path(names[0]).stem.split("_")[0] for names in drawn.values()}
    assert len(changing) == 2
    asked: dict[str, list[str]] = {"train": [], "val": []}
    for side, other in (("train", "val"), ("val", "train")):
        for name in drawn[side]:
            asked[other if Path(name).stem.split("_")[0] in changing else side].append(name)
    asked = {side: sorted(names) for side, names in asked.items()}
    (tmp_path / "split.json").write_text(json.dumps(asked))
    assert run_train(work, *arguments, "--split-file", tmp_path / "split.json", "--run-dir", "runs/asked").status == 0
    assert read(work / "runs" / "asked" / "split.json") == asked != drawn


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
    assert "neighbouring tiles leak" in result.out
