"""Find a checkpoint, and read what its files say before any weight is loaded."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from extract.errors import BackboneError

from .family import FAMILIES, find_family
from .hub import CONFIGURATION, download, measure_download, no_checkpoint

_HUB_IDS = {
    "vitl16": "facebook/dinov3-vitl16-pretrain-sat493m",
    "vit7b16": "facebook/dinov3-vit7b16-pretrain-sat493m",
}

_TRAINED_SIZE = {"vitl16": 512, "vit7b16": 512, **dict.fromkeys(_HUB_IDS.values(), 512)}
"""Pixels a side with which the satellite checkpoints were trained; their preprocessor says 224."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory and what its files say, before any weight is loaded.

    Attributes:
        name: as the user gave it.
        path: directory with config.json, preprocessor_config.json and model*.safetensors.
        depth, width: transformer layers, embedding length.
        image_size: effective pixels a side, a multiple of the patch size.
        tokens: CLS, registers and patches of a tile of that size.
        flop: floating-point operations of one tile's forward pass.
        mean, std: the preprocessor's, per channel.
    """

    name: str
    path: Path
    depth: int
    width: int
    image_size: int
    tokens: int
    flop: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def weight_files(self) -> list[Path]:
        """Return the files that transformers loads, in name order; an export's head may lie next to them."""
        return sorted(self.path.glob("model*.safetensors"))

    def hash_weights(self) -> str:
        """Return the sha256 of the weight file; of several, the sha256 of their hex digests in name order."""
        digests = []
        for file in self.weight_files:
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def find_checkpoint(name: str, image_size: int | None = None) -> Checkpoint:
    """Locate `vitl16`, `vit7b16`, `demo`, a local directory or a hub id, and read its configuration.

    Args:
        image_size: pixels a side; default 512 for the satellite backbones, else that of the checkpoint's processor.

    Raises:
        BackboneError: not found, gated, of no known family, no safetensors, or an image size it cannot take.
    """
    path = _find_local(name) or download(_HUB_IDS.get(name, name))
    checkpoint = _read_configuration(name, path, image_size)
    if not checkpoint.weight_files:
        raise BackboneError(f"{path} has no model*.safetensors: save the checkpoint with safe serialization")
    return checkpoint


def find_configuration(name: str, image_size: int | None = None) -> tuple[Checkpoint, int]:
    """Do as `find_checkpoint`, but download no weights from the hub.

    Returns:
        the checkpoint, and its bytes still to be downloaded; if there are any, weights may be missing.

    Raises:
        BackboneError: as `find_checkpoint`.
    """
    hub_id = _HUB_IDS.get(name, name)
    if _find_local(name) or not (missing := measure_download(hub_id)):
        return find_checkpoint(name, image_size), 0
    return _read_configuration(name, download(hub_id, CONFIGURATION), image_size), missing


def _read_configuration(name: str, path: Path, image_size: int | None) -> Checkpoint:
    config = _read_json(path / "config.json")
    family = find_family(name, config.get("model_type"))
    processor = _read_json(path / "preprocessor_config.json")
    try:
        mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
        size = _TRAINED_SIZE.get(name) or int(processor["size"]["height"])
        size = size if image_size is None else image_size
        patch, depth, width = config[family.patch_size], config[family.depth], config[family.width]
        tokens = family.find_first_patch(config) + (size // patch) ** 2
        flop = count_flop(config, size)
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"{len(mean)} means and {len(std)} deviations for 3 channels")
    except (KeyError, TypeError, ValueError) as error:
        raise BackboneError(
            f"{path}: its configuration cannot be used ({type(error).__name__}: {error}): is this a DINOv3 checkpoint?"
        ) from error
    if size <= 0 or size % patch:
        below = max(patch, size // patch * patch)
        raise BackboneError(
            f"IMAGE_SIZE {size} is not a multiple of the {patch} px patch: try {below} or {below + patch}"
        )
    return Checkpoint(name, path, depth, width, size, tokens, flop, mean, std)


def count_flop(config: Mapping[str, Any], image_size: int) -> float:
    """Count the floating-point operations of one tile's forward pass, from config.json; a multiply-add is two.

    Patch embedding, projections, attention and MLP are counted; norms, activations and biases are well below 1 %.
    """
    family = FAMILIES[config["model_type"]]
    patches = (image_size // config[family.patch_size]) ** 2
    tokens = family.find_first_patch(config) + patches
    width, hidden = config[family.width], config[family.mlp_width]
    projections = 4 * width * width + (3 if config.get(family.gated_mlp) else 2) * width * hidden
    attention = 2 * tokens * width  # scores and weighted sum of one token over all
    embedding = patches * 3 * config[family.patch_size] ** 2 * width
    return float(2 * (config[family.depth] * tokens * (projections + attention) + embedding))


def follow_links(name: str) -> str:
    """Return a name that still means this checkpoint later: for a local directory its path without links, since a link
    such as `runs/finetune` moves on to the next run; any other name unchanged."""
    real = os.path.realpath(name)
    if name == "demo" or not Path(name, "config.json").is_file() or real == os.path.abspath(name):
        return name
    return real if os.path.isabs(name) else os.path.relpath(real)


def _find_local(name: str) -> Path | None:
    """Return the directory of a local checkpoint; None if the name is one on the hub."""
    if name == "demo":
        return Path(str(resources.files("extract.demo").joinpath("backbone")))
    local = Path(name)
    if (local / "config.json").is_file():
        return local
    if local.is_dir() or name.startswith((".", "/")) or (name.count("/") != 1 and name not in _HUB_IDS):
        raise no_checkpoint(name)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BackboneError(
            f"{path} is missing: copy the checkpoint's configuration files next to its weights"
        ) from error
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} cannot be read ({error}): save the checkpoint again") from error
    if not isinstance(value, dict):
        raise BackboneError(f"{path} is not a JSON object: save the checkpoint again")
    return value
