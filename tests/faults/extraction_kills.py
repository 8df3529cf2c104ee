"""One extraction that is killed again and again, and what it leaves in the end.

python -m tests.faults.extraction_kills FOLDER SEED KILLS [KILLS gs://bucket/prefix]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import CacheError, CacheRoot, Version
from tests.caches import get_all
from tests.tiles import draw_objects, write_directory

from .armed import ARMED, BLOCK_ROWS, Charge, Fired, arm

_TIMEOUT_S = 120.0
_OUTLIVED_BLOCKS = 12
"""What a rank was seen to finish at most before torchrun, or the lack of it, ended it."""
_PROJECT_ROOT = str(Path(__file__).parents[2])
_ARMED_MODULE = Charge.__module__
_MODEL_MODULE = "transformers.models.dinov3_vit.modeling_dinov3_vit"
_POINTS: dict[str, dict[str, Any]] = {
    "before a block's chunk": {"key": r"(^|/)cls/c/"},
    "while a chunk is written": {"key": r"(^|/)patch_mean/c/", "when": "during"},
    "between two arrays": {"key": r"(^|/)label_ids/c/", "when": "after"},
    "before the commit": {"key": r"(^|/)commit/c/"},
    "after the commit": {"key": r"(^|/)commit/c/", "when": "after"},
}
"""Moments in the life of a block, by name. Chunks are written side by side: chance decides which others are there."""
_LAST_POINTS: dict[str, dict[str, Any]] = {
    "before the seal": {"key": r"(^|/)seal/c/"},
    "before `current` moves": {"key": r"^current$"},
}
"""Moments after the last block: they come when nothing else is left to kill."""


@dataclass(frozen=True)
class Kill:
    """One of the loop.

    Attributes:
        point: its name, for people.
        charge: without the marker.
        ranks: of torchrun; 0 is one process without it.
    """

    point: str
    charge: Charge
    ranks: int

    @property
    def fault(self) -> str:
        number = "kill -9" if self.charge.signal == signal.SIGKILL else "SIGTERM"
        whom = {"self": "of a rank" if self.ranks else "", "all": "of all ranks", "launcher": "of torchrun"}
        return " ".join(filter(None, [number, whom[self.charge.whom], self.point]))


def draw_kills(seed: int, kills: int) -> list[Kill]:
    """So many kills: creation first, then named points in turn with drawn moments between them; the end at the end."""
    rng = np.random.default_rng(seed)
    last = [
        Kill(name, Charge("", "put", **charge), ranks=0)
        for name, charge in _LAST_POINTS.items()
        for _ in range(1 if kills < 40 else 3)
    ]
    drawn = [_draw(rng, "while the version is created", {"nth": int(rng.integers(2, 25))})]
    while len(drawn) + len(last) < kills:
        for name, charge in _POINTS.items():
            drawn.append(_draw(rng, name, charge))
            # Few puts: every commit is progress, and so is a SIGTERM, which lets the block in writing be finished.
            drawn.append(_draw(rng, "at some put", {"nth": int(rng.integers(2, 8))}))
        drawn.append(_draw(rng, "at some read", {"operation": "get", "nth": int(rng.integers(1, 60))}))
        drawn.append(_draw(rng, "at some read", {"operation": "get", "nth": int(rng.integers(1, 60))}))
    return drawn[: kills - len(last)] + last


def _draw(rng: np.random.Generator, point: str, charge: dict[str, Any]) -> Kill:
    ranks = 2 if rng.random() < 0.3 else 0
    number = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
    whom = str(rng.choice(["self", "all", "launcher"])) if ranks else "self"
    if number == signal.SIGTERM and ranks:
        whom = "launcher"  # as a scheduler does it
    return Kill(
        point, Charge(**{"marker": "", "operation": "put", "signal": int(number), "whom": whom, **charge}), ranks
    )


def run_extraction_kills(folder: Path, kills: int, seed: int, cache: str | None = None) -> list[dict[str, Any]]:
    """Kill one extraction so many times, then let it finish, and compare with an undisturbed one.

    Args:
        folder: for everything that is written.
        kills: how often.
        seed: of the tiles, the backbone and the moments.
        cache: where the killed extraction writes, a directory below `folder` if None.

    Returns:
        a row for each kind of fault: `fault`, `tried`, `survived`.

    Raises:
        AssertionError: something was lost, changed or hung; names the kill.
    """
    drawn = draw_kills(seed, kills)
    # About every other kill finds one more block finished, and a rank that outlives the other, or torchrun, goes on.
    outlived = sum(kill.ranks > 0 and kill.charge.whom != "all" for kill in drawn)
    tiles = BLOCK_ROWS * (4 + 3 * kills // 4 + _OUTLIVED_BLOCKS * outlived)
    write_directory(folder / "tiles", draw_objects(np.random.default_rng(seed), tiles, size=32))
    runs = _Runs(folder, ["run", "--tiles", "tiles", "--backbone", "backbone", "--batch-size", str(BLOCK_ROWS)])
    assert runs.fork(_make_backbone, folder, seed) == 0
    reference, cache = str(folder / "undisturbed"), cache or str(folder / "killed")
    assert runs.run_alone(reference) == 0, runs.log
    undisturbed = _read_objects(reference)
    expected = _open_only_version(reference)
    assert expected
    tried: Counter[str] = Counter()
    puts: list[int] = []
    for number, kill in enumerate(drawn):
        fired = runs.kill(number, kill, cache)
        puts.append(fired.puts)
        _check_blocks(cache, expected, f"kill {number}, {kill}")
        tried[kill.fault] += 1
    assert runs.run_alone(cache) == 0, runs.log
    left = _read_objects(cache)
    differing = sorted(key for key in undisturbed.keys() | left.keys() if undisturbed.get(key) != left.get(key))
    assert not differing, f"the killed extraction left something else than the undisturbed one: {differing}"
    later = sum(count > 0 for count in puts)
    print(f"{kills} kills, {later} of them after the first put of their run had begun", flush=True)
    assert later >= 0.6 * kills, "too many kills came before there was anything to lose"
    return [{"fault": f"extract: {fault}", "tried": n, "survived": n} for fault, n in sorted(tried.items())]


def run_hung_rank(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Halt one of two ranks for good: the other must end the job with a message, not wait in silence.

    Returns, raises:
        as `run_extraction_kills`.
    """
    write_directory(folder / "tiles", draw_objects(np.random.default_rng(seed), 100, size=32))
    _make_backbone(folder, seed)
    charge = Charge(str(folder / "marker"), "put", key="/commit/c/", signal=signal.SIGSTOP)
    process = start_armed(folder, charge, "--nproc-per-node=2")
    assert process.stdout
    said = []
    for line in process.stdout:  # ends at the latest when torchrun has ended the halted rank, too
        said.append(line)
    process.wait(_TIMEOUT_S)
    assert process.returncode != 0, said
    assert any("has not been heard of for 20 s" in line for line in said), said
    return [{"fault": "extract: a rank hangs (SIGSTOP)", "tried": 1, "survived": 1}]


