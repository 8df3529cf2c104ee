"""Shard what training changes over the ranks (FSDP2), and convert whole tensors to shards and back.

Each rank holds a part of every trained layer, of its gradient and of AdamW's moments; a layer is whole on a rank only
while it computes. Frozen layers stay whole on every rank. Files are independent of this: rank 0 reads and writes whole
tensors, so a run may resume on another number of ranks, with or without shards.

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel".
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from extract.ranks.group import Ranks
from train.errors import CheckpointError

from .classifier import Classifier


def shard_trained(classifier: Classifier, ranks: Ranks) -> None:
    """Shard the trained part in place: each layer is a group, gathered and released together; final norm and head form
    another.

    From then on all ranks must call the classifier equally often, even without rows, in training and in evaluation.
    """
    assert classifier.backbone is not None
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for layer in classifier.backbone.trained:
        fully_shard(layer, mesh=mesh)
    frozen = {parameter for parameter in classifier.parameters() if not parameter.requires_grad}
    # Release the last group after each forward pass, too: in between, only shards are read and written.
    fully_shard(classifier, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)


def describe_shards(ranks: Ranks) -> str:
    """Return a line for the user."""
    if ranks.world_size == 1:
        return "--shard: one rank holds every layer whole: NPROC=2 or more would share them out"
    return (
        f"--shard: each of {ranks.world_size} ranks holds its part of trained layers, gradients and AdamW's moments, "
        "and the frozen layers whole"
    )


def is_sharded(classifier: Classifier) -> bool:
    return isinstance(classifier, FSDPModule)


def gather_tensors(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Gather sharded tensors on the CPU of rank 0 only; return others as they are. Every rank must call this."""
    found = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor
            continue
        whole = tensor.full_tensor()
        if ranks.is_main:
            found[name] = whole.cpu()
    return found


def gather_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """Return the `state_dict()` of an optimiser, its tensors gathered as by `gather_tensors`."""
    state = optimizer.state_dict()
    return {**state, "state": {number: gather_tensors(held, ranks) for number, held in state["state"].items()}}


def send(tensor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    """Send a tensor from rank 0; return this rank's shard if `like` is sharded, else a copy on the device of `like`.

    All ranks must call this; on the others only shape and dtype of `tensor` matter.
    """
    held = tensor.to(like.device) if ranks.is_main else torch.empty_like(tensor, device=like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(held, like.device_mesh, like.placements)
    dist.broadcast(held, 0)
    return held


def send_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Load the `state_dict()` of an optimiser from rank 0 on all ranks; moments are sharded as their parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sent = {}
    for number, held in state["state"].items():
        parameter = parameters[number]
        step = torch.empty((), device=parameter.device)
        sent[number] = {
            name: send(tensor, parameter if tensor.shape == parameter.shape else step, ranks)
            for name, tensor in held.items()
        }
    optimizer.load_state_dict({**state, "state": sent})


def load_tensors(classifier: Classifier, tensors: Mapping[str, torch.Tensor], ranks: Ranks | None = None) -> None:
    """Copy the tensors of a checkpoint into a classifier, whole or sharded.

    `ranks` are given if only rank 0 has the tensors, and the others their outlines.

    Raises:
        CheckpointError: the classifier has no tensor of such a name and shape.
    """
    state = classifier.state_dict()
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name} {tuple(tensor.shape)} does not fit this model: the checkpoint belongs to another one"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(send(tensor, state[name], ranks) if ranks else tensor)
