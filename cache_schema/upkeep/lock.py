"""Who writes to a version: one small object beside it, so that a second extraction is told.

It is advice. What keeps two writers from harming each other are the digests, so an owner that is lost is no error.
No clock is compared with another machine's: an owner lives while its heartbeat changes.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cache_schema.errors import OwnedError, StorageError
from cache_schema.storage.objects import Slot, Stored, open_slot

SUFFIX = ".owner"
_RELEASE_S = 5.0
"""How long the end of a run may wait for its object to go; a process told to stop has ten seconds."""


@dataclass(frozen=True)
class Pace:
    """Seconds between two heartbeats, between two looks at another's, and without one until it is taken over."""

    beat_s: float = 15.0  # a bucket takes about one write a second to an object
    look_s: float = 3.0
    stale_s: float = 120.0


PACE = Pace()


@dataclass(frozen=True)
class Owner:
    """A process that writes to a version.

    Attributes:
        token: of this one take-over; no two are the same.
        job: torchrun's id of the job, the same after its restarts; None without one.
        host: its name, for people.
        machine: the kernel and its namespace of process ids, empty where unknown; pids are comparable within.
        pid: of the process.
        born: when the process started, in the kernel's ticks; tells a pid from its next use.
        since: for people, UTC.
        beats: heartbeats so far.
    """

    token: str
    job: str | None
    host: str
    machine: str
    pid: int
    born: int
    since: str
    beats: int = 0

    @classmethod
    def make(cls, job: str | None = None) -> "Owner":
        """This process."""
        pid, now = os.getpid(), datetime.now(UTC).isoformat(" ", "seconds")
        return cls(uuid.uuid4().hex, job, socket.gethostname(), _name_machine(), pid, _find_birth(pid) or 0, now)

    @classmethod
    def parse(cls, data: bytes) -> "Owner | None":
        """The owner an object names; None if this program cannot read it, and then only its changes say something."""
        try:
            owner = cls(**json.loads(data))
        except (ValueError, TypeError):
            return None
        text = (owner.token, owner.host, owner.machine, owner.since)
        numbers = (owner.pid, owner.born, owner.beats)
        whole = all(type(value) is str for value in text) and all(type(value) is int for value in numbers)
        return owner if whole and 0 < owner.pid < 2**31 else None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since.removesuffix('+00:00')} UTC"

    def is_alive(self, me: "Owner") -> bool | None:
        """Whether it still writes as far as `me` can tell at once; None if only its heartbeat can.

        What an earlier run of the same process left, or one that the same torchrun has restarted since, is not alive.
        """
        if self.machine and self.machine == me.machine:
            return self.pid != me.pid and _is_running(self.pid, self.born)
        return False if self.job is not None and self.job == me.job else None


@contextmanager
def own_version(
    url: str,
    version_id: str,
    *,
    job: str | None = None,
    pace: Pace = PACE,
    say: Callable[[str], None] = print,
) -> Iterator[None]:
    """Own a version of the cache at `url` within the context; takes over from an owner that is gone.

    Args:
        url: directory or `gs://bucket/prefix`.
        version_id: of a version, which need not exist yet.
        job: torchrun's id of this job.
        pace: for tests.
        say: takes a line for the user.

    Raises:
        OwnedError: another process writes to it; says which.
        StorageError: the disk or the bucket refuses.
    """
    slot = open_slot(url, version_id + SUFFIX)
    heart = _Heart(slot, *_acquire(slot, version_id, Owner.make(job), pace, say), pace.beat_s)
    heart.start()
    try:
        yield
    finally:
        heart.stop()


def find_owner(url: str, version_id: str, *, pace: Pace = PACE, say: Callable[[str], None] = print) -> str | None:
    """Name the process that writes to a version, None if there is none; may take `pace.stale_s` to be sure.

    Raises:
        StorageError: the disk or the bucket refuses.
    """
    slot = open_slot(url, version_id + SUFFIX)
    found = slot.read()
    return _find_life(slot, found, version_id, Owner.make(), pace, say) if found else None


def _acquire(slot: Slot, version_id: str, me: Owner, pace: Pace, say: Callable[[str], None]) -> tuple[Owner, Stored]:
    """Put `me` where nobody is, or over one that is gone; of two that come late the second finds the first."""
    while True:
        found = slot.read()
        if found and (alive := _find_life(slot, found, version_id, me, pace, say)):
            raise OwnedError(
                f"version {version_id} is being written by {alive}: let it finish, or end it; "
                "then the same command goes on from there"
            )
        if mine := _put(slot, me, found):
            if found:
                say(f"{_describe(found)} is gone: version {version_id} is taken over from it")
            return me, mine


def _find_life(
    slot: Slot, found: Stored, version_id: str, me: Owner, pace: Pace, say: Callable[[str], None]
) -> str | None:
    """Name the process in `found` if it lives; None if it is gone, or has ended meanwhile."""
    owner = Owner.parse(found.data)
    alive = owner.is_alive(me) if owner else None
    if alive is not None:
        return _describe(found) if alive else None
    say(f"version {version_id} was being written by {_describe(found)}: waiting {pace.stale_s:.0f} s for its heartbeat")
    deadline = time.monotonic() + pace.stale_s
    while time.monotonic() < deadline:
        time.sleep(pace.look_s)
        now = slot.read()
        if now is None:
            return None
        if now.data != found.data:
            return _describe(now)
    return None


def _put(slot: Slot, me: Owner, over: Stored | None) -> Stored | None:
    """Write `me` over what was found; None if something else is there by now."""
    if mine := slot.put(me.to_bytes(), over):
        return mine
    # Of a write that was refused on its repetition, only the object tells that it was done.
    found = slot.read()
    owner = Owner.parse(found.data) if found else None
    return found if owner and owner.token == me.token else None


class _Heart:
    """Writes the heartbeat, and removes the object at the end.

    All of it in a thread that the process need not wait for: a bucket out of reach must not keep a run from ending.
    """

    def __init__(self, slot: Slot, me: Owner, stored: Stored, beat_s: float) -> None:
        self._slot, self._me, self._stored, self._beat_s = slot, me, stored, beat_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(_RELEASE_S)

    def _run(self) -> None:
        while not self._stopped.wait(self._beat_s):
            # While the bucket is out of reach, the run's own writes say so.
            with suppress(StorageError):
                if not self._beat():
                    return
        with suppress(StorageError):  # the next run finds this process gone
            self._slot.remove(self._stored)

    def _beat(self) -> bool:
        """Whether this process is the owner still."""
        self._me = replace(self._me, beats=self._me.beats + 1)
        if stored := _put(self._slot, self._me, self._stored):
            self._stored = stored
            return True
        found = self._slot.read()
        print(
            f"warning: {_describe(found) if found else 'nobody, its owner object was removed,'} has taken over what "
            "this run writes; both go on, and no block is trusted that they mixed",
            file=sys.stderr,
            flush=True,
        )
        return False


def _describe(stored: Stored) -> str:
    return str(Owner.parse(stored.data) or "an owner that cannot be read")


def _name_machine() -> str:
    """The running kernel and this process's namespace of process ids: containers may share a host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_running(pid: int, born: int) -> bool | None:
    """Whether the process that was `born` then still runs; None where another user's processes are hidden."""
    birth = _find_birth(pid)
    if birth is not None:
        return birth == born
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return None


def _find_birth(pid: int) -> int | None:
    """When a process started, in ticks since the kernel did, 0 if it has ended; None if nothing is known about it."""
    try:
        # A command in parentheses, which may hold any character; then the state, and 18 fields on the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
