"""Main memory: what a process could take of it."""

import ctypes
import os
from pathlib import Path

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""As mallopt(3) numbers them."""
_KEPT = 1 << 30


def find_free_memory() -> int:
    """Bytes of main memory that this process could take: what the system has, or its container is allowed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    group = Path("/sys/fs/cgroup")
    try:
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or one without a limit ("max")
        return free


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for what is next asked for, up to 1 GiB; nothing where it is not glibc's.

    By itself it maps what is over 32 MiB anew each time, as the widest activations of a batch are: on a virtual machine
    whose fresh pages took 4 us each that was a tenth of a forward pass. A process grows by a few such activations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # An older glibc refuses such a threshold. Asked for the second alone, it would no longer adapt the first.
    if mallopt and mallopt(_M_MMAP_THRESHOLD, _KEPT):
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
