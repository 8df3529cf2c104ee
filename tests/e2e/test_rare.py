"""Rare classes, doubted labels and bit-equal runs, as the trainer's user meets them: on caches of planted vectors."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn import metrics as sk

import train.loop.assemble
from tests.planted import Finished, fresh_seed
from tests.planted import train as run_train
from tests.vectors import TYPE_IDS, plant_vectors, write_cache
from train.loop.trainer import Trainer

ROWS, EPOCHS = 500, 8
FLIPPED = 0.03
PLAIN = ("--epochs", EPOCHS, "--lr", 0.01, "--hidden", 128, "--device", "cpu")
WEIGHTED = (*PLAIN, "--class-weights", "effective", "--repeat-factor", 0.1)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A directory with a cache, `cache`, and which (n, 8) of its labels are flipped; the labels are in `labels.npy`."""
    root, rng = tmp_path_factory.mktemp("rare"), np.random.default_rng(fresh_seed())
    vectors, labels = plant_vectors(rng, ROWS)
    flipped = rng.random(labels.shape) < FLIPPED
    write_cache(root / "cache", vectors, labels ^ flipped)
    np.save(root / "labels.npy", labels ^ flipped)
    return root, flipped


@pytest.fixture(scope="module")
def trained(noisy: tuple[Path, np.ndarray]) -> tuple[Path, Finished]:
    """The directory after a plain run, `head-001`, and a weighted one on the same split, which is returned."""
    root, _ = noisy
    arguments = ("head", "--cache", root / "cache")
    plain = run_train(root, *arguments, *PLAIN)
    assert plain.status == 0, plain.err
    assert "without: difference" not in plain.out
    weighted = run_train(root, *arguments, *WEIGHTED)
    assert weighted.status == 0, weighted.err
    return root, weighted


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_val(root: Path, run: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(n, 8) probabilities and labels of the validation tiles that show a class, and the classes' names."""
    kept = load_file(root / "runs" / run / "val_logits.safetensors")
    labels = np.load(root / "labels.npy")[kept["rows"]]
    meta = read(root / "runs" / run / "best" / "checkpoint.json")
    type_to_class = [read_class_id(type_id) for type_id in TYPE_IDS]
    names = [meta["class_names"][c] for c in type_to_class]
    shown = labels.any(axis=1)
    return 1 / (1 + np.exp(-kept["logits"][:, type_to_class][shown].astype(np.float64))), labels[shown], names


def read_class_id(type_id: int) -> int:
    from cache_schema import RawLabels, Taxonomy

    label_ids = np.zeros((1, 128), np.uint16)
    label_ids[0, type_id] = 1
    return int(Taxonomy.xview().decode(RawLabels.pack(label_ids), "type").labels[0].argmax())


def test_a_run_keeps_its_validation_logits(trained: tuple[Path, Finished]) -> None:
    root, _ = trained
    for run in ("head-001", "head-002"):
        probs, labels, names = read_val(root, run)
        metrics = {row["name"]: row for row in read(root / "runs" / run / "metrics.json")["per_class"]}
        for c, name in enumerate(names):
            assert metrics[name]["support"] == labels[:, c].sum()
            assert metrics[name]["f1"] == pytest.approx(sk.f1_score(labels[:, c], probs[:, c] >= 0.5), abs=1e-6)


def test_the_rarest_classes_have_figures_of_their_own(trained: tuple[Path, Finished]) -> None:
    """There are eight classes with tiles, so their averages are those of all; the history's last best line agrees."""
    root, weighted = trained
    for run in ("head-001", "head-002"):
        metrics = read(root / "runs" / run / "metrics.json")
        variant = metrics["variants"]["rarest in training"]
        assert len(variant["per_class"]) == len(TYPE_IDS)
        history = [json.loads(line) for line in (root / "runs" / run / "history.jsonl").read_text().splitlines()]
        best = max(history, key=lambda line: line["f1_weighted"])
        for key in ("f1_macro", "map_macro"):
            assert variant[key] == pytest.approx(metrics[key], abs=1e-9)
            assert best[f"{key}_rarest"] == pytest.approx(metrics[key], abs=1e-6)
    assert "rarest in training" in weighted.out
    split, labels = read(root / "runs" / "head-001" / "split.json"), np.load(root / "labels.npy")
    names = sorted(split["train"] + split["val"])
    support = labels[[names.index(name) for name in split["train"]]].sum(axis=0)
    (line,) = [line for line in weighted.out.splitlines() if line.startswith("rarest in training: ")]
    assert [int(part.split()[-1]) for part in line.split(", ")] == sorted(support.tolist())


def test_weights_and_repeats_are_put_beside_the_plain_run(trained: tuple[Path, Finished]) -> None:
    root, weighted = trained
    out = weighted.out
    assert re.search(r"class weights, effective: positives of \d of 60 classes count up to [1-9]\d?\.\d x", out)
    assert "class weights: 52 classes without a training tile keep weight 1: " in out
    assert re.search(r"repeat factor 0.1: \d+ of \d+ tiles are shown more than once, an epoch has about \d+", out)
    assert "Warning" not in weighted.err
    title = "class weights effective, repeat factor 0.1, against runs/head-001 without: difference [95 %"
    assert title in out
    assert "other settings differ" not in out
    (after, labels, names), (before, _, _) = (read_val(root, run) for run in ("head-002", "head-001"))
    f1 = [sk.f1_score(labels, probs >= 0.5, average="macro") for probs in (before, after)]
    ap = [sk.average_precision_score(labels, probs, average="macro") for probs in (before, after)]
    number = r"([+-]\d\.\d{3}) \[([+-]\d\.\d{3}), ([+-]\d\.\d{3})\]"
    for title in ("rarest in training", "all classes"):
        match = re.search(rf"^{title} +weighted F1 {number}, macro F1 {number}, mAP {number}$", out, re.MULTILINE)
        assert match, out
        weighted_f1, low, high, macro, _, _, precision, _, _ = map(float, match.groups())
        assert low <= weighted_f1 <= high
        assert macro == pytest.approx(f1[1] - f1[0], abs=6e-4)
        assert precision == pytest.approx(ap[1] - ap[0], abs=6e-4)
    rarest = names[int(labels.sum(axis=0).argmin())]
    c = names.index(rarest)
    scores = [f"{sk.f1_score(labels[:, c], probs[:, c] >= 0.5):.3f}" for probs in (before, after)]
    assert re.search(rf"^{rarest} +\d+ +{labels[:, c].sum()} +{scores[0]} -> {scores[1]} ", out, re.MULTILINE)


def test_another_split_or_none_without_them_is_said(trained: tuple[Path, Finished]) -> None:
    root, _ = trained
    quick = ("head", "--cache", root / "cache", "--epochs", 1, "--device", "cpu", "--class-weights", "balanced")
    other = run_train(root, *quick, "--seed", 9)
    assert other.status == 0, other.err
    assert "class weights balanced, repeat factor 0: no earlier run without them is on this split" in other.out
    same = run_train(root, *quick, "--lr", 0.01)
    assert f"other settings differ too: hidden 128 -> 512, epochs {EPOCHS} -> 1\n" in same.out


# Triage


def read_doubts(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_triage_finds_most_flipped_labels(noisy: tuple[Path, np.ndarray], trained: tuple[Path, Finished]) -> None:
    """3 % of labels that hyperplanes separate are flipped. Of a list as long as there are flips, 60 % are flips, and of
    its first half 75 %, at least; labels in any order would be right 3 times in 100."""
    root, flipped = noisy
    labels, count = np.load(root / "labels.npy"), int(flipped.sum())
    result = run_train(root, "triage", "--run-dir", "runs/head-001", "--top", count, "--out", "d/doubts.csv")
    assert result.status == 0, result.err
    assert f"{ROWS} tiles judged" in result.out
    assert f"the {count} most doubtful labels -> d/doubts.csv" in result.out
    assert "doubt is no proof" in result.out
    found = read_doubts(root / "d" / "doubts.csv")
    assert len(found) == count
    names = [
        read(root / "runs" / "head-001" / "best" / "checkpoint.json")["class_names"][read_class_id(i)] for i in TYPE_IDS
    ]
    cells = [(int(d["tile"][7:11]) * 20 + int(d["tile"][12:14]), names.index(d["class"])) for d in found]
    assert len(set(cells)) == count
    right = [bool(flipped[cell]) for cell in cells]
    assert np.mean(right) >= 0.6
    assert np.mean(right[: count // 2]) >= 0.75
    assert flipped.mean() < 0.05
    doubts = [float(d["doubt"]) for d in found]
    assert doubts == sorted(doubts, reverse=True)
    for d, cell in zip(found, cells, strict=True):
        assert int(d["label"]) == labels[cell]
        assert d["kind"] == ("likely wrong" if labels[cell] else "likely missing")
        assert 0 < float(d["doubt"]) < 1
        assert (float(d["out_of_fold_probability"]) < 0.5) == labels[cell]


def test_what_triage_cannot_judge_is_one_line(noisy: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    rng = np.random.default_rng(fresh_seed())
    vectors, labels = plant_vectors(rng, 80)
    few = write_cache(tmp_path / "few", vectors, labels)
    one = write_cache(tmp_path / "one", vectors, labels & (np.arange(8) == 0), per_scene=8)
    for arguments, message in (
        (("--cache", few), "only 4 scenes show a class: .*needs 5; check --scene-regex"),
        (("--cache", one), r"the labels show one class only \(Building\): .*at least two; check --label-ids"),
        (("--cache", few, "--top", 0), "--top 0: at least 1"),
        (("--run-dir", "runs/none"), "no run at runs/none: train one first"),
        ((), "no run at runs/head"),
        (("--cache", "nowhere"), "nowhere"),
    ):
        result = run_train(tmp_path, "triage", *arguments, "--out", tmp_path / "doubts.csv")
        assert result.status == 1
        assert len(result.errors) == 1, result.err
        assert re.search(message, result.err), result.err
        assert "Traceback" not in result.err
    assert not (tmp_path / "doubts.csv").exists()


# Bit-equal runs


class WatchingTrainer(Trainer):
    """Notes whether torch was held to deterministic algorithms while it trained."""

    seen: list[bool]

    def fit(self, note: Any) -> None:
        self.seen.append(torch.are_deterministic_algorithms_enabled())
        super().fit(note)


def test_deterministic_runs_are_bit_equal(
    noisy: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, repeats and clipping, whatever state the generators are in."""
    monkeypatch.setattr(train.loop.assemble, "Trainer", WatchingTrainer)
    WatchingTrainer.seen = []
    options = ("--epochs", 2, "--clip-norm", 0.01, "--repeat-factor", 0.1, "--deterministic", "--device", "cpu")
    for run in (1, 2):
        torch.manual_seed(run)
        np.random.seed(run)
        result = run_train(tmp_path, "head", "--cache", noisy[0] / "cache", *options)
        assert result.status == 0, result.err
    assert WatchingTrainer.seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    first, second = (tmp_path / "runs" / f"head-00{run}" for run in (1, 2))
    files = (
        "history.jsonl",
        "metrics.json",
        "val_logits.safetensors",
        "best/model.safetensors",
        "last/model.safetensors",
    )
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
