"""How a sweep stands, for anybody who asks, while it runs or long after."""

import fcntl
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from pydantic import ValidationError
from rich.console import Console

from sweep import report, scoring, verification
from sweep import spec as specs
from sweep.forecast import duration
from sweep.place import Place, driver_named
from sweep.progress import Outlook, machine, outlook, overview, seeded, tally, to_verify, verification_heading
from sweep.requests import COMMAND, Request, not_tried, waiting
from sweep.spec import SpecError, SweepSpec
from sweep.study import (
    EXHAUSTED,
    PROGRAM,
    STATES,
    UPDATE,
    Entry,
    Ledger,
    begun_by_newer,
    ranking,
    read_journal,
    read_url,
    unknown_fields,
)
from sweep.validation import complaints
from trainables import data


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
    waiting: Sequence[Request] = ()
    """What was asked for and not done yet."""
    url: str | None = None
    """Of its ledger, with the password; None for the journal."""
    unknown: Sequence[str] = ()
    """What a newer version wrote of it, and this one leaves out."""

    def reread(self) -> Ledger:
        """The ledger as it is by now. Raises `NoSweep`."""
        return read(self.place, self.spec.name, self.url)

    @property
    def newer(self) -> str | None:
        """A sentence when a newer version wrote what this one may not know all of."""
        if self.unknown:
            left_out = f"{PROGRAM} {version(PROGRAM)} does not know, and leaves out here: {', '.join(self.unknown)}"
            return f"{left_out}. A newer version has run this sweep: {UPDATE}"
        return begun_by_newer(self.ledger)

    @cached_property
    def verifying(self) -> Sequence[Entry]:
        """Trials that verify the winner."""
        ledger = self.ledger.verification()
        return [] if ledger is None else ledger.entries()

    @property
    def trials(self) -> int:
        """How many the search is to have: `search.trials`, or those of a space that has no more."""
        return len(self.entries) if self.ledger.noted(EXHAUSTED) else self.spec.search.trials

    @property
    def verifications(self) -> int:
        """How many of these there are to be."""
        expected = to_verify(self.spec.verify, self.entries, self.trials)
        ledger = self.ledger.verification()
        return max(expected, 0 if ledger is None else ledger.noted("trials") or 0)

    @property
    def outlook(self) -> Outlook:
        """What is left, as of the newest evaluations."""
        rule, evaluations = self.spec.early_stopping or None, self.spec.budget.evaluations
        return outlook(self.entries, self.trials, evaluations, rule, self.verifying, self.verifications)

    @property
    def is_done(self) -> bool:
        """Whether no trial is left to do."""
        runs = any(entry.state is TrialState.RUNNING for entry in [*self.entries, *self.verifying])
        begun = len(self.entries) >= self.trials and len(self.verifying) >= self.verifications
        return begun and not runs

    @property
    def command(self) -> str | None:
        """What goes on with it; None where that was not written down."""
        command: str | None = self.ledger.noted(COMMAND)
        return command

    @property
    def memory(self) -> int:
        """Bytes that a process which trains used at most."""
        return max((entry.cost.peak_memory for entry in self.entries), default=0)

    @property
    def gpu_load(self) -> float | None:
        """Share of the time of training in which a GPU was computing; None without a GPU."""
        elapsed, busy = (sum(getattr(e.cost, what) for e in self.entries) for what in ("elapsed", "gpu_seconds"))
        return busy / elapsed if busy else None


