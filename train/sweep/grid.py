"""The grid of a sweep: its configurations, and the command that trains one of them alone."""

import itertools
import shlex
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from train.config import HEADS, DataConfig, TrainConfig
from train.errors import TrainError
from train.model.loss import LOSS_PARAMETERS

T = TypeVar("T")

_LOSS_FORMS = ", ".join(":".join([name, *parameters]) for name, parameters in LOSS_PARAMETERS.items())

_ALWAYS = ("features", "head", "loss", "lr", "weight_decay", "epochs", "batch_size", "seed")
"""Options a printed command spells out even where they are the default."""
_NEVER = ("run", "data", "unfreeze", "resume")


@dataclass(frozen=True)
class Grid:
    """What a sweep varies, as its user wrote it: lists separated by commas.

    Attributes:
        lrs, weight_decays: numbers.
        losses: `bce`, `focal`, `asymmetric`, with their parameters after colons: `focal:0.65:2`.
        features: pooled arrays, joined by `+`.
        heads: `mlp`, `linear`.
    """

    lrs: str
    weight_decays: str
    losses: str
    features: str
    heads: str

    def expand(self, base: TrainConfig) -> list[TrainConfig]:
        """Every combination; all else is as in `base`.

        Raises:
            TrainError: an empty list, an entry that means nothing, or a configuration that comes twice.
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
    """The loss as `--losses` takes it: `focal:0.65:2`."""
    values = (f"{getattr(config, name):g}" for name in LOSS_PARAMETERS[config.loss])
    return ":".join([config.loss, *values])


def describe_command(config: TrainConfig) -> str:
    """The shell command that trains this configuration alone; what is a default is left out."""
    default = TrainConfig(cache="", run="")
    options = [*_differing(asdict(config), asdict(default), _NEVER)]
    options += _differing(asdict(config.data), asdict(DataConfig()), ())
    return shlex.join(["python", "-m", "train", "head", *options])


def _differing(values: dict[str, Any], defaults: dict[str, Any], never: tuple[str, ...]) -> Iterator[str]:
    for name, value in values.items():
        if name in never or (value == defaults[name] and name not in _ALWAYS):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{'' if value else 'no-'}{option}"
        else:
            yield f"--{option}"
            yield ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _split(option: str, text: str, parse: Callable[[str], T]) -> list[T]:
    """The entries of a list that is separated by commas."""
    entries = [part.strip() for part in text.split(",") if part.strip()]
    if not entries:
        raise TrainError(f"--{option} is empty: name at least one, and separate several by commas")
    try:
        return [parse(entry) for entry in entries]
    except ValueError as error:
        raise TrainError(f"--{option} {text}: {error}") from error


def _parse_head(text: str) -> str:
    if text not in HEADS:
        raise ValueError(f"{text} is no head: choose of {', '.join(HEADS)}")
    return text


def _parse_loss(text: str) -> dict[str, Any]:
    name, *values = text.split(":")
    parameters = next((parameters for known, parameters in LOSS_PARAMETERS.items() if known == name), None)
    if parameters is None or len(values) > len(parameters):
        raise ValueError(f"{text} is no loss: choose of {_LOSS_FORMS}; parameters may be left out")
    return {"loss": name, **dict(zip(parameters, map(float, values), strict=False))}
