"""One driver at a time has a sweep directory."""

import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime

import filelock

from sweep.paths import LOCK_SECONDS
from sweep.place import PULSE_SECONDS, Place, driver_named
from sweep.preemption import Drain
from sweep.scheduler import Listener
from sweep.trainable import Lease
from sweep.validation import Refused
from trainables.data import DataError

TAKING_SECONDS = 1.0
"""Of two drivers that take a sweep on an object store in the same moment, the first sees the second in this time, and
gives way."""


@contextmanager
def locked(place: Place, drain: Drain, listener: Listener) -> Iterator[Lease]:
    """Hold the sweep directory; a crash leaves no false alarm, for the kernel lets go when the process dies.

    The lease that is given out holds until the next driver has the directory. An object store has no locks, but
    a pulse: should two drivers start in the same moment, the one that is named as the holder goes on.
    """
    paths = place.paths
    fresh = not paths.root.exists()
    if paths.root.is_symlink():
        raise Refused(f"{paths.root} is a link to {paths.root.resolve()}; name the directory above that as `storage`")
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(paths.lock, timeout=LOCK_SECONDS)
        lock.acquire()
    except filelock.Timeout as error:
        raise _in_use(place) from error
    except OSError as error:
        raise Refused(
            f"storage: cannot write to {paths.root} ({error.strerror}); name a directory that is yours"
        ) from error
    try:
        lease = Lease(
            place,
            f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f} UTC",
        )
        _take(lease, listener)
        with _pulse(lease, drain, listener) if place.is_remote else nullcontext():
            yield lease
    except (Refused, DataError):
        if fresh and not paths.spec.exists():
            shutil.rmtree(paths.root)  # nothing was started
        raise
    finally:
        lock.release()


def _take(lease: Lease, listener: Listener) -> None:
    """Make the lease hold; on an object store, unless another driver shows that it lives (a killed one does not)."""
    place = lease.place
    try:
        if place.is_remote and place.holds(place.paths.pulse):
            listener.note(f"Looking for {3 * PULSE_SECONDS:g} s whether another driver runs this sweep")
            if place.is_driven():
                raise _in_use(place)
        place.paths.lock_holder.write_text(lease.text)
        place.push(place.paths.lock_holder)
        if place.is_remote:
            time.sleep(TAKING_SECONDS)
            if not lease.holds():
                raise _in_use(place)
    except (OSError, ValueError) as error:  # pyarrow raises both
        raise Refused(f"storage: {place.url} cannot be used: {error}") from error


@contextmanager
def _pulse(lease: Lease, drain: Drain, listener: Listener) -> Iterator[None]:
    """Write to a file on the object store all the time, and end the sweep when another driver has it."""
    place = lease.place
    file = place.paths.pulse
    ended = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            try:
                file.write_text(f"{lease.text}, pulse {number}")
                place.push(file)
                if not lease.holds():
                    drain.request("breakdown", f"Another driver has taken over {place.url}")
            except Exception as error:  # noqa: BLE001 - trials meet it, too; without a pulse another driver would come
                listener.note(f"{place.url} does not answer: {error}")
            if ended.wait(PULSE_SECONDS):
                return

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):  # the next driver looks for a while
            if lease.holds():
                place.delete(file)


def _in_use(place: Place) -> Refused:
    holder = driver_named(place.text(place.paths.lock_holder))
    look, pause = place.command("status"), place.command("pause")
    return Refused(
        f"{place.url} is in use by {holder}; wait for it ({look} says how long), end it ({pause}), or give this sweep"
        " another `name`"
    )
