"""What a checkpoint says of itself, and checkpoints that are not right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from extract.backbone.checkpoint import find_checkpoint, follow_links
from extract.errors import BackboneError
from tests.checkpoints import MEAN, STD
from tests.unit.extract.backbone.test_dinov3 import LAYERS, load


def test_what_a_checkpoint_says(plain: Path) -> None:
    found = find_checkpoint(str(plain))
    assert (found.depth, found.width, found.image_size, found.mean, found.std) == (LAYERS, 64, 64, MEAN, STD)
    assert find_checkpoint(str(plain), 224).image_size == 224


@pytest.mark.parametrize("size, message", [
    (100, "IMAGE_SIZE 100 is not a multiple of the 16 px patch: try 96 or 112"),
    (10, "try 16 or 32"),
    (0, "IMAGE_SIZE 0 is not"),
    (-16, "try 16 or 32"),
])  # fmt: skip
def test_image_size_it_cannot_take(plain: Path, size: int, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        find_checkpoint(str(plain), size)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "no checkpoint at .*a directory with config.json"),
    "config cut": (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
    "config of a list": (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "another model": (lambda path: edit_json(path / "config.json", model_type="vit"), "'vit'.*must be a DINOv3 ViT"),
    "no patch size": (lambda path: edit_json(path / "config.json", patch_size=None), "patch_size"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), r"no model\*.safetensors: save the checkpoint"),
    "no preprocessor": (
        lambda path: (path / "preprocessor_config.json").unlink(),
        "preprocessor_config.json is missing: copy",
    ),
    "preprocessor without size": (
        lambda path: edit_json(path / "preprocessor_config.json", size={"shortest_edge": 64}),
        "height",
    ),
    "preprocessor of one channel": (
        lambda path: edit_json(path / "preprocessor_config.json", image_mean=[0.5]),
        "1 means and 3 deviations",
    ),
    "tensor missing": (
        lambda path: edit_weights(path, lambda tensors: tensors.pop("layer.3.norm1.weight")),
        r"leaves 1 tensors unfilled, such as model\.layer\.3\.norm1\.weight",
    ),
    "tensor of another shape": (
        lambda path: edit_weights(path, lambda tensors: tensors.update({"norm.weight": torch.zeros(32)})),
        r"leaves 1 tensors unfilled, such as norm\.weight",
    ),
    "weights of a shallower model": (
        lambda path: edit_json(path / "config.json", num_hidden_layers=5),
        r"unfilled, such as model\.layer\.4",
    ),
    "weights cut": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100]),
        "cannot load",
    ),
    "weights empty": (lambda path: (path / "model.safetensors").write_bytes(b""), "cannot load"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(BackboneError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_hash_of_weights_is_that_of_the_files_bytes(copy: Path) -> None:
    first = copy / "model.safetensors"
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    assert find_checkpoint(str(copy)).hash_weights() == digest
    edit_json(copy / "config.json", transformers_version="0")  # not the weights' concern
    assert find_checkpoint(str(copy)).hash_weights() == digest
    (copy / "head.safetensors").write_bytes(b"the head that an export puts next to it")
    assert find_checkpoint(str(copy)).hash_weights() == digest
    second = copy / "model-2.safetensors"
    second.write_bytes(first.read_bytes() + b"x")
    both = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (second, first)]  # by name: "-" before "."
    assert find_checkpoint(str(copy)).hash_weights() == hashlib.sha256("".join(both).encode()).hexdigest()


def test_one_changed_weight_changes_the_hash(copy: Path) -> None:
    before = find_checkpoint(str(copy)).hash_weights()
    edit_weights(copy, lambda tensors: tensors["norm.bias"][0].add_(1e-3))
    assert find_checkpoint(str(copy)).hash_weights() != before


def test_a_link_is_followed_and_any_other_name_stays(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    (copy.parent / "newest").symlink_to(copy)
    (copy.parent / "demo").symlink_to(copy)
    (copy.parent / "empty").mkdir()
    (copy.parent / "to-nothing").symlink_to("empty")
    assert follow_links("newest") == copy.name
    assert follow_links(str(copy.parent / "newest")) == str(copy)
    for name in (copy.name, f"./{copy.name}", str(copy), "demo", "vitl16", "org/model", "to-nothing"):
        assert follow_links(name) == name
