"""A dry run writes nothing and says what the real one does."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from tests.e2e.command_line.commands import QUICK, extract, read_json, snapshot
from tests.planted import train as run_train


def test_a_dry_extraction_writes_nothing_and_says_what_the_real_one_does(made: Path, tmp_path: Path) -> None:
    tiles = Path(shutil.copytree(made / "tiles", tmp_path / "tiles"))
    arguments = ("run", "--tiles", "tiles", "--backbone", made / "checkpoint", "--workers", 0, "--precision", "float32")

    def foretell(*more: object) -> Any:
        before = snapshot(tmp_path)
        dry = extract(tmp_path, *arguments, *more, "--dry-run", "--json")
        assert dry.status == 0, dry.err
        assert snapshot(tmp_path) == before
        assert dry.err.endswith("dry run: nothing was written\n")
        return read_json(dry.out)

    def do(*more: object) -> Any:
        return read_json(extract(tmp_path, *arguments, *more, "--json").out)

    dry = foretell()
    real = do()
    assert (dry["cache"], dry["version"], dry["to_do"]) == (real["cache"], real["version"], real["computed"])
    sizes = [path.stat().st_size for path in (tiles / "images").iterdir()]
    assert (dry["tiles"], dry["blocks"], dry["pending_blocks"], dry["bytes_to_read"]) == (60, 1, 1, sum(sizes))
    assert dry["changes"] is None
    dry = foretell()
    assert (dry["exists"], dry["to_do"], dry["kept"], dry["pending_blocks"], dry["bytes_to_read"]) == (
        True,
        0,
        60,
        0,
        0,
    )

    shutil.copy(tiles / "images/s00_0.png", tiles / "images/s99_0.png")
    (tiles / "labels/s99_0.txt").write_text("")
    shutil.copy(tiles / "images/s00_0.png", tiles / "images/s00_1.png")
    (tiles / "labels/s00_2.txt").write_text("73 0.5 0.5 0.25 0.25\n")
    (tiles / "labels/s11_4.txt").unlink()
    dry = foretell()
    assert dry["changes"] == {"new": 1, "changed": 1, "removed": 1, "relabelled": 1, "kept": 57}
    assert dry["bytes_to_read"] == sum((tiles / f"images/{name}.png").stat().st_size for name in ("s99_0", "s00_1"))
    real = do()
    assert (
        (dry["version"], dry["to_do"], dry["kept"])
        == (real["version"], real["computed"], real["kept"])
        == (
            real["version"],
            *(2, 58),
        )
    )


def test_a_dry_extraction_meets_the_same_errors(made: Path, tmp_path: Path) -> None:
    for tiles, message in (("nowhere", "nowhere"), ("", "TILES is not set")):
        result = extract(tmp_path, "run", "--tiles", tiles, "--backbone", made / "checkpoint", "--dry-run")
        assert result.status == 1
        assert message in result.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_fine_tuning_writes_nothing_and_says_what_the_real_one_does(made: Path, work: Path) -> None:
    options = ("--cache", made / "cache", "--unfreeze", 2, "--workers", 0, *QUICK)
    before, cache = snapshot(work), snapshot(made)
    dry = run_train(work, "finetune", *options, "--dry-run", "--json")
    assert dry.status == 0, dry.err
    assert (snapshot(work), snapshot(made)) == (before, cache)
    values = read_json(dry.out)
    real = run_train(work, "finetune", *options)
    assert real.status == 0, real.err
    trained = re.search(r"training (\d+) tensors \(([\d,]+) parameters\)", real.out)
    assert trained
    assert values["training"]["backbone_parameters"] == int(trained[2].replace(",", ""))
    in_head = [tensor.numel() for tensor in read_head(work / "runs/head/best/model.safetensors")]
    assert values["training"]["head_parameters"] == sum(in_head)
    assert values["training"]["tensors"] == int(trained[1]) + len(in_head)
    split = json.loads((work / "runs/finetune/split.json").read_text())
    rows = values["split"]
    assert (rows["val"], rows["test"]) == (len(split["val"]), 0)
    assert values["batch_size"] == json.loads((work / "runs/finetune/config.json").read_text())["config"]["batch_size"]
    assert values["steps_per_epoch"] == math.ceil(rows["train"] / values["batch_size"])
    assert values["head_run"] == "runs/head-001"
    assert values["step_zero"] is True
    assert "step 0 can run" in dry.err
    assert "step 0: " in real.out


def read_head(path: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(path).values())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("features, recompute", [("cls", False), ("cls+patch_mean", False), ("cls", True)])
def test_the_estimate_of_memory_is_what_autograd_keeps(
    made: Path, work: Path, amp: bool, features: str, recompute: bool
) -> None:
    """Counted by autograd's own hooks; the layers of this checkpoint are narrower for their width than real ones."""
    options = ("--cache", made / "cache", "--unfreeze", 3, "--device", "cpu", "--amp" if amp else "--no-amp")
    more = ("--grad-checkpoint",) if recompute else ()
    dry = run_train(work, "finetune", *options, *more, "--features", features, "--dry-run", "--json")
    memory = read_json(dry.out)["memory"]
    checkpoint = find_checkpoint(str(made / "checkpoint"))
    backbone = Backbone.load(checkpoint, precision="float32", device=torch.device("cpu"))
    backbone.unfreeze_last(3, checkpointing=recompute)
    backbone.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() > checkpoint.width**2 * 2:  # not a weight's bf16 copy
            kept[storage.data_ptr()] = storage
        return tensor

    hidden = torch.zeros(256, checkpoint.tokens, checkpoint.width)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=amp):
        backbone.run_suffix(hidden, features.split("+"))
    counted = sum(storage.nbytes() for storage in kept.values()) * memory["tiles_at_once"] / 256
    one_layer = (46 if amp else 76) * checkpoint.tokens * checkpoint.width * memory["tiles_at_once"] if recompute else 0
    assert (memory["activations"] - one_layer) / counted == pytest.approx(1, abs=0.35)
    assert memory["total"] == memory["weights"] + memory["trained"] + memory["activations"]


def test_a_dry_run_of_what_is_no_new_fine_tuning_is_refused(made: Path, work: Path) -> None:
    for options, message in (
        (("--resume",), "leave --resume out"),
        (("--unfreeze", 0), "UNFREEZE=0"),
        (("--unfreeze", 9), "4 layers"),
    ):
        result = run_train(work, "finetune", "--cache", made / "cache", *options, "--device", "cpu", "--dry-run")
        assert result.status == 1
        assert message in result.errors[0]
