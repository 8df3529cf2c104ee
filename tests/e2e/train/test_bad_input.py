"""Bad input: one line, a status, nothing written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

from tests.checkpoints import make_checkpoint
from tests.e2e.train.recompute import assert_refused, read, snapshot
from tests.planted import CLASSES, extract_cache, fresh_seed, plant_tiles
from tests.planted import train as run_train


def test_training_without_a_cache_names_extraction(tmp_path: Path, python_env: dict[str, str]) -> None:
    for command in ("head", "finetune"):
        assert_refused(run_train(tmp_path, command), "make extract")
    assert_refused(run_train(tmp_path, "head", "--cache", "cache/none"), "cache/none.*make extract|no .*cache/none")
    assert_refused(run_train(tmp_path, "evaluate", "--tiles", tmp_path), "make train-head")
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-m", "train", "head"]
    finished = subprocess.run(command, cwd=tmp_path, env=python_env, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 1
    assert finished.stderr == "error: no cache was written yet: run `make extract` first, or set CACHE\n"


@pytest.mark.parametrize(
    "command, options, message",
    [
        ("head", ("--backbone", "vitl16"), "made with BACKBONE=.*checkpoint, not vitl16.*make extract BACKBONE=vitl16"),
        ("finetune", ("--backbone", "vitl16"), "was made with BACKBONE=.*checkpoint, not vitl16"),
        ("head", ("--val-cache", "OTHER"), "hold different embeddings .*weights_sha256.*extract both"),
        ("head", ("--test-cache", "OTHER"), "hold different embeddings"),
        ("head", ("--val-cache", "SAME"), "VAL_CACHE is the training cache itself"),
        ("head", ("--val-cache", "COPY"), "holds the same tiles as"),
        ("head", ("--label-ids", "class"), "no class ids of this class list.*--label-ids"),
        ("head", ("--scene-regex", r"^(?P<scene>\d+)$"), "116 tile names do not fit --scene-regex.*images/s00_0.png"),
        ("head", ("--scene-regex", "s(.*)"), r"no group \(\?P<scene>"),
        ("head", ("--scene-regex", "(?P<scene>"), "not a regular expression"),
        ("head", ("--scene-regex", r"^(?P<scene>s)"), "only 1 scenes.*VAL_CACHE"),
        ("head", ("--split-file", "nowhere.json"), "nowhere.json is not a split.json"),
        ("head", ("--taxonomy", "nowhere.csv"), "cannot read the class list nowhere.csv"),
        ("head", ("--exclude", "77"), "--exclude 77: give class ids from 0 to 59"),
        ("head", ("--features", "mean"), "--features mean: choose from cls, patch_mean"),
        ("head", ("--val-fraction", "1.5"), "--val-fraction 1.5"),
        ("head", ("--lr", "-1"), "--lr -1.0: above 0"),
        ("head", ("--lr", "1e30", "--epochs", "2"), "lower --lr"),
        ("head", ("--run-dir", "gs://bucket"), "RUN=gs://bucket names no run"),
        ("head", ("--run-dir", "runs"), "runs is a directory, not a link"),
        ("head", ("--resume", "--run-dir", "runs/nowhere"), "no run at runs/nowhere"),
        ("finetune", ("--unfreeze", "9"), "UNFREEZE=9"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_everything(
    work: Path, made: Path, tmp_path: Path, command: str, options: tuple[str, ...], message: str
) -> None:
    if "OTHER" in options:
        backbone = make_checkpoint(tmp_path / "checkpoint", seed=fresh_seed())
        extract_cache(made / "val-tiles", tmp_path / "other", backbone)
    if "COPY" in options:
        shutil.copytree(made / "cache", tmp_path / "copy")
    places = {"OTHER": tmp_path / "other", "COPY": tmp_path / "copy", "SAME": made / "cache"}
    before = {path: data for path, data in snapshot(work / "runs").items() if path != "head"}
    result = run_train(
        work, command, "--cache", made / "cache", "--device", "cpu", *(places.get(option, option) for option in options)
    )
    assert_refused(result, message)
    after = snapshot(work / "runs")
    assert before.items() <= after.items()
    if "lower --lr" not in message:
        assert {path for path in after if path != "head"} == set(before)


def test_class_ids_where_type_ids_are_meant(made: Path, tmp_path: Path) -> None:
    tiles = plant_tiles(tmp_path / "tiles", scenes=6, per_scene=4, seed=fresh_seed(), ids="class")
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    refused = run_train(tmp_path, "head", "--cache", cache, "--label-ids", "type", "--epochs", 1)
    assert_refused(refused, "no type ids of this class list: .*--label-ids")
    assert not (tmp_path / "runs").exists()
    detected = run_train(tmp_path, "head", "--cache", cache, "--epochs", 1, "--device", "cpu")
    assert detected.status == 0, detected.err
    assert "label ids read as class ids" in detected.out
    supports = {row["name"]: row["support"] for row in read(tmp_path / "runs" / "head" / "metrics.json")["per_class"]}
    assert {name for name, support in supports.items() if support} == set(CLASSES)
    # The same ids in a validation set are read as the training cache was, so a mixture cannot pass unnoticed.
    mixed = run_train(tmp_path, "head", "--cache", made / "cache", "--val-cache", cache, "--epochs", 1)
    assert_refused(mixed, "no type ids of this class list")


def test_labels_that_fit_neither_reading_show_their_histogram(made: Path, tmp_path: Path) -> None:
    tiles = plant_tiles(tmp_path / "tiles", scenes=6, per_scene=4, seed=fresh_seed())
    for number, path in enumerate(sorted((tiles / "labels").iterdir())):
        path.write_text(f"{18 if number % 2 else 19} 0.5 0.5 0.1 0.1\n")
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    result = run_train(tmp_path, "head", "--cache", cache)
    assert result.status == 1
    assert "cannot tell type ids from class ids" in result.err
    assert "18:12 19:12 other:0" in result.err
    assert "--label-ids" in result.err


def test_an_unfinished_cache_is_refused_unless_it_is_asked_for(made: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made / "cache", tmp_path / "cache"))
    version = read(cache / "current")["version"]
    group = zarr.open_group(str(cache / f"{version}.zarr"), mode="r+")
    group["commit"][0] = 0
    result = run_train(tmp_path, "head", "--cache", cache, "--epochs", 1)
    assert_refused(result, "117 rows of .* are missing or damaged.*make extract.*--allow-unsealed")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_resumed_on_another_version_of_its_cache(made: Path, tmp_path: Path) -> None:
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))
    cache = extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    assert run_train(tmp_path, "head", "--cache", cache, "--epochs", 1, "--device", "cpu").status == 0
    (tiles / "images" / "s02_2.png").unlink()
    extract_cache(tiles, tmp_path / "cache", made / "checkpoint")
    before = snapshot(tmp_path / "runs")
    refused = run_train(tmp_path, "head", "--resume", "--device", "cpu")
    assert_refused(refused, "was trained on version .* which holds .* now: start a new run")
    refused = run_train(tmp_path, "finetune", "--cache", cache, "--workers", 0, "--device", "cpu")
    assert_refused(refused, "was trained on version .*make train-head")
    assert snapshot(tmp_path / "runs") == before


def test_a_damaged_best_checkpoint_is_refused(work: Path, made: Path) -> None:
    path = work / "runs" / "head" / "best" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_refused(run_train(work, "predict", "--cache", made / "cache"), "does not match its sha256")
    arguments = ("--cache", made / "cache", "--workers", 0, "--device", "cpu")
    assert_refused(run_train(work, "finetune", *arguments), "does not match its sha256")
    assert not (work / "predictions.csv").exists()
