"""DINOv3: find the checkpoint, load it frozen, run it, pool its tokens, unfreeze its last layers.

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
    """A DINOv3 ViT that gives pooled embeddings; frozen, except for the last layers once they are unfrozen.

    Frozen parts stay in eval() whatever `train()` says: in training mode DINOv3 jitters its position embeddings, so
    even frozen features would be random.
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
        """The transformer layers."""
        return self._family.find_layers(self.vit)

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        norm: nn.Module = self.vit.norm
        return norm

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen part, in which pixel values are expected."""
        dtype: torch.dtype = self.vit.embeddings.patch_embeddings.weight.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.vit.embeddings.patch_embeddings.weight.device
        return device

    def forward(self, pixel_values: Tensor, pooling: Sequence[str] = DEFAULT_POOLING) -> dict[str, Tensor]:
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

    def run_suffix(self, hidden: Tensor, pooling: Sequence[str] = DEFAULT_POOLING) -> dict[str, Tensor]:
        """From the prefix's tokens (B, T, D) to pooled embeddings, as `forward`; carries gradients where layers are
        trained."""
        keep = count_tokens_read(pooling)
        if self.trained_layers:
            hidden = hidden.float()
            # Position embeddings depend on the size of the tiles alone; they are square, so the tokens tell it.
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
        """Final norm and means in float32, whatever came before. Tokens are CLS, the registers, then the patches."""
        norm = self.vit.norm
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = layer_norm(hidden.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
            return pool_tokens(tokens, pooling, self.first_patch)

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
    """A transformer layer of transformers' `DINOv3ViTModel`, whose class comes behind this one."""

    def forward(self: Any, hidden: Tensor, *, keep: int | None = None, **options: Any) -> Tensor:
        """(B, T, D) to (B, T, D), or to its first `keep` tokens, (B, keep, D).

        Keys and values are still those of all tokens. Of vitl16 at 224 with three layers trained, a training step took
        0.94 of the time so.
        """
        if keep is None:
            return super().forward(hidden, **options)  # type: ignore[misc, no-any-return]
        attended, _ = self.attention(self.norm1(hidden), **options)
        hidden = self.drop_path(self.layer_scale1(attended[:, :keep])) + hidden[:, :keep]
        outputs: Tensor = self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden)))) + hidden
        return outputs


def let_keep_first(layer: Any) -> None:
    """Let a layer of transformers' `DINOv3ViTModel` be called with `keep`, see `_KeepsFirst`; in place.

    Called otherwise, it computes what it did. It stays the module it was, so hooks, such as those of FSDP, still run.
    """
    kind = type(layer)
    if not issubclass(kind, _KeepsFirst):
        layer.__class__ = type(kind.__name__, (_KeepsFirst, kind), {})
