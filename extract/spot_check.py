"""Embed some rows of a cache again, and check that its vectors are what its backbone gives for its tiles.

Digests show that a vector is the one that was written; only this shows that it was the right one.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_schema import Layout, Status, Version, open_cache
from cache_schema.cli.text import show_first
from extract.backbone.checkpoint import Checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import TileEmbedder
from extract.backbone.provenance import find_cached_checkpoint
from extract.tiles.batch import PendingBatch, TileBatch, TileRequest, make_requests
from extract.tiles.listing import list_tiles
from extract.tiles.source import CONCURRENT_READS, Source, open_source

from .earlier import compare_tables

MIN_COSINE = {"float32": (0.9999, 0.9999), "bf16": (0.999, 0.99)}
"""By precision, what the median and the worst row must reach: on another device bf16 rounds otherwise, and more."""


@dataclass(frozen=True)
class Comparison:
    """Lines for the user, and whether the vectors are what they should be."""

    lines: tuple[str, ...]
    agrees: bool


def compare_sample(
    cache: str, version_id: str | None, rows: int, *, seed: int | None, tiles: str | None, backbone: str | None
) -> Comparison:
    """Embed random rows of a version again, in its own precision and each at its own place in a batch.

    Args:
        cache, version_id: the version, finished or not; None for the one in use.
        rows: how many, of those that are embedded.
        seed: of the choice; None for another every time.
        tiles: where the tiles are now, None for where they were.
        backbone: name or directory of the checkpoint, None for what the cache says.

    Raises:
        ProvenanceError: the checkpoint is not the one that made the cache.
        TileprobeError: no cache, no tiles, no checkpoint, a bucket out of reach.
    """
    version = open_cache(cache, version=version_id, allow_unsealed=True)
    checkpoint = find_cached_checkpoint(version, backbone, remedy="name the checkpoint that did with --backbone")
    source = open_source(tiles or version.recorded.tiles)
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    embedded = np.flatnonzero(version.read_status() == Status.EMBEDDED)
    drawn = np.sort(np.random.default_rng(seed).choice(embedded, min(rows, len(embedded)), replace=False))
    then, now = version.read_table().select(drawn), list_tiles(source, unlabelled=True).table
    changes = compare_tables(now, then)
    same, gone = changes.same_tile, changes.row < 0
    lines = [f"sample of {len(drawn):,} rows, seed {seed} (--seed {seed} draws them again)"]
    for lost, what in ((~same & ~gone, "changed"), (gone, "went away")):
        if names := then.tile[lost].tolist():
            lines.append(f"{len(names):,} tiles {what} since, and are not compared: {show_first(names, limit=20)}")
    if not same.any():
        return Comparison((*lines, "no row is left to compare: check TILES, or choose more rows"), False)
    compared = drawn[same].tolist()
    requests = make_requests(now, changes.row[same].tolist(), labels=False)
    again = _embed_rows(version, compared, requests, source, checkpoint, lines)
    stored = {name: version[name][compared].astype(np.float64) for name in version.layout.pooling}
    verdicts = [_judge(name, stored[name], again[name], version.provenance.precision) for name in stored]
    lines += [line for line, _ in verdicts]
    agrees = all(agrees for _, agrees in verdicts)
    if not agrees:
        lines.append("these are not the vectors that this backbone gives for these tiles: extract into another CACHE")
    return Comparison(tuple(lines), agrees)


def _embed_rows(
    version: Version,
    rows: Sequence[int],
    requests: Sequence[TileRequest],
    source: Source,
    checkpoint: Checkpoint,
    lines: list[str],
) -> dict[str, npt.NDArray[np.float64]]:
    """Embed the tiles of `rows` again, (n, D) for each pooling; NaN, and a line, where one cannot be decoded now."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision: Any = version.provenance.precision
    backbone = Backbone.load(checkpoint, precision=precision, device=device)
    embedder = TileEmbedder.for_version(version, backbone, checkpoint)
    width = version.layout.width
    again = {name: np.full((len(rows), width), np.nan) for name in version.layout.pooling}
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        for members in _share_out(version.layout, rows, embedder.batch_size):
            places = list(members)
            chosen = [members[place] for place in places]
            batch = PendingBatch(source, pool, [requests[i] for i in chosen]).finish()
            lines.extend(batch.problems)
            vectors = embedder.embed(_spread(batch, places, embedder.batch_size))
            for name, pooled in vectors.items():
                again[name][chosen] = pooled[places].double().cpu().numpy()
    return again


def _share_out(layout: Layout, rows: Sequence[int], batch_size: int) -> list[dict[int, int]]:
    """Return batches, each from places to indices into `rows`.

    Every row gets the place it had when its whole block was extracted, since its place in a batch may change a row's
    bits; the other rows do not. A row that was computed among rows kept from an earlier version had another place.
    """
    batches: list[dict[int, int]] = []
    used: Counter[int] = Counter()
    for index, row in enumerate(rows):
        place = row % layout.block_rows % batch_size
        if used[place] == len(batches):
            batches.append({})
        batches[used[place]][place] = index
        used[place] += 1
    return batches


def _spread(batch: TileBatch, places: Sequence[int], batch_size: int) -> TileBatch:
    """Put the tiles at these places of a whole batch, and blanks at the others."""
    images = [torch.zeros(16, 16, 3, dtype=torch.uint8)] * batch_size
    status = np.full(batch_size, Status.PENDING, np.uint8)
    for place, image, code in zip(places, batch.images, batch.status, strict=True):
        images[place], status[place] = image, code
    return replace(batch, rows=np.arange(batch_size), images=images, status=status)


def _judge(
    name: str, stored: npt.NDArray[np.float64], again: npt.NDArray[np.float64], precision: str
) -> tuple[str, bool]:
    """Return a line, and whether the cosines of (n, D) vectors reach `MIN_COSINE`."""
    norms, norms_again = np.linalg.norm(stored, axis=1), np.linalg.norm(again, axis=1)
    cosines = (stored * again).sum(axis=1) / (norms * norms_again)
    largest = (np.linalg.norm(stored - again, axis=1) / norms).max()
    median, least = float(np.median(cosines)), float(cosines.min())
    wanted_median, wanted_least = MIN_COSINE[precision]
    same = int((stored == again).all(axis=1).sum())
    line = (
        f"{name}: {len(stored):,} rows, {same:,} of them bit for bit; cosine {least:.6f} at least, {median:.6f} in the "
        f"median (wanted: {wanted_least}, {wanted_median}); largest difference {largest:.1e} of the norm"
    )
    return line, median >= wanted_median and least >= wanted_least  # a NaN reaches nothing
