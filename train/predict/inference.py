"""Run a trained model over a cache or over tiles, and yield its logits row by row, in order."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from cache_schema import BlockValues, IntegrityError, ProvenanceError, Status, Version, open_cache
from cache_schema.layout import UInt8Array, UInt16Array
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import pad_batch
from extract.backbone.transform import TileTransform
from extract.ranks.group import Ranks
from extract.tiles.batch import Request, TileBatch
from extract.tiles.feed import TileFeed
from extract.tiles.listing import list_tiles
from extract.tiles.source import open_source
from extract.timing import Timing, describe_waits
from train.errors import TrainError
from train.loop.step import use_amp
from train.model.augment import SYMMETRIES, Views, average_views
from train.model.classifier import join_features

from .inputs import Inputs, Listed, find_inputs
from .target import Target
from .trained_model import TrainedModel

_STREAM_BATCH = 32
_HEAD_ROWS = 8192
_ROUND = 16
"""Batches per rank that rank 0 gathers and sorts at once: few enough to hold, enough that ranks rarely wait."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Task:
    """A model and the rows it runs on.

    Attributes:
        tta: `d4` averages each tile's logits over its eight symmetries.
        version: the version to read vectors from; None streams tiles.
    """

    model: TrainedModel
    inputs: Inputs
    tta: Views = "one"
    version: Version | None = None

    @classmethod
    def plan(cls, model: TrainedModel, target: Target, ranks: Ranks, *, labels: bool, tta: Views) -> "Task":
        """List the rows of the target. A head on a cache reads vectors; every other combination streams tiles.

        Raises:
            TrainError: --tta is set for a head on a cache, whose vectors are of one view.
            ProvenanceError: the cache was made with another backbone, image size or precision than the run.
            SourceError: there are no tiles.
        """
        if target.names:
            names, window, stride = target.names, target.window, target.stride
            return cls(model, ranks.run_on_main(lambda: find_inputs(names, window, stride)), tta)
        if not target.cache:
            tiles = open_source(str(target.tiles)).url
            table = ranks.run_on_main(lambda: list_tiles(open_source(tiles), unlabelled=not labels).table)
            return cls(model, Inputs((Listed(tiles, table, labels=labels),)), tta)
        version = ranks.run_everywhere(lambda: open_cache(str(target.cache)))
        inputs = Inputs((Listed(version.recorded.tiles, version.read_table(), labels=labels),))
        if model.meta.unfreeze:
            return cls(model, inputs, tta)
        if tta != "one":
            raise TrainError(
                f"--tta {tta} needs tiles, but {model.place} reads cached vectors: use --tiles, or leave --tta out"
            )
        ranks.run_everywhere(lambda: _check_provenance(model, version))
        return cls(model, inputs, tta, version)


@dataclass(frozen=True, eq=False)
class Scored:
    """The logits of n consecutive rows.

    Attributes:
        first: number of the first row.
        logits: (n, C) float32, NaN in rows without an embedding.
        label_ids: (n, 128) uint16, zeros where labels were not read.
        status: (n,) uint8, see `Status`.
        problems: a line for each unreadable tile.
    """

    first: int
    logits: FloatArray
    label_ids: UInt16Array
    status: UInt8Array
    problems: tuple[str, ...] = ()


def infer(
    model: TrainedModel, target: Target, ranks: Ranks, *, workers: int | None, labels: bool, tta: Views = "one"
) -> tuple[Listed, Scored] | None:
    """Return the tiles of the target and all their logits on rank 0, None on the others; raise as `Task.plan`."""
    task = Task.plan(model, target, ranks, labels=labels, tta=tta)
    parts = [*score(task, ranks, Timing(), workers=workers)]
    if not ranks.is_main:
        return None
    (listed,) = task.inputs.parts
    assert isinstance(listed, Listed)
    logits, label_ids, status = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "label_ids", "status")
    )
    return listed, Scored(0, logits, label_ids, status)


def score(task: Task, ranks: Ranks, timing: Timing, *, workers: int | None) -> Iterator[Scored]:
    """Yield the logits of every row in order on rank 0; the other ranks must iterate too, and get nothing.

    Args:
        timing: this rank's times are added to it.
        workers: feed processes per rank.
    """
    if task.version:
        return _score_vectors(task.model, task.version, ranks, timing)
    size = max(1, min(_STREAM_BATCH, len(task.inputs)))
    batches = sum(math.ceil(rows / size) for _, rows, _ in task.inputs.group())
    return _put_in_order(_score_share(task, ranks, timing, size, workers), batches, ranks)


def _check_provenance(model: TrainedModel, version: Version) -> None:
    meta, provenance = model.meta, version.provenance
    mine = (meta.weights_sha256, meta.image_size, meta.precision)
    if mine != (provenance.weights_sha256, provenance.image_size, provenance.precision):
        raise ProvenanceError(
            f"{version.url} holds embeddings of {version.recorded.backbone} at {provenance.image_size} px in "
            f"{provenance.precision}, the run is of {meta.backbone} at {meta.image_size} px in {meta.precision}: "
            "extract with the run's settings, or use --tiles"
        )


