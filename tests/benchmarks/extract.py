"""Measure extraction against its bare forward pass and against the original script."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import median

from extract.backbone.precision import Precision, choose_precision, multiplies_bf16

from . import contenders, original
from .fixtures import BUCKET, SMALL_TILES, TILES, WORKERS, Fixtures
from .measure import Bound, Figure, divide_rounds, run_rounds
from .processes import pin_to, run_apart

RUN_S = 12.0
"""Approximate seconds that one run of vitl16 computes on any processor; there are some 30 runs."""
TABLE_TILES = 10_000_000

_FEW_SMALL_TILES = 2_000
_RANK_TILES = 1_536  # six blocks, three for each of two ranks


@dataclass(frozen=True)
class Load:
    """Number of tiles per run, a whole number of batches."""

    batch: int
    tiles: int


def choose_load(tile_s: float, seconds: float = RUN_S, most: int = TILES) -> Load:
    """Choose a load that computes for about `seconds`.

    Batches have 32 tiles, or the largest power of two that allows two batches: with a single batch, fetching could not
    overlap with computing.

    Args:
        tile_s: seconds per tile.
        seconds: target duration.
        most: number of tiles available.
    """
    batch = contenders.BATCH
    while batch > 1 and 2 * batch * tile_s > seconds:
        batch //= 2
    return Load(batch, max(1, min(round(seconds / (batch * tile_s)), most // batch)) * batch)


def measure_ceiling(fixtures: Fixtures) -> list[Figure]:
    """Measure how well the forward pass uses the processor."""
    precision = choose_precision(contenders.CPU)
    batch = choose_load(_time_tile(fixtures, 224, precision)).batch
    flops = run_apart(contenders.compare_with_ceiling, fixtures.vitl16, 224, precision, batch)
    return [
        Figure(
            "vitl16 at 224, batches in memory, achieved FLOP/s over the matmul ceiling of the same run",
            Bound(">=", 0.85),
            divide_rounds(flops["forward"], flops["matmul"]),
            detail=f"{precision}, forward of {batch} tiles: {median(flops['forward']) / 1e12:.3g} of "
            f"{median(flops['matmul']) / 1e12:.3g} TFLOP/s ({contenders.MATMUL}-cubed product)",
        )
    ]


def measure_whole_224(fixtures: Fixtures) -> list[Figure]:
    """Compare the whole command with the forward pass alone and with the original's epoch."""
    precision = choose_precision(contenders.CPU)
    tile_s = _time_tile(fixtures, 224, precision)
    load = choose_load(tile_s)
    loads = {"original, float32": _choose_original_load(_time_tile(fixtures, 224, "float32"))}
    if multiplies_bf16(contenders.CPU):
        loads["original, autocast"] = _choose_original_load(tile_s)
    fixtures.serve(load.tiles, *(other.tiles for other in loads.values()))
    runs = _pair_with_memory(fixtures, 224, precision, load)
    runs |= {name: partial(_run_original_epoch, fixtures, name, other) for name, other in loads.items()}
    speeds = run_rounds("whole extraction at 224", runs)
    name = "whole extraction against the original way's forward epoch, tiles/s"
    return [
        _over_memory("vitl16 at 224", Bound(">=", 0.90), precision, load, speeds),
        _over_original(f"{name}: in float32", Bound(">=", 3.5), "original, float32", loads, speeds),
        _over_original(f"{name}: with autocast", Bound(">=", 1.35), "original, autocast", loads, speeds),
    ]


def measure_whole_512(fixtures: Fixtures) -> list[Figure]:
    """Compare the whole command with the forward pass alone, at the satellite backbones' training size."""
    precision = choose_precision(contenders.CPU)
    load = choose_load(_time_tile(fixtures, 512, precision))
    fixtures.serve(load.tiles)
    speeds = run_rounds("whole extraction at 512", _pair_with_memory(fixtures, 512, precision, load))
    return [_over_memory("vitl16 at IMAGE_SIZE 512", Bound(">=", 0.97), precision, load, speeds)]


