"""Join the process group, run work on one rank or on all, and share atomic counters."""

import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist

from cache_schema import TileprobeError
from extract.errors import AgreementError, ConfigError

from .heartbeat import REMEDY, read_peer_timeout, watch_peers
from .same_job import NOTHING_ASKED, Asked, Member, decline, settle
from .signals import Stopped

_log = logging.getLogger(__name__)

T = TypeVar("T")

_HOST = torch.device("cpu")

Counter = Callable[[int], int]
"""`add(n)` adds n and returns the total of all ranks."""

GROUP_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for a live rank, mostly for rank 0 while it lists. `heartbeat` detects dead ranks."""

_DECLINE_TIMEOUT = timedelta(seconds=30)
"""How long a rank that fails before it has joined tries to inform the others."""
_STOP_PATIENCE_S = 10
"""How long rank 0 waits for the other ranks to stop; torchrun kills all of them after 30 s."""
_STOP_LOOK_S = 0.05

_arrived = threading.Event()
"""Set once this rank starts to join: from then on the others notice its end in other ways."""


class ToldByMainError(TileprobeError):
    """Rank 0 reports the error; this rank prints nothing."""


class PeerLostError(TileprobeError):
    """Another rank ended during a collective operation; that rank or torchrun prints the reason."""


def shows_bars() -> bool:
    """Return whether to show progress bars: not if the command is quiet or logs every batch."""
    return _log.getEffectiveLevel() == logging.WARNING


def get_job_id() -> str | None:
    """Return torchrun's id of this job, which stays the same after restarts; None if it has no unique id."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if job == "none" else job