@torch.inference_mode()
def _score_vectors(model: TrainedModel, version: Version, ranks: Ranks, timing: Timing) -> Iterator[Scored]:
    """Run the head over a cache block by block, on rank 0 alone: there is too little work to share."""
    if not ranks.is_main:
        return
    meta, started = model.meta, time.perf_counter()
    classifier = model.make_classifier(None, version.layout.width, ranks.device)
    for block in range(version.layout.blocks):
        values = _read_block(version, block)
        vectors = join_features({name: torch.from_numpy(values.pooled[name]) for name in meta.features}, meta.features)
        logits = torch.cat([classifier(part.to(ranks.device)).float().cpu() for part in vectors.split(_HEAD_ROWS)])
        timing.tiles += len(logits)
        timing.wall_s = time.perf_counter() - started
        yield Scored(version.layout.block_slice(block).start, logits.numpy(), values.label_ids, values.status)


def _read_block(version: Version, block: int) -> BlockValues:
    """Read a block; one that fails its check reads as pending."""
    try:
        return version.read_trusted(block)
    except IntegrityError:
        rows = version.layout.block_slice(block)
        return BlockValues.make_blank(version.layout, rows.stop - rows.start)


def _score_share(task: Task, ranks: Ranks, timing: Timing, size: int, workers: int | None) -> Iterator[Scored]:
    """Stream this rank's batches through the model."""
    model, feeds = task.model, _open_feeds(task.inputs, ranks, workers)
    checkpoint = ranks.run_on_main(model.find_checkpoint)
    precision: Any = model.meta.precision
    backbone = Backbone.load(checkpoint, precision=precision, device=ranks.device)
    classifier = model.make_classifier(backbone, checkpoint.width, ranks.device)

    def compute(pixels: Tensor) -> Tensor:
        logits: Tensor = classifier(pad_batch(pixels, size))
        return logits[: len(pixels)]

    transform = TileTransform(checkpoint.image_size, checkpoint.mean, checkpoint.std)
    amp, count = use_amp(model.amp, ranks.device), ranks.make_counter("predicted")
    asked = started = time.perf_counter()
    with tqdm(total=len(task.inputs), unit="tile", desc="predict", disable=not ranks.draws_bars) as bar:
        for batch in _read_share(task.inputs, feeds, ranks, size):
            got = time.perf_counter()
            with torch.inference_mode(), torch.autocast(ranks.device.type, torch.bfloat16, enabled=amp):
                pixels = transform(batch.images, device=ranks.device, dtype=backbone.dtype)
                logits = average_views(compute, pixels) if task.tta == "d4" else compute(pixels)
            found = logits.float().cpu().numpy()
            found[batch.status != Status.EMBEDDED] = np.nan
            timing.note_batch(batch)
            timing.feed_s += got - asked
            timing.device_s += time.perf_counter() - got
            yield Scored(int(batch.rows[0]), found, batch.label_ids, batch.status, batch.problems)
            asked = time.perf_counter()
            timing.wall_s = asked - started
            bar.set_postfix_str(describe_waits([timing]), refresh=False)
            bar.update(count(len(batch)) - bar.n)


def _open_feeds(inputs: Inputs, ranks: Ranks, workers: int | None) -> dict[str, TileFeed]:
    """Open a feed for each place, and start the workers of the first while the model is being loaded."""
    pinned, count = ranks.device.type == "cuda", ranks.choose_workers(workers)
    places = dict.fromkeys(part.place for part in inputs.parts)
    feeds = {place: TileFeed(open_source(place), workers=count, pin_memory=pinned) for place in places}
    for feed in islice(feeds.values(), 1):
        feed.start()
    return feeds


def _read_share(inputs: Inputs, feeds: dict[str, TileFeed], ranks: Ranks, size: int) -> Iterator[TileBatch]:
    """Yield every world_size-th batch, beginning at this rank; a batch comes from one place."""
    number = 0
    for place, rows, requests in inputs.group():
        first = (ranks.rank - number) % ranks.world_size
        yield from feeds[place].read(islice(_cut(requests, size), first, None, ranks.world_size))
        number += math.ceil(rows / size)


def _cut(requests: Iterator[Request], size: int) -> Iterator[list[Request]]:
    while batch := list(islice(requests, size)):
        yield batch


def _put_in_order(mine: Iterator[Scored], batches: int, ranks: Ranks) -> Iterator[Scored]:
    """Gather the batches of all ranks on rank 0, and yield them in the order of their rows."""
    if ranks.world_size == 1:
        yield from mine
        return
    for _ in range(math.ceil(batches / (ranks.world_size * _ROUND))):
        parts: list[list[Scored]] = [[]] * ranks.world_size
        dist.gather_object([*islice(mine, _ROUND)], parts if ranks.is_main else None, dst=0)
        if ranks.is_main:
            yield from sorted(chain.from_iterable(parts), key=lambda part: part.first)
    next(mine, None)  # no batch is left, but this records the time of the last one


def describe_views(tta: Views) -> list[str]:
    """Return a line for the user if several views of each tile were averaged."""
    if tta == "one":
        return []
    return [
        f"--tta {tta}: mean logits of {SYMMETRIES} flips and rotations of each tile; temperature and thresholds were "
        "fitted on a single view"
    ]
