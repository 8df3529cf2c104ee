"""Fine-tuning in shards on two ranks: the numbers and the files of every rank holding all, at half the memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train

TIMEOUT_S = 240
ROOT = Path(__file__).parents[2]
FINETUNE = (
    *("finetune", "--empty", "keep", "--unfreeze", 2, "--epochs", 2, "--batch-size", 5, "--save-steps", 8, "--no-amp"),
    *("--dropout", 0, "--layer-decay", 0.75, "--clip-norm", 0.01, "--device", "cpu", "--workers", 0),
)
"""21 steps an epoch, of which the last has one row, so that one rank has none."""
PARTS = ("--epochs", 1, "--accumulate", 3, "--grad-checkpoint", "--cache-prefix", "--amp")
"""Shares of 3 and 2 rows in three parts: one rank's third part is empty."""

RESUME = ("finetune", "--resume", "--device", "cpu", "--workers", 0, "--run-dir")


@dataclass(frozen=True)
class Job:
    """What two ranks left.

    Attributes:
        work: their working directory.
        out: what rank 0 printed, of each command.
        facts: of the step in shards, for each rank.
    """

    work: Path
    out: list[str]
    facts: list[dict[str, Any]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """101 tiles train. 19 validate in batches of 4, so that one rank has a batch more than the other."""
    root = tmp_path_factory.mktemp("shards")
    seed = fresh_seed()
    plant_tiles(root / "tiles", scenes=6, per_scene=20, seed=seed)
    checkpoint = make_checkpoint(root / "checkpoint", seed=seed, use_gated_mlp=True)
    extract_cache(root / "tiles", root / "cache", checkpoint, batch_size=4)
    tiles = sorted(f"images/{path.name}" for path in (root / "tiles" / "images").iterdir())
    (root / "split.json").write_text(json.dumps({"train": tiles[:101], "val": tiles[101:]}))
    data = ("--cache", root / "cache", "--split-file", root / "split.json")
    assert run_train(root, "head", *data, "--empty", "keep", "--epochs", 2, "--device", "cpu").status == 0
    finetune = (*FINETUNE, *data, "--head-run", root / "runs" / "head")
    work = root / "work"
    work.mkdir()
    commands = [
        (*finetune, "--run-dir", "runs/whole"),
        (*finetune, "--run-dir", "runs/shard", "--shard"),
        (*finetune, *PARTS, "--run-dir", "runs/whole-parts"),
        (*finetune, *PARTS, "--run-dir", "runs/shard-parts", "--shard"),
        ("back", "runs", "again/runs"),
        ("back", "runs", "alone/runs"),
        (*RESUME, "again/runs/whole", "--shard"),
        (*RESUME, "again/runs/shard"),
        (*finetune, "--dry-run", "--json"),
        (*finetune, "--dry-run", "--json", "--shard"),
    ]
    text = json.dumps([list(map(str, command)) for command in commands])
    launch = [sys.executable, "-m", "extract.launch", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name("sharded.py")), str(checkpoint), text],
        cwd=work,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    print(done.stdout)
    facts = [json.loads((work / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    return Job(work, re.split(r"^command \d+$", done.stdout, flags=re.MULTILINE)[1:], facts)


def find_head(job: Job) -> Path:
    """The run that all of them started from."""
    return job.work.parent / "runs" / "head"


def read_history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, other: Path, start: Path) -> None:
    """Losses within 1e-4; weights within 4 % of what training moved them, since Adam divides by the gradient's own
    size, so that rounding in a tiny one moves a weight by up to a step; AdamW's moments within 5 % of their norm, since
    where bf16 rounds the other way once, a hundredth has been seen. Files hold the same names, shapes and groups."""
    assert len(read_history(run)) == len(read_history(other))
    for a, b in zip(read_history(run), read_history(other), strict=True):
        assert a.keys() == b.keys()
        assert (b["lr"], b["clipped_share"]) == (a["lr"], a["clipped_share"])
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    for name in ("best", "last"):
        assert {file.name for file in (run / name).iterdir()} == {file.name for file in (other / name).iterdir()}
    before = load_file(start / "best" / "model.safetensors")
    backbone = load_file(start.parents[1] / "checkpoint" / "model.safetensors")
    before |= {f"backbone.vit.{name.replace('layer.', 'model.layer.')}": tensor for name, tensor in backbone.items()}
    first, second = (load_file(each / "last" / "model.safetensors") for each in (run, other))
    assert {name: tensor.shape for name, tensor in first.items()} == {n: tensor.shape for n, tensor in second.items()}
    assert len([name for name in first if name.startswith("backbone.")]) > 1
    for name, tensor in first.items():
        moved = np.linalg.norm(tensor - before[name])
        assert np.linalg.norm(second[name] - tensor) <= 0.04 * moved, name
    states = [torch.load(each / "last" / "optimizer.pt", weights_only=True) for each in (run, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for moment in ("step", "exp_avg", "exp_avg_sq"):
        wanted, found = ([held[moment] for held in state["state"].values()] for state in states)
        largest = max(float(tensor.norm()) for tensor in wanted)
        for want, got in zip(wanted, found, strict=True):
            assert type(got) is torch.Tensor
            assert got.shape == want.shape
            assert (got - want).norm() <= 0.05 * want.norm() + 1e-4 * largest


def test_in_shards_training_is_what_it_is_whole(job: Job) -> None:
    runs = job.work / "runs"
    assert_same_run(runs / "whole", runs / "shard", find_head(job))
    assert len(read_history(runs / "shard")) == 2
    assert "each of 2 ranks holds its part" in job.out[1]
    assert "--shard" not in job.out[0]
    whole, shard = (json.loads((runs / run / "config.json").read_text())["config"] for run in ("whole", "shard"))
    assert (whole.pop("shard"), shard.pop("shard")) == (False, True)


def test_so_it_is_in_parts_recomputed_from_the_prefix_cache_under_autocast(job: Job) -> None:
    runs = job.work / "runs"
    assert_same_run(runs / "whole-parts", runs / "shard-parts", find_head(job))


def test_a_run_goes_on_in_shards_and_back(job: Job) -> None:
    """From within an epoch; begun whole and resumed in shards, and the other way round."""
    begun, again = job.work / "runs", job.work / "again" / "runs"
    for run, out in (("whole", job.out[6]), ("shard", job.out[7])):
        assert "after epoch 1 of 2, step 16 of the next" in out
        assert ("--shard: each of 2" in out) == (run == "whole")
        assert_same_run(begun / run, again / run, find_head(job))


def test_alone_a_rank_goes_on_with_what_two_began_in_shards(job: Job) -> None:
    result = run_train(job.work / "alone", *RESUME, "runs/shard", "--shard")
    assert result.status == 0, result.err
    assert "after epoch 1 of 2, step 16 of the next" in result.out
    assert "--shard: one rank holds every layer whole" in result.out
    assert_same_run(job.work / "runs" / "shard", job.work / "alone" / "runs" / "shard", find_head(job))


def test_a_rank_holds_its_part(job: Job) -> None:
    """Half of weights, gradients and moments each, and nothing is left whole after a step and an evaluation."""
    assert sum(fact["held"] for fact in job.facts) == job.facts[0]["whole"]
    for fact in job.facts:
        assert fact["held"] == pytest.approx(fact["whole"] / 2, rel=0.01)
        assert fact["registered"] == fact["gradients"] == fact["held"]
        assert fact["moments"] == 2 * fact["held"]


def test_clipping_is_by_the_norm_over_all_shards(job: Job) -> None:
    """At 0.9 and at 1.1 of it."""
    assert [fact["clipped"] for fact in job.facts] == [[True, False], [True, False]]


def test_other_ranks_are_told_what_they_need(job: Job) -> None:
    assert [fact["told"] for fact in job.facts] == ["all of it", "all"]


def test_what_does_not_fit_is_refused(job: Job) -> None:
    for fact in job.facts:
        assert fact["refusal"].startswith("8,192 tiles at once do not fit in memory (")
        assert "--accumulate 2 " in fact["refusal"]


def test_a_dry_run_counts_shards(job: Job) -> None:
    """16 bytes for each parameter of the half, and of one layer."""
    whole, shard = (json.JSONDecoder().raw_decode(out, out.index("{"))[0] for out in job.out[8:])
    trained, layers = (whole["training"][name] for name in ("parameters", "backbone_parameters"))
    assert whole["memory"]["trained"] == 16 * trained
    assert shard["memory"]["trained"] == 16 * (-(-trained // 2) + layers // 2)
    assert shard["memory"]["activations"] == whole["memory"]["activations"]
