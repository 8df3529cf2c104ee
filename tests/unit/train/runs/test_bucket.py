"""Runs in a bucket: numbers, names that come from there, and two processes with one run."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.cloud import storage

from train.errors import CheckpointError, TrainError
from train.runs.bucket import BucketRun, claim_run, find_run, work_folder
from train.runs.directory import RunDirectory


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.runs.bucket.PAUSE_S", 0.0)


@pytest.fixture
def url(bucket: storage.Bucket) -> str:
    return f"gs://{bucket.name}/runs/head"


def test_every_machine_gets_a_number_of_its_own(url: str) -> None:
    with ThreadPoolExecutor(6) as threads:
        runs = list(threads.map(lambda _: claim_run(url).url, range(6)))
    assert sorted(runs) == [f"{url}-{number:03d}" for number in range(1, 7)]
    assert find_run(url).url == f"{url}-006"
    assert find_run(f"{url}-002").url == f"{url}-002"
    assert find_run(f"{url}-fast") is None


def test_numbers_of_this_machine_are_not_used_again(url: str) -> None:
    work_folder(f"{url}-041").mkdir(parents=True)
    assert claim_run(url).url == f"{url}-042"


def test_what_is_sent_comes_back(url: str, tmp_path: Path) -> None:
    run = RunDirectory.create(url)
    for name in ("best/model.safetensors", "last/optimizer.pt", "history.jsonl", "last.tmp/x", "previous/sha256"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(name.encode() * 9)
    pickle.loads(pickle.dumps(run)).finish()  # noqa: S301 - as it reaches the other ranks
    copy = tmp_path / "copy"
    (copy / "last").mkdir(parents=True)
    (copy / "last" / "optimizer.pt").write_bytes(b"older")
    (copy / "stray").write_bytes(b"")
    assert BucketRun(f"{url}-001").fetch(copy) == []
    found = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    expected = ("best/model.safetensors", "last/optimizer.pt", "history.jsonl")
    assert found == {name: name.encode() * 9 for name in expected}


def test_of_two_that_go_on_with_a_run_the_second_is_told(url: str) -> None:
    run = RunDirectory.create(url)
    (run.path / "history.jsonl").write_text("1\n")
    run.finish()
    first, second = RunDirectory.resume(url), RunDirectory.resume(url)
    second.finish()
    with pytest.raises(TrainError, match="another process continues"):
        first.finish()


@pytest.mark.parametrize(
    "name", ["../outside", "/outside", "best/../../outside", "tensorboard/..", "best/optimizer.pt", "claim", "a\n.json"]
)
def test_names_from_the_bucket_stay_inside(url: str, bucket: storage.Bucket, tmp_path: Path, name: str) -> None:
    RunDirectory.create(url).finish()
    prefix = "runs/head-001"
    digest = "0" * 64
    bucket.blob(f"{prefix}/objects/{digest}").upload_from_string(b"x")
    files = json.dumps({"files": {name: digest}})
    bucket.blob(f"{prefix}/checkpoints/000002.json").upload_from_string(files)
    notes = BucketRun(f"{url}-001").fetch(tmp_path / "inner" / "copy")
    assert "000002.json is damaged" in notes[0]
    bucket.blob(f"{prefix}/checkpoints/000001.json").delete()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        RunDirectory.open(url)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("outside", "optimizer.pt", "claim")]


@pytest.mark.parametrize("url", ["gs://bucket", "gs://bucket/", "gs://bucket/../x", "gs://bucket//x", "gs://b/x/.."])
def test_a_place_without_a_name_is_refused(url: str) -> None:
    with pytest.raises(TrainError, match="write gs://bucket/prefix/name"):
        claim_run(url)
