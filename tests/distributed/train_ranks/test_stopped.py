"""Runs on two ranks that are killed, told to stop or meet an error."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

from tests.distributed.train_ranks.ranks import (
    AUGMENTED,
    DROPPING,
    TIMEOUT_S,
    count_lines,
    data,
    kill_group,
    read,
    read_history,
    run_in_turn,
    started,
    torchrun,
    wait_until,
)
from tests.planted import extract_cache
from tests.planted import train as run_train
from train.data.batches import epoch_order


def start_and_kill(command: list[str], cwd: Path, env: dict[str, str], run: Path, *, epochs: int, of: int) -> None:
    """kill -9 once history has that many lines."""
    with started(command, cwd, env) as process:
        wait_until(lambda: count_lines(run / "history.jsonl") >= epochs, process)
        kill_group(process)
    assert epochs <= count_lines(run / "history.jsonl") < of, "it was over before it could be stopped"
    assert not (run / "metrics.json").exists()


def assert_same_run(resumed: Path, whole: Path) -> None:
    assert (resumed / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    assert read(resumed / "metrics.json") == read(whole / "metrics.json")
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert (resumed / "report.html").is_file()


def test_killed_runs_resume_to_the_same_history(
    undisturbed: Path, made: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    """With dropout and augmentation. A head on two ranks, resumed on two: byte for byte what it would have been.
    Fine-tuning on one, resumed on one: likewise; a copy of it, resumed on two, goes on to the end."""
    head, finetune = tmp_path / "runs" / "head", tmp_path / "runs" / "finetune"
    start_and_kill(torchrun(2, "head", *data(made), *DROPPING), tmp_path, env, head, epochs=2, of=10)
    options = ("--epochs", 6, "--unfreeze", 2, "--batch-size", 16, "--save-steps", 5, "--device", "cpu", "--workers", 0)
    arguments = ("finetune", *data(made), *options, *AUGMENTED, "--head-run", undisturbed / "runs" / "head")
    alone = [sys.executable, "-m", "train", *map(str, arguments)]
    # The first epoch may be killed before its checkpoint is there; of the second on, there is one.
    start_and_kill(alone, tmp_path, env, finetune, epochs=2, of=6)
    copy = Path(shutil.copytree(tmp_path, tmp_path.with_name("copy"), symlinks=True))

    resume = ("--resume", "--device", "cpu")
    there = ("finetune", *resume, "--workers", 0, "--run-dir", copy / "runs" / "finetune")
    out = run_in_turn(tmp_path, env, ("head", *resume), there)
    assert re.search(r"resuming runs/head-001 after epoch \d+ of 10", out)
    assert_same_run(head, undisturbed / "runs" / "whole")
    assert len(read_history(copy / "runs" / "finetune")) == 6

    result = run_train(tmp_path, "finetune", *resume, "--workers", 0)
    assert result.status == 0, result.err
    assert "mAP of the starting head" not in result.out  # it does not start any more
    result = run_train(tmp_path, *arguments, "--run-dir", "runs/whole")
    assert result.status == 0, result.err
    assert_same_run(finetune, tmp_path / "runs" / "whole")


def test_a_run_that_is_asked_to_stop_resumes_to_the_same_history(
    made: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "head"
    arguments = ("head", *data(made), "--epochs", 30, "--batch-size", 8, "--save-every", 2, "--device", "cpu")
    with started([sys.executable, "-m", "train", *map(str, arguments)], tmp_path, env) as process:
        wait_until(lambda: count_lines(run / "history.jsonl") >= 5, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT_S) != 0
    assert 5 <= count_lines(run / "history.jsonl") < 30, "it was over before it could be stopped"
    result = run_train(tmp_path, "head", "--resume", "--device", "cpu")
    assert result.status == 0, result.err
    match = re.search(r"after epoch (\d+) of 30", result.out)
    assert match
    assert int(match[1]) % 2 == 0
    assert run_train(tmp_path, *arguments, "--run-dir", "runs/whole").status == 0
    assert_same_run(run, tmp_path / "runs" / "whole")


def test_a_damaged_last_checkpoint_costs_an_epoch_not_the_run(made: Path, tmp_path: Path) -> None:
    arguments = ("head", *data(made), "--epochs", 4, "--device", "cpu")
    assert run_train(tmp_path, *arguments).status == 0
    run = tmp_path / "runs" / "head"
    history = (run / "history.jsonl").read_bytes()
    weights = run / "last" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result = run_train(tmp_path, "head", "--resume", "--device", "cpu")
    assert result.status == 0, result.err
    assert "resuming runs/head-001 after epoch 3 of 4" in result.out
    assert (run / "history.jsonl").read_bytes() == history


def test_an_error_on_one_rank_ends_the_job_with_one_line(made: Path, tmp_path: Path, env: dict[str, str]) -> None:
    """A tile goes away while the job runs, one that rank 1 alone is going to read."""
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    epochs, batch = 12, 8
    names = read(made / "split.json")["train"]

    def find_victims(seed: int) -> list[int]:
        """Rows that rank 1 reads in every epoch but the first, which has its line when the tile goes."""
        orders = [epoch_order(len(names), seed, epoch).tolist() for epoch in range(1, epochs)]
        return [row for row in range(len(names)) if all(order.index(row) % batch % 2 == 1 for order in orders)]

    seed, victim = next((seed, row) for seed in count() for row in find_victims(seed))
    options = (
        "--split-file",
        made / "split.json",
        "--empty",
        "keep",
        "--batch-size",
        batch,
        "--epochs",
        epochs,
        "--seed",
        seed,
    )
    command = torchrun(2, "finetune", "--cache", cache, *options, "--workers", 0, "--device", "cpu")
    with started(command, tmp_path, env) as process:
        wait_until(lambda: count_lines(tmp_path / "runs" / "finetune" / "history.jsonl") >= 1, process)
        (tiles / names[victim]).unlink()
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode not in (0, None)
    assert "Traceback" not in out + err, err
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1, err
    assert errors[0].endswith(
        f"error: {names[victim]} was listed but is gone, but the cache holds its embedding: run `make extract` again"
    )
