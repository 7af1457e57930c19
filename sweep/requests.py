"""What is asked of a sweep from another terminal: stop a trial, revive one, try a configuration, pause.

A request is a small file in the sweep directory. The driver alone acts on it: it looks about once a second, acts,
writes what came of it to the ledger, and deletes the file last. After a kill between any two of these the next driver
finds the file, and sees from the ledger what is done: a request is acted on once.
"""

import json
import math
import secrets
import signal
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from optuna.trial import TrialState
from pydantic import TypeAdapter, ValidationError

from sweep.place import PULSE_SECONDS, Place
from sweep.preemption import Drain
from sweep.space import Space
from sweep.study import STATES, Entry, Ledger, drawn
from sweep.tracking import RECORDED, ROWS, described
from sweep.validation import Refused
from trainables import checkpoint

if TYPE_CHECKING:
    from sweep.scheduler import Listener
    from sweep.status import Status

BY_HAND = "stopped by hand"
"""Reason of a trial that somebody stopped."""
ANSWERED = "requests"
"""Note in the ledger: the requests that were acted on, in this order, each with what came of it."""
COMMAND = "command"
"""Note in the ledger: the command that goes on with the sweep."""
CLOSING_SECONDS = 15.0
"""How long the process of a trial that was stopped may take to end its W&B run; one that was killed never does."""
WAIT_SECONDS = 8.0
"""How long whoever asks waits for an answer, which a slice of a trial may come before."""

Verb = Literal["stop", "revive", "enqueue", "pause"]
ALLOWED: Mapping[Verb, str] = {
    "stop": "a trial can be stopped until it ends",
    "revive": "a trial can be revived that was stopped",
    "enqueue": "a configuration can be enqueued that lies in the space and was not tried",
    "pause": "a sweep can be paused while it runs",
}


@dataclass(frozen=True)
class Request:
    """One request; its file is named after it."""

    name: str
    verb: Verb
    trial: int | None = None
    """That is to be stopped or revived."""
    config: Mapping[str, Any] | None = None
    """To be enqueued, by field; what is not named is as the space fixes it, else the documented default."""

    def __str__(self) -> str:
        number = [] if self.trial is None else [f"--trial {self.trial}"]
        return " ".join([self.verb, *number, *(f"{key}={value}" for key, value in (self.config or {}).items())])


def waiting(place: Place, warn: Callable[[str], object] = lambda told: None) -> list[Request]:
    """Requests that nobody has acted on yet, oldest first; `warn` is told of files that are none."""
    found = []
    for file in place.files(place.paths.requests):
        try:
            if (text := place.text(file)) is not None:  # else it was acted on in this moment
                found.append(TypeAdapter(Request).validate_json(text))
        except (OSError, UnicodeDecodeError, ValidationError):
            warn(f"{file} is no request, or cannot be read; it is left alone")
    return found


def enqueued(ledger: Ledger) -> list[dict[str, Any]]:
    """Optuna parameters of the configurations that were asked for, in this order, also of those that were begun."""
    return [answer["params"] for answer in ledger.noted(ANSWERED) or () if answer["params"] is not None]


def not_tried(ledger: Ledger, space: Space, trials: int) -> list[str]:
    """A line for each configuration that was enqueued and has not been tried; `trials` are those that are asked for."""
    begun = {entry.config for entry in ledger.entries()}
    configs = dict.fromkeys(drawn(params, space).config for params in enqueued(ledger))
    waiting = [config for config in configs if config not in begun]
    return [
        f"Enqueued, and not tried yet: {described(config, space.searched)}"
        + (f"; it needs search.trials={number}" if number > trials else "")
        for number, config in enumerate(waiting, start=len(ledger) + 1)
    ]


def obstacle(request: Request, ledger: Ledger, space: Space, evaluations: int) -> str | None:
    """Why a request cannot be honoured as the ledger stands; None when it can. `evaluations` are a whole budget."""
    entries = {entry.number: entry for entry in ledger.entries()}
    if request.verb == "enqueue":
        try:
            params = space.params_of(request.config or {})
        except ValueError as error:
            return str(error)
        config = drawn(params, space).config
        same = next((entry for entry in entries.values() if entry.config == config), None)
        if same is not None:
            return f"trial {same.number} has this configuration and is {_state(same)}"
        return "this configuration is enqueued already" if params in enqueued(ledger) else None
    if request.verb == "pause":
        return None
    if request.trial not in entries:
        return f"there is no trial {request.trial}; it has {', '.join(map(str, entries)) or 'none'}"
    entry = entries[request.trial]
    if entry.state is TrialState.RUNNING and entry.reported >= evaluations:  # its driver was killed before it ended it
        return f"trial {entry.number} has used its whole budget"
    wanted = TrialState.RUNNING if request.verb == "stop" else TrialState.PRUNED
    return None if entry.state is wanted else f"trial {entry.number} is {_state(entry)}"


