"""DINOv3: find the checkpoint, load it frozen, run it, pool its tokens, unfreeze its last layers.

Source: Siméoni et al. 2025, "DINOv3"; the model code is transformers' `DINOv3ViTModel`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint as recompute

from .errors import BackboneError
from .hub import CONFIGURATION, download, measure_download, no_checkpoint
from .last_layer import let_keep_first
from .memory import keep_freed_memory
from .packed import SDPA, can_pack, pack, unpack
from .precision import DTYPES, Precision

POOLING = ("cls", "patch_mean")

_HUB_IDS = {
    "vitl16": "facebook/dinov3-vitl16-pretrain-sat493m",
    "vit7b16": "facebook/dinov3-vit7b16-pretrain-sat493m",
}
_TRAINED_SIZE = {"vitl16": 512, "vit7b16": 512, **dict.fromkeys(_HUB_IDS.values(), 512)}
"""Pixels a side the satellite checkpoints were trained at; their own preprocessor says 224."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory and what its files say, before any weight is loaded.

    Attributes:
        name: as the user gave it.
        path: directory holding config.json, preprocessor_config.json and model*.safetensors.
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
        """model.safetensors, or its shards, in name order."""
        return _weight_files(self.path)

    def hash_weights(self) -> str:
        """sha256 of the weight file's bytes; of several, over their hex digests in name order."""
        digests = []
        for file in self.weight_files:
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def find_checkpoint(name: str, image_size: int | None = None) -> Checkpoint:
    """Locate `vitl16`, `vit7b16`, `demo`, a local directory or a hub id, and read its configuration.

    Args:
        name: which one.
        image_size: pixels a side; default 512 for the satellite backbones, else what the checkpoint's processor says.

    Raises:
        BackboneError: not found, gated, not a DINOv3 ViT, no safetensors, or an image size it cannot take.
    """
    path = _find_local(name) or download(_name_on_hub(name))
    if not _weight_files(path):
        raise BackboneError(f"{path} has no model*.safetensors: save the checkpoint with safe serialization")
    return _read_configuration(name, path, image_size)


def find_configuration(name: str, image_size: int | None = None) -> tuple[Checkpoint, int]:
    """As `find_checkpoint`, but of what lies on the hub no weight is fetched.

    Returns:
        the checkpoint, and bytes of it still to be downloaded; as long as there are any, weights may be missing.

    Raises:
        BackboneError: as `find_checkpoint`.
    """
    if _find_local(name):
        return find_checkpoint(name, image_size), 0
    missing = measure_download(hub_id := _name_on_hub(name))
    if not missing:
        return find_checkpoint(name, image_size), 0
    return _read_configuration(name, download(hub_id, CONFIGURATION), image_size), missing


