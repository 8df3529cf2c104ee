"""The commands shown give the run and the extraction again."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tests.caches import make_provenance, make_recorded
from tests.unit.train.report.made_up import make_run
from train.__main__ import _make_config, finetune, head
from train.config import DataConfig, TrainConfig
from train.report.commands import describe_extraction, describe_training
from train.report.facts import Facts

CONFIGS = [
    TrainConfig(cache="c", run="runs/head"),
    TrainConfig(
        cache="gs://b/c d", run="runs/x", lr=0.003, loss="bce", head="linear", data=DataConfig(exclude=(5, 48)), seed=3
    ),
    TrainConfig(cache="c", run="runs/head", amp=False, patience=4, folds=3, deterministic=True).like_original(),
    TrainConfig(
        cache="c", run="runs/finetune", unfreeze=3, epochs=10, batch_size=32, lr=1e-4, warmup=0.1, views="d4",
        cache_prefix=True, large_prefix=True, head_run="runs/head-001", amp=True,
        data=DataConfig(split_file="runs/head-001/split.json", taxonomy="my classes.csv"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_the_command_shown_is_the_run_again(tmp_path: Path, rng: np.random.Generator, config: TrainConfig) -> None:
    """Parsed by the command line itself it gives the same settings."""
    facts = replace(Facts.read(make_run(tmp_path, rng)), config=config)
    python, m, package, name, *words = shlex.split(describe_training(facts))
    assert (python, m, package) == ("python", "-m", "train")
    command = {"head": head, "finetune": finetune}[name]
    options = command.make_context(name, words).params
    parsed = _make_config(options)
    assert asdict(parsed) == asdict(config)


def test_the_extraction_shown_is_what_the_cache_knows() -> None:
    settings = {"recorded": make_recorded(tiles="gs://b/my tiles").to_json(), "provenance": make_provenance().to_json()}
    words = shlex.split(describe_extraction(settings, "cache/x"))
    assert words[:4] == ["python", "-m", "extract", "run"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--tiles"] == "gs://b/my tiles"
    assert options["--image-size"] == "64"
    assert options["--precision"] == "float32"
