"""Reconstruct the commands that made a run, from the settings it kept."""

import shlex

from cache_schema.cli.options import make_options, spell_out
from extract.config import ExtractConfig
from train.command import spell_command

from .facts import Facts, Json

_OF_THE_MACHINE = ("device", "workers", "memory_budget")


def list_commands(facts: Facts) -> list[str]:
    """Return the shell commands of the extraction and of the training, without options that have their defaults."""
    return [describe_extraction(facts.settings, facts.config.cache), describe_training(facts)]


def describe_extraction(settings: Json, cache: str) -> str:
    """Return the `python -m extract run …` that filled the cache, as far as the cache knows."""
    made, depends = settings["recorded"], settings["provenance"]
    values = {name: made[name] for name in ("tiles", "backbone", "batch_size")}
    values |= {name: depends[name] for name in ("image_size", "precision")} | {"cache": cache}
    words = spell_out(make_options(ExtractConfig), values, always=values)
    return shlex.join(["python", "-m", "extract", "run", *words])


def describe_training(facts: Facts) -> str:
    """Return `python -m train head …` or `… finetune …`, without options of the machine, such as --device."""
    return spell_command(facts.config, never=_OF_THE_MACHINE)
