"""Commands in turn, as in `in_turn.py`; then one step in shards, and in `facts-RANK.json` what a rank holds of it.

`sharded.py CHECKPOINT '[["finetune", "--shard"], ["back", "runs", "again/runs"], ["finetune", "--resume"]]'`

`back` copies runs as if they had been stopped at the last checkpoint but one.
"""

import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# This file is run by its path, beside which `in_turn` lies.
from in_turn import main, set_apart
from torch.distributed.tensor import DTensor

from extract.ranks.group import Ranks, join_ranks
from tests.unit.train.loop.test_step import make_batch, make_classifier
from train.config import TrainConfig
from train.data.batches import Batch
from train.errors import TrainError
from train.loop.step import TrainStep
from train.model.classifier import Classifier

LARGE = 8192
"""Tiles of 48 KB."""
ROOM = 150 << 20


def go_back(runs: Path, copy: Path) -> None:
    shutil.copytree(runs, copy, symlinks=True)
    for previous in copy.glob("*-001/previous"):
        shutil.rmtree(previous.with_name("last"))
        previous.rename(previous.with_name("last"))


def count(tensors: Iterable[torch.Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in tensors)


def train_once(checkpoint: Path, ranks: Ranks, clip_norm: float | None) -> tuple[Classifier, TrainStep, bool]:
    """A classifier after a step on two rows of rank 0 and one of rank 1, and whether its gradient was clipped."""
    config = TrainConfig(cache="c", run="r", unfreeze=3, amp=False, batch_size=3, shard=True, clip_norm=clip_norm)
    classifier = make_classifier(checkpoint, 1, 3)
    step = TrainStep(classifier, config, None, ranks)
    result = step.run(replace(make_batch(0, 2 - ranks.rank), global_size=3), 1.0)
    return classifier, step, bool(result.clipped)


def measure(checkpoint: Path, ranks: Ranks) -> dict[str, Any]:
    """What this rank holds after a step and an evaluation, in numbers of values."""
    plain = make_classifier(checkpoint, 1, 3)
    classifier, step, _ = train_once(checkpoint, ranks, None)
    with torch.inference_mode():
        classifier.eval()(make_batch(0, 2 - ranks.rank).inputs)
    named = dict(classifier.named_parameters())
    trained = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in trained if isinstance(parameter.grad, DTensor)]
    moments = [tensor for held in step.optimizer.state.values() for tensor in held.values() if tensor.ndim]
    norm = math.sqrt(sum(float(gradient.full_tensor().double().square().sum()) for gradient in gradients))
    return {
        "whole": sum(tensor.numel() for tensor in plain.trained_tensors().values()),
        "held": count(trained),
        "registered": count(named[name] for name in plain.trained_tensors()),
        "gradients": count(gradients),
        "moments": count(moments),
        "clipped": [train_once(checkpoint, ranks, share * norm)[2] for share in (0.9, 1.1)],
        "told": ranks.run_on_main(lambda: "all of it", tell=lambda result: result[:3]),
        "refusal": refuse(step, make_batch(0, 1)),
    }


def refuse(step: TrainStep, one: Batch) -> str:
    """What is said of many views of one tile, which the first of all operations copies: no rank gets as far as to wait
    for the other."""
    large = Batch(one.inputs.expand(LARGE, -1, -1, -1), one.labels.expand(LARGE, -1), torch.arange(LARGE), 2 * LARGE)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))
    try:
        step.run(large, 1.0)
    except TrainError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "it fits"


if __name__ == "__main__":
    is_main = os.environ["RANK"] == "0"
    for number, words in enumerate(json.loads(sys.argv[2])):
        if is_main:
            print(f"command {number}", flush=True)
        if words[0] != "back":
            set_apart(str(number))
            main(words, prog_name="python -m train", standalone_mode=False)
        elif is_main:  # the others wait for it where the next command begins
            go_back(*map(Path, words[1:]))
    set_apart("step")
    with join_ranks("cpu") as ranks:
        Path(f"facts-{ranks.rank}.json").write_text(json.dumps(measure(Path(sys.argv[1]), ranks)))
