"""Train many heads of one shape as one: stacked parameters, and one matrix product for the layer that sees the inputs.

Every member trains exactly as it would alone: on the same batches, with its own loss, rate and decay, and with the same
dropout. Dropout draws depend on seed and epoch only, so one mask serves all members.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from train.config import TrainConfig
from train.model.classifier import Head


class StackedHeads:
    """M heads of one shape.

    Attributes:
        tensors: the tensors of a head's `state_dict`, each with a first dimension of M.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, inputs: Tensor, mask: Tensor | None = None, *, amp: bool = False) -> Tensor:
        """Compute the logits of all members for the same inputs.

        Args:
            inputs: (B, D) float32.
            mask: (B, H), multiplies the hidden layer of every member (dropout); None outside training.
            amp: autocast to bf16; leave it off when scoring, since bf16 logits tie.

        Returns:
            (M, B, C).
        """
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            weight, bias, *second = self.tensors.values()
            first: Tensor = functional.linear(inputs, weight.flatten(0, 1), bias.flatten())
            first = first.unflatten(1, (len(weight), -1))
            if not second:
                return first.transpose(0, 1)
            hidden = first.relu()
            if mask is not None:
                hidden = hidden * mask[:, None]
            weight, bias = second
            logits: Tensor = torch.baddbmm(bias[:, None], hidden.transpose(0, 1), weight.transpose(1, 2))
            return logits


class Stack:
    """M configurations of one shape and seed with their optimiser; they differ in loss, rate and decay only.

    Attributes:
        features, hidden: shared by all members; `hidden` is 0 for linear heads.
        heads: the current parameters.

    Args:
        configs: the members, grouped by loss.
        head: initial parameters of every member.
        amp: autocast to bf16 in training.
    """

    def __init__(self, configs: Sequence[TrainConfig], head: Head, device: torch.device, *, amp: bool) -> None:
        self.configs = tuple(configs)
        self.features, self.hidden = configs[0].features, configs[0].hidden_width
        copies = len(configs)
        stacked = {
            name: tensor.to(device).repeat(copies, *[1] * tensor.dim()).requires_grad_()
            for name, tensor in head.state_dict().items()
        }
        self.heads = StackedHeads(stacked)
        self._amp = amp
        self._losses = [(loss, len(list(group))) for loss, group in groupby(configs, TrainConfig.make_loss)]
        # The optimiser sees each member's slices as separate tensors.
        self._slices = {name: tensor.detach().unbind() for name, tensor in stacked.items()}
        self._optimizer = _make_optimizer(configs, list(zip(*self._slices.values(), strict=True)))

    def train_step(self, inputs: Tensor, labels: Tensor, mask: Tensor | None, scale: float) -> None:
        """Train every member for one step.

        Args:
            inputs: (B, D) float32.
            labels: (B, C) bool.
            mask: (B, H), see `StackedHeads`.
            scale: multiplies every member's learning rate.
        """
        logits = self.heads(inputs, mask if self.hidden else None, amp=self._amp)
        parts = logits.split([members for _, members in self._losses])
        summed = [loss(part, labels.expand_as(part)).sum() for (loss, _), part in zip(self._losses, parts, strict=True)]
        (torch.stack(summed).sum() / labels.numel()).backward()
        for name, tensor in self.heads.tensors.items():
            assert tensor.grad is not None
            for part, grad in zip(self._slices[name], tensor.grad.unbind(), strict=True):
                part.grad = grad
            tensor.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        self._optimizer.step()


def _make_optimizer(configs: Sequence[TrainConfig], members: Sequence[tuple[Tensor, ...]]) -> torch.optim.AdamW:
    """Make a fused AdamW; members with the same rate and decay share a parameter group, and so a kernel."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for config, tensors in zip(configs, members, strict=True):
        groups.setdefault((config.lr, config.weight_decay), []).extend(tensors)
    return torch.optim.AdamW(
        [{"params": tensors, "peak_lr": lr, "weight_decay": decay} for (lr, decay), tensors in groups.items()],
        fused=True,
    )
