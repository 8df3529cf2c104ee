"""Tiles on their way to the device: worker processes make batches ahead of their use.

Each worker fetches its next batch while it decodes the present one, so it waits for the bucket only at the beginning.
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
from extract.ranks.signals import put_off_signals

from .batch import PendingBatch, Request, TileBatch
from .source import CONCURRENT_READS, Source
from .windows import WindowReader

PREFETCHED_BATCHES = 2
"""Finished batches per worker that may wait to be used; one more is being decoded, and one fetched."""


class TileFeed:
    """Worker processes that read and decode batches ahead of their use, kept from one pass to the next.

    Args:
        source: where tiles are; each worker makes its own client on first use.
        workers: processes; 0 reads in this one.
        pin_memory: hand out page-locked images, for copies to a GPU that do not block.
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
            worker_init_fn=_end_with_rank if workers else None,
            # Forked workers can deadlock on the locks of Zarr's event loop and of the HTTP client.
            multiprocessing_context=make_forkserver() if workers else None,
        )

    def start(self) -> None:
        """Start the workers, so that they are ready by the time of the first pass; returns at once."""
        for _ in self.read([]):
            pass

    def read(self, batches: Iterable[Sequence[Request]]) -> Iterator[TileBatch]:
        """One pass over `batches`, in order. They are drawn in this process, a few ahead of what has been yielded, so a
        generator may decide late what comes next.

        Raises:
            TileprobeError: what a worker met that is not one tile's own fault (outage, refused access).
            RunError: a worker process died.
        """
        self._batches.current = batches
        try:
            with put_off_signals():  # a worker still on its way when its rank is gone would leave a traceback
                items = iter(self._loader)
            for item in items:
                if isinstance(item, TileprobeError):
                    raise item
                yield item
        except (RuntimeError, OSError, EOFError) as error:
            if os.strerror(errno.EMFILE) in str(error):
                raise RunError(
                    "too many open files: raise the limit with `ulimit -n 4096`, or lower --workers; the same command "
                    "goes on from the last committed block"
                ) from error
            if isinstance(error, OSError) and not isinstance(error, (ConnectionError, FileNotFoundError)):
                raise
            # Most often the loader notices; but a worker may also die while this process takes over its shared memory.
            in_transfer = self._loader.num_workers > 0 and not isinstance(error, RuntimeError)
            if "DataLoader worker" not in str(error) and not in_transfer:
                raise
            raise RunError(
                f"a feed worker died ({error}); out of memory, most often: lower --workers or --batch-size; "
                "the same command goes on from the last committed block"
            ) from error


_Job = list[Sequence[Request]]
"""Two batches: the one to deliver, and the one that the same worker will be asked for next, empty at the end."""


class _Batches:
    """A batch sampler whose batches are replaced before each pass.

    The DataLoader deals them out to its workers in turn, so the one `ahead` places later goes to the same worker (with
    none, to this process).
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
    """Lives in a worker; `__getitems__` is handed a whole job."""

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
        # A pass that was left early may have begun a batch that nobody asks for.
        pending = begun if begun and begun.requests == requests else self._begin(requests)
        self._begun = self._begin(following) if following else None
        try:
            return pending.finish()
        except TileprobeError as error:
            # Raised here it would reach the main process wrapped in a worker's traceback.
            return error.with_traceback(None)

    def _begin(self, requests: Sequence[Request]) -> PendingBatch:
        assert self._pool is not None
        return PendingBatch(self._source, self._pool, requests, self._windows)


def _end_with_rank(worker: int) -> None:
    """Have this worker end when the rank it works for is gone, however that ended, or ends it.

    PyTorch's own watch looks at the parent process, which is the fork server here; and that lives as long as a worker.
    """
    rank = multiprocessing.parent_process()
    assert rank

    def watch() -> None:
        rank.join()
        os._exit(1)

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank.pid:
            pass
        os._exit(0)

    tasks = [watch]
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        # torchrun's SIGTERM goes to every process of a rank. The rank answers it; a worker that ended before might do
        # so with a lock that the rank then needs. Not in the fork server: what else it serves would never end.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        tasks.append(obey)
    for work in tasks:
        threading.Thread(target=work, name=f"{work.__name__}-rank", daemon=True).start()
    sys.excepthook = _let_go_of_rank


def _let_go_of_rank(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Be silent on a rank that was told to stop while it took over a batch, and hung up.

    Python's server of shared memory (`multiprocessing.resource_sharer`), a thread of this worker with no other client,
    would print where it was.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def make_forkserver() -> multiprocessing.context.BaseContext:
    """Start the server that workers are forked from, with this module and all it imports already loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Ctrl-C goes to every process of a terminal. The rank answers it; its workers end with it, and keep quiet.
    resource_tracker.ensure_running()  # whose start, later, would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()  # inherits the mask, and its workers from it
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _pass_through(item: Any) -> Any:
    """A batch leaves the dataset whole: nothing to collate."""
    return item
