"""Some rows of a cache embedded again: are its vectors what its backbone gives for its tiles?

Digests say that a vector is the one that was written; only this says that it was the right one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_schema import Layout, Status, TileTable, Version, open_cache
from extract.backbone.checkpoint import Checkpoint
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import TileEmbedder
from extract.backbone.provenance import find_cached_checkpoint
from extract.tiles.batch import PendingBatch, TileBatch, make_requests
from extract.tiles.listing import list_tiles
from extract.tiles.source import CONCURRENT_READS, Source, open_source

from .earlier import compare_tables

MIN_COSINE = {"float32": (0.9999, 0.9999), "bf16": (0.999, 0.99)}
"""By precision, what the median and the worst row must reach: on another device bf16 rounds otherwise, and more."""
_MAX_NAMED = 20

Vectors = dict[str, npt.NDArray[np.float64]]


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
    drawn = np.sort(np.random.default_rng(seed).choice(embedded, min(rows, len(embedded)), replace=False)).tolist()
    sample = _Sample.follow(drawn, version.read_table(), list_tiles(source, unlabelled=True).table)
    lines = [f"sample of {len(drawn):,} rows, seed {seed} (--seed {seed} draws them again)", *sample.describe_lost()]
    if not sample.rows:
        return Comparison((*lines, "no row is left to compare: check TILES, or choose more rows"), False)
    again = _embed_sample(version, sample, source, checkpoint, lines)
    stored = {name: version[name][sample.rows].astype(np.float64) for name in version.layout.pooling}
    verdicts = [_judge(name, stored[name], again[name], version.provenance.precision) for name in stored]
    lines += [line for line, _ in verdicts]
    if not all(agrees for _, agrees in verdicts):
        lines.append("these are not the vectors that this backbone gives for these tiles: extract into another CACHE")
        return Comparison(tuple(lines), False)
    return Comparison(tuple(lines), True)


@dataclass(frozen=True)
class _Sample:
    """Rows whose tiles are what they were.

    Attributes:
        rows: of the version's table.
        listed: the same tiles' rows in `now`.
        now: the table of a present listing.
        changed, gone: names of tiles that were drawn, but cannot be compared.
    """

    rows: list[int]
    listed: list[int]
    now: TileTable
    changed: list[str]
    gone: list[str]

    @classmethod
    def follow(cls, drawn: Sequence[int], table: TileTable, now: TileTable) -> "_Sample":
        """Find the tiles of `drawn` rows in a present listing, by name, and compare size and checksum."""
        tiles = table.select(np.asarray(drawn, np.int64))
        changes = compare_tables(now, tiles)
        gone, same = changes.row < 0, changes.same_tile
        return cls(
            rows=np.asarray(drawn)[same].tolist(),
            listed=changes.row[same].tolist(),
            now=now,
            changed=tiles.tile[~same & ~gone].tolist(),
            gone=tiles.tile[gone].tolist(),
        )

    def describe_lost(self) -> Iterator[str]:
        for names, what in ((self.changed, "changed"), (self.gone, "went away")):
            if names:
                more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
                yield f"{len(names):,} tiles {what} since, and are not compared: {', '.join(names[:_MAX_NAMED])}{more}"


def _embed_sample(
    version: Version, sample: _Sample, source: Source, checkpoint: Checkpoint, lines: list[str]
) -> Vectors:
    """Per pooling (n, D), NaN in rows whose tile cannot be decoded any more; `lines` says which."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision: Any = version.provenance.precision
    backbone = Backbone.load(checkpoint, precision=precision, device=device)
    embedder = TileEmbedder.for_version(version, backbone, checkpoint)
    width = version.layout.width
    again = {name: np.full((len(sample.rows), width), np.nan) for name in version.layout.pooling}
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        for members in _share_out(version.layout, sample.rows, embedder.batch_size):
            places = list(members)
            chosen = [members[place] for place in places]
            requests = make_requests(sample.now, [sample.listed[i] for i in chosen], labels=False)
            batch = PendingBatch(source, pool, requests).finish()
            lines.extend(batch.problems)
            vectors = embedder.embed(_spread(batch, places, embedder.batch_size))
            for name, pooled in vectors.items():
                again[name][chosen] = pooled[places].double().cpu().numpy()
    return again


def _share_out(layout: Layout, rows: Sequence[int], batch_size: int) -> list[dict[int, int]]:
    """Batches, each from places to indices into `rows`.

    Every row comes to the place it had when its whole block was extracted: what else is in a batch leaves a row's bits
    alone, its place need not. A row that was computed among rows taken over had another one.
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
    """The same tiles at these places of a whole batch, nothing at the others."""
    images = [torch.zeros(16, 16, 3, dtype=torch.uint8)] * batch_size
    status = np.full(batch_size, Status.PENDING, np.uint8)
    for place, image, code in zip(places, batch.images, batch.status, strict=True):
        images[place], status[place] = image, code
    return replace(batch, rows=np.arange(batch_size), images=images, status=status)


def _judge(
    name: str, stored: npt.NDArray[np.float64], again: npt.NDArray[np.float64], precision: str
) -> tuple[str, bool]:
    """A line, and whether the cosines of (n, D) vectors reach `MIN_COSINE`."""
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
