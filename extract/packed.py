"""Frozen layers on a CPU that multiplies bf16: a weight lies as oneDNN reads it, and an activation joins the product.

A plain `Linear` lays its weight out anew at every call, and what follows it goes over the memory once more. Packed, a
product gives the same bits; an activation is applied to it before it is rounded to bf16, and not after.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn

_FUSED = {"gelu": ("gelu", "none"), "silu": ("swish", "")}
"""By their names in a configuration the activations that oneDNN applies, as it calls them, and their variant."""
_BEFORE_ACTIVATION = ("gate_proj", "up_proj")
"""The product whose result is activated: the first of these that a layer's MLP has."""


class PackedLinear(nn.Module):
    """What `linear` gives in inference, followed by an activation; there are no gradients and no `state_dict()`.

    Args:
        linear: bf16 on the CPU.
        activation: by its name in a configuration; None applies none.
    """

    def __init__(self, linear: nn.Linear, activation: str | None = None) -> None:
        super().__init__()
        self.train(linear.training)
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation, self._variant = _FUSED[activation] if activation else ("none", "")

    def forward(self, inputs: Tensor) -> Tensor:
        """(…, in) to (…, out), both bf16."""
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


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies bf16 there, on x86-64: nothing else was tried. Elsewhere layers stay as they are."""
    if device.type != "cpu" or dtype != torch.bfloat16 or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(layer: nn.Module, activation: str) -> None:
    """Pack all products of a transformer layer, in place.

    Args:
        layer: of transformers' `DINOv3ViTModel`.
        activation: the name of its activation in the configuration; one that oneDNN lacks stays a step of its own.
    """
    for module in list(layer.modules()):
        children = dict(module.named_children())
        activated = None
        if "act_fn" in children and activation in _FUSED:
            activated = next(name for name in _BEFORE_ACTIVATION if name in children)
            module.act_fn = _Applied(children["act_fn"])
        for name, child in children.items():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, activation if name == activated else None))


def unpack(layer: nn.Module) -> None:
    """Undo `pack`, in place."""
    for module in list(layer.modules()):
        for name, child in module.named_children():
            plain: Any = None
            if isinstance(child, PackedLinear):
                plain = child.unpack()
            elif isinstance(child, _Applied):
                plain = child.activation
            if plain is not None:
                setattr(module, name, plain)
