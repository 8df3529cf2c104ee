"""Whether the other ranks are still there: each beats in the group's store, and is missed when it no longer does.

How long something takes does not tell a slow rank from one whose machine or cable is gone: rank 0 may list for half an
hour while the others wait, and of a peer that is switched off no connection says anything. The heartbeat does.
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
"""Seconds of silence after which a rank is lost, in the environment; make hands on what its command line sets."""
REMEDY = "once all machines and the network are there, the same command goes on, a trainer's with ARGS=--resume"
_TIMEOUT_S = 120.0  # as long as the owner of a cache may be silent; a machine that moves to another host is faster
_LOOKS = 20  # in that time; as many heartbeats
_LEFT = "left"


def read_peer_timeout() -> float:
    """Seconds of silence after which a rank is lost.

    Raises:
        ConfigError: the variable holds something else than a positive number.
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
    """End this process with one line if a peer is silent for so long within the context.

    Rank 0 watches all and the others rank 0, so that the store answers a number of requests that grows with the ranks,
    not with their pairs. A rank that leaves in order says so.

    Args:
        store: of the group, all of whose ranks call this.
        rank, world_size: of this process.
        timeout_s: seconds.
    """
    if world_size == 1:
        yield
        return
    # One for these threads alone: a store serves one caller at a time. torch's own stubs lack `clone`.
    own: dist.Store = store.clone()  # type: ignore[attr-defined]
    watch = _PeerWatch(own, rank, range(1, world_size) if rank == 0 else [0], timeout_s)
    watch.start()
    try:
        yield
        with suppress(dist.DistError):  # the store may have left with its rank already
            store.set(_name_key(rank), _LEFT)
    finally:
        watch.stop()


class _PeerWatch:
    """Two threads: one talks to the store, which may keep it waiting for a quarter of an hour; one counts meanwhile."""

    def __init__(self, store: dist.Store, rank: int, watched: Sequence[int], timeout_s: float) -> None:
        self._store, self._rank, self._timeout_s = store, rank, timeout_s
        self._keys = {peer: _name_key(peer) for peer in watched}
        self._last = dict.fromkeys(watched, "")
        # In looks, not in seconds: a process that was halted itself has heard nobody meanwhile.
        self._looks = 0
        self._heard: dict[int, float] = dict.fromkeys(watched, 0)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._count)]

    def start(self) -> None:
        self._beat(0)  # before anybody reads: the store waits for a key that is not there
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
        with suppress(dist.DistError):  # a store that is gone is silent
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
        """At once: the main thread may be in a call that waits for the very rank that is lost."""
        host = self._last[peer].partition(" ")[2]
        print(
            f"\nerror: rank {peer}{host and f' on {host}'} has not been heard of for {self._timeout_s:g} s "
            f"({VARIABLE}), so rank {self._rank} ends: {REMEDY}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _name_key(rank: int) -> str:
    return f"beat/{rank}"
