"""One extraction: list, share out blocks, embed, commit, seal.

There is no collective between the first block and the last: ranks draw blocks from a counter, so a slow rank simply
takes fewer, and what a block holds does not depend on who computed it.
"""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cache_schema import CacheRoot, Provenance, Recorded, Status, TileTable, Version

from .backbone import ATTENTION, POOLING, Backbone, Checkpoint, find_checkpoint
from .batch import TileRequest, make_requests
from .config import ExtractConfig, remember_cache
from .distributed import Counter, Ranks, join_ranks
from .embed import TileEmbedder
from .errors import RunError
from .feed import TileFeed
from .listing import list_tiles
from .precision import DTYPES, Precision, PrecisionChoice, choose_precision, multiplies_bf16
from .scenes import choose_whole_scenes, find_scenes
from .source import Source, open_source
from .stop import Stopped, stop_on_signals
from .summary import Timing, describe_labels, describe_quarantined, describe_speed, describe_waits, estimate_whole
from .transform import RESAMPLING, describe_scale
from .writer import BlockWriter

_LIBRARIES = ("torch", "transformers", "pillow", "zarr", "numpy")


@dataclass(frozen=True)
class Plan:
    """What rank 0 found out and every rank needs.

    Attributes:
        cache, version_id: the version to fill.
        checkpoint: of the backbone.
        batch_size: of this version; an earlier run's, where there was one.
        pending: blocks without a commit when the run started.
        all_tiles: tiles the whole bucket would give, whatever the limit.
        notes: lines for the user.
    """

    cache: str
    version_id: str
    checkpoint: Checkpoint
    batch_size: int
    pending: tuple[int, ...]
    all_tiles: int
    notes: tuple[str, ...]


def run_extraction(config: ExtractConfig) -> None:
    """Bring the cache of `config.tiles` up to date with the bucket; what is committed already is not redone.

    Raises:
        TileprobeError: whatever a user can mend; committed blocks stay.
        Stopped: SIGTERM or SIGINT came; committed blocks stay, and one line has said how many.
    """
    with stop_on_signals(), join_ranks(config.device) as ranks:
        plan = None
        try:
            started = time.perf_counter()
            plan = ranks.run_on_main(lambda: _plan(config, ranks))
            for note in plan.notes if ranks.is_main else ():
                print(note, flush=True)
            timing = _embed(config, plan, ranks) if plan.pending else Timing()
            timings: list[Timing] = [timing] * ranks.world_size
            torch.distributed.all_gather_object(timings, timing)
            summary = ranks.run_on_main(lambda: _finish(config, plan, timings, time.perf_counter() - started))
            if ranks.is_main:
                print(summary, flush=True)
        except Stopped as stop:
            if ranks.is_main:
                print(_describe_stop(stop, plan), file=sys.stderr, flush=True)
            raise


def make_provenance(checkpoint: Checkpoint, precision: Precision) -> Provenance:
    """What embeddings of this checkpoint in this precision depend on; reads and hashes the weight files."""
    return Provenance(
        weights_sha256=checkpoint.hash_weights(),
        depth=checkpoint.depth,
        width=checkpoint.width,
        image_size=checkpoint.image_size,
        mean=checkpoint.mean,
        std=checkpoint.std,
        resampling=RESAMPLING,
        pooling=POOLING,
        precision=precision,
    )


def record_environment(backbone: str, source: Source, batch_size: int, device: torch.device) -> Recorded:
    """What is worth knowing about where embeddings were computed."""
    cuda = device.type == "cuda"
    return Recorded(
        backbone=backbone,
        tiles=source.url,
        identity=source.identity,
        batch_size=batch_size,
        attention=ATTENTION,
        hardware=torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        libraries={name: installed_version(name) for name in _LIBRARIES},
    )


def _plan(config: ExtractConfig, ranks: Ranks) -> Plan:
    """List the bucket, read the checkpoint's files, and open or create the version they lead to."""
    checkpoint = find_checkpoint(config.backbone, config.image_size)
    source = open_source(config.tiles)
    listing = list_tiles(source, unlabelled=config.unlabelled)
    table = listing.table
    notes = [f"{len(table):,} tiles under {source.url}"]
    if listing.unlabelled:
        notes.append(f"{listing.unlabelled:,} tiles without a label file left out (--unlabelled embeds them)")
    if listing.other:
        notes.append(f"{listing.other:,} objects under images/ are not PNG, JPEG or TIFF: left out")
    if config.limit is not None:
        table = table.select(choose_whole_scenes(find_scenes(table.tile, config.scene_regex), config.limit))
        notes.append(f"LIMIT={config.limit}: {len(table):,} of {len(listing.table):,} tiles, whole scenes")
    cache = config.cache_url(checkpoint.image_size)
    root = CacheRoot(cache)
    provenance = _choose_provenance(config.precision, checkpoint, root, table, ranks.device)
    recorded = record_environment(config.backbone, source, config.batch_size, ranks.device)
    version = root.create_version(table, provenance, recorded)
    notes += [f"differs from the run that began this version: {d}" for d in version.recorded.differences(recorded)]
    if config.retry_quarantined:
        notes.append(_reopen_quarantined(version, table))
    pending = tuple(np.flatnonzero(~version.committed()).tolist())
    if pending:
        precision = provenance.precision
        notes.append(f"{_count_rows(version, pending):,} to do in {precision} -> {cache} (version {version.id})")
        if precision == "bf16" and not multiplies_bf16(ranks.device):
            notes.append("this device has no bf16 instructions: --precision float32 would be many times as fast")
    return Plan(cache, version.id, checkpoint, version.recorded.batch_size, pending, len(listing.table), tuple(notes))


