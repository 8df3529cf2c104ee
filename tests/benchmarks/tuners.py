"""Measure fine-tuning in separate processes: its step, the original's step, and the parts of its epochs."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cache_schema import open_cache
from extract.backbone.checkpoint import Checkpoint, find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.precision import Precision
from extract.ranks.group import Ranks, join_ranks
from extract.tiles.feed import TileFeed
from extract.tiles.source import open_source
from train.config import DataConfig, TrainConfig
from train.data.batches import Batch, Tiles
from train.data.labels import read_labelled_cache
from train.data.prefix import PrefixCache, PrefixTiles, compute_slots
from train.data.streaming import StreamedTiles
from train.data.vectors import Residence
from train.loop.step import TrainStep
from train.model.classifier import Classifier, Head

from . import original
from .contenders import CPU
from .measure import run_rounds
from .processes import read_memory

CLASSES = 60
UNFREEZE = 3
IMAGE_SIZE = 224


def compare_steps(checkpoint: Path, precision: Precision, batch: int, autocasts: list[bool]) -> dict[str, list[float]]:
    """Return seconds of an extraction's `forward` pass, our `step` and the original's, on the same batch."""
    pixels, labels = _make_batch(batch)
    with join_ranks("cpu") as ranks:
        found = find_checkpoint(str(checkpoint), IMAGE_SIZE)
        frozen = Backbone.load(found, precision=precision, device=CPU)
        step = _make_step(found, precision, batch, ranks)
        mine = Batch(pixels.to(frozen.dtype), labels, torch.arange(batch), batch)
        contenders: dict[str, Callable[[], object]] = {
            "forward": lambda: _embed(frozen, mine.inputs),
            "step": lambda: step.run(mine, 1.0),
        }
        for autocast in autocasts:
            theirs = original.make_step(checkpoint, UNFREEZE, classes=CLASSES, autocast=autocast)
            contenders[f"original, {'autocast' if autocast else 'float32'}"] = lambda run=theirs: run(pixels, labels)
        for run in contenders.values():
            run()
        return run_rounds("step", {name: lambda run=run: _time(run) for name, run in contenders.items()})


def measure_peak(checkpoint: Path, precision: Precision, batch: int, way: str) -> int:
    """Return the peak resident bytes of two steps; the second also holds the optimiser's state."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pixels, labels = _make_batch(batch)
    if way == "original":
        theirs = original.make_step(checkpoint, UNFREEZE, classes=CLASSES, autocast=False)
        for _ in range(2):
            theirs(pixels, labels)
    else:
        with join_ranks("cpu") as ranks:
            step = _make_step(find_checkpoint(str(checkpoint), IMAGE_SIZE), precision, batch, ranks)
            for _ in range(2):
                step.run(Batch(pixels, labels, torch.arange(batch), batch), 1.0)
    return read_memory("self", "VmHWM")


def compare_epochs(cache: str, checkpoint: Path, batch: int, workers: int) -> dict[str, list[float]]:
    """Return tiles per second of an epoch `streamed`, `from the prefix cache`, and with tiles `in memory`."""
    with join_ranks("cpu") as ranks:
        found = find_checkpoint(str(checkpoint), IMAGE_SIZE)
        residence = Residence(("cls",), CPU, size=0, budget=0, batch_size=batch, held=True)
        rows = read_labelled_cache(open_cache(cache), DataConfig(empty="keep"), residence, ranks)
        precision = rows.version.provenance.precision
        step = _make_step(found, precision, batch, ranks)
        feed = TileFeed(open_source(rows.version.recorded.tiles), workers=workers)
        backbone = step.backbone
        streamed = StreamedTiles(rows, feed, found, ranks, dtype=backbone.dtype, eval_batch=batch)
        prefix = PrefixCache(f"{cache}-prefix", rows.version, found, UNFREEZE)
        prefix.fill(
            rows.rows.index,
            lambda batches: compute_slots(backbone, streamed, batches, views=1, batch=batch),
            batch=batch,
            ranks=ranks,
        )
        kept = PrefixTiles(rows, prefix, ranks, eval_batch=batch)
        held = list(streamed.iterate_epoch(batch_size=batch, seed=0, epoch=0))

        def train(batches: Callable[[], Iterator[Batch]]) -> float:
            return len(rows.rows) / _time(lambda: [step.run(batch, 1.0) for batch in batches()])

        def draw(tiles: Tiles) -> Callable[[], Iterator[Batch]]:
            return lambda: tiles.iterate_epoch(batch_size=batch, seed=0, epoch=1)

        return run_rounds(
            "epochs",
            {
                "streamed": lambda: train(draw(streamed)),
                "from the prefix cache": lambda: train(draw(kept)),
                "in memory": lambda: train(lambda: iter(held)),
            },
        )


class _Step(TrainStep):
    """Step that keeps a reference to its backbone."""

    backbone: Backbone


def _make_step(found: Checkpoint, precision: Precision, batch: int, ranks: Ranks) -> _Step:
    backbone = Backbone.load(found, precision=precision, device=CPU)
    backbone.unfreeze_last(UNFREEZE)
    classifier = Classifier(Head(found.width, CLASSES, hidden=512, dropout=0.1), backbone, ("cls",)).train()
    step = _Step(classifier, TrainConfig("cache", "run", unfreeze=UNFREEZE, batch_size=batch), None, ranks)
    step.backbone = backbone
    return step


def _make_batch(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE), torch.rand(batch, CLASSES) < 0.05


@torch.inference_mode()
def _embed(backbone: Backbone, pixels: Tensor) -> None:
    backbone(pixels)


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
