"""A ladder as its user climbs it: rungs in separate processes, killed, refused, repaired and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_checkpoint
from tests.conftest import PROJECT_ROOT
from tests.planted import Finished, extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train
from train.runs.checkpoint import load_checkpoint

DEADLINE_S = 240
TOLERANCE = 1e-12
EPOCHS = 3
MEBIBYTE = 1 << 20
RUNGS = ("neighbours", "mlp", "unfreeze-1")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tiles, a checkpoint of 4 layers, a cache; processes started meanwhile import this very project."""
    root = tmp_path_factory.mktemp("ladder")
    seed = fresh_seed()
    plant_tiles(root / "tiles", scenes=10, per_scene=6, seed=seed)
    extract_cache(root / "tiles", root / "cache", make_checkpoint(root / "checkpoint", seed=seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield root


@dataclass(frozen=True)
class Story:
    """A ladder that was killed in its last rung, refused while that went on, failed on two ranks for a changed tile,
    and resumed; `killed` and `failed` are its ladder.json then."""

    work: Path
    killed: dict[str, Any]
    refused: Finished
    failed_run: Finished
    failed: dict[str, Any]
    finished: Finished

    @property
    def ladder(self) -> Path:
        return self.work / "runs" / "ladder"


@pytest.fixture(scope="module")
def story(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    work = tmp_path_factory.mktemp("work")
    ladder = work / "runs" / "ladder"
    options = ["--cache", str(made / "cache"), "--device", "cpu", "--rungs", "1,mlp,neighbours"]
    more = [
        "--head-options",
        "--epochs 2",
        "--finetune-options",
        f"--epochs {EPOCHS}",
        "--finetune-options",
        "--workers 0",
    ]
    # What another command's table says would give one rung other tiles than the next.
    (work / "tileprobe.toml").write_text(
        "[train.head]\nepochs = 7\nval-fraction = 0.4\nlr = 0.5\n[train.ladder]\nseed = 3\nallow-unsealed = false\n"
    )
    with (work / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", "ladder", *options, *more], cwd=work, stdout=out, stderr=out
        )
        wait_for(lambda: (ladder / "unfreeze-1" / "last").exists() or process.poll() is not None)
        rung = read(ladder / "ladder.json")["rungs"][-1]["legs"][-1]["pid"]
        os.kill(rung, signal.SIGSTOP)  # it outlives the ladder, however slow this test is
        process.kill()
        assert process.wait() == -signal.SIGKILL, (work / "out").read_text()
    killed = read(ladder / "ladder.json")
    refused = run_train(work, "ladder", "--resume")
    os.kill(rung, signal.SIGKILL)
    names = read(ladder / "mlp" / "split.json")["train"]
    tile = made / "tiles" / next(name for name in names if name.endswith("_1.png"))  # which shows every class
    before, times = tile.read_bytes(), tile.stat()
    tile.write_bytes(before + b"more")
    wait_for(lambda: not is_locked(ladder / "lock"))
    failed_run = run_train(work, "ladder", "--resume", "--nproc", 2)
    failed = read(ladder / "ladder.json")
    tile.write_bytes(before)
    os.utime(tile, ns=(times.st_atime_ns, times.st_mtime_ns))
    return Story(work, killed, refused, failed_run, failed, run_train(work, "ladder", "--resume"))


def is_locked(path: Path) -> bool:
    return subprocess.run(["flock", "--nonblock", path, "true"], check=False).returncode != 0


def test_a_killed_ladder_knows_what_was_finished_and_what_was_under_way(story: Story) -> None:
    assert [rung["name"] for rung in story.killed["rungs"]] == list(RUNGS)
    assert [rung["state"] for rung in story.killed["rungs"]] == ["finished", "finished", "running"]
    assert "table" not in story.killed


def test_the_rungs_take_settings_from_the_ladder_alone(story: Story) -> None:
    config = read(story.ladder / "mlp" / "config.json")["config"]
    assert (config["epochs"], config["seed"], config["lr"]) == (2, 3, 1e-3)
    assert config["data"]["val_fraction"] == 0.2
    assert "--seed" in story.killed["settings"]["shared"]
    assert "--allow-unsealed" not in story.killed["settings"]["shared"]


def test_a_rung_that_outlives_its_ladder_keeps_others_out(story: Story) -> None:
    pid = story.killed["rungs"][-1]["legs"][-1]["pid"]
    assert story.refused.status == 1
    assert story.refused.errors == [
        f"error: runs/ladder-001 is in use by a ladder, or by a rung that outlived one (process {pid}): wait until it "
        "has ended, or end it"
    ]


def test_a_failed_rung_is_named_and_the_table_shows_the_others(story: Story) -> None:
    assert story.failed_run.status == 1
    reason = "tiles is not what the cache was made from: 0 tiles gone, 1 changed"
    (error,) = story.failed_run.errors
    assert error.startswith("error: 1 of 3 rungs failed (UNFREEZE=1: ")
    assert reason in error
    assert "continue with --resume" in error
    assert "kept, since they are finished: nearest neighbours, MLP head" in story.failed_run.out
    assert [rung["state"] for rung in story.failed["rungs"]] == ["finished", "finished", "failed"]
    assert reason in story.failed["rungs"][-1]["error"]
    assert [line["name"] for line in story.failed["table"]] == ["neighbours", "mlp"]
    assert "nearest neighbours" in story.failed["sentence"]


def test_the_figures_are_those_of_the_runs_on_one_split(story: Story) -> None:
    assert story.finished.status == 0, story.finished.err
    whole = read(story.ladder / "ladder.json")
    assert [rung["state"] for rung in whole["rungs"]] == ["finished"] * 3
    assert [line["name"] for line in whole["table"]] == list(RUNGS)
    assert whole["reference"] == "mlp"
    mlp = read(story.ladder / "mlp" / "metrics.json")
    for line in whole["table"]:
        run = story.ladder / line["name"]
        metrics = read(run / "metrics.json")
        assert read(run / "split.json") == read(story.ladder / "mlp" / "split.json")
        assert (line["f1_weighted"], line["map_macro"]) == (metrics["f1_weighted"], metrics["map_macro"])
        assert line["intervals"] == metrics["intervals"]
        low, high = metrics["intervals"]["map_macro"]
        assert f"{metrics['map_macro']:.3f} [{low:.3f}, {high:.3f}]" in story.finished.out
        if line["name"] == "mlp":
            assert line["over_reference"] is None
            continue
        for key, difference in line["over_reference"]["difference"].items():
            assert difference == pytest.approx(metrics[key] - mlp[key], abs=TOLERANCE)
    assert whole["sentence"] in story.finished.out
    assert whole["sentence"].startswith("UNFREEZE=1 ")
    assert (story.ladder / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_neighbours_rung_is_the_baseline_of_the_mlp_s_run(story: Story) -> None:
    rung = read(story.ladder / "neighbours" / "metrics.json")
    baseline = read(story.ladder / "mlp" / "metrics.json")["baselines"]["10 nearest neighbours"]
    for key in ("f1_weighted", "f1_macro", "map_macro", "accuracy"):
        assert rung[key] == pytest.approx(baseline[key], abs=TOLERANCE)


def test_the_layers_start_from_the_mlp_s_head(story: Story) -> None:
    assert read(story.ladder / "unfreeze-1" / "config.json")["config"]["head_run"] == "runs/ladder-001/mlp-001"
    log = (story.ladder / "unfreeze-1.log").read_text()
    assert "head starts from runs/ladder-001/mlp-001" in log
    assert load_checkpoint(story.ladder / "unfreeze-1" / "best").meta.unfreeze == 1


def test_finished_rungs_are_kept_and_the_half_done_one_goes_on(story: Story) -> None:
    whole = read(story.ladder / "ladder.json")
    assert [len(rung["legs"]) for rung in whole["rungs"]] == [1, 1, 3]
    assert whole["rungs"][:2] == story.killed["rungs"][:2]
    assert [path.name for path in story.ladder.glob("unfreeze-1-*")] == ["unfreeze-1-001"]
    log = (story.ladder / "unfreeze-1.log").read_text()
    assert log.count("$ ") == 3
    assert re.search(r"resuming runs/ladder-001/unfreeze-1-001 after epoch [1-3] of 3", log)
    assert "--nproc-per-node=2" in log
    history = [json.loads(line) for line in (story.ladder / "unfreeze-1" / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == list(range(1, EPOCHS + 1))


def test_every_start_s_time_counts_and_memory_is_the_process_s_own(story: Story) -> None:
    whole = read(story.ladder / "ladder.json")
    legs = whole["rungs"][-1]["legs"]
    assert [leg["status"] for leg in legs] == [None, 1, 0]
    assert all(leg["seconds"] > 0 for leg in legs)
    for rung, line in zip(whole["rungs"], whole["table"], strict=True):
        assert line["wall_s"] == pytest.approx(sum(leg["seconds"] for leg in rung["legs"]))
        assert 100 * MEBIBYTE < line["host_peak_bytes"] < 16_384 * MEBIBYTE  # torch alone takes more than 100
        assert line["device_peak_bytes"] is None
    assert whole["table"][0]["training_s"] == 0
    assert 0 < whole["table"][1]["training_s"] < whole["table"][1]["wall_s"]
    assert "(3 starts)" in story.finished.out


def test_runs_of_other_tiles_are_not_compared(story: Story, tmp_path: Path) -> None:
    work = shutil.copytree(story.work, tmp_path / "work", symlinks=True)
    path = work / "runs" / "ladder" / "unfreeze-1" / "split.json"
    split = read(path)
    path.write_text(json.dumps({"train": split["val"], "val": split["train"]}))
    result = run_train(work, "ladder", "--resume")
    assert result.status == 1
    assert result.errors == [
        "error: runs/ladder-001/unfreeze-1-001 was scored on other tiles than the cache holds now: the cache changed "
        "between rungs: start a new ladder without --resume"
    ]


def test_without_the_mlp_no_layer_is_trained(made: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--rungs", "mlp,1,9", "--head-options", "--memory-budget 1K")
    result = run_train(tmp_path, "ladder", "--cache", made / "cache", *options)
    assert result.status == 1
    assert "UNFREEZE=9 is left out: the backbone has 4 layers" in result.out
    (error,) = result.errors
    assert error.startswith("error: 2 of 2 rungs failed (MLP head: --memory-budget 1K is too small to stream blocks")
    assert "; UNFREEZE=1: not run, since there is no MLP head to start from)" in error
    ladder = tmp_path / "runs" / "ladder"
    assert "table" not in read(ladder / "ladder.json")
    assert not (ladder / "unfreeze-1.log").exists()


def test_a_signal_reaches_the_rung_and_leaves_the_ladder_to_be_resumed(made: Path, tmp_path: Path) -> None:
    state = tmp_path / "runs" / "ladder" / "ladder.json"

    def stop() -> None:
        wait_for(lambda: state.exists() and '"running"' in state.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    result = run_train(tmp_path, "ladder", "--cache", made / "cache", "--device", "cpu", "--rungs", "neighbours")
    thread.join()
    assert result.status == 128 + signal.SIGTERM
    stopped = "stopped by SIGTERM: 0 of 1 rungs of runs/ladder-001 are finished; --resume continues from there"
    assert stopped in result.err
    (rung,) = read(state)["rungs"]
    assert rung["state"] == "waiting"
    assert rung["legs"][0]["status"] in (-signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--rungs", "mlp,many"), "--rungs mlp,many: many is no rung: choose from"),
        (("--rungs", "mlp,7", "--head-options", "--epoch 3"), "--head-options --epoch 3: No such option"),
        (("--head-options", "--lr 0"), "--lr 0.0: above 0"),
        (("--head-options", "--epochs '3"), "--head-options --epochs '3: No closing quotation: see"),
        (
            ("--finetune-options", "--unfreeze 2"),
            "--finetune-options --unfreeze 2: --unfreeze is for the ladder as a whole",
        ),
        (("--finetune-options", "--seed 2"), "--finetune-options --seed 2: --seed is for the ladder as a whole"),
        (
            ("--run-dir", "gs://bucket/ladder"),
            "gs://bucket/ladder: a ladder must be on this machine: choose",
        ),
        (("--resume",), "no ladder at runs/ladder: start one without --resume, or check RUN"),
        (("--cache", "nowhere"), "no cache at nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    made: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = run_train(tmp_path, "ladder", "--cache", made / "cache", *options)
    assert result.status == 1
    assert len(result.errors) == 1
    assert message in result.errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_ladder_starts_its_ranks_itself(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_train(tmp_path, "ladder", "--cache", made / "cache")
    assert result.status == 1
    assert "a ladder is one process that starts the ranks of its rungs: run it alone, with --nproc" in result.err