def measure_feed(fixtures: Fixtures) -> list[Figure]:
    """Compare the feed with its unavoidable work and with the original's feed.

    One of our workers decodes on all cores of its share; a worker of the original uses one core. With one worker per
    core, both have the same number of workers and cores.
    """
    bucket = fixtures.serve(TILES)
    server, prefix = os.environ["STORAGE_EMULATOR_HOST"], bucket.prefix(TILES)
    paths = bucket.paths(TILES)
    cores = sorted(os.sched_getaffinity(0))[:2]
    with pin_to(cores):
        runs = run_rounds(
            "feed",
            {
                "feed": lambda: run_apart(contenders.run_feed, f"gs://{BUCKET}/{prefix}", len(cores)),
                "decode and GET alone": lambda: run_apart(contenders.run_parts, server, BUCKET, prefix, paths),
                "original": lambda: run_apart(original.run_feed, BUCKET, prefix, bucket.names, len(cores)),
            },
        )
    speeds, costs = zip(*runs["feed"], strict=True)
    decode, get = (median(column) for column in zip(*runs["decode and GET alone"], strict=True))
    return [
        Figure(
            "feed alone (fetch + decode + batch, 512 px PNG, no model), core-milliseconds a tile over "
            "(spng decode alone + one obstore GET alone)",
            Bound("<=", 1.3),
            divide_rounds(costs, [sum(parts) for parts in runs["decode and GET alone"]]),
            detail=f"{median(costs):.3g} ms over {decode:.3g} + {get:.3g} ms",
        ),
        Figure(
            "feed alone against the original way's feed, tiles/s",
            Bound(">=", 2.5),
            divide_rounds(speeds, runs["original"]),
            detail=f"{median(speeds):.0f} over {median(runs['original']):.0f} tiles/s; {len(cores)} workers on "
            f"{len(cores)} cores each",
        ),
    ]


def measure_many_blocks(fixtures: Fixtures) -> list[Figure]:
    """Measure what grows with the bucket: memory, and blocks to write."""
    backbone, many, few = fixtures.tiny, fixtures.small_tiles, fixtures.first_small_tiles(_FEW_SMALL_TILES)
    watched = run_rounds(
        "many blocks",
        {
            f"{SMALL_TILES:,} tiles": lambda: fixtures.extract_watched(many, backbone),
            f"{_FEW_SMALL_TILES:,} tiles": lambda: fixtures.extract_watched(few, backbone),
        },
    )
    (runs, peaks), (_, few_peaks) = (zip(*results, strict=True) for results in watched.values())
    main = divide_rounds([peak.main for peak in peaks], [peak.main for peak in few_peaks])
    largest = divide_rounds([peak.largest for peak in peaks], [peak.largest for peak in few_peaks])
    return [
        Figure(
            "share of an extraction's wall time in which the device waits for a write",
            Bound("<=", 0.005),
            tuple(run.write_share for run in runs),
            unit="share",
            detail=f"{SMALL_TILES:,} tiles at {median(run.tiles_per_s for run in runs):.0f} tiles/s, local cache; "
            "a tiny backbone, so that blocks come as fast as from a GPU",
        ),
        Figure(
            f"peak memory at {SMALL_TILES:,} tiles over that at {_FEW_SMALL_TILES:,} (small tiles, small backbone)",
            Bound("<=", 1.1),
            tuple(map(max, main, largest)),
            detail=f"the worse of two: main process {median(main):.3f}, largest process {median(largest):.3f}, "
            f"of {median(peak.largest for peak in few_peaks) / 2**20:.0f} MiB",
        ),
    ]


def measure_table(fixtures: Fixtures) -> list[Figure]:
    """Measure the tile table in absolute figures, since a bucket of that size must fit any machine."""
    cost = run_apart(contenders.build_tile_table, TABLE_TILES)
    name = f"tile table for {TABLE_TILES // 10**6} M tiles"
    detail = "from listing pages of tiles and labels to the table; making the pages up is not counted"
    return [
        Figure(f"{name}: memory a row (bytes)", Bound("<=", 300), (cost.bytes_a_row,), unit="bytes", detail=detail),
        Figure(f"{name}: time (s)", Bound("<=", 120), (cost.seconds,), unit="s", detail=detail),
    ]


