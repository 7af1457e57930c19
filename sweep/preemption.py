"""Signals, drain and the grace period."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 75
"""Exit code of a sweep that was told to end and can be continued (EX_TEMPFAIL of sysexits.h)."""


class Drain:
    """The flag that asks all trials to write a checkpoint and leave; raised at most once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.preempted = False
        """Whether a signal raised it."""

    def __call__(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Raise the flag; the first reason stays."""
        self.reason = self.reason or reason

    def preempt(self, number: int) -> None:
        """Raise the flag for a signal."""
        self.preempted = True
        self.request(signal.Signals(number).name)


@contextmanager
def draining_on_signals(drain: Drain, grace: float, farewell: str) -> Iterator[None]:
    """SIGTERM and SIGINT raise the flag; a second one, or `grace` seconds, end the process at once with code 75.

    Ending at once is safe: ledger and checkpoints are true at any moment. `farewell` is printed before.
    """

    def end() -> None:
        print(farewell, file=sys.stderr, flush=True)
        os._exit(EXIT_PREEMPTED)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if drain.preempted:
            end()
        drain.preempt(number)
        force = threading.Timer(grace, end)
        force.daemon = True
        force.start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def draining_after(drain: Drain, hours: float | None) -> Iterator[None]:
    """Raise the flag when `hours` of wall clock are over."""
    timer = threading.Timer(3600 * hours, drain.request, [f"budget.hours {hours:g} is used up"]) if hours else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()
