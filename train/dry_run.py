"""`train finetune --dry-run`: print what would train, on which rows and in how much memory, and write nothing."""

import math
from dataclasses import replace
from typing import Any

import torch

from cache_schema import Status, Version
from cache_schema.cli.text import format_bytes
from extract.backbone.checkpoint import Checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.pooling import count_tokens_read
from extract.backbone.precision import DTYPES
from extract.backbone.provenance import find_cached_checkpoint
from extract.ranks.group import Ranks, join_ranks
from extract.ranks.same_job import Asked
from train.data.batches import count_epoch
from train.data.memory import choose_budget
from train.data.sets import Sets, read_sets
from train.loop.assemble import make_head, make_meta
from train.loop.schedule import choose_batch_size
from train.loop.step import use_amp
from train.loop.step_zero import choose_block
from train.model.shards import describe_shards

from .begin import check_run, resolve_config
from .config import TrainConfig
from .errors import TrainError

_KEPT = {"float32": 76, "autocast": 46, "checkpointed": 4}
"""Bytes kept for the backward pass per token, layer and unit of width, counted by autograd hooks on 256- to 1024-wide
layers of this architecture (torch 2.13); a test counts them again."""
_KEPT_FOR_CLS = {"float32": 32, "autocast": 22}
"""The same for a last layer that computes CLS only."""
_TRAINED = 16
"""Bytes per trained parameter: itself, its gradient, and the two moments of AdamW. With shards, one layer takes this
again: while it computes, it, its gradient, the gradient in transfer and the next layer are held whole."""


def describe_training(config: TrainConfig) -> dict[str, Any] | None:
    """Print what `run_training` would do with this configuration.

    Returns:
        the same as JSON values on the main rank; None on the others.

    Raises:
        TileprobeError: the run would end before its first step; step 0 itself is not run.
    """
    if config.resume:
        raise TrainError("--dry-run describes a new run, and a resumed run has its own settings: leave --resume out")
    if not config.unfreeze:
        raise TrainError("UNFREEZE=0 trains the head alone, in seconds: --dry-run is for UNFREEZE=1 or more")
    with join_ranks(config.device, Asked.of("train finetune --dry-run", config)) as ranks:
        lines, values = ranks.run_on_main(lambda: _describe(config, ranks))
    if not ranks.is_main:
        return None
    print("\n".join(lines), flush=True)
    return values


def _describe(config: TrainConfig, ranks: Ranks) -> tuple[list[str], dict[str, Any]]:
    config, head, notes = resolve_config(config)
    budget = config.memory_budget or choose_budget(ranks.device, ranks.local_world_size)
    # The other ranks wait.
    sets = read_sets(replace(config, memory_budget=budget), Ranks.alone(ranks.device))
    config = replace(config, batch_size=choose_batch_size(len(sets.train.rows), config.batch_size))
    room = check_run(config, head, sets)
    steps = math.ceil(count_epoch(sets.train.rows, config.seed, 0) / config.batch_size)
    sizes = {"train": len(sets.train.rows), "val": len(sets.val.rows), "test": len(sets.test.rows) if sets.test else 0}
    values: dict[str, Any] = {
        "dry_run": True,
        "cache": config.cache,
        "version": sets.train.version.id,
        "head_run": config.head_run,
        "split": sizes,
        "batch_size": config.batch_size,
        "steps_per_epoch": steps,
        "epochs": config.epochs,
        **_describe_model(config, sets, ranks),
    }
    training, memory = values["training"], values["memory"]
    step_zero = values["step_zero"]
    lines = [
        *sets.notes,
        *notes,
        *room,
        *([describe_shards(ranks)] if config.shard else ()),
        f"would train {training['tensors']:,} tensors ({training['parameters']:,} parameters): the last "
        f"{config.unfreeze} layers, the final norm and the head",
        f"{sizes['train']:,} tiles train, {sizes['val']:,} validate, {sizes['test']:,} test: {steps:,} steps an epoch "
        f"of {config.batch_size} tiles, {config.epochs} epochs",
        f"memory of a rank, about {format_bytes(memory['total'])}: {format_bytes(memory['weights'])} of frozen "
        f"weights, {format_bytes(memory['trained'])} for those that train, their gradients and AdamW, "
        f"{format_bytes(memory['activations'])} that {memory['tiles_at_once']} tiles leave for the backward pass",
        "step 0 can run: backbone and tiles match the cache"
        if step_zero
        else "step 0 cannot run: the cache has no embedded row to compare with yet: run `make extract` again",
        "dry run: nothing was written",
    ]
    return lines, values


def _describe_model(config: TrainConfig, sets: Sets, ranks: Ranks) -> dict[str, Any]:
    version = sets.train.version
    checkpoint = find_cached_checkpoint(version)
    backbone = Backbone.outline(checkpoint)
    names = backbone.unfreeze_last(config.unfreeze)
    head = make_head(make_meta(config, sets.train), version.layout.width, config.seed)
    in_head = sum(parameter.numel() for parameter in head.parameters())
    in_layers = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in backbone.parameters()) - in_layers
    block = choose_block(version)
    can_compare = version.committed()[block] and (version.read_block(block).status == Status.EMBEDDED).any()
    return {
        "training": {
            "layers": config.unfreeze,
            "tensors": len(names) + len(list(head.parameters())),
            "parameters": in_layers + in_head,
            "backbone_parameters": in_layers,
            "head_parameters": in_head,
        },
        "memory": _estimate_memory(config, version, checkpoint, ranks, frozen, in_layers, in_head),
        "step_zero": bool(can_compare),
    }


def _estimate_memory(
    config: TrainConfig,
    version: Version,
    checkpoint: Checkpoint,
    ranks: Ranks,
    frozen: int,
    in_layers: int,
    in_head: int,
) -> dict[str, int]:
    """Estimate the bytes of one rank, without those of its libraries, from numbers of parameters."""
    precision: Any = version.provenance.precision
    amp = use_amp(config.amp, ranks.device)
    tiles = math.ceil(math.ceil(config.batch_size / ranks.world_size) / config.accumulate)
    unit = checkpoint.tokens * checkpoint.width * tiles
    arithmetic = "autocast" if amp else "float32"
    layer = unit * _KEPT[arithmetic]
    last = unit * _KEPT_FOR_CLS[arithmetic] if count_tokens_read(config.features.split("+")) == 1 else layer
    kept = (config.unfreeze - 1) * layer + last
    if config.grad_checkpoint:  # and all activations of one layer at a time
        kept = config.unfreeze * unit * _KEPT["checkpointed"] + (layer if config.unfreeze > 1 else last)
    held = trained = in_layers + in_head
    if config.shard and ranks.world_size > 1:
        held = -(-trained // ranks.world_size) + in_layers // config.unfreeze
    copies = trained if amp and not config.grad_checkpoint else 0  # autocast's bf16 copies, kept for the backward pass
    memory = {
        "weights": frozen * DTYPES[precision].itemsize,
        "trained": held * _TRAINED + copies * torch.bfloat16.itemsize,
        "activations": kept,
    }
    return {**memory, "total": sum(memory.values()), "tiles_at_once": tiles}
