"""Detect dead ranks by a heartbeat that each rank writes to the group's store.

A timeout cannot tell a slow rank from a dead host: rank 0 may list for half an hour while the others wait, and a
powered-off peer leaves its sockets open. Heartbeats can.
"""

import math
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist

from extract.errors import ConfigError

VARIABLE = "PEER_TIMEOUT"
"""Environment variable: seconds without a heartbeat after which a rank is lost. make passes its own variable on."""
REMEDY = "once all machines and the network are up, run the same command again, a trainer's with ARGS=--resume"
_TIMEOUT_S = 120.0  # as for the owner of a cache; longer than the live migration of a virtual machine
_LOOKS = 20  # checks, and heartbeats, in that time
_LEFT = "left"


def read_peer_timeout() -> float:
    """Read the seconds without a heartbeat after which a rank is lost.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    text = os.environ.get(VARIABLE) or str(_TIMEOUT_S)
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise ConfigError(f"{VARIABLE}={text}: give seconds, more than 0; {_TIMEOUT_S:.0f} where it is not set")


@contextmanager
def watch_peers(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> Iterator[None]:
    """While the context runs, end this process with one line if a peer sends no heartbeat for `timeout_s` seconds.

    All ranks must call this. Rank 0 watches all others, and they watch rank 0, so that requests to the store grow with
    the number of ranks, not of pairs. A rank that leaves the context normally announces it.
    """
    if world_size == 1:
        yield
        return
    # A separate connection for these threads: a store serves one caller at a time. torch's stubs lack `clone`.
    own: dist.Store = store.clone()  # type: ignore[attr-defined]
    watch = _PeerWatch(own, rank, range(1, world_size) if rank == 0 else [0], timeout_s)
    watch.start()
    try:
        yield
        with suppress(dist.DistError):  # the rank that hosts the store may have left already
            store.set(_name_key(rank), _LEFT)
    finally:
        watch.stop()


class _PeerWatch:
    """Two threads: one talks to the store, which may block for a quarter of an hour, while the other counts."""

    def __init__(self, store: dist.Store, rank: int, watched: Sequence[int], timeout_s: float) -> None:
        self._store, self._rank, self._timeout_s = store, rank, timeout_s
        self._keys = {peer: _name_key(peer) for peer in watched}
        self._last = dict.fromkeys(watched, "")
        # Counted in checks, not seconds: a process that was suspended itself could not hear its peers.
        self._looks = 0
        self._heard: dict[int, float] = dict.fromkeys(watched, 0)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._count)]

    def start(self) -> None:
        self._beat(0)  # before any rank reads it: the store blocks on a missing key
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _beat(self, number: int) -> None:
        self._store.set(_name_key(self._rank), f"{number} {socket.gethostname()}")

    def _talk(self) -> None:
        beats = 0
        with suppress(dist.DistError):  # without a store, no more heartbeats arrive
            while not self._stopped.wait(self._timeout_s / _LOOKS):
                self._beat(beats := beats + 1)
                for peer, value in zip(self._keys, self._store.multi_get(list(self._keys.values())), strict=True):
                    text = value.decode()
                    if text != self._last[peer]:
                        self._last[peer], self._heard[peer] = text, math.inf if text == _LEFT else self._looks

    def _count(self) -> None:
        while not self._stopped.wait(self._timeout_s / _LOOKS):
            self._looks += 1
            peer = min(self._heard, key=lambda peer: self._heard[peer])
            if self._looks - self._heard[peer] > _LOOKS:
                self._end(peer)

    def _end(self, peer: int) -> None:
        """Exit at once: the main thread may be blocked in a call that waits for the lost rank."""
        host = self._last[peer].partition(" ")[2]
        print(
            f"\nerror: rank {peer}{host and f' on {host}'} has not been heard of for {self._timeout_s:g} s "
            f"({VARIABLE}), so rank {self._rank} exits: {REMEDY}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _name_key(rank: int) -> str:
    return f"beat/{rank}"
