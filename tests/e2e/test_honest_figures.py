"""Folds, baselines, the leak audit and what bad labels lead to, as the user of the trainer meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from cache_schema import Status
from tests.labelled import name_tiles, plant_labels, plant_vectors, write_cache, write_taxonomy
from tests.planted import Finished, fresh_seed
from tests.planted import train as run_train

CLASSES, WIDTH, FOLDS, EPOCHS = 6, 16, 3, 2
OPTIONS = ("--device", "cpu", "--label-ids", "class", "--empty", "keep", "--hidden", 16, "--epochs", EPOCHS)


class Made:
    """12 scenes whose vectors show their classes, one of them all copies of a tile of another; and a run of folds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(fresh_seed())
        self.tiles = name_tiles(rng.integers(15, 30, 12).tolist())
        self.scenes = np.array([Path(name).stem.split("_")[0] for name in self.tiles])
        self.labels = plant_labels(rng, self.scenes, CLASSES)
        self.labels[:, -1] = False
        self.labels[np.flatnonzero(self.scenes == "s0004")[:3], -1] = True  # a class of a single scene
        self.labels[np.flatnonzero(self.scenes == "s0003")[0], 0] = True  # so that it can validate alone
        vectors = plant_vectors(rng, self.labels, WIDTH, signal=1.5)
        copies, original = self.scenes == "s0007", np.flatnonzero(self.scenes == "s0002")[0]
        self.labels[original, 0] = True  # so that the copies show a class
        vectors[copies], self.labels[copies] = vectors[original], self.labels[original]
        self.vectors = vectors.astype(np.float16).astype(np.float32)
        self.cache = write_cache(root / "cache", self.tiles, self.vectors, self.labels)
        self.options = ("--taxonomy", write_taxonomy(root / "classes.csv", CLASSES), *OPTIONS)
        self.ran = self.train("head", "--folds", FOLDS)
        self.run = root / "runs" / "head"

    def train(self, command: str, *options: object) -> Finished:
        return run_train(self.root, command, "--cache", self.cache, *self.options, *options)

    def select(self, names: list[str]) -> np.ndarray:
        return np.isin(self.tiles, names)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(tmp_path_factory.mktemp("honest"))
    assert made.ran.status == 0, made.ran.err
    return made


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def assert_refused(result: Finished, message: str) -> None:
    assert result.status == 1, result.out + result.err
    assert len(result.errors) == 1, result.err
    assert message in result.errors[0]
    assert "Traceback" not in result.err


