"""The trainer is killed, at every named point of a save and at drawn ones, and ends as if nothing had been."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest

from tests.faults.trainer_kills import (
    FIRST_SAVE,
    LATER_SAVES,
    Kill,
    Leg,
    head_arguments,
    make_cache,
    run_leg,
    run_named_kills,
    run_torchrun_leg,
    run_trainer_kills,
)
from tests.planted import fresh_seed
from tests.planted import train as run_train
from train.runs.directory import RunDirectory
from train.runs.resume import load_last

RESUME = ["head", "--resume", "--device", "cpu"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("kills"), fresh_seed())


def test_killed_at_drawn_moments_it_ends_where_an_undisturbed_run_does(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(cache)
    rows = run_trainer_kills(tmp_path, 2, fresh_seed())
    assert sum(row["tried"] for row in rows) == sum(row["survived"] for row in rows) == 2


def test_killed_at_named_points_of_a_save_it_loses_at_most_the_epoch_in_hand(cache: Path, tmp_path: Path) -> None:
    """Some of the points in each run of the tests; `make soak` goes through all."""
    (tmp_path / "cache").symlink_to(cache)
    seed = fresh_seed()
    draw = random.Random(seed)
    rows = run_named_kills(tmp_path, draw.sample(FIRST_SAVE, 1), draw.sample(LATER_SAVES, 2), seed)
    assert sum(row["tried"] for row in rows) == sum(row["survived"] for row in rows) == 3


def test_a_stop_says_what_is_saved(cache: Path, tmp_path: Path) -> None:
    kill = Kill(place="before remove previous", epoch=4, signal=signal.SIGTERM)
    leg = run_leg(tmp_path, head_arguments(cache, 9), kill)
    assert leg.status == 128 + signal.SIGTERM
    (line,) = [line for line in leg.err.splitlines() if "stopped" in line]
    assert line.endswith("stopped by SIGTERM: 3 of 9 epochs of runs/head-001 are saved; --resume continues from there")
    result = run_train(tmp_path, *RESUME)
    assert result.status == 0, result.err
    assert "resuming runs/head-001 after epoch 3 of 9" in result.out


def test_damage_then_a_kill_before_the_next_save_is_over_does_not_lose_the_run(cache: Path, tmp_path: Path) -> None:
    """The damaged checkpoint must not take the place of the good one that the run went on from."""
    assert run_leg(tmp_path, head_arguments(cache, 6), Kill(place="before write history.jsonl", epoch=3)).status < 0
    run = tmp_path / "runs" / "head"
    weights = run / "last" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    leg = run_leg(tmp_path, RESUME, Kill(place="before rename last.tmp", epoch=3))
    assert leg.status == -signal.SIGKILL, leg.err
    lines = [line for line in leg.out.splitlines() if "is damaged" in line]
    assert len(lines) == 1
    assert re.search(r"does not match its sha256: it is damaged; continuing from .*/previous, of epoch 2$", lines[0])
    assert load_last(run.resolve())[0].meta.epoch == 2
    assert (run / "last.damaged" / "model.safetensors").is_file()


def spoilt_arguments(cache: Path) -> list[str]:
    """Fine-tuning with a step size that no weight survives."""
    options = ["--unfreeze", "1", "--epochs", "2", "--batch-size", "4", "--workers", "0", "--lr", "1e30"]
    return ["finetune", "--cache", str(cache), *options, "--warmup", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def moved(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Leg]:
    """`one` was killed on one rank and resumed on two, `two` the other way round; `whole` was left alone.

    The job of two ranks, which is returned, also met a loss that is not finite, in `spoilt`.
    """
    root = tmp_path_factory.mktemp("moved")
    for name in ("whole", "one", "two", "spoilt"):
        (root / name).mkdir()
    arguments = [*head_arguments(cache, 6), "--dropout", "0", "--no-amp"]
    assert run_leg(root / "whole", arguments).status == 0
    kill = Kill(place="before remove last.tmp", epoch=3)
    assert run_leg(root / "one", arguments, kill).status == -signal.SIGKILL
    first = [(root / "spoilt", spoilt_arguments(cache)), (root / "one", RESUME)]
    leg = run_torchrun_leg(root / "two", arguments, kill, first=first)
    assert leg.status != 0
    assert "rank 0 was ended by SIGKILL" in leg.err
    assert "resuming runs/head-001 after epoch 2 of 6" in leg.out
    resumed = run_leg(root / "two", RESUME)
    assert resumed.status == 0, resumed.err
    assert "resuming runs/head-001 after epoch 2 of 6" in resumed.out
    return root, leg


@pytest.mark.parametrize("name", ["one", "two"])
def test_on_another_number_of_ranks_it_goes_on_to_the_same_numbers(moved: tuple[Path, Leg], name: str) -> None:
    """Without dropout, whose draws each rank has for itself. Sums over ranks are added in another order: 1e-5."""
    whole, history = (RunDirectory(moved[0] / n / "runs" / "head").read_history() for n in ("whole", name))
    assert len(whole) == 6
    for line, expected in zip(history, whole, strict=True):
        for key in ("epoch", "lr", "train_loss", "loss"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_streamed_loss_that_is_not_finite_names_its_rows(
    request: pytest.FixtureRequest, cache: Path, tmp_path: Path, ranks: int
) -> None:
    """On every rank, and none waits for another: the job of two goes on with its next command."""
    if ranks == 1:
        leg, work = run_leg(tmp_path, spoilt_arguments(cache)), tmp_path
        assert leg.status == 1, leg.err
    else:
        root, leg = request.getfixturevalue("moved")
        work = root / "spoilt"
        assert leg.err.count("told by rank 0") == 1
    assert "Traceback" not in leg.err
    (line,) = [line for line in leg.err.splitlines() if "error: the loss" in line]
    match = re.search(r"not finite in epoch 1, step (\d+) of \d+, for (rows? .*) of a batch of \d: lower --lr", line)
    assert match, line
    named = dict(re.findall(r"(\d+) \((images/[^)]*)\)", match[2]))
    assert named
    tiles = sorted(f"images/{path.name}" for path in (cache.parent / "tiles" / "images").iterdir())
    assert all(tiles[int(row)] == tile for row, tile in named.items())
    assert not [path.name for path in (work / "runs" / "finetune").iterdir() if path.is_dir()]


def test_a_full_disk_ends_in_one_line_and_a_run_that_goes_on(cache: Path, tmp_path: Path) -> None:
    """A limit on the size of any file, set once the history has three lines, stands for the disk."""
    leg = run_leg(tmp_path, head_arguments(cache, 5), Kill(place="before remove last.tmp", epoch=3, signal=0))
    assert leg.status == 1, leg.err
    (line,) = [line for line in leg.err.splitlines() if "error: " in line]
    assert re.search(r"cannot write .*/last: .*make room or access, then continue with --resume$", line)
    result = run_train(tmp_path, *RESUME)
    assert result.status == 0, result.err
    assert "resuming runs/head-001 after epoch 2 of 5" in result.out