def start_armed(folder: Path, charge: Charge, *launch: str) -> subprocess.Popen[str]:
    """torchrun in `folder`, on its `tiles` and `backbone`, into `killed`."""
    arguments = ["--tiles", "tiles", "--backbone", "backbone", "--cache", "killed", "--workers", "1"]
    arguments += ["--device", "cpu", "--precision", "float32"]
    return subprocess.Popen(
        [sys.executable, "-m", "extract.launch", "--standalone", *launch, "-m", _ARMED_MODULE, "run", *arguments],
        env={**os.environ, ARMED: json.dumps(asdict(charge)), "PYTHONPATH": _PROJECT_ROOT},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class _Runs:
    """Starts runs of one extraction: forked from a process that has the libraries loaded, or by torchrun."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._folder = folder
        self._arguments = [*arguments, "--device", "cpu", "--precision", "float32"]
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload([_ARMED_MODULE, _MODEL_MODULE])
        self.log = folder / "runs.log"

    def run_alone(self, cache: str, charge: Charge | None = None) -> int | None:
        arguments = [*self._arguments, "--workers", "0", "--cache", cache]
        return self.fork(_run_armed, self._folder, self.log, arguments, charge)

    def fork(self, target: Callable[..., None], *args: Any) -> int | None:
        process = self._fork.Process(target=target, args=args)
        process.start()
        process.join(_TIMEOUT_S)
        hung = process.is_alive()
        process.kill()
        process.join()
        assert not hung, f"a run hung: {self.log}"
        return process.exitcode

    def kill(self, number: int, kill: Kill, cache: str) -> Fired:
        """Run until `kill`, and until all its processes are gone."""
        marker = self._folder / f"kill-{number}.json"
        charge = replace(kill.charge, marker=str(marker))
        status = self._run_torchrun(cache, kill.ranks, charge) if kill.ranks else self.run_alone(cache, charge)
        assert marker.exists(), f"kill {number} never went off, the run ended with {status}: {kill}, {self.log}"
        assert status != 0, f"kill {number} changed nothing: {kill}"
        fired = Fired(**json.loads(marker.read_text()))
        deadline = time.monotonic() + _TIMEOUT_S
        while left := [pid for pid in fired.pids if Path(f"/proc/{pid}").exists() and not _is_zombie(pid)]:
            assert time.monotonic() < deadline, f"processes {left} outlived kill {number}: {kill}, {self.log}"
            time.sleep(0.05)
        return fired

    def _run_torchrun(self, cache: str, ranks: int, charge: Charge) -> int:
        launch = ["-m", "extract.launch", "--standalone", f"--nproc-per-node={ranks}", "-m", _ARMED_MODULE]
        arguments = [*self._arguments, "--workers", "1", "--cache", cache]
        env = {**os.environ, ARMED: json.dumps(asdict(charge)), "PYTHONPATH": _PROJECT_ROOT}
        with self.log.open("ab") as log:
            return subprocess.run(
                [sys.executable, *launch, *arguments],
                env=env,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                timeout=_TIMEOUT_S,
                check=False,
            ).returncode


def _make_backbone(folder: Path, seed: int) -> None:
    from tests.checkpoints import make_checkpoint  # and with it the model, which the process that forks does without

    make_checkpoint(folder / "backbone", seed=seed, image_size=32)


def _run_armed(folder: Path, log: Path, arguments: list[str], charge: Charge | None) -> None:
    """In a forked process: the command line as it is."""
    os.chdir(folder)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # One core, as each of two ranks has: the number of threads shows in the last bits of a product.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    arm(charge)
    sys.argv = ["extract", *arguments]
    from extract.__main__ import run

    run()


def _check_blocks(cache: str, expected: Version, context: str) -> None:
    """Whatever is committed is what the undisturbed extraction wrote, and the undisturbed tiles are all that count."""
    version = _open_only_version(cache)
    if version is None:
        return
    assert version.id == expected.id, context
    for block in np.flatnonzero(version.committed()).tolist():
        found, wanted = version.read_trusted(block), expected.read_trusted(block)
        assert found.digest(expected.layout) == wanted.digest(expected.layout), f"block {block} differs after {context}"


def _read_objects(cache: str) -> dict[str, bytes]:
    """All objects but the files that a write had begun and not renamed, which are no part of a cache."""
    return {key: data for key, data in get_all(cache).items() if not key.endswith(".partial")}


def _open_only_version(cache: str) -> Version | None:
    root = CacheRoot(cache)
    try:
        versions = root.versions()
        assert len(versions) <= 1, versions
        return root.open_version(versions[0]) if versions else None
    except CacheError:  # its creation was interrupted
        return None


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


if __name__ == "__main__":
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    found = [run_extraction_kills(folder / "directory", int(sys.argv[3]), seed)]
    if sys.argv[4:]:
        found.append(run_extraction_kills(folder / "bucket", int(sys.argv[4]), seed, sys.argv[5]))
    print(json.dumps(found))
