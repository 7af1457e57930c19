"""Signals, drain and the grace period."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

EXIT_PREEMPTED = 75
"""Exit code of a sweep that was told to end and can be continued (EX_TEMPFAIL of sysexits.h)."""


class Drain:
    """The flag that asks all trials to write a checkpoint and leave; raised at most once."""

    def __init__(self) -> None:
        self.cause: Literal["signal", "hours", "breakdown"] | None = None
        self.reason: str | None = None

    def __call__(self) -> bool:
        return self.cause is not None

    def request(self, cause: Literal["signal", "hours", "breakdown"], reason: str) -> None:
        """Raise the flag. A signal overrules other causes, a breakdown the end of time; else the first one stays."""
        if self.cause is None or cause == "signal" or (cause == "breakdown" and self.cause == "hours"):
            self.cause, self.reason = cause, reason


@contextmanager
def shielded_from_signals() -> Iterator[None]:
    """Processes that are started in the block never get SIGTERM or SIGINT; here both come once it is over.

    Schedulers signal every process of a job at once. Ray's own must outlive that: over them the trials are asked to
    write their checkpoints. (Ray ends its processes with SIGKILL when SIGTERM does not do it.) Handlers that the block
    installs, as `ray.init` does, are put back.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def draining_on_signals(drain: Drain, grace: float, farewell: str) -> Iterator[None]:
    """SIGTERM and SIGINT raise the flag; a second one, or `grace` seconds, end the process at once with code 75.

    Ending at once is safe: ledger and checkpoints are true at any moment. `farewell` is printed before. A process that
    goes on after the block is left alone.
    """
    forced: list[threading.Timer] = []

    def end() -> None:
        try:
            print(farewell, file=sys.stderr, flush=True)
        finally:  # also when nobody reads it any more
            os._exit(EXIT_PREEMPTED)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if drain.cause == "signal":
            end()
        drain.request("signal", signal.Signals(number).name)
        force = threading.Timer(grace, end)
        force.daemon = True
        force.start()
        forced.append(force)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for force in forced:
            force.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def draining_after(drain: Drain, hours: float | None) -> Iterator[None]:
    """Raise the flag when `hours` of wall clock are over."""
    timer = (
        threading.Timer(3600 * hours, drain.request, ["hours", f"budget.hours {hours:g} is used up"]) if hours else None
    )
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()