def _read_configuration(name: str, path: Path, image_size: int | None) -> Checkpoint:
    config = _read_json(path / "config.json")
    if config.get("model_type") != "dinov3_vit":
        raise BackboneError(f"{name} is a {config.get('model_type')!r} checkpoint: BACKBONE must be a DINOv3 ViT")
    processor = _read_json(path / "preprocessor_config.json")
    try:
        mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
        size = _TRAINED_SIZE.get(name) or int(processor["size"]["height"])
        size = size if image_size is None else image_size
        patch, depth, width = config["patch_size"], config["num_hidden_layers"], config["hidden_size"]
        tokens = 1 + config["num_register_tokens"] + (size // patch) ** 2
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
    """Floating-point operations of one tile's forward pass, from a checkpoint's config.json; a multiply-add is two.

    Counted are patch embedding, projections, attention and MLP; norms, activations and biases are well below 1 %.
    """
    patches = (image_size // config["patch_size"]) ** 2
    tokens = 1 + config["num_register_tokens"] + patches
    width, hidden = config["hidden_size"], config["intermediate_size"]
    projections = 4 * width * width + (3 if config.get("use_gated_mlp") else 2) * width * hidden
    attention = 2 * tokens * width  # scores and weighted sum, of one token with all
    embedding = patches * 3 * config["patch_size"] ** 2 * width
    return float(2 * (config["num_hidden_layers"] * tokens * (projections + attention) + embedding))


def follow_links(name: str) -> str:
    """The name that still means this checkpoint later: of a local directory the one behind links, since one such as
    `runs/finetune` moves on to the next run. Any other name as it is."""
    real = os.path.realpath(name)
    if name == "demo" or not Path(name, "config.json").is_file() or real == os.path.abspath(name):
        return name
    return real if os.path.isabs(name) else os.path.relpath(real)


class Backbone(nn.Module):
    """A DINOv3 ViT that gives pooled embeddings; frozen, except for the last layers once they are unfrozen.

    Frozen parts stay in eval() whatever `train()` says: in training mode DINOv3 jitters its position embeddings, so
    even frozen features would be random.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.trained_layers = 0
        self.checkpointing = False
        vit.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, precision: Precision, device: torch.device) -> Self:
        """Load weights in `precision` onto `device`; its layers are packed where that is faster, see `packed`.

        Raises:
            BackboneError: the weights are damaged or do not fill the architecture.
        """
        from safetensors import SafetensorError
        from transformers import AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            # The dtype is given here, never by .to(dtype) afterwards, which would also round the RoPE frequencies.
            vit, loading = AutoModel.from_pretrained(
                checkpoint.path,
                dtype=DTYPES[precision],
                attn_implementation=SDPA,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name the tensor below, where the library would refer to its log
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BackboneError(f"cannot load {checkpoint.path}: {error}") from error
        mismatched = [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]
        unfilled = sorted([*loading["missing_keys"], *mismatched])
        if unfilled:  # transformers would leave these at random values with a warning
            raise BackboneError(
                f"{checkpoint.path} leaves {len(unfilled)} tensors unfilled, such as {unfilled[0]}: "
                "it does not belong to this architecture"
            )
        if device.type == "cpu":
            keep_freed_memory()
        backbone = cls(vit.to(device))
        if can_pack(backbone.device, backbone.dtype):
            for layer in backbone.layers:
                pack(layer, vit.config.hidden_act)
        return backbone

    @classmethod
    def outline(cls, checkpoint: Checkpoint) -> Self:
        """The architecture alone, on torch's meta device: to count parameters without reading or holding any."""
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        with torch.device("meta"):
            return cls(AutoModel.from_config(config, attn_implementation=SDPA))

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, wherever this release of transformers keeps them."""
        for owner in (getattr(self.vit, "model", None), self.vit):
            layers = getattr(owner, "layer", None)
            if isinstance(layers, nn.ModuleList):
                return layers
        raise BackboneError("cannot find the transformer layers in this release of transformers: see constraints.txt")

    @property
    def first_patch(self) -> int:
        """Where the patch tokens begin: after CLS and the registers."""
        return 1 + int(self.vit.config.num_register_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen part, in which pixel values are expected."""
        dtype: torch.dtype = self.vit.embeddings.patch_embeddings.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vit.embeddings.patch_embeddings.weight.device
        return device

    def forward(self, pixel_values: Tensor, pooling: Sequence[str] = POOLING) -> dict[str, Tensor]:
        """Pooled embeddings of (B, 3, S, S) pixel values: per name in `pooling` (B, D) float32."""
        with torch.no_grad():
            hidden = self.run_prefix(pixel_values)
        return self.run_suffix(hidden, pooling)

    def run_prefix(self, pixel_values: Tensor) -> Tensor:
        """Tokens (B, T, D) that enter the first trained layer, in the frozen part's dtype."""
        # One memory layout, whatever path the pixels came by: another takes another convolution, and rounds otherwise.
        pixel_values = pixel_values.to(self.dtype, memory_format=torch.contiguous_format)
        with torch.autocast(pixel_values.device.type, enabled=False):
            hidden: Tensor = self.vit.embeddings(pixel_values)
            rope = self.vit.rope_embeddings(pixel_values)
            for layer in self.layers[: len(self.layers) - self.trained_layers]:
                hidden = layer(hidden, position_embeddings=rope)
        return hidden

    def run_one_layer(self, pixel_values: Tensor) -> Tensor:
        """Tokens (B, T, D) after the first layer alone."""
        hidden: Tensor = self.vit.embeddings(pixel_values)
        rope = self.vit.rope_embeddings(pixel_values)
        return self.layers[0](hidden, position_embeddings=rope)  # type: ignore[no-any-return]

    def run_suffix(self, hidden: Tensor, pooling: Sequence[str] = POOLING) -> dict[str, Tensor]:
        """From the prefix's tokens (B, T, D) to pooled embeddings, as `forward`; carries gradients where layers are
        trained."""
        keep = 1 if set(pooling) == {"cls"} else None
        if self.trained_layers:
            hidden = hidden.float()
            # Position embeddings depend on the size of the tiles alone; they are square, so the tokens tell it.
            side = math.isqrt(hidden.shape[1] - self.first_patch) * self.vit.config.patch_size
            rope = self.vit.rope_embeddings(hidden.new_empty(1, 3, side, side))
            *layers, last = self.trained
            runs: list[Callable[..., Tensor]] = [*layers, partial(last, keep=keep)]
            for run in runs:
                if self.checkpointing and torch.is_grad_enabled():
                    hidden = recompute(run, hidden, position_embeddings=rope, use_reentrant=False)
                else:
                    hidden = run(hidden, position_embeddings=rope)
        return self._pool(hidden[:, :keep], pooling)

    @property
    def trained(self) -> nn.ModuleList:
        """The unfrozen layers, in their order."""
        return self.layers[len(self.layers) - self.trained_layers :]

    def _pool(self, hidden: Tensor, pooling: Sequence[str]) -> dict[str, Tensor]:
        """Final norm and means in float32, whatever came before. Tokens are CLS, the registers, then the patches."""
        norm = self.vit.norm
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = layer_norm(hidden.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
            pools: dict[str, Callable[[], Tensor]] = {
                "cls": lambda: tokens[:, 0],
                "patch_mean": lambda: tokens[:, self.first_patch :].mean(dim=1),
            }
            return {name: pools[name]() for name in pooling}

    def unpack(self) -> None:
        """Make every layer a plain one again, with weights that have names: what is saved or traced must be."""
        for layer in self.layers:
            unpack(layer)

    def unfreeze_last(self, layers: int, *, checkpointing: bool = False) -> list[str]:
        """Make the last `layers` transformer layers and the final norm trainable, as float32 master weights.

        Args:
            layers: how many.
            checkpointing: keep each trained layer's input only, and compute the rest again in the backward pass
                (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

        Returns:
            Names of the tensors that will train.

        Raises:
            BackboneError: more layers than there are, fewer than one, or a checkpoint in which none is trainable.
        """
        if not 1 <= layers <= len(self.layers):
            raise BackboneError(
                f"UNFREEZE={layers}: this backbone has {len(self.layers)} layers: choose 1 to that many"
            )
        self.trained_layers, self.checkpointing = layers, checkpointing
        for layer in self.trained:
            unpack(layer)
        let_keep_first(self.trained[-1])
        for module in (*self.trained, self.vit.norm):
            module.float().requires_grad_(True)
        names = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        if not names:
            raise BackboneError(f"asked to train {layers} layers, but no tensor of them can be trained")
        return names

    def train(self, mode: bool = True) -> Self:
        super().train(False)
        for layer in self.trained:
            layer.train(mode)
        return self


def _find_local(name: str) -> Path | None:
    """The directory of a checkpoint that need not come from the hub."""
    if name == "demo":
        return Path(str(resources.files("extract.demo").joinpath("backbone")))
    local = Path(name)
    if (local / "config.json").is_file():
        return local
    if local.is_dir() or name.startswith((".", "/")) or (name.count("/") != 1 and name not in _HUB_IDS):
        raise no_checkpoint(name)
    return None


def _name_on_hub(name: str) -> str:
    return _HUB_IDS.get(name, name)


def _weight_files(path: Path) -> list[Path]:
    """By the names transformers loads them by: other tensors may lie beside them, such as an export's head."""
    return sorted(path.glob("model*.safetensors"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BackboneError(
            f"{path} is missing: copy the checkpoint's configuration files beside its weights"
        ) from error
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} cannot be read ({error}): save the checkpoint again") from error
    if not isinstance(value, dict):
        raise BackboneError(f"{path} is not a JSON object: save the checkpoint again")
    return value
