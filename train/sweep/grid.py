"""Define the grid of a sweep, its configurations, and the command that trains one of them alone."""

import itertools
from collections import ChainMap, Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cache_schema.cli.options import option
from train.command import spell_command
from train.config import HEADS, TrainConfig
from train.errors import TrainError
from train.model.loss import LOSS_PARAMETERS

T = TypeVar("T")

_LOSS_FORMS = ", ".join(":".join([name, *parameters]) for name, parameters in LOSS_PARAMETERS.items())

_ALWAYS = ("features", "head", "loss", "lr", "weight_decay", "epochs", "batch_size", "seed")
"""Options that a printed command spells out even where they are the default."""


@dataclass(frozen=True)
class Grid:
    """What a sweep varies: lists separated by commas, as the user wrote them.

    By default 2 x 2 x 4 x 2 x 2 = 64 configurations: two values of each number, as one would hide a trend, all losses,
    and both kinds of head.
    """

    lrs: str = option("1e-3,3e-3", "Training", "Peak learning rates.")
    weight_decays: str = option("0.01,0.3", "Training", "Weight decays of AdamW.")
    losses: str = option(
        "bce,focal:0.65:2,focal:0.5:1,asymmetric",
        "Training",
        "bce, focal:ALPHA:GAMMA, asymmetric:GAMMA-POS:GAMMA-NEG:MARGIN; parameters may be left out.",
    )
    features: str = option("cls,cls+patch_mean", "Model", "Pooled arrays of the cache, joined by +.")
    heads: str = option("linear,mlp", "Model", "linear, mlp.")

    def expand(self, base: TrainConfig) -> list[TrainConfig]:
        """Return every combination, with all other settings as in `base`.

        Raises:
            TrainError: a list is empty, an entry is not valid, or a configuration comes twice.
        """
        axes: tuple[list[dict[str, Any]], ...] = (
            [{"features": choice} for choice in _split("features", self.features, str)],
            [{"head": head} for head in _split("heads", self.heads, _parse_head)],
            _split("losses", self.losses, _parse_loss),
            [{"lr": lr} for lr in _split("lrs", self.lrs, float)],
            [{"weight_decay": decay} for decay in _split("weight-decays", self.weight_decays, float)],
        )
        configs = [replace(base, **dict(ChainMap(*changes))) for changes in itertools.product(*axes)]
        twice = next((config for config, times in Counter(configs).items() if times > 1), None)
        if twice is not None:
            what = f"{twice.features}, {twice.head}, {describe_loss(twice)}, {twice.lr:g}, {twice.weight_decay:g}"
            raise TrainError(f"the lists name one configuration twice ({what}): name each of their values once")
        return configs


def describe_loss(config: TrainConfig) -> str:
    """Return the loss as `--losses` takes it: `focal:0.65:2`."""
    values = (f"{getattr(config, name):g}" for name in LOSS_PARAMETERS[config.loss])
    return ":".join([config.loss, *values])


def describe_command(config: TrainConfig) -> str:
    """Return the shell command that trains this configuration alone; most options with default values are left out."""
    return spell_command(config, always=_ALWAYS, never=("run",))


def _split(name: str, text: str, parse: Callable[[str], T]) -> list[T]:
    """Return the entries of a list that is separated by commas."""
    entries = [part.strip() for part in text.split(",") if part.strip()]
    if not entries:
        raise TrainError(f"--{name} is empty: name at least one, and separate several by commas")
    try:
        return [parse(entry) for entry in entries]
    except ValueError as error:
        raise TrainError(f"--{name} {text}: {error}") from error


def _parse_head(text: str) -> str:
    if text not in HEADS:
        raise ValueError(f"{text} is no head: choose from {', '.join(HEADS)}")
    return text


def _parse_loss(text: str) -> dict[str, Any]:
    name, *values = text.split(":")
    parameters = next((parameters for known, parameters in LOSS_PARAMETERS.items() if known == name), None)
    if parameters is None or len(values) > len(parameters):
        raise ValueError(f"{text} is no loss: choose from {_LOSS_FORMS}; parameters may be left out")
    return {"loss": name, **dict(zip(parameters, map(float, values), strict=False))}
