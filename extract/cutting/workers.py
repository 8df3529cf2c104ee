"""Cut scenes in several processes, which stop between two tiles when told to."""

import multiprocessing
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event

from extract.errors import RasterError, RunError
from extract.ranks.signals import block_interrupts, end_with_parent

from .cut import SceneJob, cut_scene


@dataclass(frozen=True)
class Outcome:
    """The result for one scene: done, or the reason why it cannot be read, or neither if it was stopped."""

    name: str
    done: bool
    error: str = ""


def run_cutters(jobs: Sequence[SceneJob], workers: int) -> Generator[Outcome, None, None]:
    """Cut scenes and yield the outcome of each as it ends.

    Close the iterator to stop: every process then finishes only its current tile.

    Args:
        workers: number of processes; 1 cuts in this process.

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
        with block_interrupts():
            futures = [pool.submit(_cut, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that cuts scenes died, most often because memory ran out: lower --workers; finished scenes are "
            "kept, and the same command continues from there"
        ) from error
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


_stopped: Event | None = None


def _begin(stopped: Event) -> None:
    """Set up a process of the pool: keep the event that stops it, and exit when the main process is gone."""
    global _stopped
    _stopped = stopped
    end_with_parent()


def _cut(job: SceneJob) -> Outcome:
    try:
        return Outcome(job.name, cut_scene(job, _stopped.is_set if _stopped else lambda: False))
    except RasterError as error:
        return Outcome(job.name, False, str(error))
