"""Reconstruct the commands that made a run from its settings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from train.config import FINETUNE, TRAINING, memory_budget, training_options

from .facts import Facts, Json

_OF_THE_MACHINE = ("device", "workers", "memory_budget", "resume", "like_original")
_BY_LIKE_ORIGINAL = ("exclude", "seed", "empty", "val_fraction")


def list_commands(facts: Facts) -> list[str]:
    """Shell commands: the extraction, then the training; what is a default is left out."""
    return [describe_extraction(facts.settings, facts.config.cache), describe_training(facts)]


def describe_extraction(settings: Json, cache: str) -> str:
    """`python -m extract run …` as it filled the cache, as far as the cache knows."""
    made, depends = settings["recorded"], settings["provenance"]
    options = {
        "tiles": made["tiles"],
        "backbone": made["backbone"],
        "image-size": depends["image_size"],
        "precision": depends["precision"],
        "batch-size": made["batch_size"],
        "cache": cache,
    }
    return shlex.join(
        [
            "python",
            "-m",
            "extract",
            "run",
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ]
    )


def describe_training(facts: Facts) -> str:
    """`python -m train head …` or `python -m train finetune …`; options of the machine, such as --device, left out."""
    name = "finetune" if facts.config.unfreeze else "head"
    values = asdict(facts.config)
    values |= values.pop("data")
    return shlex.join(["python", "-m", "train", name, *_spell_out(make_command(name), values)])


def make_command(name: str) -> click.Command:
    """A trainer's command line, to be asked for its options only."""
    if name == "finetune":
        return click.command()(training_options("finetune", FINETUNE)(lambda **_: None))
    folds = click.option("--folds", type=int, default=0)
    return click.command()(training_options("head", TRAINING)(memory_budget(folds(lambda **_: None))))


def _spell_out(command: click.Command, values: dict[str, Any]) -> Iterator[str]:
    alike = values["split_tiles"]
    if alike:
        yield "--like-original"
    for param in command.params:
        name = str(param.name)
        value = values.get(name)
        if name in _OF_THE_MACHINE or (alike and name in _BY_LIKE_ORIGINAL):
            continue
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        if value is None or value == param.default:
            continue
        if isinstance(value, bool):
            yield from param.opts[:1] if value else param.secondary_opts[:1]
        else:
            yield from (param.opts[0], str(value))
