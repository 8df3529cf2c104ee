"""A trainer that is killed again and again at its own file operations, and must end where an undisturbed one does.

A child forked from a process that has torch loaded runs the real command line. The functions by which a run's files are
written are wrapped, not replaced: each reports where it is, and at the chosen place the process sends itself a real
SIGKILL or SIGTERM; half-way means that half of the bytes are in the file by then.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.checkpoints import make_checkpoint
from tests.planted import extract_cache, plant_tiles

TIMEOUT_S = 120
EPOCHS_A_KILL = 3
"""A leg does less than this many epochs before it is killed, so a run of this many a kill is never over too early."""
BATCH = 8
_TORCHRUN_LEGS = 5
"""One kill in this many is of a torchrun job of two ranks, in a run of its own; none in a short loop."""
FIRST_SAVE = ("half-way through history.jsonl", "half-way through best.tmp/model.safetensors", "before rename last.tmp")
"""Places of the first save, when there is nothing yet to fall back on."""
LATER_SAVES = (
    "before remove last.tmp",
    "half-way through last.tmp/model.safetensors",
    "half-way through last.tmp/optimizer.pt",
    "half-way through last.tmp/sha256",
    "before rename last.tmp",
    "before remove previous",
    "after remove previous",
    "after rename last",
    "after rename last.tmp",
    "half-way through history.jsonl",
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.trainer_kills", "train.run", "train.report"])


@dataclass(frozen=True)
class Kill:
    """When a process is to end itself: at its nth operation, or the first time it is at a place in or after an epoch.

    Attributes:
        number: of the operation, from 1; 0 goes by place.
        place: such as `before rename last`.
        epoch: epochs with a line in the history by then.
        signal: SIGKILL or SIGTERM; 0 lets the process go on with no room left: no file can grow beyond 4 KiB.
    """

    number: int = 0
    place: str = ""
    epoch: int = 0
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Leg:
    """How a process ended (negative: by that signal), what it printed, and the places it went through."""

    status: int
    out: str
    err: str
    places: tuple[str, ...]


class Watch:
    """Counts the operations on files of the run below `runs`, and ends the process where it was told to."""

    def __init__(self, runs: Path, kill: Kill | None, log: Path) -> None:
        self._runs = str(runs.resolve())
        self._kill = kill
        self._seen = 0
        self._log = log.open("w", buffering=1)

    def reach(self, place: str, path: object) -> None:
        """Say that the process is at `place` with `path`."""
        path = Path(os.path.abspath(str(path)))
        if not str(path).startswith(self._runs):
            return
        self._seen += 1
        name = path.name if path.parent.name.startswith("head-") else f"{path.parent.name}/{path.name}"
        self._log.write(f"{place} {name}\n")
        kill = self._kill
        if kill is None or (self._seen != kill.number if kill.number else f"{place} {name}" != kill.place):
            return
        if not kill.number and self._epochs(path) < kill.epoch:
            return
        self._kill = None
        if kill.signal:
            os.kill(os.getpid(), kill.signal)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    def _epochs(self, path: Path) -> int:
        run = next(parent for parent in [path, *path.parents] if parent.parent == Path(self._runs))
        history = run / "history.jsonl"
        return history.read_bytes().count(b"\n") if history.exists() else 0

    def install(self) -> None:
        """Wrap what the trainer writes with."""
        import safetensors.torch
        import torch

        from train.loop import trainer as loop
        from train.runs import checkpoint
        from train.runs.directory import RunDirectory

        def write(path: Path, data: bytes, mode: str) -> None:
            self.reach("before write", path)
            with path.open(mode) as stream:
                stream.write(data[: len(data) // 2])
                stream.flush()
                self.reach("half-way through", path)
                stream.write(data[len(data) // 2 :])

        def save_file(tensors: Any, path: Path) -> None:
            write(path, safetensors.torch.save(tensors), "wb")

        original = torch.save

        def torch_save(state: Any, path: Any, **options: Any) -> None:
            if not isinstance(path, Path):  # a message to another rank
                return original(state, path, **options)
            buffer = io.BytesIO()
            original(state, buffer)
            return write(path, buffer.getvalue(), "wb")

        def write_text(path: Path, text: str, *_: Any, **__: Any) -> int:
            write(path, text.encode(), "wb")
            return len(text)

        def append_history(run: Any, line: dict[str, Any]) -> None:
            write(run.history, (json.dumps(line) + "\n").encode(), "ab")

        checkpoint.save_file = save_file
        torch.save = torch_save
        Path.write_text = write_text  # type: ignore[method-assign, assignment]
        RunDirectory.append_history = append_history  # type: ignore[method-assign]
        Path.rename = self._around(Path.rename, "rename")  # type: ignore[method-assign]
        shutil.rmtree = self._around(shutil.rmtree, "remove")  # type: ignore[assignment]
        checkpoint.sync = loop.sync = self._around(checkpoint.sync, "sync")

    def _around(self, original: Callable[..., Any], word: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            self.reach(f"before {word}", path)
            result = original(path, *args, **options)
            self.reach(f"after {word}", path)
            return result

        return call


def run_leg(cwd: Path, arguments: list[str], kill: Kill | None = None) -> Leg:
    """`python -m train ARGUMENTS` in a process of its own, ended at `kill` if it gets there."""
    log = cwd / "leg"
    process = _CONTEXT.Process(target=_train, args=(cwd, arguments, kill, log))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join(TIMEOUT_S)
        raise AssertionError(f"{arguments} was not over after {TIMEOUT_S} s")
    assert process.exitcode is not None
    return _read_leg(process.exitcode, log)


def run_torchrun_leg(
    cwd: Path, arguments: list[str], kill: Kill | None = None, *, first: Sequence[tuple[Path, list[str]]] = ()
) -> Leg:
    """The same on two ranks under torchrun; rank 0, which writes the files, is the one that is killed.

    Args:
        cwd, arguments, kill: as for one process.
        first: working directories and arguments of commands that the same job runs before, since its start costs more.
    """
    log = cwd / "leg"
    launch = [sys.executable, "-m", "extract.launch", "--standalone", "--nproc-per-node=2", __file__]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    job = json.dumps(
        {"commands": [*first, (cwd, arguments)], "kill": kill and asdict(kill), "log": str(log)}, default=str
    )
    done = subprocess.run([*launch, job], cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    log.with_suffix(".out").write_text(done.stdout)
    log.with_suffix(".err").write_text(done.stderr)
    return _read_leg(done.returncode, log)


def _read_leg(status: int, log: Path) -> Leg:
    out, err = log.with_suffix(".out").read_text(), log.with_suffix(".err").read_text()
    return Leg(status, out, err, tuple(log.read_text().splitlines()))


def _train(cwd: Path, arguments: list[str], kill: Kill | None, log: Path) -> None:
    """The child's part."""
    from train.__main__ import run

    os.chdir(cwd)
    sys.argv = ["train", *arguments]
    with log.with_suffix(".out").open("w", buffering=1) as out, log.with_suffix(".err").open("w", buffering=1) as err:
        with redirect_stdout(out), redirect_stderr(err):
            Watch(cwd / "runs", kill, log).install()
            try:
                run()
            except SystemExit as end:  # its message would go to the parent's stderr
                if isinstance(end.code, str):
                    print(end.code, file=err)
                    sys.exit(1)
                raise


