"""`make ladder`: run the trainer once per rung, and compare what the more expensive models gained.

Every rung is a separate process, so that its time and memory can be measured. The ladder's directory holds

    ladder.json                     settings, the state of each rung, and at the end the table
    ladder.png                      quality against cost
    linear -> linear-001, …         the rungs' runs, each with a log of what it printed, linear.log
    lock                            held while a rung runs, even if the ladder itself was killed
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import torch
from tqdm import tqdm

from cache_schema import open_cache
from cache_schema.cli.settings import isolate
from cache_schema.storage.place import is_bucket
from extract.ranks.group import shows_bars
from extract.ranks.signals import Stopped, act_on_signals
from train.errors import TrainError
from train.runs.directory import RunDirectory

from .rungs import LINEAR, MLP, NEIGHBOURS, Leg, Record, Rung, choose_rungs

LADDER = "ladder.json"


@dataclass(frozen=True)
class LadderConfig:
    """Settings of a ladder.

    Attributes:
        shared: command-line options of every rung, with the cache.
        head: further options of rungs on cached vectors.
        finetune: further options of rungs that train layers.
    """

    cache: str
    rungs: str
    shared: Sequence[str]
    head: Sequence[str]
    finetune: Sequence[str]


def run_ladder(link: str, config: LadderConfig | None, nproc: int | None) -> None:
    """Run every rung, then print the table and what was gained.

    Args:
        link: link to the newest ladder, `runs/ladder` -> `runs/ladder-001`.
        config: None resumes the newest ladder.
        nproc: ranks per rung; None for one per GPU.

    Raises:
        TrainError: a rung failed; the table shows the others.
        Stopped: SIGTERM or SIGINT came; finished rungs are kept, and the current one saved its state.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError("a ladder is one process that starts the ranks of its rungs: run it alone, with --nproc")
    if is_bucket(link):
        raise TrainError(f"{link}: a ladder must be on this machine: choose a local RUN")
    nproc = nproc or max(1, torch.cuda.device_count())
    ladder = Ladder.begin(link, config, nproc) if config else Ladder.reopen(link, nproc)
    with ladder.locked():
        ladder.run()
        ladder.report()


