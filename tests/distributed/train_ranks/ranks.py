"""Commands under torchrun, and the settings that the runs share."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from cache_schema import open_cache
from tests.caches import plant_cache, rewrite_block
from tests.proxy import Proxy

TIMEOUT_S = 240
IN_TURN = Path(__file__).parents[1] / "in_turn.py"
HEAD = ("--epochs", 2, "--batch-size", 8, "--dropout", 0, "--no-amp", "--device", "cpu")
DROPPING = ("--epochs", 10, "--batch-size", 8, "--save-steps", 3, "--device", "cpu")
VECTORS = ("--epochs", 2, "--batch-size", 64, "--dropout", 0, "--no-amp", "--device", "cpu")
CONVEX = ("--head", "linear", "--loss", "bce", "--weight-decay", 0, "--epochs", 12, "--lr", 0.05)
"""Where training goes to whatever the order of the rows: click takes the last value of an option."""
PLANTED = 8
"""Classes that made-up vectors tell: see `plant_cache`."""
STREAMED = ("--memory-budget", "64K")
STILL = ("--lr", 1e-12)
"""Steps too small to change a weight."""
CONTROLLED = (
    *("--epochs", 30, "--batch-size", 8, "--dropout", 0, "--no-amp", "--device", "cpu", "--run-dir", "runs/controlled"),
    *("--class-weights", "balanced", "--repeat-factor", 0.5, "--clip-norm", 0.005, "--patience", 1),
)
PREDICT = ("--tta", "d4", "--device", "cpu", "--workers", 0)
NAMED = ("--window", 8, "--out", "named.jsonl", "--device", "cpu", "--workers", 0)
AUGMENTED = ("--views", "d4", "--jitter", 0.3, "--crop-scale", 0.7)
FINETUNE = ("--epochs", 2, "--unfreeze", 2, "--batch-size", 4, "--dropout", 0, "--no-amp", "--device", "cpu")


COPIES = ("held", "streamed")
READS = {
    "held": 1 << 20,
    "streamed": 64 << 10,
    **dict.fromkeys(["nan", "cut", "unknown", "apart-{rank}", "lacking-{rank}"], 1 << 20),
}
"""Caches that two ranks read between them, and bytes for their vectors: two copies of `vectors` in a bucket, and others
that cannot serve."""


@dataclass(frozen=True)
class InBucket:
    """Copies of `vectors` in a bucket that is seen through a proxy."""

    url: str
    proxy: Proxy

    def find(self, made: Path, name: str) -> str:
        """Where a cache of `READS` is."""
        return f"{self.url}/{name}" if name in COPIES else str(made / name)

    def count_reads(self, copy: str, array: str) -> dict[int, int]:
        """How often the chunk of each block was read."""
        chunk = re.compile(rf"/{copy}/\w+\.zarr/{array}/c/(\d+)[^?]*\?.*alt=media")
        return Counter(int(found[1]) for path in self.proxy.asked if (found := chunk.search(unquote(path))))


def spoil_copies(root: Path) -> None:
    """Of nine blocks the last five are rank 1's: one of them with a vector that is not finite, or without its labels;
    in another cache, one of rank 0's with labels that mean nothing. And caches of each rank's own: rank 1 has another,
    or none."""
    for name in ("nan", "cut", "unknown"):
        shutil.copytree(root / "vectors", root / name)
    values = open_cache(root / "nan").read_block(6)
    values.pooled["cls"][3, 2] = np.nan
    rewrite_block(str(root / "nan"), 6, values)
    values = open_cache(root / "unknown").read_block(2)
    values.label_ids[:, -1] = 1
    rewrite_block(str(root / "unknown"), 2, values)
    (chunk,) = (root / "cut").glob("*.zarr/label_ids/c/7/0")
    chunk.write_bytes(b"cut")
    for name in ("apart-0", "lacking-0"):
        (root / name).symlink_to("vectors")
    plant_cache(str(root / "apart-1"), 300)


def torchrun(ranks: int, *arguments: object) -> list[str]:
    launch = [sys.executable, "-m", "extract.launch", "--standalone", f"--nproc-per-node={ranks}", "-m", "train"]
    return [*launch, *map(str, arguments)]


def run_in_turn(cwd: Path, env: dict[str, str], *commands: tuple[object, ...]) -> str:
    """What commands print that run one after the other on two ranks of one job."""
    launch = [sys.executable, "-m", "extract.launch", "--standalone", "--nproc-per-node=2", str(IN_TURN)]
    text = json.dumps([list(map(str, command)) for command in commands])
    status, out, err = run_to_end([*launch, text], cwd, env)
    assert status == 0, out + err
    assert "Traceback" not in err
    return out


def run_to_end(command: list[str], cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
    with started(command, cwd, env) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


@contextmanager
def started(command: list[str], cwd: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        kill_group(process)
        process.communicate(timeout=TIMEOUT_S)


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 for the launcher, its ranks (torchrun gives each a session of its own) and their feed workers."""
    for pid in [*find_descendants(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def find_descendants(pid: int) -> list[int]:
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread is gone
            children += [int(child) for child in path.read_text().split()]
    return children + [grandchild for child in children for grandchild in find_descendants(child)]


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def read_history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def data(made: Path) -> tuple[object, ...]:
    return ("--cache", made / "cache", "--split-file", made / "split.json", "--empty", "keep")


def make_env() -> dict[str, str]:
    root = str(Path(__file__).parents[3])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def name_inputs(made: Path) -> tuple[Path, ...]:
    return made / "tiles" / "images" / "s01_1.png", made / "scene.tif", made / "tiles"