def _choose_provenance(
    asked: PrecisionChoice, checkpoint: Checkpoint, root: CacheRoot, table: TileTable, device: torch.device
) -> Provenance:
    """`auto` keeps the precision of a version that is there, finished or begun, on whatever device it goes on."""
    if asked != "auto":
        return make_provenance(checkpoint, asked)
    fastest = make_provenance(checkpoint, choose_precision(device))
    there, digest = root.versions(), table.identity_digest()
    candidates = [fastest, *(replace(fastest, precision=precision) for precision in DTYPES)]
    return next((known for known in candidates if known.version_id(digest) in there), fastest)


def _count_rows(version: Version, blocks: Sequence[int]) -> int:
    slices = [version.layout.block_slice(block) for block in blocks]
    return sum(rows.stop - rows.start for rows in slices)


def _reopen_quarantined(version: Version, table: TileTable) -> str:
    """Take back the commits of blocks that hold quarantined rows, so that this run tries them again."""
    rows = np.flatnonzero(version.read_status() > Status.EMBEDDED)
    if len(rows):
        version.reopen_blocks(sorted(set((rows // version.layout.block_rows).tolist())))
        # A mended tile may be the same bytes in a new generation, and while sealed the version kept the old one.
        version.write_generation(table.generation)
    return f"{len(rows):,} quarantined tiles are tried again"


def _embed(config: ExtractConfig, plan: Plan, ranks: Ranks) -> Timing:
    """Embed and commit this rank's draw of the pending blocks."""
    version = CacheRoot(plan.cache).open_version(plan.version_id, read_only=False)
    precision: Any = version.provenance.precision
    backbone = Backbone.load(plan.checkpoint, precision=precision, device=ranks.device)
    embedder = TileEmbedder(backbone, plan.checkpoint, plan.batch_size)
    draw, count_done = ranks.make_counter("block"), ranks.make_counter("done")
    workers = ranks.choose_workers(config.workers)
    feed = TileFeed(open_source(config.tiles), workers=workers, pin_memory=ranks.device.type == "cuda")
    total = _count_rows(version, plan.pending)
    timing, started = Timing(), time.perf_counter()
    with (
        BlockWriter(version) as writer,
        tqdm(total=total, unit="tile", desc="extract", disable=not ranks.is_main) as bar,
    ):
        asked, described = started, False
        for batch in feed.read(_draw_batches(version, plan, draw)):
            got = time.perf_counter()
            if not described and ranks.is_main and (embedded := np.flatnonzero(batch.status == Status.EMBEDDED)).size:
                bar.write(describe_scale(batch.images[embedded[0]].shape[0], plan.checkpoint.image_size))
                described = True
            vectors = embedder.embed(batch)
            computed = time.perf_counter()
            writer.add(batch, vectors)
            timing.note_batch(batch)
            timing.feed_s += got - asked
            timing.device_s += computed - got
            timing.write_s += (asked := time.perf_counter()) - computed
            timing.wall_s = asked - started
            bar.set_postfix_str(describe_waits([timing]), refresh=False)
            bar.update(count_done(len(batch)) - bar.n)
    return timing


def _describe_stop(stop: Stopped, plan: Plan | None) -> str:
    done = "before the first block"
    if plan:
        committed = CacheRoot(plan.cache).open_version(plan.version_id).committed()
        done = f"{int(committed.sum()):,} of {len(committed):,} blocks of {plan.cache} are committed"
    return f"stopped by {stop}: {done}; the same command goes on from there"


def _draw_batches(version: Version, plan: Plan, draw: Counter) -> Iterator[list[TileRequest]]:
    """Batches of the blocks this rank draws; a batch never spans two blocks."""
    table = version.read_table()
    while (drawn := draw(1) - 1) < len(plan.pending):
        rows = version.layout.block_slice(plan.pending[drawn])
        for start in range(rows.start, rows.stop, plan.batch_size):
            yield make_requests(table, range(start, min(start + plan.batch_size, rows.stop)))


def _finish(config: ExtractConfig, plan: Plan, timings: list[Timing], elapsed: float) -> str:
    """Recheck, refuse or seal, move `current`, and say what there is now."""
    root = CacheRoot(plan.cache)
    version = root.open_version(plan.version_id, read_only=False)
    status = version.read_status()
    missing, quarantined = int((status == Status.PENDING).sum()), int((status > Status.EMBEDDED).sum())
    if missing:
        raise RunError(f"{missing:,} rows of {plan.cache} are missing or damaged: run the same command again")
    if quarantined > config.max_quarantined * len(status):
        raise RunError(
            f"{quarantined:,} of {len(status):,} tiles are quarantined, more than --max-quarantined "
            f"{config.max_quarantined} allows: mend them and run again with --retry-quarantined, or raise it\n"
            + describe_quarantined(version, status)
        )
    if not version.sealed:
        version.seal()
    if root.current() != version.id:
        root.set_current(version.id)
    remember_cache(plan.cache)
    lines = [f"{plan.cache}: {len(status) - quarantined:,} embeddings, sealed (version {version.id})"]
    if quarantined:
        lines.append(describe_quarantined(version, status))
    if not plan.pending:
        return "\n".join([f"0 to do, {elapsed:.0f} s", *lines])
    lines += [describe_labels(timings), describe_speed(timings, elapsed)]
    if config.limit is not None:
        lines.append(estimate_whole(version, plan.all_tiles, timings))
    return "\n".join(lines)
