"""One extraction: list, share out blocks, embed, commit, seal.

Between the first block and the last there is no collective: ranks draw blocks from a shared counter. So a slow rank
takes fewer blocks, and the content of a block does not depend on the rank that computed it.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cache_schema import CacheRoot, Status, Version
from extract.backbone.dinov3 import Backbone
from extract.backbone.embed import TileEmbedder
from extract.backbone.transform import describe_scale
from extract.ranks.group import Ranks, join_ranks
from extract.ranks.same_job import Asked
from extract.ranks.signals import Stopped, stop_on_signals
from extract.tiles.batch import TileBatch
from extract.tiles.feed import TileFeed
from extract.tiles.source import open_source

from .config import ExtractConfig
from .draw import BlockDraw
from .errors import RunError
from .finish import Finished, finish, recheck
from .plan import Plan, make_plan
from .timing import Stopwatch, Timing, describe_waits
from .writer import BlockWriter

_log = logging.getLogger(__name__)


def run_extraction(config: ExtractConfig) -> Finished | None:
    """Bring the cache of `config.tiles` up to date with the bucket; committed blocks are not computed again.

    Returns:
        the report, printed already; None on all ranks but the main one.

    Raises:
        TileprobeError: an error that the user can fix; committed blocks stay.
        Stopped: SIGTERM or SIGINT came; committed blocks stay, and one line says how many.
    """
    with stop_on_signals(), join_ranks(config.device, Asked.of("extract run", config)) as ranks, ExitStack() as at_end:
        plan = None
        try:
            started = time.perf_counter()
            plan = ranks.run_on_main(lambda: make_plan(config, ranks.device, at_end))
            for note in plan.notes:
                ranks.say(note)
            timing, tried = Timing(), Counter[int]()
            while True:
                if plan.pending:
                    timing.add(_embed(config, plan, ranks))
                    tried.update(plan.pending)
                timings: list[Timing] = [timing] * ranks.world_size
                torch.distributed.all_gather_object(timings, timing)
                status = recheck(plan, ranks)
                elapsed = time.perf_counter() - started
                outcome = ranks.run_on_main(partial(finish, config, plan, status, timings, ranks, elapsed, tried))
                if isinstance(outcome, Finished):
                    ranks.say(outcome.text)
                    return outcome if ranks.is_main else None
                plan = outcome
        except Stopped as stop:
            if ranks.is_main:
                print(_describe_stop(stop, plan), file=sys.stderr, flush=True)
            raise


def _embed(config: ExtractConfig, plan: Plan, ranks: Ranks) -> Timing:
    """Embed and commit the pending blocks that this rank draws from the counter of all ranks."""
    version = CacheRoot(plan.cache).open_version(plan.version_id, read_only=False)
    source = open_source(config.tiles)
    feed = TileFeed(source, workers=ranks.choose_workers(config.workers), pin_memory=ranks.device.type == "cuda")
    feed.start()
    embedder = _load_embedder(plan, version, ranks)
    timing, writer = Timing(), BlockWriter(version)
    blocks = BlockDraw(version, plan, source, writer, timing)
    draw, progress = ranks.make_counter("block"), _Progress(plan, ranks)
    with (
        _profiler(config.profile if ranks.is_main else None) as note_step,
        progress.bar,
        Stopwatch(timing, writer) as stopwatch,
        ranks.stop_together(),  # a block that is being written counts, whichever rank writes it
        writer,
    ):
        for batch in stopwatch.waits(feed.read(blocks.draw_batches(draw, embedder.batch_size))):
            writer.add(batch, embedder.embed(batch))
            note_step()
            progress.show(batch, timing)
    feed.close()
    return timing


def _load_embedder(plan: Plan, version: Version, ranks: Ranks) -> TileEmbedder:
    """Load the backbone; halve the batch size once, before the first block, if a batch does not fit on every rank."""
    precision: Any = version.provenance.precision
    backbone = Backbone.load(plan.checkpoint, precision=precision, device=ranks.device)
    embedder = TileEmbedder.for_version(version, backbone, plan.checkpoint)
    if not ranks.agree(embedder.fits()):
        asked, embedder.batch_size = embedder.batch_size, max(1, embedder.batch_size // 2)
        fit = ranks.agree(embedder.fits())
        ranks.run_on_main(lambda: _record_halved_batch(version, plan, asked, embedder.batch_size if fit else None))
    return embedder


def _record_halved_batch(version: Version, plan: Plan, asked: int, fitting: int | None) -> None:
    """Record the batch size that fits, or refuse to continue where none may be recorded."""
    if plan.earlier_id:
        raise RunError(
            f"a batch of {asked} tiles does not fit in memory, and the rows kept from version {plan.earlier_id} were "
            "computed in batches of that size: run this on a machine with more memory, or extract into another CACHE "
            "with a smaller --batch-size"
        )
    if fitting is None:
        size = version.provenance.image_size
        raise RunError(
            f"not even half a batch of {asked} tiles of {size} px fits in memory: "
            "set a smaller --batch-size or IMAGE_SIZE"
        )
    version.record_batch_size(fitting)
    print(f"a batch of {asked} tiles does not fit in memory: continuing with {fitting}", flush=True)


class _Progress:
    """The progress bar of all ranks together, and a log line for each batch of this rank."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.bar = tqdm(total=plan.to_do, unit="tile", desc="extract", disable=not ranks.draws_bars)
        self._image_size = plan.checkpoint.image_size
        self._count_done = ranks.make_counter("done")
        self._tells_scale = ranks.is_main

    def show(self, batch: TileBatch, timing: Timing) -> None:
        """Count a batch; with the first embedded tile, tell what resizing does to small objects."""
        if self._tells_scale and (embedded := np.flatnonzero(batch.status == Status.EMBEDDED)).size:
            self.bar.write(describe_scale(batch.images[embedded[0]].shape[0], self._image_size))
            self._tells_scale = False
        first, last = int(batch.rows[0]), int(batch.rows[-1])
        _log.debug("rows %d-%d: fetched in %.2f s, decoded in %.2f s", first, last, batch.fetch_s, batch.decode_s)
        self.bar.set_postfix_str(describe_waits([timing]), refresh=False)
        self.bar.update(self._count_done(len(batch)) - self.bar.n)


@contextmanager
def _profiler(path: str | None) -> Iterator[Callable[[], None]]:
    """Give a function to call after every batch; with a path, write a trace of five early batches there."""
    if path is None:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=5, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=lambda trace: trace.export_chrome_trace(path)) as run:
        yield run.step


def _describe_stop(stop: Stopped, plan: Plan | None) -> str:
    done = "before the first block"
    if plan:
        committed = CacheRoot(plan.cache).open_version(plan.version_id).committed()
        done = f"{int(committed.sum()):,} of {len(committed):,} blocks of {plan.cache} are committed"
    return f"stopped by {stop}: {done}; the same command continues from there"