def look(directory: str, ledger: str | None = None) -> Status:
    """The sweep in a directory, or at an s3:// URL. `ledger` is the URL of its database where that holds a password,
    for the recorded spec does not.

    Reads only: a driver that is writing is not disturbed. Raises `NoSweep`.
    """
    place = Place.at(directory)
    paths = place.paths
    if Path(directory).is_file():
        raise NoSweep(f"{directory} is a file; name the directory of a sweep, like sweeps/pricer")
    try:
        place.pull_file(paths.spec)
        recorded, unknown = specs.load_known(paths.spec)
    except (SpecError, OSError, ValueError) as error:
        if paths.spec.exists():
            told = f"its space.yaml cannot be read: {error}; if a newer version of {PROGRAM} wrote it, {UPDATE}"
            raise NoSweep(f"{place.url}: {told}") from error
        why = f" ({error})" if place.is_remote else ""
        raise NoSweep(place.no_sweep(why)) from error
    url = ledger or recorded.ledger
    if url and "***" in url:
        raise NoSweep(f"{place.url}: its ledger is {url}; give the URL with its password: --ledger URL")
    study = read(place, recorded.name, url)
    entries = study.entries()
    for entry in entries:
        try:
            entry.config  # noqa: B018 - is read
        except (KeyError, ValidationError) as error:
            why = complaints(error) if isinstance(error, ValidationError) else "none is on record"
            raise NoSweep(
                f"{place.url}: trial {entry.number} has no configuration that this version of {PROGRAM} knows ({why});"
                f" if a newer one wrote it, {UPDATE}"
            ) from error
    unknown += [f"{field} of the trials" for field in unknown_fields(study)]
    try:
        driver = driver_named(place.text(paths.lock_holder)) if _is_driven(place) else None
        asked = waiting(place)
    except OSError as error:  # a directory of somebody else, a store that does not answer
        driver, asked = f"a process or not, which cannot be seen ({error})", []
    return Status(place, recorded, study, entries, driver, asked, url, unknown)


def read(place: Place, name: str, url: str | None) -> Ledger:
    """The ledger of the sweep called `name`, in the database at `url` or in its journal. Raises `NoSweep`."""
    try:
        return read_url(url, name) if url else read_journal(place.paths.ledger, name)
    except FileNotFoundError as error:
        told = f"{place.url} has no ledger: its driver has not begun, or {place.paths.ledger} was moved"
        raise NoSweep(told) from error
    except Exception as error:  # whatever a database's driver raises
        raise NoSweep(f"{place.url}: the ledger cannot be read: {error}") from error


def onward(ledger: Ledger, spec: SweepSpec, place: Place) -> list[str]:
    """What comes after a sweep that has ended, a line with its command; nothing after that of a toy with a winner."""
    entries = ledger.entries()
    if better := verification.advice(verification.result(ledger), ledger.criterion, place):
        return better
    if any(entry.best or entry.unscored for entry in entries):
        return [f"Take the winner home with: {place.command('export')}"] if spec.model else []
    again = [place.command("rerun", "--trial", str(entry.number)) for entry in entries[:1]]
    return [f"No trial finished; train one of them again with: {command}" for command in again]


def rerun_spec(
    found: Status, trial: int, overrides: Sequence[str] = (), ledger: str | None = None, *, all_data: bool = False
) -> SweepSpec:
    """The spec of a sweep of its own, NAME-rerun-NNN beside this one, that trains a trial's configuration again.

    Model, data, budget and seed are as recorded, so it gives the same losses; `overrides` such as `budget.epochs=3`
    change them. Nothing is uploaded to the Hub unless they say so. `ledger` is as for `look`.

    With `all_data` it is NAME-all-NNN and is trained on the validation rows, too, so it has no validation loss. Unless
    an override says how long, it passes over all rows as often as the trial's best checkpoint had over its own.

    Raises `NoSweep` when there is no such trial, nothing says how long, or a newer version wrote what this one does not
    know; SpecError as `spec.load` does.
    """
    if found.unknown:
        raise NoSweep(f"{found.place.url}: {found.newer}")
    entry = next((entry for entry in found.entries if entry.number == trial), None)
    if entry is None:
        numbers = ", ".join(str(entry.number) for entry in found.entries) or "none"
        raise NoSweep(f"there is no trial {trial}; {found.place.url} has {numbers}")
    recorded = found.spec
    values = {
        "name": f"{recorded.name}-rerun-{trial:03d}",
        "storage": found.place.url.rpartition("/")[0],
        "search": {"trials": 1},
        "early_stopping": False,
        "space": entry.config.model_dump(mode="json"),
        "tracking.project": recorded.tracking.project or recorded.name,
        "verify": None,
        "checkpoint.push_to": None,
    }
    if ledger is not None:
        values["ledger"] = ledger
    if all_data:
        if recorded.data is None:
            raise NoSweep("--all-data: a toy has no rows; leave it out")
        values |= {"name": f"{recorded.name}-all-{trial:03d}", "budget.evaluations": 0, "objective": None}
        if recorded.data.test is None and not any(override.startswith("data.test=") for override in overrides):
            values["metric"] = None  # of rows that it was trained on
        if not any(override.startswith(("budget.steps=", "budget.epochs=")) for override in overrides):
            begun = Place.at(f"{values['storage']}/{values['name']}")
            begun.pull_file(begun.paths.spec)
            values |= _as_begun(begun) if begun.paths.spec.exists() else _best_passes(found, entry)
    own = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    spec = specs.load(found.place.paths.spec, [*own, *overrides])
    if all_data and spec.budget.evaluations:
        raise NoSweep("--all-data leaves no rows for evaluations; leave budget.evaluations out")
    return spec


