"""Being told to stop: SIGTERM (a scheduler, a machine that is taken away, torchrun) or SIGINT (Ctrl-C)."""

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ANSWERED = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal asked this process to stop.

    Not an `Exception`: neither a retry nor the handling of some error on the way may take it for its own.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread at the first SIGTERM or SIGINT; a second one ends the process at once."""

    def stop(number: int) -> None:
        raise Stopped(number)

    with act_on_signals(stop):
        yield


@contextmanager
def act_on_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` in the main thread at the first SIGTERM or SIGINT; a second one ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        act(number)

    before = {number: signal.signal(number, handle) for number in _ANSWERED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def put_off_signals() -> Iterator[None]:
    """Have SIGTERM and SIGINT wait until this is over, then be answered as before. Only the main thread can."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in _ANSWERED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


@contextmanager
def run_child(command: Sequence[str], **options: Any) -> "Iterator[subprocess.Popen[str]]":
    """A process to which the first SIGTERM or SIGINT is passed on; leaving waits for its end, however long it takes.

    It gets a session of its own, so that Ctrl-C comes to this process alone, which tells the child once.

    Raises:
        Stopped: a signal came, and the child, which has said what it was doing, is gone.
    """
    signals: list[int] = []
    child: subprocess.Popen[str] | None = None

    def pass_on(number: int) -> None:
        signals.append(number)
        if child is not None:
            child.send_signal(number)

    with act_on_signals(pass_on):
        with subprocess.Popen(command, text=True, start_new_session=True, **options) as child:
            for number in signals:  # came before there was a child to tell
                child.send_signal(number)
            yield child
        if signals:
            raise Stopped(signals[0])
