"""Measure the parts of an extraction and the limit of the hardware, each in a separate process."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import obstore
import torch
from imagecodecs import spng_decode
from obstore.store import GCSStore
from tqdm import tqdm

from extract.backbone.checkpoint import find_checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.precision import DTYPES, Precision
from extract.backbone.transform import TileTransform
from extract.tiles.decode import decode_tile

from .measure import run_rounds
from .processes import read_cpu_seconds, read_memory

CPU = torch.device("cpu")
MATMUL = 4096
BATCH = 32

_GETS_IN_FLIGHT = 8
_PASSES = 3
_LISTING_PAGE = 1000


class FeedRun(NamedTuple):
    """Result of a feed without a model. Core-milliseconds per tile are summed over all its processes."""

    tiles_per_s: float
    core_ms: float


class TableCost(NamedTuple):
    bytes_a_row: float
    seconds: float


def time_forward(checkpoint: Path, image_size: int, precision: Precision, batch: int) -> float:
    """Return seconds per tile after a warm-up."""
    backbone = _load(checkpoint, image_size, precision)
    pixels = torch.rand(batch, 3, image_size, image_size, dtype=backbone.dtype)
    with torch.inference_mode():
        backbone(pixels)
        started = time.perf_counter()
        backbone(pixels)
        return (time.perf_counter() - started) / batch


def compare_with_ceiling(checkpoint: Path, image_size: int, precision: Precision, batch: int) -> dict[str, list[float]]:
    """Return FLOP/s of the `forward` pass and of a `matmul` of about the same duration, run in turns."""
    backbone = _load(checkpoint, image_size, precision)
    pixels = torch.rand(batch, 3, image_size, image_size, dtype=backbone.dtype)
    a, b, product = (torch.rand(MATMUL, MATMUL, dtype=DTYPES[precision]) for _ in range(3))
    flop = batch * find_checkpoint(str(checkpoint), image_size).flop
    matmul_flop = 2.0 * MATMUL**3
    repeats = max(1, round(flop / matmul_flop))

    def run_forward() -> float:
        started = time.perf_counter()
        backbone(pixels)
        return flop / (time.perf_counter() - started)

    def run_matmul() -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=product)
        return repeats * matmul_flop / (time.perf_counter() - started)

    with torch.inference_mode():
        run_matmul(), run_forward()
        return run_rounds("ceiling", {"matmul": run_matmul, "forward": run_forward})


def embed_in_memory(
    checkpoint: Path, image_size: int, precision: Precision, batch: int, tiles: Sequence[Path]
) -> float:
    """Return tiles per second of transform and forward pass on tiles decoded in advance.

    The first batch is as cold as in an extraction.
    """
    backbone = _load(checkpoint, image_size, precision)
    found = find_checkpoint(str(checkpoint), image_size)
    transform = TileTransform(image_size, found.mean, found.std)
    images = torch.from_numpy(np.stack([decode_tile(tile.read_bytes()) for tile in tiles])).split(batch)
    started = time.perf_counter()
    with torch.inference_mode():
        for part in images:
            backbone(transform(part, device=CPU, dtype=backbone.dtype))
    return len(tiles) / (time.perf_counter() - started)


def run_feed(url: str, workers: int) -> FeedRun:
    """Measure the feed alone, after a first pass that starts its workers and opens their connections."""
    from extract.tiles.batch import make_requests
    from extract.tiles.feed import TileFeed
    from extract.tiles.listing import list_tiles
    from extract.tiles.source import open_source

    source = open_source(url)
    table = list_tiles(source).table
    batches = [make_requests(table, range(i, min(i + BATCH, len(table)))) for i in range(0, len(table), BATCH)]
    feed = TileFeed(source, workers=workers)
    _exhaust(feed.read(batches))
    spent, started = read_cpu_seconds(os.getpid()), time.perf_counter()
    tiles = sum(_exhaust(feed.read(batches)) for _ in range(_PASSES))
    seconds = time.perf_counter() - started
    return FeedRun(tiles / seconds, 1000 * (read_cpu_seconds(os.getpid()) - spent) / tiles)


def run_parts(server: str, bucket: str, prefix: str, tiles: Sequence[Path]) -> tuple[float, float]:
    """Return core-milliseconds per tile: libspng in one thread, and obstore's GET with 8 in flight."""
    encoded = [tile.read_bytes() for tile in tiles]
    store = GCSStore(
        bucket,
        client_options={"allow_http": True},
        config={"skip_signature": True, "base_url": server},
    )
    paths = [f"{prefix}/images/{tile.name}" for tile in tiles]

    def decode_all() -> None:
        for data in encoded:
            spng_decode(data)

    with ThreadPoolExecutor(_GETS_IN_FLIGHT) as threads:

        def get_all() -> None:
            for data in threads.map(lambda path: obstore.get(store, path).bytes(), paths):
                len(data)

        return _time_cores(decode_all) / len(tiles), _time_cores(get_all) / len(tiles)


def build_tile_table(tiles: int) -> TableCost:
    """Measure memory growth and time from listing pages to tile table, without creating the pages."""
    from extract.tiles.listing import build_table
    from extract.tiles.source import ListedPage

    making_s = 0.0

    def list_pages(folder: str, suffix: str, size: int) -> Iterator[ListedPage]:
        nonlocal making_s
        for first in range(0, tiles, _LISTING_PAGE):
            started = time.perf_counter()
            rows = [
                (f"{folder}/{i // 400:06d}_{i // 20 % 20:02d}_{i % 20:02d}{suffix}", size + i % 997, i, 10**15 + i)
                for i in range(first, min(first + _LISTING_PAGE, tiles))
            ]
            bar.update(len(rows))
            making_s += time.perf_counter() - started
            yield ListedPage.from_rows(rows)

    with tqdm(total=2 * tiles, desc="table", unit="object", unit_scale=True) as bar:
        before, started = read_memory("self", "VmRSS"), time.perf_counter()
        listing = build_table(
            list_pages("images", ".png", 300_000), list_pages("labels", ".txt", 400), unlabelled=False
        )
        seconds = time.perf_counter() - started - making_s
    assert len(listing.table) == tiles
    return TableCost((read_memory("self", "VmHWM") - before) / tiles, seconds)


def _load(checkpoint: Path, image_size: int, precision: Precision) -> Backbone:
    """Load a backbone on the CPU, with the thread count of a single-rank extraction."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return Backbone.load(find_checkpoint(str(checkpoint), image_size), precision=precision, device=CPU)


def _exhaust(batches: Iterable[Sized]) -> int:
    """Consume the feed and return the number of tiles."""
    return sum(len(batch) for batch in batches)


def _time_cores(work: Callable[[], None]) -> float:
    """Return this process's CPU milliseconds for `work`, after one warm-up call."""
    work()
    started = time.process_time()
    for _ in range(_PASSES):
        work()
    return 1000 * (time.process_time() - started) / _PASSES
