"""`train evaluate`, and sets of their own: the figures of training come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.e2e.train.recompute import (
    AVERAGES,
    TOLERANCE,
    assert_figures,
    assert_refused,
    compute_logits,
    names_shown,
    read,
    sigmoid,
)
from tests.planted import extract_cache
from tests.planted import train as run_train


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
        "weighted F1": "f1_weighted",
        "weighted F1, tuned": "f1_weighted_tuned",
        "macro F1": "f1_macro",
        "micro F1": "f1_micro",
        "weighted precision": "precision_weighted",
        "macro precision": "precision_macro",
        "weighted recall": "recall_weighted",
        "macro recall": "recall_macro",
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


def test_evaluating_a_cache_of_another_backbone_is_refused(trained: Path, made: Path, tmp_path: Path) -> None:
    cache = extract_cache(made / "val-tiles", tmp_path / "cache", made / "checkpoint", precision="bf16")
    assert_refused(run_train(trained, "evaluate", "--cache", cache), "in bf16, the run is of .* in float32.*--tiles")
    assert_refused(run_train(trained, "evaluate"), "give either --tiles or --cache")
    assert_refused(run_train(trained, "evaluate", "--tiles", "x", "--cache", "y"), "give either --tiles or --cache")
    assert_refused(run_train(trained, "evaluate", "--tiles", tmp_path / "none"), "no directory .*none: check TILES")
