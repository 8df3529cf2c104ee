"""What a damaged run goes on from: the checkpoint before, the best epoch replaced, or one line that says why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.train.runs.test_checkpoint import make_meta, train_a_little
from train.errors import CheckpointError
from train.runs.checkpoint import load_best, load_checkpoint, save_checkpoint
from train.runs.directory import RunDirectory
from train.runs.resume import recover_run


def cut(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])


def flip(directory: Path) -> None:
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-3] ^= 16
    (directory / "model.safetensors").write_bytes(data)


def empty(directory: Path) -> None:
    (directory / "checkpoint.json").write_bytes(b"")


def lose(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def half_write(directory: Path) -> None:
    for name in ("checkpoint.json", "sha256"):
        (directory / name).unlink()


def remove(directory: Path) -> None:
    shutil.rmtree(directory)


DAMAGES = [cut, flip, empty, lose, half_write, remove]


def make_run(root: Path, best_epoch: int) -> RunDirectory:
    """Three epochs, each with a checkpoint."""
    run = RunDirectory.create(str(root / "head"))
    for epoch in (1, 2, 3):
        run.append_history({"epoch": epoch})
        tensors, optimizer = train_a_little(epoch)
        meta = replace(make_meta(epoch), best_epoch=min(epoch, best_epoch))
        if epoch == best_epoch:
            save_checkpoint(run.best, tensors, meta)
        save_checkpoint(run.last, tensors, meta, optimizer)
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_falls_back_and_says_so(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = make_run(tmp_path, best_epoch=1)
    damage(run.last)
    checkpoint, notes = recover_run(run, 1)
    assert checkpoint is not None
    assert checkpoint.meta.epoch == 2
    assert len(notes) == 1
    assert re.search(r"(damaged|missing|cannot be read.*); continuing from .*previous, of epoch 2$", notes[0])
    assert not run.last.exists()
    assert (run.path / "last.damaged").exists() == (damage is not remove)
    assert recover_run(run, 1)[0] is not None  # and again, had the run been killed right then


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_both_is_one_error_that_names_the_way_out(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = make_run(tmp_path, best_epoch=1)
    damage(run.last)
    damage(run.path / "previous")
    with pytest.raises(CheckpointError, match=r"cannot resume .*last.*previous.*: start a new run without --resume$"):
        recover_run(run, 1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_best_is_written_anew_or_refused_before_training(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for epoch in (3, 2, 1):
        run = make_run(tmp_path / str(epoch), best_epoch=epoch)
        damage(run.best)
        with pytest.raises(CheckpointError, match="continue that run with --resume, which repairs it if it can"):
            load_best(run.path)
        if epoch == 1:
            with pytest.raises(CheckpointError, match=r"no other checkpoint is of the best epoch, 1: start a new run"):
                recover_run(run, 1)
            continue
        checkpoint, (note,) = recover_run(run, 1)
        assert checkpoint is not None
        assert checkpoint.meta.epoch == 3
        assert note.endswith(f"replaced by {run.path / ('last' if epoch == 3 else 'previous')}, "
                             f"which is of the best epoch, {epoch}")  # fmt: skip
        mended = load_checkpoint(run.best)
        assert mended.meta.epoch == epoch
        assert all(torch.equal(mended.tensors[name], value) for name, value in train_a_little(epoch)[0].items())


def test_an_undamaged_run_goes_on_from_its_last_without_a_word(tmp_path: Path) -> None:
    checkpoint, notes = recover_run(make_run(tmp_path, best_epoch=2), 1)
    assert checkpoint is not None
    assert (checkpoint.meta.epoch, notes) == (3, ())


def test_a_run_stopped_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "head"))
    for epochs in range(3):
        checkpoint, notes = recover_run(run, 2)
        assert checkpoint is None
        assert "stopped before its first checkpoint" in notes[0]
        run.append_history({"epoch": epochs + 1})
    with pytest.raises(CheckpointError, match="start a new run without --resume"):
        recover_run(run, 2)  # three epochs, and a checkpoint every two: it was there


@pytest.mark.parametrize("text", ["", '{"epoch": 1}\n{"epoch": 2}\n', '{"epoch": 1}\n\0\0\0\n{"epoch": 3}\n'])
def test_a_history_that_lost_epochs_is_refused(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path, best_epoch=2)
    run.history.write_text(text)
    with pytest.raises(CheckpointError, match=r"history\.jsonl does not hold the 3 epochs"):
        recover_run(run, 1)
    assert json.loads((run.last / "checkpoint.json").read_text())["epoch"] == 3
