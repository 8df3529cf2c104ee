"""Runs in a bucket on the real server: machines are lost, objects damaged, networks go away, two processes meet."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from google.cloud import storage

from cache_schema.storage.objects import open_objects
from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train
from tests.proxy import Proxy
from train.loop.trainer import Trainer
from train.runs import bucket as remote
from train.runs.bucket import BucketRun

EPOCHS = 4
HEAD = ("--epochs", EPOCHS, "--batch-size", 8, "--device", "cpu")
FIGURES = ("history.jsonl", "metrics.json", "split.json")


class MachineLostError(Exception):
    """Not one that the command line explains."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles, their cache, and `runs/head`, an undisturbed local run."""
    root = tmp_path_factory.mktemp("remote")
    seed = fresh_seed()
    plant_tiles(root / "tiles", scenes=6, per_scene=9, seed=seed)
    extract_cache(root / "tiles", root / "cache", make_checkpoint(root / "checkpoint", seed=seed))
    result = run_train(root, "head", "--cache", root / "cache", *HEAD)
    assert result.status == 0, result.err
    return root


@pytest.fixture(autouse=True)
def _every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)


@pytest.fixture
def run(bucket: storage.Bucket) -> str:
    return f"gs://{bucket.name}/some/runs/head"


def get(bucket: storage.Bucket, name: str) -> bytes:
    return bytes(bucket.blob(f"some/runs/{name}").download_as_bytes())


def names(bucket: storage.Bucket, prefix: str = "") -> list[str]:
    return [blob.name for blob in bucket.list_blobs(prefix=f"some/runs/{prefix}")]


def stop_after(epoch: int, patch: pytest.MonkeyPatch) -> None:
    """Fail as a machine does that is lost in the epoch after this one, once that one's checkpoint is in the bucket."""
    train_epoch = Trainer._train_epoch

    def stop(self: Trainer, *arguments: Any) -> float:
        remote_run = self._run._remote
        if remote_run is not None and self._epoch >= 1:
            remote_run._settle()
        if self._epoch == epoch:
            raise MachineLostError
        return train_epoch(self, *arguments)

    patch.setattr(Trainer, "_train_epoch", stop)


def lose_machine(made: Path, cwd: Path, run: str, epoch: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MachineLostError):
        stop_after(epoch, patch)
        run_train(cwd, "head", "--cache", made / "cache", "--run-dir", run, *HEAD)
    shutil.rmtree(cwd / "runs")


def assert_undisturbed(made: Path, bucket: storage.Bucket, name: str = "head-001") -> None:
    for file in FIGURES:
        assert get(bucket, f"{name}/{file}") == (made / "runs" / "head" / file).read_bytes(), file


def test_a_run_in_a_bucket_is_that_of_a_directory(made: Path, bucket: storage.Bucket, run: str, tmp_path: Path) -> None:
    result = run_train(tmp_path, "head", "--cache", made / "cache", "--run-dir", run, *HEAD)
    assert result.status == 0, result.err
    assert f"files go to {run}-001" in result.out
    assert_undisturbed(made, bucket)
    local = {path.relative_to(tmp_path / "runs" / "gs" / bucket.name / "some" / "runs").as_posix()
             for path in tmp_path.rglob("*") if path.is_file()}  # fmt: skip
    people = {name for name in local if "/last/" not in name and "/previous/" not in name}
    there = {name.removeprefix("some/runs/") for name in names(bucket)}
    assert people <= there
    assert any("tensorboard/" in name for name in people)
    assert "head-001/report.html" in people
    assert len(names(bucket, "head-001/checkpoints/")) == 2

    shutil.rmtree(tmp_path / "runs")
    evaluated = run_train(tmp_path, "evaluate", "--run-dir", run, "--cache", made / "cache", "--device", "cpu")
    local_run = run_train(made, "evaluate", "--cache", made / "cache", "--device", "cpu")
    assert (evaluated.status, evaluated.out) == (0, local_run.out)
    predicted = run_train(tmp_path, "predict", "--run-dir", f"{run}-001", "--cache", made / "cache", "--device", "cpu")
    assert predicted.status == 0, predicted.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions-thresholds.csv", "predictions.csv"]

    tuned = f"gs://{bucket.name}/some/runs/finetune"
    finetune = ("finetune", "--cache", made / "cache", "--run-dir", tuned, "--epochs", 1, "--workers", 0, "--device")
    result = run_train(tmp_path, *finetune, "cpu")
    assert result.status == 0, result.err
    assert f"head starts from {run}-001" in result.out
    assert json.loads(get(bucket, "finetune-001/split.json")) == json.loads(get(bucket, "head-001/split.json"))