def make_cache(folder: Path, seed: int) -> Path:
    """A small cache below `folder`; made once."""
    if not (folder / "cache" / "current").exists():
        plant_tiles(folder / "tiles", scenes=6, per_scene=8, seed=seed)
        extract_cache(folder / "tiles", folder / "cache", make_checkpoint(folder / "checkpoint", seed=seed))
    return folder / "cache"


def head_arguments(cache: Path, epochs: int) -> list[str]:
    """A head with dropout, whose draws a resumed run has to repeat."""
    return ["head", "--cache", str(cache), "--epochs", str(epochs), "--batch-size", str(BATCH), "--device", "cpu"]


def assert_same_run(run: Path, whole: Path) -> None:
    """Byte for byte: history, metrics and weights.

    Raises:
        AssertionError: naming the file that differs.
    """
    for name in ("history.jsonl", "metrics.json", "best/model.safetensors", "last/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{run / name} differs from {whole / name}"
    assert (run / "report.html").is_file()
    left = [path.name for path in run.rglob("*") if path.name.endswith((".tmp", ".old", ".damaged"))]
    assert not left, f"{run} still holds {left}"


def count_saved(run: Path) -> int:
    """Whole lines of the history."""
    history = run / "history.jsonl"
    return history.read_bytes().count(b"\n") if history.exists() else 0


def run_trainer_kills(folder: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kill one training run `kills` times at moments drawn from its own file operations, and resume it each time.

    Args:
        folder: empty, to work in.
        kills: in all; from 10 on a fifth of them end a torchrun job of two ranks.
        seed: of the moments and of the data.

    Returns:
        `{"fault", "tried", "survived"}` for each kind of kill; survived: the next process went on after it, having lost
        at most the epoch in hand.

    Raises:
        AssertionError: a kill cost more than that, or the end is not that of an undisturbed run.
    """
    cache = make_cache(folder, seed)
    by_torchrun = kills // _TORCHRUN_LEGS if kills >= 10 else 0
    rows = _kill_one_run(folder / "one", cache, kills - by_torchrun, seed, run_leg, "trainer")
    if by_torchrun:
        rows += _kill_one_run(folder / "two", cache, by_torchrun, seed, run_torchrun_leg, "trainer on two ranks")
    return rows


def run_named_kills(folder: Path, first: Sequence[str], later: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Kill one training run at each place in turn; each process goes on from where the one before it ended.

    Args:
        folder: empty, to work in.
        first: places of the first save, see `FIRST_SAVE`.
        later: places of the saves that follow, see `LATER_SAVES`.
        seed: of the data.

    Returns:
        `{"fault", "tried", "survived"}` for each place.

    Raises:
        AssertionError: a kill cost more than the epoch in hand, or the end is not that of an undisturbed run.
    """
    cache, places = make_cache(folder, seed), [*first, *later]
    arguments = whole_arguments = head_arguments(cache, len(later) + 5)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    run = folder / "killed" / "runs" / "head"
    for number, place in enumerate(places):
        leg = run_leg(folder / "killed", arguments, Kill(place=place, epoch=max(0, number - len(first))))
        where = f"{place} (seed {seed})"
        assert leg.status == -signal.SIGKILL, f"{where}: {leg.status} {leg.err}"
        assert leg.places[-1] == place
        saved = _assert_goes_on(run, where)
        assert saved == 0 or number >= len(first), f"{where}: {saved} epochs were saved before the first was"
        assert place != "after rename last" or not (run / "last").exists()
        arguments = ["head", "--resume", "--device", "cpu"]
    for name, last in (("whole", whole_arguments), ("killed", arguments)):
        leg = run_leg(folder / name, last)
        assert leg.status == 0, leg.err
    assert_same_run(run, folder / "whole" / "runs" / "head")
    return [{"fault": f"trainer: SIGKILL {place}", "tried": 1, "survived": 1} for place in places]


def _kill_one_run(
    folder: Path, cache: Path, kills: int, seed: int, run: Callable[..., Leg], title: str
) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    arguments = head_arguments(cache, EPOCHS_A_KILL * kills)
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
    whole = run(folder / "whole", arguments)
    assert whole.status == 0, whole.err
    an_epoch = len(whole.places) // (EPOCHS_A_KILL * kills)
    work = folder / "killed"
    tried = {signal.SIGKILL: 0, signal.SIGTERM: 0}
    leg_arguments = arguments
    for number in range(kills):
        how = signal.SIGTERM if number % 4 == 3 else signal.SIGKILL
        # Past the operations by which a run is opened, so that the first kill leaves one to resume.
        first = 8 if number == 0 else 1
        kill = Kill(number=draw.randint(first, first + (EPOCHS_A_KILL - 1) * an_epoch), signal=how)
        leg = run(work, leg_arguments, kill)
        where = f"kill {number} (seed {seed}): {kill}, {leg.places[-1:]}"
        assert len(leg.places) >= kill.number, f"{where}: it was over before: {leg.status} {leg.err}"
        assert leg.status != 0, where
        assert "Traceback" not in leg.err, leg.err
        if how == signal.SIGTERM:
            # The latter by a run that is told while it opens: nothing is changed by then.
            assert re.search(r"stopped by SIGTERM(: \d| before the run began\n)", leg.err), f"{where}: {leg.err}"
        tried[how] += 1
        leg_arguments = ["head", "--resume", "--device", "cpu"]
        _assert_goes_on(work / "runs" / "head", where)
    last = run(work, leg_arguments)
    assert last.status == 0, last.err
    assert_same_run(work / "runs" / "head", folder / "whole" / "runs" / "head")
    fault = f"{title}: {{}} at a file operation"
    return [{"fault": fault.format(how.name), "tried": n, "survived": n} for how, n in tried.items() if n]


def _assert_goes_on(run: Path, where: str) -> int:
    """At most the epoch in hand is lost: of the lines in the history all but the last have a whole checkpoint.

    Returns:
        how many epochs are saved.
    """
    from train.errors import CheckpointError
    from train.runs.resume import load_last

    try:
        epoch = load_last(run.resolve())[0].meta.epoch
    except CheckpointError:
        epoch = 0
    assert epoch >= count_saved(run) - 1, f"{where}: {count_saved(run)} epochs were done, {epoch} are saved"
    return epoch


def _main() -> None:
    """One rank of a torchrun job: the commands one after the other, the last as its user would have it."""
    from cache_schema import TileprobeError
    from extract.ranks.group import ToldByMainError
    from train.__main__ import main, run

    job, rendezvous = json.loads(sys.argv[1]), dist.rendezvous
    for number, (cwd, arguments) in enumerate(job["commands"], start=1):

        def set_apart(*args: Any, number: int = number, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
            """A process group leaves its keys in torchrun's store, and the next must not find them."""
            store, rank, world_size = next(rendezvous(*args, **options))
            yield dist.PrefixStore(str(number), store), rank, world_size

        dist.rendezvous = set_apart
        os.chdir(cwd)
        if number < len(job["commands"]):
            try:
                main(arguments, prog_name="python -m train", standalone_mode=False)
            except ToldByMainError:
                print("told by rank 0", file=sys.stderr)
            except TileprobeError as error:
                print(f"error: {error}", file=sys.stderr)
    if os.environ["RANK"] == "0":
        Watch(Path("runs"), job["kill"] and Kill(**job["kill"]), Path(job["log"])).install()
    sys.argv = ["train", *arguments]
    run()


if __name__ == "__main__":
    _main()
