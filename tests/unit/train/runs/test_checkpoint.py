"""A checkpoint comes back as it was saved, or not at all: damage, interruption and foreign code are all refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planted import fresh_seed
from train.errors import CheckpointError
from train.runs.checkpoint import CheckpointMeta, LoadedCheckpoint, load_checkpoint, save_checkpoint
from train.runs.resume import load_last

FILES = ("model.safetensors", "checkpoint.json", "optimizer.pt", "sha256")


def make_meta(epoch: int) -> CheckpointMeta:
    return CheckpointMeta(
        epoch=epoch,
        unfreeze=0,
        features=("cls", "patch_mean"),
        hidden=7,
        dropout=0.1,
        class_ids=(0, 4),
        class_names=("roof", "pool, round"),
        reading="type",
        thresholds=(0.25, 0.5),
        backbone="demo",
        image_size=64,
        precision="float32",
        weights_sha256="ab" * 32,
        best=0.1 + 0.2,
        best_epoch=epoch,
    )


def train_a_little(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and a real optimiser's state."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "peak_lr": 1e-3}], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    return dict(model.state_dict()), optimizer.state_dict()


def assert_is(loaded: LoadedCheckpoint, tensors: dict[str, torch.Tensor], meta: CheckpointMeta) -> None:
    assert loaded.meta == meta
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors[name], tensor), name
        assert loaded.tensors[name].dtype == tensor.dtype


def redo_digest(directory: Path, name: str) -> None:
    """What an attacker would do: make the digest fit the altered file."""
    digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    lines = [line for line in (directory / "sha256").read_text().splitlines() if not line.endswith(f"  {name}")]
    (directory / "sha256").write_text("\n".join([*lines, f"{digest}  {name}"]) + "\n")


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """A resumable checkpoint of epoch 1."""
    tensors, optimizer = train_a_little(0)
    save_checkpoint(tmp_path / "last", tensors, make_meta(1), optimizer)
    return tmp_path / "last"


def test_round_trip(tmp_path: Path) -> None:
    tensors, optimizer = train_a_little(fresh_seed())
    tensors["backbone.half"] = torch.randn(3, 2).bfloat16().t()  # neither float32 nor contiguous
    save_checkpoint(tmp_path / "last", tensors, make_meta(3), optimizer)
    loaded = load_checkpoint(tmp_path / "last")
    assert_is(loaded, tensors, make_meta(3))
    assert loaded.optimizer is not None
    assert loaded.optimizer["param_groups"] == optimizer["param_groups"]
    for index, state in optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(loaded.optimizer["state"][index][name], value)
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == sorted(FILES)


def test_an_outline_holds_shapes_and_no_values(last: Path) -> None:
    whole = load_checkpoint(last)
    outline = whole.outline()
    assert outline.meta == whole.meta
    pairs = [(outline.tensors, whole.tensors)]
    assert whole.optimizer is not None
    assert outline.optimizer is not None
    assert outline.optimizer["param_groups"] == whole.optimizer["param_groups"]
    pairs += [(outline.optimizer["state"][number], held) for number, held in whole.optimizer["state"].items()]
    for outlined, held in pairs:
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in outlined.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in held.items()
        }
        assert {tensor.device.type for tensor in outlined.values()} == {"meta"}


def test_without_an_optimiser_there_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best", train_a_little(0)[0], make_meta(1))
    assert load_checkpoint(tmp_path / "best").optimizer is None
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed(last: Path, name: str) -> None:
    data = (last / name).read_bytes()
    step = max(1, len(data) // 60)
    for position in [*range(0, len(data), step), len(data) - 2]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        (last / name).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_checkpoint(last)
    (last / name).write_bytes(data)
    load_checkpoint(last)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_noticed(last: Path, name: str, keep: float) -> None:
    data = (last / name).read_bytes()
    (last / name).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CheckpointError):
        load_checkpoint(last)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(last: Path, name: str) -> None:
    (last / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(last)


def test_a_file_without_a_digest_is_not_trusted(last: Path) -> None:
    lines = (last / "sha256").read_text().splitlines(keepends=True)
    for name in FILES[:3]:
        (last / "sha256").write_text("".join(line for line in lines if name not in line))
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(last)


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_checkpoint(tmp_path / "last")


@pytest.mark.parametrize(
    "change", [{"epoch": None}, {"features": 3}, {"colour": "red"}], ids=["missing", "another type", "unknown"]
)
def test_metadata_of_another_release_is_an_error(last: Path, change: dict[str, Any]) -> None:
    meta = json.loads((last / "checkpoint.json").read_text()) | change
    (last / "checkpoint.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
    redo_digest(last, "checkpoint.json")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(last)


def test_optimiser_state_runs_no_code(last: Path, tmp_path: Path) -> None:
    touched = tmp_path / "owned"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (touched,))

    for write in (
        lambda path: torch.save({"state": Malicious()}, path),
        lambda path: path.write_bytes(pickle.dumps(Malicious(), protocol=2)),
    ):
        write(last / "optimizer.pt")
        redo_digest(last, "optimizer.pt")
        with pytest.raises(CheckpointError):
            load_checkpoint(last)
        assert not touched.exists()
    with (last / "optimizer.pt").open("rb") as stream:
        pickle.load(stream)  # noqa: S301 - shows that the file would have run code
    assert touched.exists()


def test_weights_run_no_code(last: Path, tmp_path: Path) -> None:
    touched = tmp_path / "owned"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (touched,))

    for write in (
        lambda path: torch.save({"weight": Malicious()}, path),
        lambda path: path.write_bytes(pickle.dumps(Malicious())),
    ):
        write(last / "model.safetensors")
        redo_digest(last, "model.safetensors")
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            load_checkpoint(last)
        # Nor beside it, under names that other tools load.
        for name in ("pytorch_model.bin", "model.pt"):
            write(last / name)
        with pytest.raises(CheckpointError, match="does not match its sha256"):
            load_checkpoint(last)
        for name in ("pytorch_model.bin", "model.pt"):
            (last / name).unlink()
        assert not touched.exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and no more", b"text"])
def test_an_optimiser_file_that_is_none_is_an_error(last: Path, data: bytes) -> None:
    (last / "optimizer.pt").write_bytes(data)
    redo_digest(last, "optimizer.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(last)


def test_a_damaged_last_falls_back_to_the_one_before(tmp_path: Path) -> None:
    saved = {}
    for epoch in (1, 2, 3):
        saved[epoch], optimizer = train_a_little(epoch)
        save_checkpoint(tmp_path / "last", saved[epoch], make_meta(epoch), optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "previous"]
    assert_is(load_last(tmp_path)[0], saved[3], make_meta(3))
    data = bytearray((tmp_path / "last" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "last" / "model.safetensors").write_bytes(data)
    assert_is(load_last(tmp_path)[0], saved[2], make_meta(2))
    (tmp_path / "previous" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot resume .*sha256.*optimizer\.pt.*without --resume"):
        load_last(tmp_path)


class StopHereError(Exception):
    """Stands for the kill."""


@pytest.mark.parametrize("name, resumable", [("last", True), ("best", False)])
def test_killed_at_any_step_of_saving_the_old_or_the_new_one_is_there(
    tmp_path: Path, name: str, resumable: bool
) -> None:
    def save(root: Path, epoch: int) -> dict[str, torch.Tensor]:
        tensors, optimizer = train_a_little(epoch)
        save_checkpoint(root / name, tensors, make_meta(epoch), optimizer if resumable else None)
        return tensors

    seen = set()
    for step in range(100):
        root = tmp_path / str(step)
        saved = {epoch: save(root, epoch) for epoch in (1, 2)}
        done = []

        def interrupt(original: Any, done: list[int] = done, step: int = step) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                if len(done) == step:
                    raise StopHereError
                done.append(1)
                return original(*args, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", interrupt(Path.rename))
            patch.setattr(shutil, "rmtree", interrupt(shutil.rmtree))
            patch.setattr(Path, "write_text", interrupt(Path.write_text))
            patch.setattr(torch, "save", interrupt(torch.save))
            try:
                saved[3] = save(root, 3)
            except StopHereError:
                stopped = True
            else:
                stopped = False
        saved[3] = train_a_little(3)[0]
        loaded = load_last(root)[0] if resumable else load_checkpoint(root / name)
        assert loaded.meta.epoch in (2, 3)
        assert_is(loaded, saved[loaded.meta.epoch], make_meta(loaded.meta.epoch))
        seen.add(loaded.meta.epoch)
        # And the next save is not confused by what was left lying about.
        saved[4] = save(root, 4)
        assert_is(load_checkpoint(root / name), saved[4], make_meta(4))
        if not stopped:
            break
    assert step >= 4
    assert seen == {2, 3}
