"""Make the trainers' command lines from their config, and the command line that gives a config's values."""

import shlex
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import click

from cache_schema.cli.options import make_options, spell_out

from .config import DataConfig, TrainConfig

_FINETUNE_ONLY = (
    *("unfreeze", "backbone_lr", "layer_decay", "accumulate", "views", "jitter", "crop_scale", "head_run", "workers"),
    *("grad_checkpoint", "shard", "cache_prefix", "scratch", "large_prefix"),
)
_NOT_IN_FINETUNE = ("folds", "memory_budget")
_OF_LADDER = (
    *("cache", "val_cache", "test_cache", "backbone", "allow_unsealed", "seed", "device"),
    *(DataConfig.__dataclass_fields__.keys() - {"split_tiles"}),
)
_OF_SWEEP = (*_OF_LADDER, "run", "epochs", "batch_size", "warmup", "hidden", "dropout", "amp", "memory_budget")

_DEFAULTS: dict[str, dict[str, Any]] = {
    "head": {},
    "finetune": {"epochs": 10, "batch_size": 64, "lr": 1e-4, "warmup": 0.1, "unfreeze": 3},
    "sweep": {"epochs": 20},
    "ladder": {},
}
"""What a command has other defaults for than `TrainConfig`."""
_BY_LIKE_ORIGINAL = ("exclude", "seed", "empty", "val_fraction")


def make_training_options(command: str) -> list[click.Parameter]:
    """Make the options of `head`, `finetune`, `sweep` or `ladder` that set fields of `TrainConfig`."""
    defaults = {"run": f"runs/{command}", **_DEFAULTS[command]}
    if command in ("head", "finetune"):
        without = _FINETUNE_ONLY if command == "head" else _NOT_IN_FINETUNE
        return make_options(TrainConfig, without=without, defaults=defaults)
    only = _OF_SWEEP if command == "sweep" else _OF_LADDER
    return make_options(TrainConfig, only=only, defaults=defaults)


def spell_command(config: TrainConfig, *, always: Collection[str] = (), never: Collection[str] = ()) -> str:
    """Return the shell command that trains with this config, without options that have their defaults.

    Fields in `always` are spelled out even where they are the default, and those in `never` are left out.
    """
    name = "finetune" if config.unfreeze else "head"
    values = asdict(config)
    values |= values.pop("data")
    unused = {"resume", *never, *(_BY_LIKE_ORIGINAL if config.data.split_tiles else ())}
    words = spell_out(make_training_options(name), values, always=always, never=unused)
    return shlex.join(["python", "-m", "train", name, *words])
