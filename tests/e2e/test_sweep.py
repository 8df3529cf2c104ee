"""A sweep as its user runs it: each member is the run that its command makes alone, and the winner is a run."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import train.sweep.training
from tests.caches import plant_cache
from tests.planted import Finished, fresh_seed
from tests.planted import train as run_train
from train.metrics.figures import KEY_FIGURES
from train.runs.checkpoint import load_checkpoint
from train.sweep.grid import describe_command
from train.sweep.ranking import HeadResult
from train.sweep.stacked_heads import Stack
from train.sweep.training import SweepPass

TOLERANCE = 1e-4
OPTIONS = ("--label-ids", "class", "--device", "cpu", "--hidden", 24, "--batch-size", 32)
EPOCH_STEPS = 23
GRID = ("--lrs", "3e-3", "--weight-decays", "0.1", "--losses", "bce,focal,asymmetric", "--epochs", 3, "--seeds", 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vectors")
    return Path(
        plant_cache(str(root / "cache"), 900, width=12, classes=60, seed=fresh_seed(), pooling=("cls", "patch_mean"))
    )


@pytest.fixture(scope="module")
def swept(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished, list[HeadResult]]:
    """A directory with a sweep of 12 configurations x 2 seeds, what it printed, and all its heads with tensors."""
    work = tmp_path_factory.mktemp("sweep")
    heads: list[HeadResult] = []
    with pytest.MonkeyPatch.context() as patch:
        collect = SweepPass.collect

        def keep_all(self: SweepPass, *, keep: bool) -> Any:
            found = collect(self, keep=True)
            heads.extend(found[0])
            return found

        patch.setattr(SweepPass, "collect", keep_all)
        result = run_train(work, "sweep", "--cache", cache, *OPTIONS, *GRID)
    assert result.status == 0, result.err
    return work, result, heads


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report and the intervals at a run's end, which take longer than its training."""
    for module in ("train.run", "train.sweep.run"):
        monkeypatch.setattr(f"{module}.finish_run", lambda *_: None)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def drop_split_file(command: str) -> str:
    return re.sub(r" --split-file \S+", "", command)


def run_command(work: Path, command: str, *more: object) -> Path:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "train"]
    result = run_train(work, *words[3:], *more)
    assert result.status == 0, result.err
    return work / "runs" / "head"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "head, loss, seed, features",
    [
        ("mlp", "bce", 0, "cls"),
        ("mlp", "asymmetric", 1, "cls+patch_mean"),
        ("linear", "focal", 1, "cls"),
        ("linear", "asymmetric", 0, "cls+patch_mean"),
    ],
)
def test_a_member_equals_the_same_configuration_trained_alone(
    swept: tuple[Path, Finished, list[HeadResult]], head: str, loss: str, seed: int, features: str
) -> None:
    """Dropout is on: the members draw what they would draw alone."""
    work, _, heads = swept
    (member,) = (
        result
        for result in heads
        if (result.config.head, result.config.loss, result.config.seed, result.config.features)
        == (head, loss, seed, features)
    )
    run = run_command(work, describe_command(member.config))
    best = load_checkpoint(run / "best")
    assert best.meta.epoch == member.best_epoch
    assert best.meta.hidden == (24 if head == "mlp" else 0)
    line = json.loads((run / "history.jsonl").read_text().splitlines()[member.best_epoch - 1])
    for key in KEY_FIGURES:
        assert member.figures[key] == pytest.approx(line[key], abs=TOLERANCE)
    assert member.tensors is not None
    assert {f"head.{name}" for name in member.tensors} == set(best.tensors)
    for name, tensor in member.tensors.items():
        torch.testing.assert_close(tensor, best.tensors[f"head.{name}"], rtol=0, atol=TOLERANCE)


