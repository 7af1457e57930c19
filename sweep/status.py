"""How a sweep stands, for anybody who asks, while it runs or long after."""

import fcntl
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sweep import report
from sweep import spec as specs
from sweep.place import Place
from sweep.progress import STATES, overview
from sweep.spec import SpecError, SweepSpec
from sweep.study import Entry, Ledger, ranking, read_journal, read_url


class NoSweep(Exception):
    """There is nothing to tell; the message says why and what to do."""


@dataclass(frozen=True)
class Status:
    """A sweep at one moment."""

    place: Place
    spec: SweepSpec
    """As recorded."""
    ledger: Ledger
    """To be read."""
    entries: Sequence[Entry]
    driver: str | None
    """Who runs it; None when nobody does."""


def look(directory: str, ledger: str | None = None) -> Status:
    """The sweep in a directory, or at an s3:// URL. `ledger` is the URL of its database where that holds a password,
    for the recorded spec does not.

    Reads only: a driver that is writing is not disturbed. Raises `NoSweep`.
    """
    place = Place.at(directory)
    paths = place.paths
    try:
        place.pull_file(paths.spec)
        recorded = specs.load(paths.spec, inputs=False)
    except (SpecError, OSError, ValueError) as error:
        if paths.spec.exists():
            raise NoSweep(f"{place.url}: its space.yaml cannot be read: {error}") from error
        why = f" ({error})" if place.is_remote else ""
        raise NoSweep(
            f"{place.url} holds no sweep{why}; name the directory of one, which has a space.yaml, like sweeps/pricer"
        ) from error
    url = ledger or recorded.ledger
    if url and "***" in url:
        raise NoSweep(f"{place.url}: its ledger is {url}; give the URL with its password: --ledger URL")
    try:
        study = read_url(url, recorded.name) if url else read_journal(paths.ledger, recorded.name)
    except FileNotFoundError as error:
        raise NoSweep(f"{place.url} has no ledger: its driver has not begun, or {paths.ledger} was moved") from error
    except Exception as error:  # whatever a database's driver raises
        raise NoSweep(f"{place.url}: the ledger cannot be read: {error}") from error
    entries = study.entries()
    for entry in entries:
        try:
            entry.config  # noqa: B018 - is read
        except (KeyError, ValueError) as error:
            raise NoSweep(
                f"{place.url}: trial {entry.number} has no configuration that this version of qlora-sweep knows"
                f" ({error}); if a newer one made it, update with: python -m pip install --upgrade qlora-sweep"
            ) from error
    try:
        driver = (place.text(paths.lock_holder) or "another process") if _is_driven(place) else None
    except OSError as error:  # a directory of somebody else, a store that does not answer
        driver = f"a process or not, which cannot be seen ({error})"
    return Status(place, recorded, study, entries, driver)


def _is_driven(place: Place) -> bool:
    if place.is_remote:
        return place.is_driven()
    try:
        with place.paths.lock.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment, which a driver waits for
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def show(console: Console, status: Status) -> None:
    """Print the trials, the best so far against base and default, and whether the sweep is running."""
    spec, entries = status.spec, status.entries
    searched, trials, evaluations = spec.space.searched, spec.search.trials, spec.budget.evaluations
    who = f"running in {status.driver}" if status.driver else "not running"
    console.print(f"Sweep {spec.name} in {shown(status.place)}, {who}", highlight=False, soft_wrap=True)
    if entries:
        console.print(overview(entries, searched, evaluations, {}, alive=status.driver is not None))
    for line in report.verdict(entries):
        console.print(line, highlight=False)
    console.print(f"{report.standing(entries, trials)}.", highlight=False)


def as_json(status: Status) -> dict[str, Any]:
    """The same as plain values; seconds, bytes, and losses by evaluation."""
    best = next(iter(ranking(status.entries)), None)
    return {
        "name": status.spec.name,
        "place": status.place.url,
        "driver": status.driver,
        "asked_for": status.spec.search.trials,
        "evaluations": status.spec.budget.evaluations,
        "base_loss": report.base_loss(status.entries),
        "best_trial": best and best.number,
        "trials": [_trial(entry) for entry in status.entries],
    }


def _trial(entry: Entry) -> dict[str, Any]:
    evaluation, loss = entry.best or (None, None)
    return {
        "trial": entry.number,
        "state": STATES[entry.state],
        "reason": entry.reason,
        "config": entry.config.model_dump(),
        "losses": dict(entry.losses),
        "best_evaluation": evaluation,
        "best_loss": loss,
        "halvings": entry.halvings,
        **asdict(entry.cost),
    }


def shown(place: Place) -> str:
    """Its URL, or a path from here when it lies below."""
    here = Path.cwd()
    below = not place.is_remote and Path(place.url).is_relative_to(here)
    return str(Path(place.url).relative_to(here)) if below else place.url