def test_out_of_fold_logits_are_those_of_a_run_without_the_fold(made: Made, tmp_path: Path) -> None:
    path = made.run / "out_of_fold.safetensors"
    found = load_file(path)
    with safe_open(str(path), "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["class_names"]) == [f"class {c}" for c in range(CLASSES)]
    assert metadata["version"] == read(made.run / "config.json")["version"]
    np.testing.assert_array_equal(found["row"], np.arange(len(made.tiles)))
    assert set(found["fold"].tolist()) == set(range(FOLDS))
    for scene in np.unique(made.scenes):
        assert len(set(found["fold"][made.scenes == scene].tolist())) == 1
    held_out = found["fold"] == 1
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": made.tiles[~held_out].tolist(), "val": made.tiles[held_out].tolist()}))
    batch = read(made.run / "config.json")["config"]["batch_size"]
    alone = made.train("head", "--split-file", split, "--batch-size", batch, "--run-dir", tmp_path / "alone")
    assert alone.status == 0, alone.err
    t = load_file(tmp_path / "alone" / "last" / "model.safetensors")
    hidden = np.maximum(made.vectors[held_out] @ t["head.0.weight"].T + t["head.0.bias"], 0)
    expected = hidden @ t["head.3.weight"].T + t["head.3.bias"]
    np.testing.assert_allclose(found["logits"][held_out], expected, atol=1e-4)


def test_fold_figures_are_those_of_the_out_of_fold_logits(made: Made) -> None:
    found, folds = load_file(made.run / "out_of_fold.safetensors"), read(made.run / "folds.json")
    preds = found["logits"] >= 0
    assert folds["folds"] == len(folds["per_fold"]) == FOLDS
    scores = []
    for number, figures in enumerate(folds["per_fold"]):
        mine = found["fold"] == number
        present = made.labels[mine].any(axis=0)
        scores.append(
            f1_score(made.labels[mine][:, present], preds[mine][:, present], average="weighted", zero_division=0)
        )
        assert figures["f1_weighted"] == pytest.approx(scores[-1], abs=1e-6)
        assert figures["tiles"] == mine.sum()
        assert figures["scenes"] == len(np.unique(made.scenes[mine]))
    assert folds["mean"]["f1_weighted"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert folds["std"]["f1_weighted"] == pytest.approx(np.std(scores, ddof=1), abs=1e-6)
    pooled = f1_score(made.labels, preds, average="weighted", zero_division=0)
    assert folds["pooled"]["f1_weighted"] == pytest.approx(pooled, abs=1e-6)
    low, high = folds["pooled"]["intervals"]["f1_weighted"]
    assert low < pooled < high
    assert f"{pooled:.4f} [{low:.4f}, {high:.4f}]" in made.ran.out
    for number in range(FOLDS):
        assert f"fold {number + 1} of {FOLDS}: " in made.ran.out
    # The class of one scene cannot be learnt where that scene is held out, and the fold says so.
    fold = int(found["fold"][made.scenes == "s0004"][0])
    (line,) = [
        line for line in made.ran.out.splitlines() if "warning: all tiles that show" in line and "class 5" in line
    ]
    assert line.startswith(f"fold {fold + 1} of {FOLDS}: ")


def test_baselines_are_scikit_learns_on_the_same_split(made: Made) -> None:
    split, metrics = read(made.run / "split.json"), read(made.run / "metrics.json")
    train, val = made.select(split["train"]), made.select(split["val"])
    scaler = StandardScaler().fit(made.vectors[train])
    x, y = scaler.transform(made.vectors), made.labels
    learnt = y[train].any(axis=0)
    probe = np.broadcast_to(y[train].mean(axis=0), y[val].shape).copy()
    for c in np.flatnonzero(learnt):
        probe[:, c] = LogisticRegression(tol=1e-8, max_iter=2000).fit(x[train], y[train, c]).predict_proba(x[val])[:, 1]
    nearest = KNeighborsClassifier(10, metric="cosine").fit(made.vectors[train], y[train].astype(int))
    shares = np.stack([p[:, 1] if p.shape[1] > 1 else 0 * p[:, 0] for p in nearest.predict_proba(made.vectors[val])], 1)
    expected = {
        "label frequency": np.broadcast_to(y[train].mean(axis=0), y[val].shape),
        "10 nearest neighbours": shares,
        "linear probe": probe,
    }
    assert list(metrics["baselines"]) == list(expected)
    present = np.flatnonzero(y[val].any(axis=0))
    for name, probs in expected.items():
        figures = metrics["baselines"][name]
        assert figures["basis"] == f"{train.sum()} training tiles"
        # A probability that is 0.5 to rounding may fall either way.
        f1 = f1_score(y[val][:, present], probs[:, present] >= 0.5, average="weighted", zero_division=0)
        assert figures["f1_weighted"] == pytest.approx(f1, abs=0.02), name
        ap = np.mean([average_precision_score(y[val, c], probs[:, c]) for c in present])
        assert figures["map_macro"] == pytest.approx(ap, abs=0.02), name
        (line,) = [line for line in made.ran.out.splitlines() if line.startswith(name)]
        assert f"{figures['f1_weighted']:.4f}" in line
        assert f"{figures['map_macro']:.4f}" in line
        assert name in (made.run / "report.html").read_text()


def test_copies_across_the_split_are_found(made: Made, tmp_path: Path) -> None:
    """All of s0007 are copies of a tile of s0002: with one of them on either side, every pair is listed."""
    val = made.scenes == "s0007"
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": made.tiles[~val].tolist(), "val": made.tiles[val].tolist()}))
    result = made.train("head", "--split-file", split, "--run-dir", tmp_path / "leaky")
    assert result.status == 0, result.err
    audit = read(tmp_path / "leaky" / "audit.json")
    original = made.tiles[made.scenes == "s0002"][0]
    assert audit["pairs"] == audit["val_tiles"] == audit["val"] == val.sum()
    assert {pair["val"] for pair in audit["closest"]} == set(made.tiles[val])
    assert {pair["train"] for pair in audit["closest"]} == {original}
    assert all(pair["cosine"] == pytest.approx(1, abs=1e-5) for pair in audit["closest"])
    message = f"leak audit: {val.sum()} of {val.sum()} validation tiles have a near-duplicate"
    assert message in result.out
    assert message in (tmp_path / "leaky" / "report.html").read_text()
    clean = made.scenes == "s0003"
    split.write_text(json.dumps({"train": made.tiles[~clean].tolist(), "val": made.tiles[clean].tolist()}))
    result = made.train("head", "--split-file", split, "--run-dir", tmp_path / "clean")
    assert "leak audit: 0 of" in result.out
    cosine = [pair["cosine"] for pair in read(tmp_path / "clean" / "audit.json")["closest"]]
    unit = made.vectors / np.linalg.norm(made.vectors, axis=1, keepdims=True)
    nearest = (unit[clean] @ unit[~clean].T).max(axis=1)
    np.testing.assert_allclose(cosine, np.sort(nearest)[::-1], atol=1e-5)


@pytest.mark.parametrize(
    "scene, line",
    [
        ("s0003", r"warning: no validation tile shows .*class 5: n/a in every figure"),
        ("s0004", r"warning: no training tile shows .*class 5: it cannot be learnt"),
    ],
)
def test_classes_of_one_side_are_named(made: Made, tmp_path: Path, scene: str, line: str) -> None:
    val = made.scenes == scene
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": made.tiles[~val].tolist(), "val": made.tiles[val].tolist()}))
    result = made.train("head", "--split-file", split, "--run-dir", tmp_path / "run")
    assert result.status == 0, result.err
    assert re.search(line, result.out)
    (row,) = [row for row in read(tmp_path / "run" / "metrics.json")["per_class"] if row["name"] == "class 5"]
    assert (row["f1"] is None) == (scene == "s0003")


def test_a_run_keeps_the_split_it_wrote(made: Made, tmp_path: Path) -> None:
    """As if an earlier release, which drew scenes at random, had written it."""
    assert made.train("head", "--run-dir", tmp_path / "old", "--seed", 5).status == 0
    split = read(tmp_path / "old" / "split.json")
    scene_of = {side: {Path(name).stem.split("_")[0] for name in names} for side, names in split.items()}
    moved = sorted(scene_of["val"])[0]
    names = [name for name in split["val"] if Path(name).stem.startswith(f"{moved}_")]
    assert len(scene_of["val"]) > 1
    other = {"train": sorted(split["train"] + names), "val": [name for name in split["val"] if name not in names]}
    (tmp_path / "old" / "split.json").write_text(json.dumps(other))
    result = run_train(made.root, "head", "--resume", "--run-dir", tmp_path / "old", "--device", "cpu")
    assert result.status == 0, result.err
    assert read(tmp_path / "old" / "split.json") == other
    assert f"{len(other['train'])} tiles train, {len(other['val'])} validate" in result.out


@pytest.mark.parametrize(
    "what, options, message",
    [
        ("more folds than scenes", ("--folds", 13), "only 12 scenes (s0000, s0001, s0002, s0003): --folds 13 needs 13"),
        ("one fold", ("--folds", 1), "--folds 1: at least 2"),
        ("one scene", ("--scene-regex", "^(?P<scene>s)"), "only 1 scenes (s): a split by scene needs 5"),
        ("all quarantined", (), "quarantined"),
        ("other classes", (), "no class ids of this class list"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    made: Made, tmp_path: Path, what: str, options: tuple[object, ...], message: str
) -> None:
    cache = made.cache
    if what == "all quarantined":
        status = np.full(len(made.tiles), Status.UNDECODABLE, np.uint8)
        cache = write_cache(tmp_path / "cache", made.tiles, made.vectors, made.labels, status=status)
    if what == "other classes":
        more = np.concatenate([made.labels, made.labels], axis=1)
        cache = write_cache(tmp_path / "cache", made.tiles, made.vectors, more)
    arguments = ("head", "--cache", cache, *made.options, "--run-dir", tmp_path / "run", *options)
    assert_refused(run_train(tmp_path, *arguments), message)
    assert not (tmp_path / "run").exists()
    if what == "other classes":
        assert_refused(run_train(made.root, "evaluate", "--cache", cache, "--device", "cpu"), message)
