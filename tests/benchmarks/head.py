"""Measure the head's trainer on cached vectors, against a bare step and against other ways to train."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import count
from pathlib import Path
from statistics import median

from extract.backbone.checkpoint import find_checkpoint
from extract.demo.server import serve_bucket
from tests.caches import plant_cache
from tests.planted import plant_tiles

from . import original, trainers
from .fixtures import BUCKET, PROJECT_ROOT, WORKERS, Fixtures
from .head_sweep import measure_sweep
from .measure import ROUNDS, Bound, Figure, divide_rounds, run_rounds
from .processes import pin_to, run_apart

ROWS, WIDTH, CLASSES = 48_000, 1024, 60
LARGE_ROWS = 2**19
"""Two pooled arrays of width 1,024 make 2 GiB."""
BUDGET = 256 * 2**20

_BY_ROWS = 2 * trainers.BATCH
_EPOCHS = 3
_LARGE_ROUNDS = 3
_TILE_SIZE, _TILES, _COPIES = 256, 512, 8
_ORIGINAL_TILES = 256
_WHOLE_EPOCHS = 50


def measure_step(fixtures: Fixtures) -> list[Figure]:
    """Measure what the loop adds to forward, loss, backward and update."""
    speeds = run_apart(trainers.compare_epoch_with_steps, _plant(fixtures), _make_directory(fixtures), ROUNDS)
    epoch, steps = speeds["epoch"], speeds["steps"]
    return [
        Figure(
            f"epoch of the head over the same step on a batch already gathered, tiles/s ({ROWS:,} x {WIDTH:,}, batch "
            f"{trainers.BATCH:,})",
            Bound(">=", 0.85),
            divide_rounds(epoch, steps),
            detail=f"{median(epoch):,.0f} over {median(steps):,.0f} tiles/s",
        )
    ]


def measure_other_ways(fixtures: Fixtures) -> list[Figure]:
    """Train the same head on the same vectors row by row and with scikit-learn."""
    vectors = _plant(fixtures)
    speeds = run_rounds(
        "other ways to train the head",
        {
            "head": lambda: run_apart(trainers.time_head_epochs, vectors, _make_directory(fixtures), _EPOCHS),
            "rows": lambda: run_apart(trainers.train_by_rows, vectors, _BY_ROWS),
            "scikit-learn": lambda: run_apart(trainers.train_by_sklearn, vectors, _EPOCHS),
        },
    )
    head, rows, sklearn = speeds["head"], speeds["rows"], speeds["scikit-learn"]
    return [
        Figure(
            "epoch of the head against a DataLoader that reads rows one by one from the same Zarr array, tiles/s",
            Bound(">=", 200),
            divide_rounds(head, rows),
            detail=f"{median(head):,.0f} over {median(rows):,.0f} tiles/s, those of {_BY_ROWS:,} tiles",
        ),
        Figure(
            "epoch of the head against scikit-learn's MLPClassifier of the same hidden size, batch and epochs, tiles/s",
            Bound(">=", 1.5),
            divide_rounds(head, sklearn),
            detail=f"{median(head):,.0f} over {median(sklearn):,.0f} tiles/s, {_EPOCHS} epochs",
        ),
    ]


def measure_streaming(fixtures: Fixtures) -> list[Figure]:
    """Compare vectors streamed from disk with vectors held in memory."""
    vectors = _plant_large(fixtures)

    def run(budget: int) -> trainers.HeadRun:
        directory = _make_directory(fixtures)
        return run_apart(trainers.train_head, vectors, directory, epochs=1, features="cls+patch_mean", budget=budget)

    runs = run_rounds("streaming", {"streamed": partial(run, BUDGET), "held": partial(run, 2**40)}, _LARGE_ROUNDS)
    streamed, held = ([run.speeds[0] for run in runs[name]] for name in ("streamed", "held"))
    growth = tuple(run.growth / BUDGET for run in runs["streamed"])
    return [
        Figure(
            "epoch of the head streamed from a cache of 2 GiB with a budget of 256 MiB against held in memory, tiles/s",
            Bound(">=", 0.5),
            divide_rounds(streamed, held),
            detail=f"{median(streamed):,.0f} over {median(held):,.0f} tiles/s, {LARGE_ROWS:,} x {2 * WIDTH:,}, the "
            "system's page cache as it comes",
        ),
        Figure(
            "growth of resident memory when streaming, from before loading to the peak, over the budget",
            Bound("<=", 1.3),
            growth,
            detail=f"{median(growth) * BUDGET / 2**20:.0f} MiB, labels and tile names of all rows included",
        ),
    ]


def measure_whole(fixtures: Fixtures) -> list[Figure]:
    """Compare extraction plus head training with running the backbone in every epoch."""
    checkpoint = Path(find_checkpoint("demo", original.IMAGE_SIZE).path)
    root = _plant_bucket(fixtures)
    names = tuple(sorted(path.stem for path in (root / "tiles" / "images").iterdir()))

    def run_ours() -> float:
        started = time.perf_counter()
        vectors = _make_directory(fixtures)
        fixtures.extract(f"gs://{BUCKET}/tiles", "demo", "--image-size", original.IMAGE_SIZE, "--cache", vectors)
        _run_head(vectors, _make_directory(fixtures), "--epochs", _WHOLE_EPOCHS)
        return time.perf_counter() - started

    def run_original() -> float:
        speed = run_apart(
            original.run_epoch, checkpoint, BUCKET, "tiles", names[:_ORIGINAL_TILES], workers=WORKERS,
            threads=len(os.sched_getaffinity(0)), batch=original.BATCH, autocast=False,
        )  # fmt: skip
        return _WHOLE_EPOCHS * len(names) / speed

    with serve_bucket(root, log=fixtures.directory / "head-server.log", bucket=BUCKET) as url:
        os.environ["STORAGE_EMULATOR_HOST"] = url
        seconds = run_rounds("whole", {"cached": run_ours, "original": run_original}, _LARGE_ROUNDS)
    return [
        Figure(
            f"{_WHOLE_EPOCHS} epochs the original way against extraction and {_WHOLE_EPOCHS} epochs of the head over "
            "the cache, both commands whole, seconds",
            Bound(">=", 60),
            divide_rounds(seconds["original"], seconds["cached"]),
            detail=f"{median(seconds['original']):,.0f} s (extrapolated from {_ORIGINAL_TILES} tiles of one epoch) "
            f"over {median(seconds['cached']):.1f} s; small backbone (demo) at {original.IMAGE_SIZE} px, "
            f"{len(names):,} tiles of {_TILE_SIZE} px",
        )
    ]


def measure_ranks(fixtures: Fixtures) -> list[Figure]:
    """Measure the gain of a second core."""
    name, bound = "two ranks on two cores against one rank pinned to one core, head, tiles/s", Bound(">=", 1.6)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return [Figure(name, bound, (), detail="this machine has one core")]
    vectors = _plant(fixtures)

    def run(ranks: int) -> float:
        with pin_to(cores[:ranks]):
            options = ("--epochs", _EPOCHS, "--val-fraction", trainers.VAL_ROWS / ROWS)
            return _run_head(vectors, _make_directory(fixtures), *options, ranks=ranks)

    speeds = run_rounds("ranks", {"two ranks": partial(run, 2), "one rank": partial(run, 1)})
    two, one = speeds["two ranks"], speeds["one rank"]
    detail = f"{median(two):,.0f} over {median(one):,.0f} tiles/s, {ROWS:,} x {WIDTH:,}"
    return [Figure(name, bound, divide_rounds(two, one), detail=detail)]


MEASURES: Mapping[str, Callable[[Fixtures], list[Figure]]] = {
    "step": measure_step,
    "other-ways": measure_other_ways,
    "streaming": measure_streaming,
    "whole": measure_whole,
    "ranks": measure_ranks,
    "sweep": measure_sweep,
}

_numbers = count(1)


def _make_directory(fixtures: Fixtures) -> Path:
    """Create a new directory below the working directory."""
    return fixtures.directory / f"head-{next(_numbers)}"


@cache
def _plant(fixtures: Fixtures) -> Path:
    path = str(fixtures.directory / "vectors")
    return Path(run_apart(plant_cache, path, ROWS, width=WIDTH, classes=CLASSES))


@cache
def _plant_large(fixtures: Fixtures) -> Path:
    path, pooling = str(fixtures.directory / "large"), ("cls", "patch_mean")
    return Path(run_apart(plant_cache, path, LARGE_ROWS, width=WIDTH, classes=CLASSES, pooling=pooling))


def _plant_bucket(fixtures: Fixtures) -> Path:
    """Create a directory to serve: `tiles/` with some tiles, each under several names."""
    made, root = fixtures.directory / "planted", fixtures.directory / "planted-bucket"
    plant_tiles(made, scenes=_TILES // 16, per_scene=16, seed=0, size=_TILE_SIZE)
    for kind in ("images", "labels"):
        (root / "tiles" / kind).mkdir(parents=True)
        for path in (made / kind).iterdir():
            for copy in range(_COPIES):
                (root / "tiles" / kind / f"c{copy}{path.name}").hardlink_to(path)
    return root


def _run_head(vectors: Path, run: Path, *options: object, ranks: int = 1) -> float:
    """Run the user's command under torchrun; return tiles per second of its median epoch."""
    launch = [sys.executable, "-m", "extract.launch", "--standalone", f"--nproc-per-node={ranks}"]
    fixed = ("--cache", vectors, "--run-dir", run, "--device", "cpu", "--empty", "keep")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    command = [*launch, "-m", "train", "head", *map(str, (*fixed, *options))]
    log = run.with_suffix(".log")
    with log.open("w") as output:
        status = subprocess.run(
            command, cwd=run.parent, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}: {log.read_text()[-2000:]}")
    timings = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    return median(line["tiles"] / line["train_s"] for line in timings)