def measure_ranks(fixtures: Fixtures) -> list[Figure]:
    """Measure the gain of a second core."""
    name = "two ranks on two cores against one rank pinned to one core (local directory, small backbone), tiles/s"
    bound = Bound(">=", 1.7)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return [Figure(name, bound, (), detail="this machine has one core")]
    tiles = fixtures.first_small_tiles(_RANK_TILES)

    def run(ranks: int) -> float:
        with pin_to(cores[:ranks]):
            return fixtures.extract(tiles, "demo", nproc=ranks).tiles_per_s

    speeds = run_rounds("ranks", {"two ranks": partial(run, 2), "one rank": partial(run, 1)})
    two, one = speeds["two ranks"], speeds["one rank"]
    detail = f"demo backbone, {_RANK_TILES:,} tiles: {median(two):.0f} over {median(one):.0f} tiles/s"
    return [Figure(name, bound, divide_rounds(two, one), detail=detail)]


MEASURES: Mapping[str, Callable[[Fixtures], list[Figure]]] = {
    "ceiling": measure_ceiling,
    "whole-224": measure_whole_224,
    "whole-512": measure_whole_512,
    "feed": measure_feed,
    "blocks": measure_many_blocks,
    "table": measure_table,
    "ranks": measure_ranks,
}


@cache
def _time_tile(fixtures: Fixtures, image_size: int, precision: Precision) -> float:
    """Return seconds per tile of a first forward pass; every size has about the same patches per batch."""
    batch = max(1, round(4 * (224 / image_size) ** 2))
    return run_apart(contenders.time_forward, fixtures.vitl16, image_size, precision, batch)


def _choose_original_load(tile_s: float) -> Load:
    """Choose batches of 32, as in the original, unless a single batch takes too long."""
    batch_s = original.BATCH * tile_s
    if batch_s > 1.5 * RUN_S:
        return choose_load(tile_s)
    return Load(original.BATCH, original.BATCH * max(1, min(round(RUN_S / batch_s), TILES // original.BATCH)))


def _pair_with_memory(
    fixtures: Fixtures, image_size: int, precision: Precision, load: Load
) -> dict[str, Callable[[], float]]:
    """Run the command on the bucket, and its forward pass on the same tiles in memory."""
    paths = fixtures.tiles.paths(load.tiles)
    url = f"gs://{BUCKET}/{fixtures.tiles.prefix(load.tiles)}"
    options = ("--image-size", image_size, "--batch-size", load.batch)
    return {
        "extract": lambda: fixtures.extract(url, fixtures.vitl16, *options).tiles_per_s,
        "in memory": lambda: run_apart(
            contenders.embed_in_memory, fixtures.vitl16, image_size, precision, load.batch, paths
        ),
    }


def _run_original_epoch(fixtures: Fixtures, name: str, load: Load) -> float:
    return run_apart(
        original.run_epoch,
        fixtures.vitl16,
        BUCKET,
        fixtures.tiles.prefix(load.tiles),
        fixtures.tiles.names[: load.tiles],
        workers=WORKERS,
        threads=len(os.sched_getaffinity(0)),
        batch=load.batch,
        autocast=name.endswith("autocast"),
    )


def _over_memory(
    what: str, bound: Bound, precision: Precision, load: Load, speeds: Mapping[str, Sequence[float]]
) -> Figure:
    whole, memory = speeds["extract"], speeds["in memory"]
    return Figure(
        f"whole extract of {what} from the GCS server, 512 px PNG, over forward + transform of batches in memory "
        "(tiles/s over tiles/s)",
        bound,
        divide_rounds(whole, memory),
        detail=f"{precision}, {load.tiles} tiles in batches of {load.batch}: {median(whole):.3g} over "
        f"{median(memory):.3g} tiles/s",
    )


def _over_original(
    name: str, bound: Bound, contender: str, loads: Mapping[str, Load], speeds: Mapping[str, Sequence[float]]
) -> Figure:
    if contender not in loads:
        reason = "this processor has no bf16 instructions: autocast would take hundreds of times as long as float32"
        return Figure(name, bound, (), detail=reason)
    whole, theirs, load = speeds["extract"], speeds[contender], loads[contender]
    detail = f"{median(whole):.3g} over {median(theirs):.3g} tiles/s, of {load.tiles} tiles in batches of {load.batch}"
    return Figure(name, bound, divide_rounds(whole, theirs), detail=detail)
