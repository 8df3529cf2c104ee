"""Measure fine-tuning: a step against a forward pass and the original's step, and the parts of an epoch."""

from collections.abc import Callable, Mapping
from statistics import median

from extract.backbone.precision import choose_precision, multiplies_bf16

from . import tuners
from .contenders import CPU
from .fixtures import BUCKET, WORKERS, Fixtures
from .measure import Bound, Figure, divide_rounds, run_rounds
from .processes import run_apart

STEP_BATCH = 8
MEMORY_BATCH = 32
EPOCH_TILES = 32
_MEMORY_ROUNDS = 3
"""Rounds for figures that hardly vary between processes."""
_NO_BF16 = "this processor has no bf16 instructions: autocast would take hundreds of times as long as float32"


def measure_step(fixtures: Fixtures) -> list[Figure]:
    """Compare a training step with the forward pass in it and with the original's step."""
    precision, bf16 = choose_precision(CPU), multiplies_bf16(CPU)
    autocasts = [False, True] if bf16 else [False]
    seconds = run_apart(tuners.compare_steps, fixtures.vitl16, precision, STEP_BATCH, autocasts)
    step = seconds["step"]

    def compare(name: str, limit: float, other: str) -> Figure:
        if other not in seconds:
            return Figure(name, Bound("<=", limit), (), detail=_NO_BF16)
        detail = f"{precision}, {STEP_BATCH} tiles: {median(step):.3g} over {median(seconds[other]):.3g} s"
        return Figure(name, Bound("<=", limit), divide_rounds(step, seconds[other]), detail=detail)

    what = f"time of a training step of vitl16 at 224, UNFREEZE={tuners.UNFREEZE}, over"
    return [
        compare(f"{what} the forward pass of the same batch in extraction", 1.35, "forward"),
        compare(f"{what} a step of the original way: in float32", 0.40, "original, float32"),
        compare(f"{what} a step of the original way: with autocast", 0.85, "original, autocast"),
    ]


def measure_memory(fixtures: Fixtures) -> list[Figure]:
    """Measure the peak memory of a training process, including weights and libraries."""
    precision = choose_precision(CPU)

    def run(way: str) -> int:
        return run_apart(tuners.measure_peak, fixtures.vitl16, precision, MEMORY_BATCH, way)

    peaks = run_rounds("memory", {way: lambda way=way: run(way) for way in ("ours", "original")}, _MEMORY_ROUNDS)
    ours, theirs = peaks["ours"], peaks["original"]
    return [
        Figure(
            f"peak memory of a step at batch {MEMORY_BATCH} over that of the original way in float32",
            Bound("<=", 0.75),
            divide_rounds(ours, theirs),
            detail=f"{precision}: {median(ours) / 2**20:,.0f} over {median(theirs) / 2**20:,.0f} MiB",
        )
    ]


def measure_epochs(fixtures: Fixtures) -> list[Figure]:
    """Measure what the feed adds to an epoch and what the prefix cache saves."""
    bucket = fixtures.serve(EPOCH_TILES)
    cache = str(fixtures.directory / "finetune-cache")
    tiles = f"gs://{BUCKET}/{bucket.prefix(EPOCH_TILES)}"
    fixtures.extract(tiles, fixtures.vitl16, "--image-size", tuners.IMAGE_SIZE, "--cache", cache)
    speeds = run_apart(tuners.compare_epochs, cache, fixtures.vitl16, STEP_BATCH, WORKERS)
    streamed, kept, memory = (speeds[name] for name in ("streamed", "from the prefix cache", "in memory"))
    size = f"{EPOCH_TILES} tiles of 512 px from the GCS server, vitl16 at 224, batches of {STEP_BATCH}"
    return [
        Figure(
            f"an epoch from the prefix cache over a streamed epoch, UNFREEZE={tuners.UNFREEZE}, seconds",
            Bound("<=", 0.38),
            divide_rounds(streamed, kept),
            detail=f"{median(kept):.3g} and {median(streamed):.3g} tiles/s; {size}",
        ),
        Figure(
            "streamed epoch's tiles/s over its compute alone (tiles in memory)",
            Bound(">=", 0.9),
            divide_rounds(streamed, memory),
            detail=f"{median(streamed):.3g} over {median(memory):.3g} tiles/s; {size}",
        ),
    ]


MEASURES: Mapping[str, Callable[[Fixtures], list[Figure]]] = {
    "step": measure_step,
    "memory": measure_memory,
    "epochs": measure_epochs,
}