def _state(entry: Entry) -> str:
    if entry.state is TrialState.RUNNING:
        return "running, or goes on with the next run"
    return STATES[entry.state] + (f" ({entry.reason})" if entry.reason else "")


class Requests:
    """The driver's side."""

    def __init__(
        self,
        ledger: Ledger,
        place: Place,
        space: Space,
        evaluations: int,
        *,
        since: int,
        holds: Callable[[], bool],
        drain: Drain,
        listener: "Listener",
    ) -> None:
        """`evaluations` are a whole budget. `since`: when this driver took the sweep over, ns since 1970. `holds`:
        whether it is still this driver's."""
        self._ledger = ledger
        self._place = place
        self._space = space
        self._evaluations = evaluations
        self._since = since
        self._holds = holds
        self._drain = drain
        self._listener = listener
        self._looked = time.monotonic()
        self._waits: dict[str, float] = {}  # time.monotonic() since when, by name of a request
        self.put_back: Callable[[int], None] = lambda number: None
        """Called with trials that are to go on."""
        self.ended: Callable[[int], None] = lambda number: None
        """Called with trials that end without a process."""
        self.to_stop: set[int] = set()
        """Trials that end with the next slice of their process."""
        self._honoured: Collection[Verb] = ALLOWED

    def begin(self) -> None:
        """Act on what was asked for while no driver was there, before any trial is handed out."""
        for request in waiting(self._place, self._listener.note):
            if request.verb == "pause" and int(request.name.partition("-")[0]) < self._since:
                self._answer(request, "no driver was there any more")
            else:
                self._act(request, ())

    def end_search(self) -> None:
        """Answer for the trials that were stopped. From now on a pause alone is acted on: all else is of the search,
        and waits for the next run."""
        self._honoured = {"stop"}
        self._looked = -math.inf
        self.look(())
        self.to_stop.clear()
        self._honoured = {"pause"}

    def look(self, active: Collection[int]) -> None:
        """Act on what is there. `active` are the trials that have a process, or get one."""
        now = time.monotonic()
        if self._drain() or (self._place.is_remote and now - self._looked < PULSE_SECONDS):
            return
        self._looked = now
        try:
            found = [request for request in waiting(self._place, self._listener.note) if request.verb in self._honoured]
            if not found or not self._holds():
                return
        except OSError:  # the store does not answer: it is asked again
            return
        try:
            for request in found:
                if not self._drain() and not self._is_closing(request):  # a pause came before
                    self._act(request, active)
        except Exception as error:  # noqa: BLE001 - whatever the ledger's storage raises
            self._drain.request("breakdown", f"The ledger cannot be written ({type(error).__name__}: {error})")

    def _is_closing(self, request: Request) -> bool:
        """Whether a trial that is to be revived must wait: the process that it had may be writing its W&B run still,
        and its next one would write the same rows once more."""
        if request.verb != "revive" or request.trial is None:
            return False
        directory = self._place.paths.trial(request.trial)
        waits = time.monotonic() - self._waits.setdefault(request.name, time.monotonic())
        try:
            written = self._place.holds(directory / RECORDED) or not self._place.holds(directory / ROWS)
        except OSError:  # the store does not answer: it is asked again
            return True
        return not written and waits < CLOSING_SECONDS

    def drained(self) -> bool:
        """Whether the sweep drains, for those who wait for something else than trials; what is asked for meanwhile is
        acted on."""
        self.look(())
        return self._drain()

    def _act(self, request: Request, active: Collection[int]) -> None:
        number = -1 if request.trial is None else request.trial
        if request.name in {answer["name"] for answer in self._ledger.noted(ANSWERED) or ()}:
            self._delete(request)
        elif (why := obstacle(request, self._ledger, self._space, self._evaluations)) is not None:
            self.to_stop.discard(number)
            self._answer(request, why)
        elif request.verb == "stop" and number in active:
            self.to_stop.add(number)  # answered when it has ended
        elif request.verb == "stop":
            self.to_stop.discard(number)  # its process was lost before it could
            self._ledger.stop(number, BY_HAND)
            self.ended(number)
            self._listener.ended(self._ledger.entry(number))
            self._answer(request, f"trial {number} is {_state(self._ledger.entry(number))}")
        elif request.verb == "revive":
            self._place.delete(self._place.paths.trial(number) / RECORDED)  # W&B is to have another end of the run
            self._ledger.revive(number)
            self.put_back(number)
            self._answer(request, f"trial {number} is revived")
        elif request.verb == "enqueue":
            params = self._space.params_of(request.config or {})
            self._answer(request, "the configuration is enqueued", params)
        else:
            self._answer(request, "trials write checkpoints and end")
            signal.raise_signal(signal.SIGTERM)
            self._drain.request("signal", "`pause`")

    def _answer(self, request: Request, outcome: str, params: Mapping[str, Any] | None = None) -> None:
        """Write to the ledger what came of a request, with `params` to be tried, and delete its file."""
        answers = self._ledger.noted(ANSWERED) or []
        self._ledger.note(ANSWERED, [*answers, {**asdict(request), "outcome": outcome, "params": params}])
        self._delete(request)
        self._listener.note(f"Asked for was {request}: {outcome}")

    def _delete(self, request: Request) -> None:
        with suppress(OSError):  # the store does not answer: it is deleted with the next look
            self._place.delete(self._place.paths.request(request.name))


