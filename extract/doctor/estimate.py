"""Estimate an extraction: measure the speed of each part, find the bottleneck, and derive time and cost."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cache_schema import Status
from cache_schema.cli.text import format_duration
from cache_schema.layout import choose_block_rows
from cache_schema.storage.place import is_bucket
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import TileEmbedder
from extract.backbone.pooling import DEFAULT_POOLING
from extract.errors import BackboneError
from extract.tiles.batch import TileBatch

from .cache import Pending
from .checkpoint import Weights
from .finding import Concern, Verdict
from .machine import Device, wait_for
from .storage import Found
from .tiles import Sample

_LOADED_BYTES = 4 * 2**30
"""Larger weights are not loaded, since that may take minutes."""
_FORWARD_S = 8.0
"""Seconds allowed for all forward passes together."""
_PASSES = 3
"""One warm-up and two timed passes."""
_SHARE_OF_PRODUCT = 0.8
"""A forward pass's share of a matrix product's FLOP/s: vitl16 at 224 in bf16 on a CPU (tests/benchmarks)."""
_LONG_S = 24 * 3600.0

CLASS_A_USD, CLASS_B_USD = 0.005 / 1000, 0.0004 / 1000
"""Price of one request that writes or lists, and of one that reads: standard storage in one region.

Source: https://cloud.google.com/storage/pricing-examples.
"""
_OTHER_OBJECTS_A_BLOCK = 3
"""Chunks of `label_ids`, `status` and `commit`; each pooled array adds one."""


@dataclass(frozen=True)
class Speed:
    """Seconds per tile of each part of an extraction, and the ranks that share the tiles.

    Attributes:
        backbone_s: forward pass, on one rank's device.
        fetch_s: in one feed process with many reads in flight.
        decode_s: on one core.
        ranks, cores, workers: ranks of the job; cores and feed processes per rank.
        on_cpu: whether the backbone runs on the cores that decode.
    """

    backbone_s: float
    fetch_s: float
    decode_s: float
    ranks: int
    cores: int
    workers: int
    on_cpu: bool

    def parts(self) -> dict[str, float]:
        """Return the seconds per tile that each part takes on one rank.

        Workers fetch and decode in parallel, each on its own core if there are enough; on a CPU, decoding takes time
        from the backbone.
        """
        at_once = max(1, min(self.workers, self.cores))
        fetch, decode = self.fetch_s / max(1, self.workers), self.decode_s / at_once
        if self.on_cpu:
            return {"backbone and decoding": self.backbone_s + self.decode_s / self.cores, "fetching": fetch}
        return {"backbone": self.backbone_s, "fetching": fetch, "decoding": decode}

    @property
    def wall(self) -> str:
        """The slowest part."""
        parts = self.parts()
        return max(parts, key=lambda part: parts[part])

    @property
    def tile_s(self) -> float:
        """Seconds per tile of the whole job; without workers, nothing runs in parallel."""
        if self.workers:
            return max(self.parts().values()) / self.ranks
        return (self.backbone_s + self.fetch_s + self.decode_s) / self.ranks


def check_speed(weights: Weights, device: Device, sample: Sample, batch_size: int, workers: int) -> Verdict[Speed]:
    """Time the backbone, or derive its speed from its FLOP if it is too large to load; compare it with the feed."""
    ranks = device.ranks
    derived = weights.checkpoint.flop / (_SHARE_OF_PRODUCT * device.flop_s)
    batch = choose_batch(derived, batch_size)
    if batch and not weights.download and weights.file_bytes <= _LOADED_BYTES:
        backbone_s = _time_backbone(weights, device, sample.batch, batch)
        how = f"measured in batches of {batch}"
    else:
        backbone_s = derived
        how = (
            f"derived: {weights.checkpoint.flop / 1e9:.3g} GFLOP at {_SHARE_OF_PRODUCT:.0%} of a matrix product's rate"
        )
    on_cpu = ranks.device.type == "cpu"
    speed = Speed(backbone_s, sample.fetch_s, sample.decode_s, ranks.world_size, ranks.cores, workers, on_cpu)
    detail = (
        f"{1 / speed.tile_s:,.1f} tiles/s; a tile takes {1000 * backbone_s:.3g} ms in the backbone ({how}), "
        f"{1000 * sample.fetch_s:.3g} to fetch in one process and {1000 * sample.decode_s:.3g} to decode on one core; "
        f"the bottleneck is {speed.wall} (feed workers per rank: {workers})"
    )
    return Verdict(speed, detail)


def choose_batch(tile_s: float, asked: int) -> int:
    """Return the largest batch whose passes fit into `_FORWARD_S`; 0 if one tile already takes longer."""
    return min(asked, int(_FORWARD_S / (_PASSES * tile_s)))


def _time_backbone(weights: Weights, device: Device, sample: TileBatch, size: int) -> float:
    """Measure seconds per tile of transform and forward pass, on the tiles of the sample."""
    backbone = Backbone.load(weights.checkpoint, precision=device.precision, device=device.ranks.device)
    embedder = TileEmbedder(backbone, weights.checkpoint, size, DEFAULT_POOLING)
    if not embedder.fits():
        raise BackboneError(f"a batch of {size} tiles does not fit in memory: set a smaller --batch-size or IMAGE_SIZE")
    rows = np.flatnonzero(sample.status == Status.EMBEDDED)[:size].tolist()
    images = [sample.images[row] for row in rows] or [torch.zeros(16, 16, 3, dtype=torch.uint8)]
    stacked = torch.stack(images) if len({image.shape for image in images}) == 1 else images
    status = np.full(len(images), Status.EMBEDDED, np.uint8)
    batch = replace(sample, rows=np.arange(len(images)), images=stacked, status=status)
    seconds = []
    for _ in range(_PASSES):
        started = time.perf_counter()
        embedder.embed(batch)
        wait_for(device.ranks.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / size


@dataclass(frozen=True)
class Estimate:
    """Time, bytes and requests of an extraction.

    Attributes:
        seconds: of the whole job, embedding only.
        read_bytes: size of the tiles to embed and their labels.
        class_a, class_b: requests to a bucket that list or write, and that read.
    """

    seconds: float
    read_bytes: int
    class_a: int
    class_b: int

    @property
    def request_usd(self) -> float:
        return self.class_a * CLASS_A_USD + self.class_b * CLASS_B_USD


def estimate(
    found: Found, pending: Pending, speed: Speed, *, tiles_in_bucket: bool, cache_in_bucket: bool, arrays: int
) -> Estimate:
    """Estimate the embedding of `pending.to_do` tiles of average size.

    Reading takes one request per tile and per non-empty label, writing one per chunk of a block.
    """
    table = found.table
    share = pending.to_do / len(table)
    read = int(table.size.sum() + table.label_size.clip(0).sum())
    requests = len(table) + int((table.label_size > 0).sum())
    blocks = -(-pending.to_write // choose_block_rows(len(table)))
    return Estimate(
        seconds=pending.to_do * speed.tile_s,
        read_bytes=round(share * read),
        class_a=found.pages * tiles_in_bucket + blocks * (arrays + _OTHER_OBJECTS_A_BLOCK) * cache_in_bucket,
        class_b=round(share * requests) * tiles_in_bucket,
    )


def check_estimate(
    found: Found, pending: Pending, speed: Speed, urls: Sequence[str], price: float | None, *, arrays: int
) -> Verdict[Estimate]:
    """Estimate tiles, bytes, time and cost of the pending work.

    Args:
        urls: of tiles and cache.
        price: of all machines together per hour, in any currency.
        arrays: number of pooled arrays in the cache.
    """
    tiles, cache = (is_bucket(url) for url in urls)
    taken = estimate(found, pending, speed, tiles_in_bucket=tiles, cache_in_bucket=cache, arrays=arrays)
    hours = taken.seconds / 3600
    cost = (
        f"{hours * price:,.2f} at {price:g} an hour"
        if price is not None
        else f"{hours * speed.ranks:,.2f} device-hours"
    )
    detail = (
        f"{found.at_least}{pending.to_do:,} tiles and {taken.read_bytes / 2**20:,.1f} MiB to read: about "
        f"{format_duration(taken.seconds)} on this hardware, {cost}"
    )
    if taken.class_a or taken.class_b:
        detail += (
            f"; {taken.class_b:,} reads and {taken.class_a:,} lists and writes of a bucket, about "
            f"{taken.request_usd:,.2f} USD for standard storage in one region (cloud.google.com/storage/pricing), "
            "without traffic, which is free within that region"
        )
    remedy = "use a GPU, or more of them; IMAGE_SIZE=224 takes a sixth of the work of 512; LIMIT=500 makes a trial"
    long = Concern("warning", "more than a day", remedy)
    return Verdict(taken, detail, [long] if taken.seconds > _LONG_S else [])
