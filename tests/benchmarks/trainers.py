"""Measure the head's trainer, its bare step and other ways to train a head, each in a separate process."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cache_schema import open_cache
from extract.ranks.group import join_ranks
from train.config import DataConfig, TrainConfig
from train.data.cached import open_cached_tiles
from train.data.sets import read_sets
from train.loop.assemble import make_head, make_meta
from train.loop.trainer import Trainer
from train.loop.validation import ValidationSet
from train.model.classifier import Classifier, Head
from train.model.loss import focal_loss
from train.model.optimizer import make_optimizer
from train.runs.directory import RunDirectory

from .processes import read_memory

BATCH = 1024
VAL_ROWS = 2048


class HeadRun(NamedTuple):
    """Tiles per second of each epoch, without validation, and peak growth of resident memory in bytes."""

    speeds: list[float]
    growth: int


def train_head(
    cache: Path,
    directory: Path,
    *,
    epochs: int,
    features: str = "cls",
    budget: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> HeadRun:
    """Run the trainer's loop in this process on nearly all rows; call `between` after every epoch."""
    _forget_peak_memory()
    before = read_memory("self", "VmRSS")
    config = TrainConfig(
        str(cache), str(directory), epochs=epochs, batch_size=BATCH, features=features, memory_budget=budget,
        data=DataConfig(val_fraction=VAL_ROWS / open_cache(str(cache)).layout.rows, empty="keep"),
    )  # fmt: skip
    with join_ranks("cpu") as ranks:
        sets = read_sets(config, ranks)
        meta = make_meta(config, sets.train)
        classifier = Classifier(make_head(meta, sets.train.version.layout.width, 0), None, meta.features)
        val = ValidationSet(open_cached_tiles(sets.val, ranks), sets.val.rows, sets.counted)
        run = RunDirectory.create(str(directory / "run"))
        trainer = Trainer(classifier, open_cached_tiles(sets.train, ranks), val, config, meta, run, ranks)
        trainer.fit(lambda line: between())
    speeds = [line["tiles"] / line["train_s"] for line in run.read_timings()]
    return HeadRun(speeds, read_memory("self", "VmHWM") - before)


def compare_epoch_with_steps(cache: Path, directory: Path, epochs: int) -> dict[str, list[float]]:
    """Return tiles per second of an `epoch` and of as many `steps` on one gathered batch, in turns."""
    steps: list[float] = []
    take_step = _make_step(open_cache(str(cache)).layout.width)
    count = round(open_cache(str(cache)).layout.rows / BATCH)

    def run_steps() -> None:
        started = time.perf_counter()
        for _ in range(count):
            take_step()
        steps.append(count * BATCH / (time.perf_counter() - started))

    speeds = train_head(cache, directory, epochs=epochs + 1, between=run_steps).speeds
    return {"epoch": speeds[1:], "steps": steps[1:]}  # the first of each is cold


def train_by_rows(cache: Path, rows: int) -> float:
    """Return tiles per second of the same step with a DataLoader that reads the Zarr array row by row."""
    torch.set_num_threads(_cores())
    version = open_cache(str(cache))
    take_step = _make_step(version.layout.width)
    loader = DataLoader(_Rows(version.group["cls"], version.read_rows().label_ids), batch_size=BATCH, shuffle=True)
    batches, started, tiles = iter(loader), time.perf_counter(), 0
    while tiles < rows:
        tiles += len(take_step(*next(batches)))
    return tiles / (time.perf_counter() - started)


class _Rows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, array: Any, label_ids: np.ndarray) -> None:
        self._array = array
        self._labels = torch.from_numpy(label_ids[:, :60] > 0)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.asarray(self._array[row])), self._labels[row]


def train_by_sklearn(cache: Path, epochs: int) -> float:
    """Return tiles per second of scikit-learn's MLP of the same hidden size and batch, in float32."""
    rows = open_cache(str(cache)).read_rows()
    inputs, labels = rows.pooled["cls"].astype(np.float32), rows.label_ids[:, :60] > 0
    model = MLPClassifier((512,), batch_size=BATCH, max_iter=epochs, tol=0.0, n_iter_no_change=epochs + 1)
    started = time.perf_counter()
    with np.errstate(all="ignore"):
        model.fit(inputs, labels)
    assert model.n_iter_ == epochs
    return epochs * len(inputs) / (time.perf_counter() - started)


def time_head_epochs(cache: Path, directory: Path, epochs: int) -> float:
    """Return the median tiles per second."""
    return median(train_head(cache, directory, epochs=epochs).speeds)


def _make_step(width: int) -> Callable[..., Tensor]:
    """Make a function that takes one optimiser step on the given batch, or else on a fixed one."""
    torch.manual_seed(0)
    classifier = Classifier(Head(width, 60, hidden=512, dropout=0.1), None, ("cls",))
    optimizer = make_optimizer(classifier, lr=1e-3, backbone_lr=1e-5, layer_decay=1.0, weight_decay=0.01)
    gathered = torch.randn(BATCH, width).half(), torch.rand(BATCH, 60) < 0.1

    def take_step(inputs: Tensor = gathered[0], labels: Tensor = gathered[1]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits = classifier(inputs)
        (focal_loss(logits, labels.float()).sum() / logits.numel()).backward()
        optimizer.step()
        return logits.detach()

    return take_step


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _forget_peak_memory() -> None:
    """Reset VmHWM to the memory resident now (proc_pid_clear_refs(5))."""
    Path("/proc/self/clear_refs").write_text("5")
