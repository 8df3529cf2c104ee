"""Measure the gain of a second host: two network namespaces, one core each, against one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.caches import plant_cache
from tests.checkpoints import make_checkpoint
from tests.hosts import Host, find_obstacle, join_hosts
from tests.planted import plant_tiles

from .fixtures import PROJECT_ROOT, Fixtures, make_small_tiles, read_run
from .measure import Bound, Figure, divide_rounds, run_rounds
from .processes import run_apart

HOSTS = 2
ROUNDS = 2
"""A run takes some 15 s, half of it start-up."""
_BACKBONE = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3}
_TILES, _SIZE = 4096, 96
_HEAD_ROWS, _HEAD_WIDTH, _HEAD_BATCH = 88_000, 1024, 4096
_TRAINED_SCENES, _TRAINED_SIZE, _TRAINED_BATCH = 75, 96, 64
"""Each trainer has more than 20 batches per epoch; with fewer it would halve the batch size."""
_TIMEOUT_S = 300


class _Job(NamedTuple):
    """One command: how to run it on a number of hosts, and what it runs on."""

    run: Callable[[Sequence[Host]], float]
    detail: str


def measure_hosts(fixtures: Fixtures) -> list[Figure]:
    """Run each command on two hosts and on one, in turns."""
    obstacle = "this machine has one core" if len(os.sched_getaffinity(0)) < HOSTS else find_obstacle()
    if obstacle:
        return [_describe(what, bound, (), obstacle) for what, (_, bound) in _JOBS.items()]
    figures = []
    with join_hosts(HOSTS) as (*hosts, _):
        for what, (prepare, bound) in _JOBS.items():
            job = prepare(fixtures)
            speeds = run_rounds(what, {"two": partial(job.run, hosts), "one": partial(job.run, hosts[:1])}, ROUNDS)
            two, one = speeds["two"], speeds["one"]
            detail = f"{median(two):,.0f} over {HOSTS} x {median(one):,.0f} tiles/s; {job.detail}"
            figures.append(_describe(what, bound, divide_rounds(two, [HOSTS * speed for speed in one]), detail))
    return figures


def _describe(what: str, bound: float, values: tuple[float, ...], detail: str) -> Figure:
    name = f"{what}: tiles/s of two hosts over twice those of one, a core each"
    return Figure(name, Bound(">=", bound), values, detail=detail)


def _prepare_extract(fixtures: Fixtures) -> _Job:
    tiles = make_small_tiles(fixtures.directory / "hosts-tiles", _TILES)
    backbone = run_apart(make_checkpoint, fixtures.directory / "hosts-backbone", image_size=_SIZE, **_BACKBONE)

    def run(hosts: Sequence[Host]) -> float:
        where = {"TILES": tiles, "BACKBONE": backbone, "CACHE": fixtures.directory / f"hosts-cache-{next(_numbers)}"}
        return read_run(_make(fixtures, hosts, "extract", where, "--workers", 0)).tiles_per_s

    return _Job(run, f"{_TILES:,} tiles, 6 layers of 192 at {_SIZE} px")


def _prepare_head(fixtures: Fixtures) -> _Job:
    path = str(fixtures.directory / "hosts-vectors")
    cache = run_apart(plant_cache, path, _HEAD_ROWS, width=_HEAD_WIDTH, classes=8)
    options = ("--batch-size", _HEAD_BATCH, "--epochs", 3, "--empty", "keep", "--val-fraction", 0.02)
    detail = f"{_HEAD_ROWS:,} x {_HEAD_WIDTH:,}, batch {_HEAD_BATCH:,}"
    return _Job(partial(_train, fixtures, "train-head", cache, options), detail)


def _prepare_finetune(fixtures: Fixtures) -> _Job:
    tiles = plant_tiles(fixtures.directory / "hosts-trained", scenes=_TRAINED_SCENES, per_scene=20, seed=0)
    backbone = run_apart(make_checkpoint, fixtures.directory / "hosts-start", image_size=_TRAINED_SIZE, **_BACKBONE)
    cache = str(fixtures.directory / "hosts-trained-cache")
    fixtures.extract(tiles, backbone, "--cache", cache)
    options = ("--batch-size", _TRAINED_BATCH, "--epochs", 2, "--empty", "keep", "--val-fraction", 0.1, "--workers", 0)
    detail = f"3 of 6 layers of 192 at {_TRAINED_SIZE} px, batch {_TRAINED_BATCH}"
    return _Job(partial(_train, fixtures, "finetune", cache, options), detail)


_JOBS: Mapping[str, tuple[Callable[[Fixtures], _Job], float]] = {
    "extract": (_prepare_extract, 0.9),
    "train-head": (_prepare_head, 0.85),
    "finetune": (_prepare_finetune, 0.85),
}
"""By command: its preparation, and the required share of twice one host's speed."""
_numbers = count()
"""Counter for unique names and ports."""


def _train(fixtures: Fixtures, target: str, cache: str, options: Sequence[object], hosts: Sequence[Host]) -> float:
    """Return tiles per second of the median epoch, without validation and without the cold first epoch."""
    run = fixtures.directory / f"hosts-run-{next(_numbers)}"
    _make(fixtures, hosts, target, {"CACHE": cache, "RUN": run}, *options)
    _, *steady = map(json.loads, (run / "timings.jsonl").read_text().splitlines())
    return median(line["tiles"] / line["train_s"] for line in steady)


def _make(
    fixtures: Fixtures, hosts: Sequence[Host], target: str, variables: Mapping[str, object], *options: object
) -> str:
    """Run the user's make target on all these hosts at once; return the output of the first."""
    meet = {"RDZV": f"{hosts[0].name}:{29_500 + next(_numbers)}", "NNODES": len(hosts)} if len(hosts) > 1 else {}
    common = {"PYTHON": sys.executable, "VENV": "", "ARGS": " ".join(map(str, ("--device", "cpu", *options)))}
    # Variables inherited from an outer make would change this one.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    env["PYTHONPATH"] = str(PROJECT_ROOT)
    started: list[tuple[subprocess.Popen[str], Path]] = []
    for number, (host, core) in enumerate(zip(hosts, sorted(os.sched_getaffinity(0)), strict=False)):
        given = {**common, **variables, **meet, **({"NODE_RANK": number} if meet else {})}
        command = ["make", "-s", "-f", PROJECT_ROOT / "Makefile", target, *(f"{k}={v}" for k, v in given.items())]
        log = fixtures.directory / f"{target}-{host.name}.log"
        with log.open("w") as output:
            placed = ["taskset", "--cpu-list", core, *command]
            process = host.start(placed, cwd=fixtures.directory, env=env, stdout=output, stderr=subprocess.STDOUT)
            started.append((process, log))
    for process, log in started:
        if status := process.wait(_TIMEOUT_S):
            raise RuntimeError(f"make {target} on {len(hosts)} hosts ended with {status}: {log.read_text()[-2000:]}")
    return started[0][1].read_text()