def _as_begun(place: Place) -> dict[str, float]:
    """The budget of a sweep that was begun: that which it was taken from may have changed since."""
    budget = specs.load(place.paths.spec, inputs=False).budget
    return {f"budget.{key}": each for key, each in (("epochs", budget.epochs), ("steps", budget.steps)) if each}


def _best_passes(found: Status, entry: Entry) -> dict[str, float]:
    """A budget of as many passes over all rows as the best checkpoint of a trial had made over the training rows."""
    budget, rows = found.spec.budget, rows_of(found.place)
    name_it = "say how long: --set budget.steps=…"
    if entry.best is None:
        raise NoSweep(f"--all-data: trial {entry.number} has no validation loss that says how long to train; {name_it}")
    evaluation, _ = entry.best
    if budget.epochs is not None:
        return {"budget.epochs": budget.epochs * evaluation / budget.evaluations}
    if rows is None:
        raise NoSweep(f"--all-data: the tokens of {found.place.url} are not on this machine; {name_it}")
    assert budget.steps is not None
    steps = budget.per_trial.evaluation_steps(budget.steps)[evaluation - 1]
    return {"budget.steps": max(1, round(steps * (rows["train"] + rows["validation"]) / rows["train"]))}


def rows_of(place: Place) -> dict[str, int] | None:
    """How many rows each part of a sweep's data has; None when this machine does not have its tokens."""
    tokens = tokenised(place)
    if tokens is None:
        return None
    rows: dict[str, int] = json.loads((tokens / data.SUMMARY).read_text(encoding="utf-8"))["rows"]
    return rows


def tokenised(place: Place) -> Path | None:
    """What `data.prepare` made for a sweep last; None when this machine does not have it."""
    found = sorted(place.paths.tokens.glob(f"*/{data.SUMMARY}"), key=lambda file: file.stat().st_mtime)
    return found[-1].parent if found else None


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
    searched, evaluations = spec.space.searched, spec.budget.evaluations
    who = f"running in {status.driver}" if status.driver else "not running"
    console.print(f"Sweep {spec.name} in {status.place.shown}, {who}", highlight=False, soft_wrap=True)
    if newer := status.newer:
        console.print(newer, highlight=False, soft_wrap=True)
    ahead, alive = status.outlook, status.driver is not None
    if entries:
        console.print(f"{ahead.whole.share:.0%}: {tally(entries, alive=alive)}", highlight=False)
        console.print(overview(console, entries, searched, evaluations, {}, ahead.whole.of_trial, alive=alive))
    for line in report.failures(entries):
        console.print(line, highlight=False, soft_wrap=True)
    if fresh := status.verifying:
        console.print(verification_heading(status.verifications), highlight=False, soft_wrap=True)
        console.print(overview(console, fresh, seeded(searched), evaluations, {}, ahead.of_verification, alive=alive))
    for line in report.failures(fresh):
        console.print(f"verification, {line}", highlight=False, soft_wrap=True)
    machines = machine(status.memory, status.gpu_load)
    bill = report.bill(status.ledger, spec.cost.per_hour)
    for line in [*report.conclusion(status.ledger), *scoring.trouble(status.ledger), *machines, *bill]:
        console.print(line, highlight=False, soft_wrap=True)
    seconds, to_verify_yet = ahead.whole.seconds, status.verifications - sum(e.state.is_finished() for e in fresh)
    left = f", about {duration(seconds)} left{'' if alive else ', once it goes on'}" if seconds else ""
    console.print(f"{report.standing(entries, status.trials, to_verify_yet)}{left}.", highlight=False)
    if exhausted := status.ledger.noted(EXHAUSTED):
        console.print(f"The search ended early: {exhausted}.", highlight=False)
    for line in not_tried(status.ledger, spec.space, spec.search.trials):
        console.print(line, highlight=False, soft_wrap=True)
    for request in status.waiting:
        console.print(f"Asked for, and not done yet: {request}", highlight=False)
    for line in [] if alive else _next(status):
        console.print(line, highlight=False, soft_wrap=True)


