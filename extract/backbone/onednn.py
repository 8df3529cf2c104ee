"""Run frozen layers on an x86 CPU with oneDNN, with weights packed in the layout that it reads.

A plain `Linear` in bf16 repacks its weight at every call, and the activation after it passes over the memory once more.
A packed product gives the same bits; its activation is applied before rounding to bf16, not after. For float32, and for
attention, PyTorch uses MKL, which leaves an AMD CPU half idle.
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
"""Names of PyTorch's attention and of `attend`, in the configuration of a model and in what a cache records."""

_FUSED = {"gelu": ("gelu", "none"), "silu": ("swish", "")}
"""Activations that oneDNN applies: name in a configuration -> its name and variant in oneDNN."""

_BEFORE_ACTIVATION = ("gate_proj", "up_proj")
"""The activation follows the first of these products that the MLP of a layer has."""

_SCORES = 2 << 20
"""Bytes of attention scores that a thread computes at a time: they fit in its CPU cache."""


class PackedLinear(nn.Module):
    """Computes `linear` and an activation in inference; it has no gradients and no `state_dict()`.

    Args:
        linear: bf16 or float32, on the CPU.
        activation: its name in a configuration; None for no activation.
    """

    def __init__(self, linear: nn.Linear, activation: str | None = None) -> None:
        super().__init__()
        self.train(linear.training)
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation, self._variant = _FUSED[activation] if activation else ("none", "")

    def forward(self, inputs: Tensor) -> Tensor:
        """Turn (…, in) into (…, out), both in the dtype of the weight."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._weight, self._bias, self._activation, [], self._variant
        )
        return outputs

    def unpack(self) -> nn.Linear:
        """Return the plain layer, bit for bit."""
        weight = self._weight.to_dense()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self._bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self._bias is not None:
            linear.bias = nn.Parameter(self._bias, requires_grad=False)
        return linear.train(self.training)


class _Applied(nn.Module):
    """Replaces an activation that the packed product before it has applied."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.train(activation.training)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden

    def unpack(self) -> nn.Module:
        return self.activation


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it (Vaswani et al. 2017, "Attention Is All You Need").

    Scores and softmax are float32; the weights are rounded to bf16 for the second product.

    Args:
        module: the layer's attention; unused.
        query, key, value: (B, H, T, D), bf16.
        attention_mask: None.
        scaling: factor on the scores.

    Returns:
        (B, T, H, D) in bf16, and None for the weights.
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
    """Let oneDNN compute float32 products. PyTorch allows that if it may round their factors to bf16; these are bf16.

    The only other way from bf16 factors to a float32 result is MKL, which takes twice as long on an AMD CPU.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN can pack this dtype on this device; only x86-64 was tried."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def choose_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name, in transformers, of the attention to use in frozen layers of this dtype.

    With AMX it is PyTorch's own, which is made for AMX; `attend` was not tried there.
    """
    if dtype != torch.bfloat16 or not can_pack(device, dtype):
        return SDPA
    return SDPA if torch.cpu.get_capabilities().get("amx_bf16") else ONEDNN


def pack(layer: nn.Module, activation: str) -> None:
    """Pack all products of a transformer layer, in place.

    Args:
        layer: of transformers' `DINOv3ViTModel`.
        activation: its name in the configuration; an activation that oneDNN lacks stays a separate step.
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
    layer.attention.config = copy.copy(layer.attention.config)  # a copy: all layers share the configuration
    layer.attention.config._attn_implementation = name


def unpack(layer: nn.Module) -> None:
    """Undo `pack`, in place."""
    _set_attention(layer, SDPA)
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if isinstance(child, PackedLinear | _Applied):
                setattr(module, name, child.unpack())


_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""As mallopt(3) numbers them."""

_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Make glibc's malloc reuse freed memory of up to 1 GiB; with another malloc, do nothing.

    By default it maps every allocation above 32 MiB again, such as the widest activations of a batch: on a virtual
    machine where a new page took 4 us, that was a tenth of a forward pass. The process grows by a few activations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # An older glibc refuses such a threshold. Setting only the second one would stop glibc from adapting the first.
    if mallopt and mallopt(_M_MMAP_THRESHOLD, _KEPT):
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