def ask(found: "Status", verb: Verb, trial: int | None = None, config: Mapping[str, Any] | None = None) -> list[str]:
    """Ask the driver of a sweep, or the next one, for something; gives, in words, what came of it within some seconds,
    or when it will be honoured.

    `stop` and `revive` are of a `trial`, `enqueue` is of a `config`, by field (what is not named is as the space fixes
    it, else the documented default), `pause` of neither. Raises `Refused` for what cannot be done as the sweep stands;
    OSError when the request cannot be written.
    """
    place, ledger = found.place, found.ledger
    again = ledger.noted(COMMAND) or "the command that ran it"
    request = Request(f"{time.time_ns()}-{secrets.token_hex(4)}", verb, trial, config)
    before = waiting(place)
    if verb == "enqueue" and found.unknown:  # what it completes the configuration by is not all that there is
        raise Refused(f"{place.url}: {found.newer}")
    if (why := obstacle(request, ledger, found.spec.space, found.spec.budget.evaluations)) is not None:
        raise Refused(f"{place.url}: {why}; {ALLOWED[verb]}")
    if verb == "pause" and found.driver is None:
        raise Refused(f"{place.url} is not running; {ALLOWED[verb]}. What goes on with it: {again}")
    if any((other.verb, other.trial, other.config) == (verb, trial, config) for other in before):
        raise Refused(f"{place.url}: that is asked for already; the driver, or the next one, acts on it: {again}")
    told = []
    if verb == "pause":
        told = [f"The same command goes on: {again}"]
    elif verb == "revive" and trial is not None:
        directory = place.paths.trial(trial)
        place.pull_checkpoints(directory, manifests_alone=True)
        kept = checkpoint.last(directory) or checkpoint.best(directory)
        told = [
            f"Its checkpoints were tidied away (checkpoint.keep: {found.spec.checkpoint.keep}), so it begins anew, with"
            " the same losses."
            if kept is None
            else f"It goes on from its checkpoint after step {kept.step}."
        ]
    elif verb == "enqueue":
        configs = {entry.config for entry in found.entries}
        begun = len(configs | {drawn(params, found.spec.space).config for params in enqueued(ledger)})
        total = begun + 1 + sum(other.verb == "enqueue" for other in before)
        space = found.spec.space
        whole = described(drawn(space.params_of(config or {}), space).config, space.searched)
        told = [f"With what is not named as the space or the documented defaults have it: {whole}"]
        if total > found.spec.search.trials:
            again += f" --set search.trials={total}"
            told.append(f"All of search.trials, {found.spec.search.trials}, are taken; more are asked for by {again}")
    place.put(place.paths.request(request.name), json.dumps(asdict(request)))
    return [_outcome(request, found, again), *told]


def _outcome(request: Request, found: "Status", again: str) -> str:
    """What the driver answers, or when it will."""
    place = found.place
    if found.driver is None:
        return f"The next run honours it: {again}"
    deadline = time.monotonic() + WAIT_SECONDS + (PULSE_SECONDS if place.is_remote else 0)
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if not place.holds(place.paths.request(request.name)):
            for answer in found.reread().noted(ANSWERED) or ():
                if answer["name"] == request.name:
                    outcome: str = answer["outcome"]
                    return f"{outcome[0].upper()}{outcome[1:]}."
    when = "The driver acts on it when it can, on a trial at the end of a slice"
    return f"{when}; should it end before, the next run does: {again}"
