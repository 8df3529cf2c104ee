"""`python -m extract`, ended by a signal at a chosen operation of its store.

    ARMED='{"operation": "put", …}' torchrun … -m tests.faults.armed run …

The operations are the store's own; only the moment of the signal is chosen, so that a failure can be repeated.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from zarr.storage import LocalStore

import cache_schema.root
import extract.run  # noqa: F401  # for the processes that are forked from one which has loaded this module
from cache_schema.storage.gcs import GcsObjects
from cache_schema.storage.gcs_store import GcsStore
from extract.__main__ import run

ARMED = "ARMED"
BLOCK_ROWS = 16
"""Instead of 256, so that a few hundred tiles are enough for dozens of blocks."""


@dataclass(frozen=True)
class Charge:
    """Which signal goes to whom, and when.

    Attributes:
        marker: file that is made when it goes off, once for all ranks; see `Fired`.
        operation: of the store.
        key: regular expression for the keys that count.
        nth: goes off at the nth of those in a process.
        when: before the operation; during it, when a file is written but not renamed or an object is stored but not
            acknowledged; or after it.
        signal: its number.
        whom: the process itself, all ranks and their launcher, or the launcher alone.
    """

    marker: str
    operation: Literal["put", "get"]
    key: str = ""
    nth: int = 1
    when: Literal["before", "during", "after"] = "before"
    signal: int = 9
    whom: Literal["self", "all", "launcher"] = "self"


@dataclass(frozen=True)
class Fired:
    """What is noted in the marker.

    Attributes:
        key: of the operation.
        puts: that this process had begun before it.
        pids: all ranks and their launcher, or the process itself.
    """

    key: str
    puts: int
    pids: list[int]


def arm(charge: Charge | None) -> None:
    """Make this process end as `charge` says, and blocks small; ranks wait for one that is halted for seconds only."""
    cache_schema.root.choose_block_rows = lambda rows: BLOCK_ROWS  # type: ignore[assignment]
    if charge:
        if charge.signal == signal.SIGSTOP:
            os.environ["PEER_TIMEOUT"] = "20"
        _watch_stores(_Fuse(charge).note)


class _Fuse:
    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._lock = threading.Lock()
        self._met = self._puts = 0

    def note(self, operation: str, when: str, key: str) -> None:
        with self._lock:
            charge = self._charge
            if (operation, when) == (charge.operation, charge.when) and re.search(charge.key, key):
                self._met += 1
                if self._met == charge.nth:
                    self._fire(key)
            self._puts += (operation, when) == ("put", "before")

    def _fire(self, key: str) -> None:
        charge, launcher = self._charge, os.getppid()
        others = [] if charge.whom == "self" and "RANK" not in os.environ else [launcher, *_find_children(launcher)]
        try:
            with open(charge.marker, "x") as marker:
                json.dump(asdict(Fired(key, self._puts, others or [os.getpid()])), marker)
        except FileExistsError:  # another rank was first
            return
        targets = {"self": [os.getpid()], "launcher": [launcher], "all": others}[charge.whom]
        for pid in sorted(targets, key=lambda pid: pid == os.getpid()):
            os.kill(pid, charge.signal)


def _watch_stores(note: Callable[[str, str, str], None]) -> None:
    for store in (LocalStore, GcsStore):
        put, get = store.set, store.get

        async def set_(self: Any, key: str, value: Any, put: Any = put) -> None:
            note("put", "before", key)
            await put(self, key, value)
            note("put", "after", key)

        async def get_(self: Any, key: str, *args: Any, get: Any = get, **options: Any) -> Any:
            note("get", "before", key)
            found = await get(self, key, *args, **options)
            note("get", "after", key)
            return found

        store.set, store.get = set_, get_  # type: ignore[method-assign, assignment]
    write, replace = GcsObjects.write, Path.replace

    def write_(self: GcsObjects, key: str, data: bytes) -> None:
        write(self, key, data)
        note("put", "during", key)

    def replace_(self: Path, target: Any) -> Path:
        if self.suffix == ".partial":  # the name LocalStore writes to
            note("put", "during", str(target))
        return replace(self, target)

    GcsObjects.write = write_  # type: ignore[method-assign]
    Path.replace = replace_  # type: ignore[method-assign, assignment]


def _find_children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


if __name__ == "__main__":
    arm(Charge(**json.loads(os.environ[ARMED])) if ARMED in os.environ else None)
    sys.argv[0] = "extract"
    run()
