"""React to SIGTERM (from a scheduler, a preempted machine or torchrun) and SIGINT (Ctrl-C)."""

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_HANDLED = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal asked this process to stop.

    Not an `Exception`, so that no retry and no error handler on the way catches it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread on the first SIGTERM or SIGINT; a second one ends the process at once."""

    def stop(number: int) -> None:
        raise Stopped(number)

    with act_on_signals(stop):
        yield


@contextmanager
def act_on_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` in the main thread on the first SIGTERM or SIGINT; a second one ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        act(number)

    with _handle_signals(handle):
        yield


@contextmanager
def put_off_signals() -> Iterator[None]:
    """Hold back SIGTERM and SIGINT while the context runs, then deliver them; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    try:
        with _handle_signals(lambda number, frame: came.append(number)):
            yield
    finally:
        for late in came:
            signal.raise_signal(late)


@contextmanager
def _handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _HANDLED}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Make processes started in this context ignore Ctrl-C.

    A terminal sends SIGINT to every process; only the one that started the others may act on it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Make this worker process exit when the process that started it is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


@contextmanager
def run_child(command: Sequence[str], **options: Any) -> "Iterator[subprocess.Popen[str]]":
    """Run a child process, pass the first SIGTERM or SIGINT on to it, and wait for its end when the context ends.

    The child runs in a new session, so that Ctrl-C reaches only this process, which tells the child once.

    Raises:
        Stopped: a signal arrived; the child has ended.
    """
    signals: list[int] = []
    child: subprocess.Popen[str] | None = None

    def pass_on(number: int) -> None:
        signals.append(number)
        if child is not None:
            child.send_signal(number)

    with act_on_signals(pass_on):
        with subprocess.Popen(command, text=True, start_new_session=True, **options) as child:
            for number in signals:  # arrived before the child was started
                child.send_signal(number)
            yield child
        if signals:
            raise Stopped(signals[0])
