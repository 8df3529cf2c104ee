"""DINOv3: load a checkpoint frozen, run it, pool its tokens, unfreeze its last layers.

Source: Siméoni et al. 2025, "DINOv3"; the model code is transformers' `DINOv3ViTModel`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint as recompute

from extract.errors import BackboneError

from .checkpoint import Checkpoint
from .family import find_family
from .onednn import SDPA, can_pack, keep_freed_memory, pack, unpack
from .pooling import DEFAULT_POOLING, count_tokens_read, pool_tokens
from .precision import DTYPES, Precision


class Backbone(nn.Module):
    """A DINOv3 ViT that computes pooled embeddings; frozen, except for the last layers once they are unfrozen.

    Frozen parts stay in eval() whatever `train()` is told: in training mode DINOv3 jitters its position embeddings, so
    even frozen features would be random.

    Attributes:
        first_patch: index of the first patch token.
        trained_layers: number of unfrozen layers.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        config = vit.config.to_dict()
        self._family = find_family("the model", config["model_type"])
        self.first_patch = self._family.find_first_patch(config)
        self._patch_size = int(config[self._family.patch_size])
        self.trained_layers = 0
        self.checkpointing = False
        vit.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, precision: Precision, device: torch.device) -> Self:
        """Load weights in `precision` onto `device`; pack the layers where that is faster, see `onednn`.

        Raises:
            BackboneError: the weights are damaged or do not fill the architecture.
        """
        from safetensors import SafetensorError
        from transformers import AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            # Set the dtype here, not by .to(dtype) afterwards, which would also round the RoPE frequencies.
            vit, loading = AutoModel.from_pretrained(
                checkpoint.path,
                dtype=DTYPES[precision],
                attn_implementation=SDPA,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the error below names the tensor; the library's refers to its log
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BackboneError(f"cannot load {checkpoint.path}: {error}") from error
        mismatched = [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]
        unfilled = sorted([*loading["missing_keys"], *mismatched])
        if unfilled:  # transformers leaves these at random values, with a warning
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
        """Make the architecture without weights, on torch's meta device, to count parameters."""
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        with torch.device("meta"):
            return cls(AutoModel.from_config(config, attn_implementation=SDPA))

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers."""
        return self._family.find_layers(self.vit)

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        norm: nn.Module = self.vit.norm
        return norm

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen part and of its pixel values."""
        dtype: torch.dtype = self.vit.embeddings.patch_embeddings.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vit.embeddings.patch_embeddings.weight.device
        return device

    def forward(self, pixel_values: Tensor, pooling: Sequence[str] = DEFAULT_POOLING) -> dict[str, Tensor]:
        """Embed (B, 3, S, S) pixel values: (B, D) float32 for each name in `pooling`."""
        with torch.no_grad():
            hidden = self.run_prefix(pixel_values)
        return self.run_suffix(hidden, pooling)

    def run_prefix(self, pixel_values: Tensor, layers: int | None = None) -> Tensor:
        """Return the tokens (B, T, D) that enter the first trained layer, in the dtype of the frozen part.

        Args:
            pixel_values: (B, 3, S, S).
            layers: how many of the frozen layers to run; None for all.
        """
        # Always the same memory layout: another selects another convolution, which rounds differently.
        pixel_values = pixel_values.to(self.dtype, memory_format=torch.contiguous_format)
        with torch.autocast(pixel_values.device.type, enabled=False):
            hidden: Tensor = self.vit.embeddings(pixel_values)
            rope = self.vit.rope_embeddings(pixel_values)
            for layer in self.layers[: len(self.layers) - self.trained_layers][:layers]:
                hidden = layer(hidden, position_embeddings=rope)
        return hidden

    def run_suffix(self, hidden: Tensor, pooling: Sequence[str] = DEFAULT_POOLING) -> dict[str, Tensor]:
        """Turn the tokens (B, T, D) of `run_prefix` into pooled embeddings, with gradients if layers are trained."""
        keep = count_tokens_read(pooling)
        if self.trained_layers:
            hidden = hidden.float()
            # Position embeddings depend only on the size of the tiles, which are square: the tokens give it.
            side = math.isqrt(hidden.shape[1] - self.first_patch) * self._patch_size
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

    def list_trained(self) -> list[nn.Module]:
        """Return the modules that train: the unfrozen layers and the final norm; none while all is frozen."""
        return [*self.trained, self.norm] if self.trained_layers else []

    def save(self, directory: Path) -> None:
        """Write config.json and the weights, as transformers reads them. The layers must be unpacked."""
        self.vit.save_pretrained(directory)

    def _pool(self, hidden: Tensor, pooling: Sequence[str]) -> dict[str, Tensor]:
        """Apply the final norm and pool, in float32 whatever the dtype of the layers."""
        norm = self.vit.norm
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = layer_norm(hidden.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
            return pool_tokens(tokens, pooling, self.first_patch)

    def unpack(self) -> None:
        """Undo packing: the weights have names again, which saving and tracing need."""
        for layer in self.layers:
            unpack(layer)

    def unfreeze_last(self, layers: int, *, checkpointing: bool = False) -> list[str]:
        """Make the last `layers` transformer layers and the final norm trainable, as float32 master weights.

        Args:
            checkpointing: keep only the input of each trained layer, and compute the rest again in the backward pass
                (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

        Returns:
            names of the tensors that will train.

        Raises:
            BackboneError: fewer than one layer or more than there are, or no tensor in them is trainable.
        """
        if not 1 <= layers <= len(self.layers):
            raise BackboneError(
                f"UNFREEZE={layers}: this backbone has {len(self.layers)} layers: choose 1 to that many"
            )
        self.trained_layers, self.checkpointing = layers, checkpointing
        for layer in self.trained:
            unpack(layer)
        _enable_keeping_first(self.trained[-1])
        for module in self.list_trained():
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


class _KeepsFirst:
    """Mixed in before the class of a layer of transformers' `DINOv3ViTModel`."""

    def forward(self: Any, hidden: Tensor, *, keep: int | None = None, **options: Any) -> Tensor:
        """Turn (B, T, D) into (B, T, D), or only into its first `keep` tokens, (B, keep, D).

        Keys and values still come from all tokens. With vitl16 at 224 px and three trained layers, a training step took
        0.94 of the time.
        """
        if keep is None:
            return super().forward(hidden, **options)  # type: ignore[misc, no-any-return]
        attended, _ = self.attention(self.norm1(hidden), **options)
        hidden = self.drop_path(self.layer_scale1(attended[:, :keep])) + hidden[:, :keep]
        outputs: Tensor = self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden)))) + hidden
        return outputs


def _enable_keeping_first(layer: Any) -> None:
    """Add the argument `keep` to a layer of transformers' `DINOv3ViTModel`, in place; see `_KeepsFirst`.

    Without it the layer computes what it did. It stays the same module, so hooks, such as those of FSDP, still run.
    """
    kind = type(layer)
    if not issubclass(kind, _KeepsFirst):
        layer.__class__ = type(kind.__name__, (_KeepsFirst, kind), {})
