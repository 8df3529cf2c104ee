"""Being told to stop: SIGTERM (a scheduler, a machine that is taken away, torchrun) or SIGINT (Ctrl-C)."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
