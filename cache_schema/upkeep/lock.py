"""The lock of a version: a small object next to it that names the process that writes, so that a second one stops.

The lock is advisory. Digests protect against two writers, so losing the lock is no error. Clocks of different machines
are never compared: an owner is alive while its heartbeat changes.
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
from cache_schema.storage.objects import Objects, open_objects
from cache_schema.storage.place import Stored

SUFFIX = ".owner"
_DEADLINE_S = 60.0
"""A bucket that does not answer for so long counts as unreachable."""
_RELEASE_S = 5.0
"""How long the end of a run waits for its object to be deleted; a process that is told to stop has ten seconds."""


@dataclass(frozen=True)
class Pace:
    """Seconds between heartbeats, between two checks of another process's, and until a silent one counts as gone."""

    beat_s: float = 15.0  # a bucket takes about one write a second to an object
    look_s: float = 3.0
    stale_s: float = 120.0


PACE = Pace()


@dataclass(frozen=True)
class Owner:
    """A process that writes to a version.

    Attributes:
        token: unique to each acquisition of the lock.
        job: torchrun's id of the job, the same after restarts; None without torchrun.
        host: name, for people.
        machine: kernel and its namespace of process ids, within which pids can be compared; empty if unknown.
        pid: process id.
        born: when the process started, in ticks of the kernel; distinguishes processes that reuse a pid.
        since: when the lock was acquired (UTC), for people.
        beats: number of heartbeats.
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
        """Describe this process."""
        pid, now = os.getpid(), datetime.now(UTC).isoformat(" ", "seconds")
        return cls(uuid.uuid4().hex, job, socket.gethostname(), _name_machine(), pid, _find_birth(pid) or 0, now)

    @classmethod
    def parse(cls, data: bytes) -> "Owner | None":
        """Parse an owner object; None if this program cannot read it."""
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
        """Return whether the owner is alive, None if only its heartbeat can tell.

        Not alive is the object of an earlier run in this process, or of a process that the same torchrun restarted.
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
    """Hold the lock of a version of the cache at `url`; an owner that is gone is replaced.

    Args:
        url, version_id: the cache and the version, which need not exist yet.
        job: torchrun's id of this job.
        pace: for tests.
        say: gets lines for the user.

    Raises:
        OwnedError: another process writes to it; the message names it.
        StorageError: the disk or the bucket refuses.
    """
    lock = _Lock(open_objects(url, deadline_s=_DEADLINE_S), version_id, Owner.make(job), pace, say)
    mine, stopped = lock.acquire(), threading.Event()
    # A daemon: an unreachable bucket must not keep a run from ending.
    thread = threading.Thread(target=_keep, args=(lock, mine, stopped), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(_RELEASE_S)


def find_owner(url: str, version_id: str, *, pace: Pace = PACE, say: Callable[[str], None] = print) -> str | None:
    """Name the process that writes to a version, None if there is none; may take `pace.stale_s`.

    Raises:
        StorageError: the disk or the bucket refuses.
    """
    lock = _Lock(open_objects(url, deadline_s=_DEADLINE_S), version_id, Owner.make(), pace, say)
    found = lock.read()
    return lock.find_life(found) if found else None


@dataclass
class _Lock:
    """The owner object of one version, read and written by this process."""

    objects: Objects
    version_id: str
    me: Owner
    pace: Pace
    say: Callable[[str], None]

    def read(self) -> Stored | None:
        return self.objects.read(self.version_id + SUFFIX)

    def write(self, over: Stored | None) -> Stored | None:
        """Write this process's owner object over `over`; None if another one is there by now."""
        if mine := self.objects.replace(self.version_id + SUFFIX, self.me.to_bytes(), over):
            return mine
        # The write may have succeeded although its repetition was refused; the stored token tells.
        found = self.read()
        owner = Owner.parse(found.data) if found else None
        return found if owner and owner.token == self.me.token else None

    def acquire(self) -> Stored:
        """Write this process's owner object, unless another owner is alive.

        Raises:
            OwnedError: another process writes to the version.
        """
        while True:
            found = self.read()
            if found and (alive := self.find_life(found)):
                raise OwnedError(
                    f"version {self.version_id} is being written by {alive}: let it finish, or end it; "
                    "then the same command continues from there"
                )
            if mine := self.write(found):
                if found:
                    self.say(f"{_describe(found)} is gone: version {self.version_id} is taken over from it")
                return mine

    def find_life(self, found: Stored) -> str | None:
        """Name the process in `found` if it is alive; None if it is gone, or ended while this waited."""
        owner = Owner.parse(found.data)
        alive = owner.is_alive(self.me) if owner else None
        if alive is not None:
            return _describe(found) if alive else None
        stale_s = self.pace.stale_s
        self.say(
            f"version {self.version_id} was being written by {_describe(found)}: waiting {stale_s:.0f} s for its "
            "heartbeat"
        )
        deadline = time.monotonic() + stale_s
        while time.monotonic() < deadline:
            time.sleep(self.pace.look_s)
            now = self.read()
            if now is None:
                return None
            if now.data != found.data:
                return _describe(now)
        return None


def _keep(lock: _Lock, stored: Stored, stopped: threading.Event) -> None:
    """Write heartbeats over `stored` until `stopped` is set, then delete the owner object; end if it is lost."""
    while not stopped.wait(lock.pace.beat_s):
        with suppress(StorageError):  # if the bucket is unreachable, the run's own writes report it
            lock.me = replace(lock.me, beats=lock.me.beats + 1)
            if mine := lock.write(stored):
                stored = mine
                continue
            found = lock.read()
            taken = f"{_describe(found)} has taken over what this run writes" if found else ""
            print(
                f"warning: {taken or 'the lock of this run was removed'}; the run continues, and digests reject blocks "
                "that two writers mix",
                file=sys.stderr,
                flush=True,
            )
            return
    with suppress(StorageError):  # the next run sees that this process has ended
        lock.objects.delete(lock.version_id + SUFFIX, stored)


def _describe(stored: Stored) -> str:
    return str(Owner.parse(stored.data) or "an owner that cannot be read")


def _name_machine() -> str:
    """Name the running kernel and this process's namespace of process ids: containers may share a host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_running(pid: int, born: int) -> bool | None:
    """Return whether the process born at `born` still runs; None if processes of other users are hidden."""
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
    """Return when a process started, in ticks since the kernel did; 0 if it has ended, None if unknown."""
    try:
        # The command in parentheses may hold any character; after it come the state and, 19 fields on, the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
