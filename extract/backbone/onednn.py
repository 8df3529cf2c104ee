"""Frozen layers on an x86 CPU: all their products by oneDNN, and laid out as it reads them.

A plain `Linear` in bf16 lays its weight out anew at every call, and what follows it goes over the memory once more.
Packed, a product gives the same bits; an activation is applied to it before it is rounded to bf16, and not after. In
float32, and in its attention, PyTorch multiplies by MKL, which leaves an AMD CPU half idle.
"""

import copy
import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SDPA, ONEDNN = "sdpa", "onednn"
"""PyTorch's attention and `attend`: their names in a model's configuration and in what a cache records."""

_FUSED = {"gelu": ("gelu", "none"), "silu": ("swish", "")}
"""By their names in a configuration the activations that oneDNN applies, as it calls them, and their variant."""

_BEFORE_ACTIVATION = ("gate_proj", "up_proj")
"""The product whose result is activated: the first of these that a layer's MLP has."""

_SCORES = 2 << 20
"""Bytes of scores a thread computes before it goes on with them: what its cache holds."""


class PackedLinear(nn.Module):
    """What `linear` gives in inference, followed by an activation; there are no gradients and no `state_dict()`.

    Args:
        linear: bf16 or float32 on the CPU.
        activation: by its name in a configuration; None applies none.
    """

    def __init__(self, linear: nn.Linear, activation: str | None = None) -> None:
        super().__init__()
        self.train(linear.training)
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation, self._variant = _FUSED[activation] if activation else ("none", "")

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in) to (…, out), both in the dtype of the weight."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._weight, self._bias, self._activation, [], self._variant
        )
        return outputs

    def unpack(self) -> nn.Linear:
        """The plain layer again, with the bits it had."""
        weight = self._weight.to_dense()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self._bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self._bias is not None:
            linear.bias = nn.Parameter(self._bias, requires_grad=False)
        return linear.train(self.training)


class _Applied(nn.Module):
    """In place of an activation that the product before it has applied already."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.train(activation.training)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention (Vaswani et al. 2017, "Attention Is All You Need") as transformers calls for it.

    Scores and their softmax are float32; the weights are rounded to bf16 for the second product.

    Args:
        module: the layer's attention; not used.
        query, key, value: (B, H, T, D), bf16.
        attention_mask: none.
        scaling: what scores are multiplied by.

    Returns:
        (B, T, H, D) in bf16, and no weights.
    """
    batch, heads, tokens, width = query.shape
    queries, keys, values = (part.reshape(batch * heads, tokens, width) for part in (query, key, value))
    outputs = torch.empty_like(queries)
    at_once = max(1, torch.get_num_threads() * _SCORES // (4 * tokens * tokens))
    with _float32_by_onednn():
        for start in range(0, batch * heads, at_once):
            part = slice(start, start + at_once)
            left, right = queries[part].float(), keys[part].float().transpose(1, 2)
            scores = torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
            weights = torch.softmax(scores, dim=-1, out=scores).bfloat16()
            torch.bmm(weights, values[part], out=outputs[part])
    return outputs.view(batch, heads, tokens, width).transpose(1, 2), None


@contextmanager
def _float32_by_onednn() -> Iterator[None]:
    """Let oneDNN compute float32 products, which PyTorch allows if it may round their factors to bf16, as these are.

    For bf16 factors and a float32 result there is nothing else but MKL, which takes twice as long on an AMD CPU.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype there, on x86-64: nothing else was tried. What cannot stays as it is."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def choose_attention(device: torch.device, dtype: torch.dtype) -> str:
    """By the name that transformers calls it the attention of frozen layers in this dtype.

    PyTorch's own where AMX multiplies, for which it is made: `attend` was not tried there.
    """
    if dtype != torch.bfloat16 or not can_pack(device, dtype):
        return SDPA
    return SDPA if torch.cpu.get_capabilities().get("amx_bf16") else ONEDNN


def pack(layer: nn.Module, activation: str) -> None:
    """Pack all products of a transformer layer, in place.

    Args:
        layer: of transformers' `DINOv3ViTModel`.
        activation: the name of its activation in the configuration; one that oneDNN lacks stays a step of its own.
    """
    weight: Tensor = next(layer.parameters())
    _set_attention(layer, choose_attention(weight.device, weight.dtype))
    for module in list(layer.modules()):
        children = dict(module.named_children())
        activated = None
        if "act_fn" in children and activation in _FUSED:
            activated = next(name for name in _BEFORE_ACTIVATION if name in children)
            module.act_fn = _Applied(children["act_fn"])
        for name, child in children.items():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, activation if name == activated else None))


def _set_attention(layer: Any, name: str) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ONEDNN, attend)
    layer.attention.config = copy.copy(layer.attention.config)  # which all layers share
    layer.attention.config._attn_implementation = name


def unpack(layer: nn.Module) -> None:
    """Undo `pack`, in place."""
    _set_attention(layer, SDPA)
    for module in list(layer.modules()):
        for name, child in module.named_children():
            plain: Any = None
            if isinstance(child, PackedLinear):
                plain = child.unpack()
            elif isinstance(child, _Applied):
                plain = child.activation
            if plain is not None:
                setattr(module, name, plain)


_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""As mallopt(3) numbers them."""

_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for what is next asked for, up to 1 GiB; nothing where it is not glibc's.

    By itself it maps what is over 32 MiB anew each time, as the widest activations of a batch are: on a virtual machine
    whose fresh pages took 4 us each that was a tenth of a forward pass. A process grows by a few such activations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # An older glibc refuses such a threshold. Asked for the second alone, it would no longer adapt the first.
    if mallopt and mallopt(_M_MMAP_THRESHOLD, _KEPT):
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