def _next(status: Status) -> list[str]:
    """What comes after a sweep that is not running, a line with its command."""
    if status.waiting or not status.is_done:
        return [f"It goes on with: {status.command}"] if status.command else []
    onwards = onward(status.ledger, status.spec, status.place)
    return onwards or [f"See what it found with: {status.place.command('report')}"]


def as_json(status: Status) -> dict[str, Any]:
    """The same as plain values; seconds, bytes, losses by evaluation, and `cost` in the currency of `cost.per_hour`."""
    best = next(iter(ranking(status.entries)), None)
    default, ahead = report.usual_default(status.entries), status.outlook
    criterion, base = status.ledger.criterion, report.base(status.entries)
    return {
        "name": status.spec.name,
        "place": status.place.url,
        "newer": status.newer,
        "driver": status.driver,
        "command": status.command,
        "asked_for": status.spec.search.trials,
        "exhausted": status.ledger.noted(EXHAUSTED),
        "is_done": status.is_done,
        "evaluations": status.spec.budget.evaluations,
        "objective": {"name": criterion.name, "direction": "maximize" if criterion.maximized else "minimize"},
        "base_loss": next((entry.losses[0] for entry in status.entries if 0 in entry.losses), None),
        "best_trial": best and best.number,
        "best_loss": best and _loss(best),
        "default_loss": default and _loss(default),
        "base_value": None if base is None else criterion.turned(base),
        "best_value": best and _value(best),
        "default_value": default and _value(default),
        "share_done": ahead.whole.share,
        "seconds_left": ahead.whole.seconds,
        "peak_memory": status.memory,
        "gpu_load": status.gpu_load,
        "cost": report.spent(status.ledger, status.spec.cost.per_hour),
        "waiting": [str(request) for request in status.waiting],
        "verification": (verified := verification.result(status.ledger))
        and asdict(verified) | {"trials": _verification_records(status)},
        "scores": (scored := scoring.scores(status.ledger)) and asdict(scored),
        "trials": records(status),
    }


def records(status: Status) -> list[dict[str, Any]]:
    """The trials as plain values, for JSON or a data frame: a dictionary each.

    `config`, `losses` and `values` (by evaluation) are dictionaries themselves; losses in nats, values of what is
    searched for, which is the loss unless there is an `objective`, `seconds` of steps and evaluations, `peak_memory` in
    bytes, `cost` in the currency of `cost.per_hour`, None without that. Best is the evaluation with the best value.
    """
    return _records(status.ledger, status.entries, status.outlook.whole.of_trial, status.spec.cost.per_hour)


def _verification_records(status: Status) -> list[dict[str, Any]]:
    """The same of the trials that verify the winner."""
    ledger = status.ledger.verification()
    left, per_hour = status.outlook.of_verification, status.spec.cost.per_hour
    return [] if ledger is None else _records(ledger, status.verifying, left, per_hour)


def _records(
    ledger: Ledger, entries: Sequence[Entry], seconds_left: Mapping[int, float], per_hour: float | None
) -> list[dict[str, Any]]:
    prices = report.prices(ledger, per_hour)
    return [_record(entry, seconds_left.get(entry.number), prices.get(entry.number)) for entry in entries]


def _record(entry: Entry, seconds_left: float | None, cost: float | None) -> dict[str, Any]:
    return {
        "trial": entry.number,
        "state": STATES[entry.state],
        "reason": entry.reason,
        "config": entry.config.model_dump(),
        "losses": dict(entry.losses),
        "values": {number: entry.criterion.turned(objective) for number, objective in entry.objectives.items()},
        "best_evaluation": entry.best and entry.best[0],
        "best_loss": _loss(entry),
        "best_value": _value(entry),
        "halvings": entry.halvings,
        "seconds_left": seconds_left,
        "cost": cost,
        **asdict(entry.cost),
    }


def _loss(entry: Entry) -> float | None:
    """Validation loss of the best evaluation."""
    return entry.best and entry.losses[entry.best[0]]


def _value(entry: Entry) -> float | None:
    return entry.best and entry.criterion.turned(entry.best[1])
