"""Settings survive a round trip through JSON, and those that cannot work are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from train.config import DataConfig, TrainConfig
from train.errors import TrainError
from train.model.augment import NO_AUGMENTATION


def make_config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"cache": "cache/a", "run": "runs/head", **options})


def test_settings_survive_a_round_trip_through_json() -> None:
    config = make_config(
        unfreeze=3,
        val_cache="gs://b/val",
        data=DataConfig(exclude=(5, 48), empty="keep", label_ids="class", taxonomy="classes.csv"),
        features="cls+patch_mean",
        amp=False,
        views="d4",
        jitter=0.2,
        crop_scale=0.8,
    )
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_defaults_are_those_of_the_design() -> None:
    config = make_config()
    assert (config.epochs, config.batch_size, config.lr, config.warmup) == (50, 1024, 1e-3, 0.05)
    assert (config.alpha, config.gamma, config.weight_decay) == (0.65, 2.0, 0.01)
    assert (config.hidden, config.dropout, config.best_by) == (512, 0.1, "f1_weighted")
    assert config.data == DataConfig(empty="drop", exclude=(), label_ids="auto", val_fraction=0.2)
    assert (config.class_weights, config.repeat_factor, config.deterministic) == ("none", 0, False)
    assert config.patience is config.clip_norm is None
    assert config.make_augmentation() == NO_AUGMENTATION


def test_settings_of_a_run_from_before_an_option_existed_load() -> None:
    stored = make_config().to_json()
    new = ("class_weights", "repeat_factor", "patience", "clip_norm", "deterministic", "views", "jitter", "crop_scale")
    for name in new:
        del stored[name]
    assert TrainConfig.from_json(stored) == make_config()


def test_like_original_is_its_split_and_its_classes() -> None:
    config = make_config(data=DataConfig(empty="keep", val_fraction=0.5), seed=7).like_original()
    assert config.seed == 42
    assert config.data == DataConfig(empty="drop", exclude=(5, 48), val_fraction=0.2, split_tiles=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": "cls+cls"}, "--features cls.cls: name pooled arrays of the cache, each once"),
        ({"features": "cls+"}, "--features cls.: name pooled arrays"),
        ({"features": ""}, "--features"),
        ({"epochs": 0}, "--epochs 0: at least 1"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"save_every": 0}, "--save-every 0: at least 1"),
        ({"val_cache": "cache/a"}, "VAL_CACHE is the training cache itself"),
        ({"test_cache": "cache/a"}, "TEST_CACHE is the training cache itself"),
        ({"lr": 0.0}, "--lr 0.0: above 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr": 1e38}, "--lr 1e.38: above 0, at most 1e.30"),
        ({"backbone_lr": -1e-5}, "--backbone-lr"),
        ({"backbone_lr": 1e38}, "--backbone-lr"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"weight_decay": 1e7}, "--weight-decay"),
        ({"warmup": 1.0}, "--warmup"),
        ({"alpha": 1.2}, "--alpha"),
        ({"gamma": -1.0}, "--gamma"),
        ({"hidden": 0}, "--hidden"),
        ({"patience": 0}, "--patience 0: at least 1"),
        ({"patience": -2}, "--patience -2"),
        ({"clip_norm": -1.0}, "--clip-norm -1.0: above 0"),
        ({"clip_norm": 0.0}, "--clip-norm 0.0"),
        ({"clip_norm": float("nan")}, "--clip-norm nan"),
        ({"repeat_factor": 1.5}, "--repeat-factor 1.5: a share of tiles, 0 to 1"),
        ({"repeat_factor": -0.1}, "--repeat-factor -0.1"),
        ({"repeat_factor": float("nan")}, "--repeat-factor nan"),
        ({"unfreeze": 1, "jitter": 1.0}, "--jitter 1.0: 0 to below 1"),
        ({"unfreeze": 1, "jitter": -0.1}, "--jitter -0.1"),
        ({"unfreeze": 1, "jitter": float("nan")}, "--jitter nan"),
        ({"unfreeze": 1, "crop_scale": 0.4}, "--crop-scale 0.4: a share of the tile's area, 0.5 to 1: .* most objects"),
        ({"unfreeze": 1, "crop_scale": 1.1}, "--crop-scale 1.1"),
        ({"unfreeze": 1, "crop_scale": float("nan")}, "--crop-scale nan"),
        ({"shard": True}, "--shard splits trained layers over the ranks, and UNFREEZE=0 trains none: set UNFREEZE=1"),
        ({"views": "d4"}, "cached vectors have none: set UNFREEZE=1 or more, or leave them out"),
        ({"unfreeze": 1, "jitter": 0.1, "cache_prefix": True}, "--cache-prefix keeps .* leave out either"),
        ({"unfreeze": 1, "crop_scale": 0.9, "cache_prefix": True}, "--cache-prefix keeps .* leave out either"),
        ({"accumulate": 0}, "--accumulate 0: at least 1"),
        ({"layer_decay": 0.0}, "--layer-decay 0.0: above 0, at most 1"),
        ({"save_steps": -1}, "--save-steps -1: 0 or more"),
        ({"jitter": 0.1}, "--views, --jitter and --crop-scale change pixels"),
        ({"crop_scale": 0.9}, "--views, --jitter and --crop-scale change pixels"),
        ({"dropout": 1.0}, "--dropout"),
        ({"seed": -1}, "--seed -1: 0 to 2147483647"),
        ({"seed": 2**31}, "--seed"),
        ({"workers": -1}, "--workers"),
    ],
)
def test_what_cannot_work_is_refused_by_its_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        make_config(**options)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(TrainError, match="--val-fraction"):
        DataConfig(val_fraction=fraction)
