"""Run measured code in separate processes, and read their memory and CPU time (Linux, `/proc`)."""

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
    """Peak resident bytes of the started process, and of the largest process in its tree."""

    main: int
    largest: int


def run_apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a module's function in a new process, without warm caches, threads or memory of other contenders."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextmanager
def pin_to(cores: Sequence[int]) -> Iterator[None]:
    """Restrict processes started in this context to these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def read_cpu_seconds(root: int) -> float:
    """Return user plus system seconds of a process and its living descendants, to a hundredth."""
    ticks = 0
    for pid in _list_tree(root):
        stat = _read_stat(pid)
        ticks += int(stat[11]) + int(stat[12]) if stat else 0
    return ticks / _TICKS_PER_S


def read_memory(pid: int | str, field: str) -> int:
    """Return bytes of `VmRSS` (resident now) or `VmHWM` (peak so far); 0 if the process has ended."""
    try:
        status = Path("/proc", str(pid), "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), 0)


def watch_memory(process: subprocess.Popen[str]) -> PeakMemory:
    """Wait for a process to end, polling peaks. The system keeps peaks, so only short-lived processes are missed."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in _list_tree(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), read_memory(pid, "VmHWM"))
        time.sleep(_POLL_S)
    return PeakMemory(peaks[process.pid], max(peaks.values()))


def _list_tree(root: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        if stat := _read_stat(pid):
            children.setdefault(int(stat[1]), []).append(pid)
    found = [root]
    for pid in found:  # `found` grows during the loop
        found += children.get(pid, [])
    return found


def _read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on (proc_pid_stat(5)); none if the process has ended."""
    try:
        # The second field, the command's name, may contain spaces and brackets.
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
