"""Augmented fine-tuning and test-time averaging, as a user starts them."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train.predict.inference
from tests.checkpoints import make_checkpoint
from tests.planted import Finished, extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train
from train.model.augment import average_views

CPU = ("--workers", 0, "--device", "cpu")
SYMMETRIC = "images/symmetric_1.png"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a head on it, a run fine-tuned from it with every augmentation, and tiles of other scenes."""
    root = tmp_path_factory.mktemp("augment")
    seed = fresh_seed()
    tiles = plant_tiles(root / "tiles", scenes=10, per_scene=8, seed=seed)
    extract_cache(tiles, root / "cache", make_checkpoint(root / "checkpoint", seed=seed))
    plant_tiles(root / "others", scenes=3, per_scene=4, seed=seed + 1, prefix="o")
    quarter = np.asarray(Image.open(root / "others" / "images" / "o01_1.png"))[:32, :32].astype(np.uint16)
    half = (quarter + quarter.transpose(1, 0, 2)) // 2
    upper = np.concatenate([half, half[:, ::-1]], axis=1)
    Image.fromarray(np.concatenate([upper, upper[::-1]]).astype(np.uint8)).save(root / "others" / SYMMETRIC)
    (root / "others" / "labels" / "symmetric_1.txt").write_text("")
    head = run_train(root, "head", "--cache", "cache", "--epochs", 3, "--device", "cpu")
    assert head.status == 0, head.err
    augmented = ("--views", "d4", "--jitter", 0.2, "--crop-scale", 0.8)
    rates = ("--epochs", 3, "--lr", 1e-3, "--backbone-lr", 3e-4, "--unfreeze", 2)
    result = run_train(root, "finetune", "--cache", "cache", *augmented, *rates, *CPU)
    assert result.status == 0, result.err
    (root / "finetune.out").write_text(result.out)
    return root


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def predict(root: Path, tiles: Path | str, *options: object, run: str = "finetune") -> tuple[str, list[dict[str, str]]]:
    """What the command prints, and the rows of its CSV."""
    target = ("--run-dir", f"runs/{run}", "--tiles", tiles, "--out", "p.csv")
    result = run_train(root, "predict", *target, *options, *CPU)
    assert result.status == 0, result.err
    with (root / "p.csv").open(newline="") as stream:
        return result.out, list(csv.DictReader(stream))


def read_logits(root: Path, rows: list[dict[str, str]], run: str = "finetune") -> np.ndarray:
    """(n, C) logits over the temperature, from probabilities."""
    names = [row["name"] for row in read(root / "runs" / run / "metrics.json")["per_class"]]
    probs = np.array([[float(row[name]) for name in names] for row in rows])
    return np.log(probs) - np.log1p(-probs)


def test_augmented_fine_tuning_learns_and_says_what_it_does(trained: Path) -> None:
    out = (trained / "finetune.out").read_text()
    assert (
        "augmentation of training tiles: eight flips and rotations; brightness and contrast within 20%; "
        "crops of 80% of the area and up, which leave out some 10% of the objects while the labels stay\n"
    ) in out
    run = trained / "runs" / "finetune"
    config = read(run / "config.json")["config"]
    assert (config["views"], config["jitter"], config["crop_scale"]) == ("d4", 0.2, 0.8)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    # Step 0 is about the tiles as they are.
    (difference,) = re.findall(r"differ from the cache by at most (\S+) of their norm", out)
    assert float(difference) <= 1e-3


