"""What a sweep's lists expand to, what is refused, and the command of one configuration."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace
from typing import Any

import pytest

import train.run
from train.__main__ import main
from train.config import DataConfig, TrainConfig
from train.errors import TrainError
from train.sweep.grid import Grid, describe_command, describe_loss

BASE = TrainConfig(cache="cache/a", run="runs/sweep", epochs=7, hidden=32)
LISTS = {
    "lrs": "1e-3, 3e-3",
    "weight_decays": "0,0.3",
    "losses": "bce,focal:0.25:2,focal:0.5,asymmetric:1:4:0.1",
    "features": "cls,cls+patch_mean",
    "heads": "linear,mlp",
}


def test_a_grid_is_every_combination_once() -> None:
    configs = Grid(**LISTS).expand(BASE)
    found = {(c.lr, c.weight_decay, describe_loss(c), c.features, c.head) for c in configs}
    losses = ("bce", "focal:0.25:2", "focal:0.5:2", "asymmetric:1:4:0.1")
    expected = itertools.product((1e-3, 3e-3), (0.0, 0.3), losses, ("cls", "cls+patch_mean"), ("linear", "mlp"))
    assert found == set(expected)
    assert len(configs) == 64
    assert {(c.epochs, c.hidden, c.cache) for c in configs} == {(7, 32, "cache/a")}


def test_the_defaults_are_64_configurations() -> None:
    defaults = {option.name: option.default for option in main.commands["sweep"].params}
    assert len(Grid(**{name: defaults[name] for name in LISTS}).expand(BASE)) == 64


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lrs": " , "}, "--lrs is empty: name at least one"),
        ({"lrs": "1e-3,fast"}, "--lrs 1e-3,fast: could not convert"),
        ({"lrs": "-1e-3"}, "--lr -0.001: above 0"),
        ({"lrs": "1e-3,0.001"}, "one configuration twice .cls, linear, bce, 0.001, 0."),
        ({"weight_decays": "-1"}, "--weight-decay -1.0: 0 to 1e"),
        ({"losses": "hinge"}, "hinge is no loss: choose from bce, focal:alpha:gamma, asymmetric:gamma_pos"),
        ({"losses": "focal,focal:0.65:2"}, "one configuration twice .cls, linear, focal:0.65:2"),
        ({"losses": "bce:1"}, "bce:1 is no loss"),
        ({"losses": "focal:x"}, "--losses focal:x"),
        ({"losses": "focal:1.5"}, "--alpha 1.5: 0 to 1"),
        ({"losses": "asymmetric:0:4:1"}, "--margin 1.0"),
        ({"features": "cls,max+"}, "--features max\\+: name pooled arrays of the cache, each once"),
        ({"heads": "conv"}, "conv is no head: choose from mlp, linear"),
        ({"heads": ""}, "--heads is empty"),
    ],
)
def test_what_means_nothing_is_refused_by_its_option(change: dict[str, str], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        Grid(**{**LISTS, **change}).expand(BASE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "bce", "head": "linear", "lr": 0.1 + 0.2, "weight_decay": 0.0, "seed": 12, "batch_size": 16},
        {"alpha": 0.25, "gamma": 1.5, "hidden": 64, "dropout": 0.0, "warmup": 0.2, "amp": False, "device": "cpu"},
        {"loss": "asymmetric", "gamma_pos": 1.0, "margin": 0.0, "val_cache": "b c", "amp": True, "epochs": 3},
        {
            "features": "cls+patch_mean",
            "allow_unsealed": True,
            "data": DataConfig("class", "my classes.csv", (5, 48), "val", "(?P<scene>.)", 0.3, "it's/split.json"),
        },
    ],
)
def test_the_command_gives_the_very_configuration(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real parser of the command line, up to where training would begin."""
    started: list[TrainConfig] = []
    monkeypatch.setattr(train.run, "run_training", started.append)
    config = replace(TrainConfig(cache="gs://b/a cache", run="runs/head"), **options)
    words = shlex.split(describe_command(config))
    assert words[:4] == ["python", "-m", "train", "head"]
    main(words[3:], standalone_mode=False)
    assert started == [config]