@pytest.mark.parametrize("damage", ["nothing", "truncated", "missing", "list"])
def test_a_lost_machine_loses_no_training(
    made: Path, bucket: storage.Bucket, run: str, tmp_path: Path, damage: str
) -> None:
    lose_machine(made, tmp_path, run, 3)
    newest, before = sorted(names(bucket, "head-001/checkpoints/"), reverse=True)
    files, older = (json.loads(bucket.blob(name).download_as_bytes())["files"] for name in (newest, before))
    victim = f"head-001/objects/{files['last/model.safetensors']}"
    assert files["last/model.safetensors"] != older["last/model.safetensors"]
    if damage == "truncated":
        bucket.blob(f"some/runs/{victim}").upload_from_string(get(bucket, victim)[:-7])
    elif damage == "missing":
        bucket.blob(f"some/runs/{victim}").delete()
    elif damage == "list":
        bucket.blob(newest).upload_from_string(b'{"files": {"last')
    result = run_train(tmp_path, "head", "--run-dir", run, "--resume", "--device", "cpu")
    assert result.status == 0, result.err
    assert f"after epoch {3 if damage == 'nothing' else 2} of {EPOCHS}" in result.out
    assert ("the checkpoint before it is used" in result.out) == (damage != "nothing")
    assert_undisturbed(made, bucket)
    kept = [json.loads(bucket.blob(n).download_as_bytes())["files"] for n in names(bucket, "head-001/checkpoints/")]
    objects = {name.rpartition("/")[2] for name in names(bucket, "head-001/objects/")}
    assert objects == set().union(*(lists.values() for lists in kept))  # nothing is left behind


def test_a_process_that_is_killed_goes_on_elsewhere(
    made: Path, bucket: storage.Bucket, run: str, tmp_path: Path, python_env: dict[str, str]
) -> None:
    long = ("head", "--cache", made / "cache", "--epochs", 400, "--batch-size", 8, "--device", "cpu", "--run-dir", run)
    command = [sys.executable, "-m", "train", *map(str, long)]
    process = subprocess.Popen(command, cwd=tmp_path, env=python_env, stdout=-1, stderr=-1, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(names(bucket, "head-001/checkpoints/")) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    shutil.rmtree(tmp_path / "runs")
    remote_run = BucketRun(f"{run}-001")
    assert remote_run.fetch(tmp_path / "copy") == []
    lines = (tmp_path / "copy" / "history.jsonl").read_text().splitlines()
    assert len(lines) == json.loads((tmp_path / "copy" / "last" / "checkpoint.json").read_text())["epoch"] >= 1


def test_an_outage_is_one_line_and_resumable(
    made: Path, bucket: storage.Bucket, run: str, tmp_path: Path, proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "open_objects", partial(open_objects, deadline_s=0.3, first_delay_s=0.02))
    proxy.choose_fault = lambda path: 503 if len(names(bucket, "head-001/checkpoints/000002")) else None
    result = run_train(tmp_path, "head", "--cache", made / "cache", "--run-dir", run, *HEAD)
    assert result.status == 1
    assert 503 in proxy.met
    assert len(result.errors) == 1
    assert "kept failing (RetryError)" in result.errors[0]
    assert "ARGS=--resume continues from there" in result.errors[0]
    assert "Traceback" not in result.err
    proxy.choose_fault = lambda path: None
    monkeypatch.setattr(remote, "open_objects", open_objects)
    shutil.rmtree(tmp_path / "runs")
    result = run_train(tmp_path, "head", "--run-dir", run, "--resume", "--device", "cpu")
    assert result.status == 0, result.err
    assert_undisturbed(made, bucket)


def test_a_missing_bucket_is_told_before_training(made: Path, gcs_server: str, tmp_path: Path) -> None:
    result = run_train(tmp_path, "head", "--cache", made / "cache", "--run-dir", "gs://no-such-bucket/head", *HEAD)
    assert result.errors == [
        "error: no bucket no-such-bucket for gs://no-such-bucket: check the name in RUN"
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_refused_access_is_told_before_training(made: Path, run: str, tmp_path: Path, proxy: Proxy) -> None:
    proxy.choose_fault = lambda path: 403 if "/upload/" in path else None
    result = run_train(tmp_path, "head", "--cache", made / "cache", "--run-dir", run, *HEAD)
    assert len(result.errors) == 1
    assert "refused (403): give the account the role Storage Object User" in result.errors[0]
    assert list(tmp_path.iterdir()) == []