def test_the_table_ranks_the_means_over_seeds(swept: tuple[Path, Finished, list[HeadResult]]) -> None:
    work, result, heads = swept
    whole = read(work / "runs" / "sweep" / "sweep.json")
    assert (whole["configurations"], whole["seeds"], whole["complete"], whole["diverged"]) == (12, [0, 1], True, [])
    with (work / "runs" / "sweep" / "sweep.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(whole["ranking"]) == 12
    means = [float(line["f1_weighted"]) for line in lines]
    assert means == sorted(means, reverse=True)
    for line, entry in zip(lines, whole["ranking"], strict=True):
        assert line["command"] == entry["command"]
        for key in KEY_FIGURES:
            values = [head[key] for head in entry["heads"]]
            assert float(line[key]) == pytest.approx(np.mean(values))
            assert float(line[f"{key}_spread"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert len(heads) == 24
    table = result.out[result.out.index("weighted F1  ") :].splitlines()
    assert f"{means[0]:.4f} ± " in table[1]
    assert "the best of 12 was chosen partly by luck" in result.out
    assert f"{whole['cross_fitted']['f1_weighted']:.4f}" in result.out


def test_the_winner_is_a_run_and_its_command_reproduces_it(
    swept: tuple[Path, Finished, list[HeadResult]], cache: Path
) -> None:
    work, result, _ = swept
    run = work / "runs" / "sweep"
    winner = read(run / "sweep.json")["ranking"][0]
    assert result.out.rstrip().endswith(f"the winner alone: {winner['command']}")
    alone = run_command(work, winner["command"])
    own, again = read(run / "metrics.json"), read(alone / "metrics.json")
    for key in (*KEY_FIGURES, "loss", "f1_weighted_tuned", "accuracy"):
        assert own[key] == pytest.approx(again[key], abs=TOLERANCE), key
    assert np.array(list(own["intervals"].values())) == pytest.approx(
        np.array(list(again["intervals"].values())), abs=TOLERANCE
    )
    tensors, others = (load_file(path / "best" / "model.safetensors") for path in (run, alone))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, others[name], atol=TOLERANCE)
    assert load_checkpoint(run / "best").meta.thresholds != ()
    assert read(run / "split.json") == read(alone / "split.json")
    for command in ("evaluate", "predict"):
        used = run_train(work, command, "--run-dir", "runs/sweep", "--cache", cache, "--device", "cpu")
        assert used.status == 0, used.err
    with (work / "predictions.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 900


@pytest.mark.usefixtures("quick")
def test_heads_that_do_not_fit_together_take_turns_and_come_out_the_same(
    swept: tuple[Path, Finished, list[HeadResult]],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train.sweep.training, "STATE_BYTES", 300_000)
    monkeypatch.setitem(train.sweep.training.ACTIVATION_BYTES, "cpu", 2 * 4 * 32 * 64)
    result = run_train(tmp_path, "sweep", "--cache", cache, *OPTIONS, *GRID[:-1], 1)
    assert result.status == 0, result.err
    assert "12 heads, 1 passes" not in result.out
    first = {
        drop_split_file(entry["command"]): entry["heads"][0]
        for entry in read(swept[0] / "runs" / "sweep" / "sweep.json")["ranking"]
    }
    assert len(first) == 12
    entries = read(tmp_path / "runs" / "sweep" / "sweep.json")["ranking"]
    assert len(entries) == 12
    for entry in entries:
        assert entry["f1_weighted_spread"] is None
        for key in KEY_FIGURES:
            other = first[drop_split_file(entry["command"])]
            assert entry["heads"][0][key] == pytest.approx(other[key], abs=TOLERANCE)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number, epoch", [(signal.SIGTERM, 4), (signal.SIGINT, 1)])
def test_a_signal_leaves_what_there_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, epoch: int
) -> None:
    """In an epoch of the second seed, which is given up, or of the first, whose finished epochs then count."""
    steps: list[Stack] = []
    train_step = Stack.train_step

    def stop_there(self: Stack, *args: Any) -> None:
        steps.append(self)
        if len(steps) == (2 * epoch + 1) * EPOCH_STEPS:  # of the second stack, half-way
            os.kill(os.getpid(), number)
        train_step(self, *args)

    monkeypatch.setattr(Stack, "train_step", stop_there)
    result = run_train(tmp_path, "sweep", "--cache", cache, *OPTIONS, *GRID, "--features", "cls")
    assert result.status == 128 + number
    whole = read(tmp_path / "runs" / "sweep" / "sweep.json")
    assert (whole["complete"], whole["epochs"]) == (False, min(epoch, 3))
    assert [len(entry["heads"]) for entry in whole["ranking"]] == [1] * 6
    stopped = f"stopped by {signal.Signals(number).name}: 6 of 12 heads are ranked, after {min(epoch, 3)} of 3 epochs"
    assert stopped in result.out
    assert f"stopped by {signal.Signals(number).name}: runs/sweep-001/sweep.json ranks the complete heads" in result.err
    assert load_checkpoint(tmp_path / "runs" / "sweep" / "best").meta.epoch <= epoch


@pytest.mark.parametrize(
    "options, message",
    [
        (("--losses", "hinge"), "--losses hinge: hinge is no loss"),
        (("--lrs", ""), "--lrs is empty"),
        (("--lrs", "-1"), "--lr -1.0: above 0"),
        (("--seeds", 0), "--seeds 0: at least 1"),
        (("--features", "max"), "--features max"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    cache: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    result = run_train(tmp_path, "sweep", "--cache", cache, *OPTIONS, *options)
    assert result.status == 1
    assert len(result.errors) == 1
    assert message in result.errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_pooling_that_the_cache_lacks_is_named(cache: Path, tmp_path: Path) -> None:
    for command in (("sweep", "--features", "cls,cls+patch_max"), ("head", "--features", "patch_max")):
        result = run_train(tmp_path, *command, "--cache", cache, *OPTIONS)
        assert result.status == 1
        assert "patch_max: choose from cls, patch_mean, or extract with another --pooling" in result.errors[0]
        assert f"{cache} holds no patch_max" in result.errors[0]


@pytest.mark.usefixtures("quick")
def test_heads_that_diverge_are_left_out_and_named(cache: Path, tmp_path: Path) -> None:
    options = ("--features", "cls", "--heads", "mlp", "--losses", "bce", "--seeds", 1, "--epochs", 2)
    result = run_train(tmp_path, "sweep", "--cache", cache, *OPTIONS, *options, "--lrs", "1e-3,1e30")
    assert result.status == 0, result.err
    whole = read(tmp_path / "runs" / "sweep" / "sweep.json")
    assert [entry["lr"] for entry in whole["ranking"]] == [1e-3, 1e-3]
    assert len(whole["diverged"]) == 2
    assert all("--lr 1e+30" in command for command in whole["diverged"])
    assert "warning: 2 heads diverged, so 2 configurations are not ranked" in result.out
    alone = run_train(tmp_path, "sweep", "--cache", cache, *OPTIONS, *options, "--lrs", "1e30")
    assert alone.status == 1
    assert "a head of every configuration diverged: lower --lrs" in alone.errors[0]
