"""Processes that cut scenes, several at once, and stop between two tiles when they are told to."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event

from extract.errors import RasterError, RunError

from .cut import SceneJob, cut_scene


@dataclass(frozen=True)
class Outcome:
    """What became of a scene: done, or the reason why it could not be read, or neither when it was stopped."""

    name: str
    done: bool
    error: str = ""


def run_cutters(jobs: Sequence[SceneJob], workers: int) -> Generator[Outcome, None, None]:
    """Cut scenes, each told of as it ends. Close the iterator to stop: every process then ends its tile and no more.

    Args:
        jobs: the scenes.
        workers: processes; with 1 everything happens in this one.

    Raises:
        TileprobeError: tiles cannot be written.
        RunError: a process died.
    """
    if workers == 1:
        yield from map(_cut, jobs)
        return
    context = multiprocessing.get_context("spawn")
    stopped = context.Event()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_begin, initargs=(stopped,))
    try:
        # Ctrl-C goes to every process of a terminal. This one answers it; the others inherit that they do not.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_cut, job) for job in jobs]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that cut scenes died; out of memory, most often: lower --workers; finished scenes stay, and the "
            "same command goes on from there"
        ) from error
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


_stopped: Event | None = None


def _begin(stopped: Event) -> None:
    """Remember, in a process of the pool, whom to ask; and end with the process that began it, however that ended."""
    global _stopped
    _stopped = stopped
    main = multiprocessing.parent_process()
    assert main

    def watch() -> None:
        main.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch-main", daemon=True).start()


def _cut(job: SceneJob) -> Outcome:
    try:
        return Outcome(job.name, cut_scene(job, _stopped.is_set if _stopped else lambda: False))
    except RasterError as error:
        return Outcome(job.name, False, str(error))