class Ladder:
    """A ladder in its directory, with a record of each rung, cheapest first, and `nproc` ranks for a rung."""

    def __init__(self, run: RunDirectory, config: LadderConfig, records: Sequence[Record], nproc: int) -> None:
        self._run, self._config, self._records, self._nproc = run, config, records, nproc
        self._lock: IO[str] | None = None
        self._child: int | None = None
        self._signal: int | None = None
        self._forwarded = False

    @classmethod
    def begin(cls, link: str, config: LadderConfig, nproc: int) -> Self:
        """Create a new ladder; write nothing if the rungs or the cache are unusable."""
        depth = open_cache(config.cache, allow_unsealed="--allow-unsealed" in config.shared).provenance.depth
        rungs, notes = choose_rungs(config.rungs, depth)
        ladder = cls(RunDirectory.create(link), config, [Record(rung) for rung in rungs], nproc)
        ladder._write()
        for note in notes:
            print(note)
        print(f"{len(rungs)} rungs: {', '.join(rung.title for rung in rungs)}; files go to {ladder._run}", flush=True)
        return ladder

    @classmethod
    def reopen(cls, link: str, nproc: int) -> Self:
        """Open the newest ladder to resume it."""
        if not Path(link, LADDER).is_file():
            raise TrainError(f"no ladder at {link}: start one without --resume, or check RUN")
        run = RunDirectory(Path(os.path.realpath(link)))
        try:
            stored = run.read_json(LADDER)
            config = LadderConfig(**{name: stored["settings"][name] for name in LadderConfig.__dataclass_fields__})
            records = [Record.from_json(line) for line in stored["rungs"]]
        except (KeyError, TypeError) as error:
            raise TrainError(f"{run}/{LADDER} was written by another release: {error}: start a new ladder") from error
        return cls(run, config, records, nproc)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory. Rungs inherit the lock, since one that outlives its ladder still writes there."""
        with (self._run.path / "lock").open("w") as self._lock:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                pids = [str(r.legs[-1].pid) for r in self._records if r.state == "running" and r.legs]
                raise TrainError(
                    f"{self._run} is in use by a ladder, or by a rung that outlived one (process "
                    f"{', '.join(pids) or 'unknown'}): wait until it has ended, or end it"
                ) from error
            yield

    def run(self) -> None:
        """Run every rung that is not finished.

        Raises:
            Stopped: SIGTERM or SIGINT came.
        """
        self._count_lost_legs()
        done = [record for record in self._records if record.state == "finished"]
        if done:
            print(f"kept, since they are finished: {', '.join(record.rung.title for record in done)}", flush=True)
        total, hidden = len(self._records), not shows_bars()
        with act_on_signals(self._forward), tqdm(total=total, initial=len(done), unit="rung", disable=hidden) as bar:
            for record in self._records:
                if record.state == "finished":
                    continue
                bar.set_description(record.rung.title)
                self._run_rung(record)
                if self._signal is not None:
                    break
                outcome = f" failed: {record.error}" if record.error else f": {record.wall_s:.0f} s"
                bar.write(record.rung.title + outcome, file=sys.stdout)
                bar.update()
        if self._signal is not None:
            finished = sum(record.state == "finished" for record in self._records)
            stop = Stopped(self._signal)
            print(
                f"stopped by {stop}: {finished} of {len(self._records)} rungs of {self._run} are finished; "
                "--resume continues from there",
                file=sys.stderr,
                flush=True,
            )
            raise stop

    def report(self) -> None:
        """Print and write the table of the finished rungs.

        Raises:
            TrainError: some rungs failed.
        """
        # Imported late: a child process begins with the peak memory of its parent.
        from .table import summarise

        finished = [record for record in self._records if record.state == "finished"]
        failed = [record for record in self._records if record.state == "failed"]
        if finished:
            results, text = summarise(self._run, finished)
            self._write(results)
            print(f"\n{text}\nladder: {self._run} ({LADDER}, ladder.png, a run and its log of every rung)")
        if failed:
            reasons = "; ".join(f"{record.rung.title}: {record.error}" for record in failed)
            raise TrainError(
                f"{len(failed)} of {len(self._records)} rungs failed ({reasons}): see the logs in {self._run}, fix "
                "the cause, and continue with --resume"
            )

    def _run_rung(self, record: Record) -> None:
        """Run one rung to its end and store the outcome in its record."""
        if record.rung.unfreeze and not (self._run.path / MLP / "metrics.json").is_file():
            record.state, record.error = "failed", "not run, since there is no MLP head to start from"
            self._write()
            return
        log = self._run.path / f"{record.rung.name}.log"
        command = self._make_command(record.rung)
        with log.open("ab") as stream:
            start = stream.tell()
            stream.write(f"$ {shlex.join(command)}\n".encode())
            stream.flush()
            self._follow(record, command, stream)
        status = record.legs[-1].status
        if self._signal is not None:
            record.state = "waiting"
        elif status == 0:
            record.state, record.error = "finished", None
        else:
            record.state, record.error = "failed", _explain(status, log, start)
        self._write()

    def _follow(self, record: Record, command: Sequence[str], log: IO[bytes]) -> None:
        """Start a process, wait for it, and record its time and memory."""
        assert self._lock is not None
        began, clock = time.time(), time.perf_counter()
        # In a separate session, so that only the ladder receives Ctrl-C, and passes it on once.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[self._lock.fileno()],
            env=isolate(os.environ),
        )
        self._child = process.pid
        leg = Leg(process.pid, began)
        record.state = "running"
        record.legs.append(leg)
        self._write()
        self._signal_child()  # for a signal that came before the child existed
        _, code, usage = os.wait4(process.pid, 0)
        self._child = None
        leg.status = process.returncode = os.waitstatus_to_exitcode(code)
        leg.seconds = time.perf_counter() - clock
        leg.peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _make_command(self, rung: Rung) -> list[str]:
        """Make the trainer's command line for one rung, resuming its run if there is one."""
        config, place = self._config, self._run.path / rung.name
        options = ["--run-dir", os.path.relpath(place), *config.shared]
        if rung.unfreeze:
            head = os.path.relpath(self._run.path / MLP)
            command = ["finetune", "--unfreeze", str(rung.unfreeze), "--head-run", head, *options, *config.finetune]
        elif rung.name == NEIGHBOURS:
            command = ["neighbours", *options, *config.head]
        else:
            command = ["head", "--head", "linear" if rung.name == LINEAR else "mlp", *options, *config.head]
        # The search for neighbours takes seconds and cannot be resumed.
        if rung.name != NEIGHBOURS and (place / "config.json").is_file():
            command.append("--resume")
        launch = ["-m", "extract.launch", f"--nproc-per-node={self._nproc}", "--standalone"]
        alone = self._nproc == 1 or rung.name == NEIGHBOURS
        return [sys.executable, *([] if alone else launch), "-m", "train", *command]

    def _count_lost_legs(self) -> None:
        """Take the last change of the log as the end of each leg that outlived the ladder."""
        for record in self._records:
            for leg in record.legs:
                if leg.seconds is None:
                    log = self._run.path / f"{record.rung.name}.log"
                    leg.seconds = max(0.0, log.stat().st_mtime - leg.began) if log.exists() else 0.0

    def _write(self, results: Mapping[str, Any] | None = None) -> None:
        settings = {**self._config.__dict__, "nproc": self._nproc}
        records = [record.to_json() for record in self._records]
        self._run.write_json(LADDER, {"settings": settings, "rungs": records, **(results or {})})

    def _forward(self, number: int) -> None:
        """Stop the current rung."""
        self._signal = number
        self._signal_child()

    def _signal_child(self) -> None:
        """Pass a signal on, but only once: a second one would kill the trainer before it can save."""
        if self._signal is not None and self._child is not None and not self._forwarded:
            self._forwarded = True
            os.kill(self._child, signal.SIGTERM)


def _explain(status: int | None, log: Path, start: int) -> str:
    """Return one line on why a process failed.

    That is the signal that ended it, or the last `error: ` line of its log after byte `start`, or its last line.
    """
    if status is not None and status < 0:
        return f"ended by {signal.Signals(-status).name}"
    with log.open("rb") as stream:
        stream.seek(start)
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines()[1:]]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(reversed(errors or [line for line in lines if line]), f"ended with status {status}")
