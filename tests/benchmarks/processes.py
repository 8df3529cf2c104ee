"""Processes of their own for what is measured, and what the system knows of them (Linux, `/proc`)."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_POLL_S = 0.05
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class PeakMemory:
    """Bytes resident at most: of the process that was started, and of the largest one of its tree."""

    main: int
    largest: int


def run_apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a module's function in a fresh process: no warm caches, no threads, no memory of another contender."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextmanager
def pin_to(cores: Sequence[int]) -> Iterator[None]:
    """Processes started meanwhile run on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def read_cpu_seconds(root: int) -> float:
    """User and system time so far of a process and of all that descend from it and are alive, to a hundredth."""
    ticks = 0
    for pid in _list_tree(root):
        stat = _read_stat(pid)
        ticks += int(stat[11]) + int(stat[12]) if stat else 0
    return ticks / _TICKS_PER_S


def read_memory(pid: int | str, field: str) -> int:
    """Bytes of `VmRSS` (resident now) or `VmHWM` (at most so far); 0 for a process that is gone."""
    try:
        status = Path("/proc", str(pid), "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), 0)


def watch_memory(process: subprocess.Popen[str]) -> PeakMemory:
    """Wait for a process to end. The system keeps each one's peak, so a late look misses nothing but short lives."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in _list_tree(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), read_memory(pid, "VmHWM"))
        time.sleep(_POLL_S)
    return PeakMemory(peaks[process.pid], max(peaks.values()))


def _list_tree(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        if stat := _read_stat(pid):
            children.setdefault(int(stat[1]), []).append(pid)
    found = [root]
    for pid in found:  # grows meanwhile
        found += children.get(pid, [])
    return found


def _read_stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (proc_pid_stat(5)); none for a process that is gone."""
    try:
        # The second one, the command's name, may hold spaces and brackets.
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