def exit_with(error: TileprobeError) -> NoReturn:
    """Print the error in one line and exit with its status.

    The first rank to exit makes torchrun end the others on its node, so ranks without an error of their own wait, so
    that the failing rank's message prints first. A rank that fails before it has joined informs the other nodes.
    """
    if isinstance(error, (ToldByMainError, PeerLostError)):
        time.sleep(5)
    if not isinstance(error, ToldByMainError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    if not _arrived.is_set() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with suppress(RuntimeError):
            store, rank, _ = _open_store(_DECLINE_TIMEOUT)
            decline(dist.PrefixStore("agreement", store), rank, str(error))
    sys.exit(error.status)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        rank, world_size: position in the whole job.
        local_world_size: number of ranks on this machine.
        device: the device of this rank.
        store: the group's key-value store; its counters are atomic across ranks.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    store: dist.Store

    @classmethod
    def alone(cls, device: torch.device = _HOST) -> Self:
        """Make a single rank that needs no process group."""
        return cls(0, 1, 1, device, dist.HashStore())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def draws_bars(self) -> bool:
        """Return whether this rank draws progress bars."""
        return self.is_main and shows_bars()

    @property
    def cores(self) -> int:
        """This rank's share of the CPU cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size) if hasattr(os, "sched_getaffinity") else 1

    def choose_workers(self, asked: int | None) -> int:
        """Return the number of feed processes of this rank: as asked, else one per core but one."""
        return max(1, self.cores - 1) if asked is None else asked

    def run_on_main(self, work: Callable[[], T], tell: Callable[[T], T] = lambda result: result) -> T:
        """Run `work` on rank 0 and return its result on all ranks; a `TileprobeError` is raised on all.

        `tell` reduces the result to the part that the other ranks need.

        Raises:
            TileprobeError: on rank 0, the error of `work`; on the others `ToldByMainError`.
        """
        outcome: list[T | TileprobeError | None] = [None]
        with _caught(outcome):
            if self.is_main:
                result = work()
                outcome[0] = tell(result)
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        told = outcome[0]
        if isinstance(told, TileprobeError):
            raise told if self.is_main else ToldByMainError(str(told))
        return result if self.is_main else told  # type: ignore[return-value]

    def run_everywhere(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return each rank's own result; if one fails, all raise."""
        failure: list[TileprobeError | None] = [None]
        with _caught(failure):
            result = work()
        if first := next(filter(None, self._gather(failure[0])), None):
            raise first if self.is_main else ToldByMainError(str(first))
        return result

    def agree(self, holds: bool) -> bool:
        """Return whether `holds` is true on every rank."""
        return all(self._gather(holds))

    def _gather(self, value: T) -> list[T]:
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def say(self, line: str) -> None:
        """Print a line for the user, on rank 0 only."""
        if self.is_main:
            print(line, flush=True)

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def stop_together(self, patience_s: float = _STOP_PATIENCE_S) -> Iterator[None]:
        """Make rank 0 leave this context last when the job is told to stop.

        It waits for `patience_s` seconds at most: a rank on another machine may not have received the signal.
        """
        count_left = self.make_counter("left")
        try:
            yield
        except Stopped:
            deadline = time.monotonic() + patience_s
            with suppress(dist.DistError):  # the store may end before its ranks
                left = count_left(1)
                while self.is_main and left < self.world_size and time.monotonic() < deadline:
                    time.sleep(_STOP_LOOK_S)
                    left = count_left(0)
            raise
        else:
            count_left(1)

    def make_counter(self, name: str) -> Counter:
        """Make a counter shared by all ranks; its key holds a nonce, so that a restarted job counts from zero."""
        nonce = self.run_on_main(lambda: uuid.uuid4().hex)
        return lambda amount: self.store.add(f"{name}/{nonce}", amount)


@contextmanager
def _caught(outcome: list[Any]) -> Iterator[None]:
    """Put a `TileprobeError` into `outcome` in place of raising it."""
    try:
        yield
    except TileprobeError as error:
        _log.debug("where the error arose:", exc_info=True)
        outcome[0] = error.with_traceback(None)


@contextmanager
def join_ranks(device: str = "auto", asked: Asked = NOTHING_ASKED) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, or make one of a single process.

    Args:
        device: `auto`, `cpu` or `cuda`; nccl on CUDA, gloo elsewhere. On CPU each rank gets cores / local ranks
            threads (torchrun alone would give it one).
        asked: the command and settings that must be the same on all ranks.

    Raises:
        ConfigError: CUDA is not available, fewer GPUs than local ranks, or PEER_TIMEOUT is not a duration.
        AgreementError: on rank 0, the nodes differ; on the others `ToldByMainError`.
    """
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen, peer_timeout = choose_device(device, local_rank, local_world), read_peer_timeout()
    store: dist.Store
    if "RANK" in os.environ:
        store, rank, world_size = _open_store(GROUP_TIMEOUT)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    _arrived.set()
    if world_size > 1:
        _agree_on_job(store, rank, world_size, Member.describe(asked, chosen.type))
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=GROUP_TIMEOUT,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    ranks = Ranks(rank, world_size, local_world, chosen, dist.PrefixStore("tileprobe", store))
    if chosen.type == "cpu":
        torch.set_num_threads(ranks.cores)
    try:
        with watch_peers(dist.PrefixStore("peers", store), rank, world_size, peer_timeout):
            yield ranks
    except RuntimeError as error:
        if world_size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise PeerLostError(f"rank {rank} lost touch with the other ranks: see their messages; {REMEDY}") from error
        raise
    finally:
        dist.destroy_process_group()


def _open_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return torchrun's store, this process's rank and the number of ranks."""
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps its store when it restarts the ranks, with the addresses of the old ones, so each attempt
        # needs its own prefix. (A store that rank 0 hosts is new each time, and the restart counts of nodes differ.)
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store, rank, world_size


def _agree_on_job(store: dist.Store, rank: int, world_size: int, me: Member) -> None:
    try:
        refusal = settle(dist.PrefixStore("agreement", store), rank, world_size, me)
    except dist.DistError as error:
        raise PeerLostError(f"rank {rank} got no answer from the other ranks: see their messages") from error
    if refusal:
        raise AgreementError(refusal) if rank == 0 else ToldByMainError(refusal)


def choose_device(device: str, local_rank: int, local_world: int) -> torch.device:
    """Choose the device (`auto`, `cpu` or `cuda`) of one of `local_world` ranks on this machine.

    Raises:
        ConfigError: CUDA is not available, or there are fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise ConfigError("--device cuda: no CUDA device is visible: use --device cpu, or check the driver")
    if local_world > gpus:
        raise ConfigError(f"NPROC={local_world}, but {gpus} GPUs are visible: use NPROC={gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
