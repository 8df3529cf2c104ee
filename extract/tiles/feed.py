"""Read and decode tiles in worker processes, ahead of their use.

Each worker fetches its next batch while it decodes the current one, so it waits for the bucket only at the start.
"""

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader, Dataset

from cache_schema import TileprobeError
from extract.errors import RunError
from extract.ranks.signals import block_interrupts, end_with_parent, put_off_signals

from .batch import PendingBatch, Request, TileBatch
from .source import CONCURRENT_READS, Source
from .windows import WindowReader

PREFETCHED_BATCHES = 2
"""Finished batches that may wait per worker; one more is being decoded, and another fetched."""


class TileFeed:
    """Worker processes that read and decode batches ahead of their use. They stay alive between passes.

    Args:
        source: where tiles are; each worker makes its own client on first use.
        workers: number of processes; 0 reads in this process.
        pin_memory: return page-locked images, for non-blocking copies to a GPU.
    """

    def __init__(self, source: Source, *, workers: int, pin_memory: bool = False) -> None:
        self._batches = _Batches(ahead=max(workers, 1))
        self._loader: DataLoader[Any] = DataLoader(
            _TileDataset(source),
            batch_sampler=self._batches,
            collate_fn=_pass_through,
            num_workers=workers,
            prefetch_factor=PREFETCHED_BATCHES if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker if workers else None,
            # Forked workers can deadlock on locks of Zarr's event loop and of the HTTP client.
            multiprocessing_context=make_forkserver() if workers else None,
        )

    def close(self) -> None:
        """End the workers; the feed cannot be read again.

        A signal has to wait: one that arrived while the loader cleans up would print a traceback.
        """
        with put_off_signals():
            del self._loader

    def start(self) -> None:
        """Start the workers before the first pass, without waiting for them."""
        for _ in self.read([]):
            pass

    def read(self, batches: Iterable[Sequence[Request]]) -> Iterator[TileBatch]:
        """Read `batches` in order.

        `batches` is iterated in this process, only a few items ahead of what has been yielded, so a generator may
        decide late what comes next.

        Raises:
            TileprobeError: an error in a worker that is not one tile's own fault (outage, refused access).
            RunError: a worker process died.
        """
        self._batches.current = batches
        try:
            with put_off_signals():  # a worker that is still starting when its rank ends would print a traceback
                items = iter(self._loader)
            for item in items:
                if isinstance(item, TileprobeError):
                    raise item
                yield item
        except (RuntimeError, OSError, EOFError) as error:
            if os.strerror(errno.EMFILE) in str(error):
                raise RunError(
                    "too many open files: raise the limit with `ulimit -n 4096`, or lower --workers; the same command "
                    "continues from the last committed block"
                ) from error
            if isinstance(error, OSError) and not isinstance(error, (ConnectionError, FileNotFoundError)):
                raise
            # Usually the loader notices. But a worker may also die while this process receives its shared memory.
            in_transfer = self._loader.num_workers > 0 and not isinstance(error, RuntimeError)
            if "DataLoader worker" not in str(error) and not in_transfer:
                raise
            raise RunError(
                f"a feed worker died ({error}), most often because memory ran out: lower --workers or --batch-size; "
                "the same command continues from the last committed block"
            ) from error


_Job = list[Sequence[Request]]
"""Two batches: the one to deliver, and the one the same worker will get next (empty at the end)."""


class _Batches:
    """A batch sampler whose batches are replaced before each pass.

    The DataLoader hands batches to its workers in turn, so the batch `ahead` places later goes to the same worker.
    """

    def __init__(self, *, ahead: int) -> None:
        self._ahead = ahead
        self.current: Iterable[Sequence[Request]] = ()

    def __iter__(self) -> Iterator[_Job]:
        waiting: deque[Sequence[Request]] = deque()
        for batch in self.current:
            waiting.append(batch)
            if len(waiting) > self._ahead:
                yield [waiting.popleft(), batch]
        while waiting:
            yield [waiting.popleft(), []]


class _TileDataset(Dataset[TileBatch | TileprobeError]):
    """Makes batches inside a worker; `__getitems__` receives a whole job."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pool: ThreadPoolExecutor | None = None
        self._begun: PendingBatch | None = None
        self._windows = WindowReader()

    def __getitems__(self, job: _Job) -> TileBatch | TileprobeError:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(CONCURRENT_READS, thread_name_prefix="fetch")
        requests, following = job
        begun, self._begun = self._begun, None
        # An earlier pass that was abandoned may have left another batch here.
        pending = begun if begun and begun.requests == requests else self._begin(requests)
        self._begun = self._begin(following) if following else None
        try:
            return pending.finish()
        except TileprobeError as error:
            # Returned, not raised: the DataLoader would wrap it in the worker's traceback.
            return error.with_traceback(None)

    def _begin(self, requests: Sequence[Request]) -> PendingBatch:
        assert self._pool is not None
        return PendingBatch(self._source, self._pool, requests, self._windows)


def _init_worker(worker: int) -> None:
    """Make this worker exit together with its rank, and ignore SIGTERM from anyone but its rank.

    PyTorch's own watchdog looks at the parent process. Here that is the fork server, which outlives the rank.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        # torchrun sends SIGTERM to every process of a rank. Only the rank may act on it: a worker that exits first may
        # hold a lock that the rank needs. Block it here and not in the fork server, whose other children would
        # inherit the mask and never end. Block it before any thread starts, since threads inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_rank, name="obey-rank", daemon=True).start()
    end_with_parent()
    sys.excepthook = _ignore_lost_connections


def _obey_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank.pid:
        pass
    os._exit(0)


def _ignore_lost_connections(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print no traceback when the rank closes its connection, as it does if it is stopped while it receives a batch.

    The error arises in the thread of `multiprocessing.resource_sharer`, which only serves the rank.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def make_forkserver() -> multiprocessing.context.BaseContext:
    """Start the server that workers are forked from, with this module and all it imports already loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # must start first: starting it later would lift the mask
    with block_interrupts():
        forkserver.ensure_running()
    return context


def _pass_through(item: Any) -> Any:
    """Return the batch as it is: there is nothing to collate."""
    return item