def test_augmentation_changes_training_tiles_each_epoch_and_no_others(trained: Path, tmp_path: Path) -> None:
    """With steps too small to change a weight the losses are of the tiles alone."""
    still = ("--lr", 1e-12, "--backbone-lr", 1e-12, "--dropout", 0, "--epochs", 2, "--unfreeze", 1)
    head = ("--head-run", trained / "runs" / "head", "--cache", "cache")
    losses = []
    for number, options in enumerate(([], ["--views", "d4"], ["--jitter", 0.3], ["--crop-scale", 0.6])):
        run = ("--run-dir", tmp_path / str(number))
        result = run_train(trained, "finetune", *head, *still, *options, *run, *CPU)
        assert result.status == 0, result.err
        losses.append(
            [json.loads(line) for line in (tmp_path / str(number) / "history.jsonl").read_text().splitlines()]
        )
    plain, *augmented = losses
    assert plain[1]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=1e-6)
    for history in augmented:
        first, second = (line["train_loss"] for line in history)
        assert abs(first - plain[0]["train_loss"]) > 1e-5 * first
        assert abs(first - second) > 1e-5 * first
        for line, other in zip(history, plain, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_averaged_predictions_are_the_mean_of_eight_runs_on_turned_tiles(trained: Path, tmp_path: Path) -> None:
    """Files turned by Pillow and predicted one by one; logits, since probabilities are averaged otherwise. A float32
    probability near 1 has its logit to some 1e-5; padding and order of a batch are the same in all."""
    ways = [None, *Image.Transpose]
    assert len(ways) == 8
    logits = []
    for number, way in enumerate(ways):
        turned = tmp_path / str(number)
        (turned / "images").mkdir(parents=True)
        for path in sorted((trained / "others" / "images").iterdir()):
            image = Image.open(path)
            (image if way is None else image.transpose(way)).save(turned / "images" / path.name)
        logits.append(read_logits(trained, predict(trained, turned)[1]))
    out, rows = predict(trained, trained / "others", "--tta", "d4")
    np.testing.assert_allclose(read_logits(trained, rows), np.mean(logits, axis=0), atol=1e-4)
    assert np.abs(logits[0] - np.mean(logits, axis=0)).max() > 1e-3
    symmetric = [row["tile"] for row in rows].index(SYMMETRIC)
    np.testing.assert_allclose(read_logits(trained, rows)[symmetric], logits[0][symmetric], atol=1e-4)
    assert "--tta d4: mean logits of 8 flips and rotations of each tile; temperature and thresholds were fitted" in out
    assert {row["tta"] for row in rows} == {"d4"}
    assert list(rows[0])[:4] == ["tile", "status", "preds", "tta"]


def test_without_averaging_nothing_is_said_of_it(trained: Path) -> None:
    out, rows = predict(trained, trained / "others")
    assert "tta" not in out
    assert "tta" not in rows[0]


def test_scores_are_of_averaged_views_and_say_so(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiles, and of a cache whose tiles a fine-tuned run has to stream; a head on tiles has pixels, too."""
    averaged: list[int] = []

    def count(model: Any, pixels: torch.Tensor) -> torch.Tensor:
        averaged.append(len(pixels))
        return average_views(model, pixels)

    monkeypatch.setattr(train.predict.inference, "average_views", count)
    for run, option, target, tiles in (
        ("finetune", "--tiles", "others", 13),
        ("finetune", "--cache", "cache", 80),
        ("head", "--tiles", "others", 13),
    ):
        for tta in ("one", "d4"):
            result = run_train(trained, "evaluate", "--run-dir", f"runs/{run}", option, target, "--tta", tta, *CPU)
            assert result.status == 0, result.err
            assert ("--tta d4: mean logits of 8 flips" in result.out) == (tta == "d4")
            assert sum(averaged) == (tiles if tta == "d4" else 0)
        averaged.clear()


# Bad input: one line, nothing written


def assert_refused(result: Finished, message: str) -> None:
    assert result.status == 1, result.out + result.err
    assert len(result.errors) == 1, result.err
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.out + result.err


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_vectors_cannot_be_turned(trained: Path, command: str) -> None:
    (trained / "p.csv").unlink(missing_ok=True)
    out = ("--out", "p.csv") if command == "predict" else ()
    result = run_train(trained, command, "--run-dir", "runs/head", "--cache", "cache", "--tta", "d4", *out, *CPU)
    assert_refused(result, "--tta d4 needs tiles, but runs/head-001 reads cached vectors: use --tiles, or leave")
    assert not (trained / "p.csv").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--unfreeze", 0, "--views", "d4"), "cached vectors have none: set UNFREEZE=1 or more"),
        (("--unfreeze", 0, "--jitter", 0.1), "cached vectors have none"),
        (("--jitter", 1), "--jitter 1.0: 0 to below 1"),
        (("--crop-scale", 0.2), "--crop-scale 0.2: a share of the tile's area, 0.5 to 1"),
        (("--crop-scale", "nan"), "--crop-scale nan"),
    ],
)
def test_augmentation_that_cannot_work_is_refused(
    trained: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    assert_refused(run_train(tmp_path, "finetune", "--cache", trained / "cache", *options, *CPU), message)
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_with_its_own_augmentation(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs", symlinks=True)
    config = tmp_path / "runs" / "finetune" / "config.json"
    stored = read(config)
    stored["config"] |= {"epochs": 4, "cache": str(trained / "cache")}
    config.write_text(json.dumps(stored))
    result = run_train(tmp_path, "finetune", "--resume", *CPU)
    assert result.status == 0, result.err
    assert "augmentation of training tiles: eight flips and rotations; brightness" in result.out
