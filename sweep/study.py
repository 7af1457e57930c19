"""The ledger: the Optuna study of a sweep, and all that is read from or written to it.

Every trial is there from the moment it is proposed (one append holds parameters, distributions and effective
configuration, so a kill leaves either all of it or nothing), every validation loss before anything is decided on it,
and at the end a state that tells the truth: COMPLETE with the best validation loss, PRUNED with its intermediate values
when early stopping ended it, FAIL with a reason. A trial that is RUNNING while no driver runs is one to be continued.
Where trials are compared by a value of the user's metric, that stands in place of the loss, which is kept beside it.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from packaging.version import Version
from sqlalchemy.engine import make_url

from sweep.criterion import LOSS, Criterion
from sweep.space import Space
from trainables.config import QLoRAConfig
from trainables.protocol import Cost

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

log = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study that is made

PROGRAM = "qlora-sweep"
UPDATE = f"get the newest source, then: python -m pip install -e PATH/TO/{PROGRAM}"
"""What to do about a sweep of a newer version."""
PART = 30_000
"""Characters of one part of a note; a database may take no more than 65,535 bytes (MySQL's TEXT), quotes escaped."""
RESAMPLES = 10
"""How often the sampler is asked anew when it proposes a configuration that the ledger already has."""
RANDOM_RESAMPLES = 200
"""How many uniform draws follow, before what is left of a space with finitely many configurations is listed."""

ENDED_AS: Mapping[TrialState, Literal["complete", "stopped", "failed"]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
"""Our words for the ends of a trial."""
STATES = {TrialState.RUNNING: "running", **ENDED_AS}
"""Our words for all states of a trial."""

Sampler = Literal["tpe", "random", "grid", "gp"]

_CRITERION = "criterion"
"""Note in the ledger."""
MACHINES = "machines"
"""Note in the ledger: what the machines have that it ran on, a text for each kind."""
PORTABLE = "spec"
"""Note in the ledger: the spec as it may be run elsewhere (`spec.portable`), in YAML."""
EXHAUSTED = "exhausted"
"""Note in the ledger: why fewer than `search.trials` were tried, where the space has no more."""


@dataclass(frozen=True)
class Entry:
    """One trial as the ledger has it."""

    trial: FrozenTrial = field(repr=False)
    criterion: Criterion = LOSS
    """What it is compared by."""

    @property
    def number(self) -> int:
        """0 for the first; Optuna's own, until a trial is revived (`Ledger.revive`)."""
        return _number(self.trial)

    @property
    def state(self) -> TrialState:
        return self.trial.state

    @property
    def config(self) -> QLoRAConfig:
        return _config(self.trial.user_attrs["config"])

    @property
    def objectives(self) -> Mapping[int, float]:
        """What it is compared by after evaluation 1, 2, …, less is better; 0, where it is there, is the base's own."""
        return self.trial.intermediate_values

    @property
    def losses(self) -> Mapping[int, float]:
        """Validation losses, by evaluation as the objectives, which they are unless a metric is."""
        recorded: Mapping[str, float] | None = self.trial.user_attrs.get("losses")
        return self.objectives if recorded is None else {int(number): loss for number, loss in recorded.items()}

    @property
    def reported(self) -> int:
        """The newest evaluation in the ledger, -1 when there is none (0 is the base's own)."""
        return max(self.objectives, default=-1)

    @property
    def best(self) -> tuple[int, float] | None:
        """Evaluation with the lowest objective, and that objective; None before the first evaluation."""
        scored = [(objective, evaluation) for evaluation, objective in self.objectives.items() if evaluation > 0]
        if not scored:
            return None
        objective, evaluation = min(scored)
        return evaluation, objective

    @property
    def unscored(self) -> bool:
        """Whether it used its whole budget and has no validation loss: it was trained on the validation rows, too."""
        return self.state is TrialState.COMPLETE and self.best is None

    @property
    def promoted(self) -> int:
        """The newest rung of early stopping that this trial was let through."""
        return int(self.trial.user_attrs.get("promoted", 0))

    @property
    def reason(self) -> str | None:
        """Why it was stopped or failed."""
        reason: str | None = self.trial.user_attrs.get("reason")
        return reason

    @property
    def cost(self) -> Cost:
        return of_known(Cost, self.trial.user_attrs.get("cost", {}))

    @property
    def halvings(self) -> int:
        """How often its micro-batch was halved because memory ran out."""
        return int(self.trial.user_attrs.get("halvings", 0))

    @property
    def deaths(self) -> tuple[int, ...]:
        """For each time that its process died without a reason that is known: the newest evaluation by then."""
        return tuple(self.trial.user_attrs.get("deaths", ()))

    @property
    def silences(self) -> int:
        """How often its process was killed because nothing was heard of it."""
        return int(self.trial.user_attrs.get("silences", 0))


def of_known(kind: type[T], facts: Mapping[str, Any]) -> T:
    """A dataclass of what was noted of it. A newer version may have noted more, which this one does without."""
    names = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in facts.items() if name in names})


@lru_cache(maxsize=100_000)
def _config(recorded: str) -> QLoRAConfig:
    """Kept, for all trials are looked at for every proposal. A driver has made sure that nothing is left out."""
    return QLoRAConfig.model_validate_json(recorded, extra="ignore")


def unknown_fields(ledger: "Ledger") -> list[str]:
    """Fields of configurations, those of the verification included, that a newer version wrote, and this one leaves
    out."""
    verifying = ledger.verification()
    entries = chain(ledger.entries(), verifying.entries() if verifying else ())
    recorded = (json.loads(entry.trial.user_attrs["config"]) for entry in entries)
    return sorted({name for config in recorded for name in config} - QLoRAConfig.model_fields.keys())


def _number(trial: FrozenTrial) -> int:
    number: int = trial.user_attrs.get("number", trial.number)
    return number


class Ledger:
    """The study of one sweep. One driver writes; anybody may read."""

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self._storage = storage
        self._ids: dict[int, int] = {}
        # Not `create_study(load_if_exists=True)`: it appends to a journal each time that it finds the study there.
        known = any(study.study_name == name for study in storage.get_all_studies())
        opened = optuna.load_study if known else partial(optuna.create_study, direction="minimize")
        self._study = opened(
            storage=storage,
            study_name=name,
            sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: proposals come from `propose`
        )
        self.criterion = of_known(Criterion, self.noted(_CRITERION) or {})
        """What its trials are compared by."""

    @classmethod
    def at_url(cls, url: str, name: str) -> "Ledger":
        """The ledger in a database (any Optuna storage URL)."""
        return cls(optuna.storages.get_storage(url), name)

    def verification(self) -> "Ledger | None":
        """The runs that verify this search's winner, a study of its own in the same storage; None when there is none.

        Nothing that the search asks for a decision reads it.
        """
        known = {study.study_name for study in self._storage.get_all_studies()}
        return Ledger(self._storage, self._verification) if self._verification in known else None

    def begin_verification(self) -> "Ledger":
        """The same, made when there is none."""
        found = Ledger(self._storage, self._verification)
        if found.noted("sweep_id") is None:
            found.compare_by(self.criterion)
            found.note("sweep_id", f"{self.noted('sweep_id')}-v")  # its W&B runs are others than those of the search
        return found

    @property
    def _verification(self) -> str:
        return f"{self._study.study_name}/verification"  # no sweep can be called so

    def __len__(self) -> int:
        return len(self._frozen())

    def entries(self) -> list[Entry]:
        """All trials, by number."""
        return [Entry(trial, self.criterion) for trial in self._frozen()]

    def entry(self, number: int) -> Entry:
        return Entry(self._storage.get_trial(self._id(number)), self.criterion)

    def objectives_at(self, evaluation: int, without: int) -> list[float]:
        """What trials other than `without` are compared by at this evaluation."""
        return [
            trial.intermediate_values[evaluation]
            for trial in self._frozen()
            if evaluation in trial.intermediate_values and _number(trial) != without
        ]

    def add(self, proposal: "Proposal") -> Entry:
        """Write a proposed trial, RUNNING from now on, in one append."""
        number = max((_number(trial) for trial in self._frozen()), default=-1) + 1
        attributes = {"config": proposal.config.model_dump_json(), "number": number}
        return self._add(proposal.params, proposal.distributions, attributes, {})

    def revive(self, number: int) -> Entry:
        """Have a trial that was stopped run on, as one that was interrupted would, in one append.

        It is not stopped again at the rungs that it came to. Optuna changes no trial that has ended, so a new one is
        added, with all that is known of the old one, which from now on it stands for: here that is seen no more.
        """
        trial = self.entry(number).trial
        known = {key: value for key, value in trial.user_attrs.items() if key != "reason"}
        rung = max(trial.intermediate_values, default=0)
        attributes = known | {"number": number, "promoted": rung}
        return self._add(trial.params, trial.distributions, attributes, trial.intermediate_values)

    def _add(
        self,
        params: Mapping[str, Any],
        distributions: Mapping[str, optuna.distributions.BaseDistribution],
        attributes: Mapping[str, Any],
        objectives: Mapping[int, float],
    ) -> Entry:
        self._study.add_trial(
            optuna.create_trial(
                state=TrialState.RUNNING,
                params=dict(params),
                distributions=dict(distributions),
                user_attrs=dict(attributes),
                intermediate_values=dict(objectives),
            )
        )
        added = max(self._study.get_trials(deepcopy=False), key=lambda trial: trial.number)
        self._ids[_number(added)] = added._trial_id
        return Entry(added, self.criterion)

    def report(self, number: int, evaluation: int, objective: float, loss: float | None = None) -> None:
        """Write what an evaluation gave, with the validation loss where that is something else; the same again changes
        nothing."""
        if loss is not None:
            known = self.entry(number).trial.user_attrs.get("losses", {})
            self._storage.set_trial_user_attr(self._id(number), "losses", {**known, str(evaluation): loss})
        self._storage.set_trial_intermediate_value(self._id(number), evaluation, objective)

    def promote(self, number: int, rung: int) -> None:
        """Write that early stopping let the trial through the rung at this evaluation."""
        self._storage.set_trial_user_attr(self._id(number), "promoted", rung)

    def spend(self, number: int, cost: Cost) -> None:
        """Write what the trial has used so far, over all attempts."""
        self._storage.set_trial_user_attr(self._id(number), "cost", asdict(cost))

    def halve(self, number: int, halvings: int) -> None:
        """Write how often the trial's micro-batch was halved."""
        self._storage.set_trial_user_attr(self._id(number), "halvings", halvings)

    def died(self, number: int) -> Entry:
        """Write that the trial's process died for no reason that is known."""
        entry = self.entry(number)
        self._storage.set_trial_user_attr(self._id(number), "deaths", [*entry.deaths, entry.reported])
        return self.entry(number)

    def silent(self, number: int) -> Entry:
        """Write that the trial's process was killed because nothing was heard of it."""
        self._storage.set_trial_user_attr(self._id(number), "silences", self.entry(number).silences + 1)
        return self.entry(number)

    def complete(self, number: int) -> None:
        """End a trial that used its whole budget; its value is its best objective, if it has any."""
        best = self.entry(number).best
        self._storage.set_trial_state_values(self._id(number), TrialState.COMPLETE, [best[1]] if best else None)

    def stop(self, number: int, reason: str) -> None:
        """End a trial that early stopping, or somebody, gave up."""
        self._end(number, TrialState.PRUNED, reason)

    def fail(self, number: int, reason: str, traceback: str | None = None) -> None:
        """End a trial whose configuration cannot be trained; `traceback` is kept for whoever looks for the cause."""
        if traceback is not None:
            self._storage.set_trial_user_attr(self._id(number), "traceback", traceback)
        self._end(number, TrialState.FAIL, reason)

    def compare_by(self, criterion: Criterion) -> None:
        """Write what trials are compared by, before there is one."""
        self.note(_CRITERION, asdict(criterion))
        self.criterion = criterion

    def note(self, key: str, value: Any) -> None:
        """Write a fact about the whole sweep (a JSON value); a kill leaves all of it or what was noted before.

        A long one is written in parts, of which the one that is written last says where the others are.
        """
        text = json.dumps(value)
        before = self._study.user_attrs.get(f"{key}/parts")
        if before is None and len(text) <= PART:
            self._write(key, value)
            return
        side = 1 - before["side"] if before else 0  # those that are read stay as they are
        parts = [text[at : at + PART] for at in range(0, len(text), PART)]
        for number, part in enumerate(parts):
            self._write(f"{key}/{side}/{number}", part)
        self._write(f"{key}/parts", {"side": side, "count": len(parts)})

    def noted(self, key: str) -> Any:
        """What `note` wrote, None when it did not."""
        notes = self._study.user_attrs
        written = notes.get(f"{key}/parts")
        if written is None:
            return notes.get(key)
        return json.loads("".join(notes[f"{key}/{written['side']}/{number}"] for number in range(written["count"])))

    def _write(self, key: str, value: Any) -> None:
        self._storage.set_study_user_attr(self._study._study_id, key, value)

    def _end(self, number: int, state: TrialState, reason: str) -> None:
        self._storage.set_trial_user_attr(self._id(number), "reason", reason)
        self._storage.set_trial_state_values(self._id(number), state)

    def _id(self, number: int) -> int:
        """The storage's own number; to look through all trials for it each time would make long sweeps slow."""
        if number not in self._ids:
            self._ids = {_number(trial): trial._trial_id for trial in self._frozen()}
        return self._ids[number]

    def _frozen(self) -> list[FrozenTrial]:
        """All trials, by number; of one that was revived the newest."""
        return list({_number(trial): trial for trial in self._study.get_trials(deepcopy=False)}.values())


def open_journal(path: Path, name: str, warn: Callable[[str], object] = warnings.warn) -> Ledger:
    """The ledger in the journal file at `path`, made when it is not there. The caller holds the driver's lock.

    A last line without its end (the machine died in the middle of an append) is cut off with a warning. Damage
    elsewhere raises ValueError: the ledger is never silently started anew.
    """
    if path.exists():
        whole = len(_whole_lines(path))
        if torn := path.stat().st_size - whole:
            warn(f"{path}: the last line is torn ({torn} bytes) and cut off; what it said is done again")
            with path.open("r+b") as stream:
                stream.truncate(whole)
    for leftover in path.parent.glob(path.name + ".lock*"):  # of a killed process: Optuna would wait 30 s for it
        leftover.unlink()
    return Ledger(JournalStorage(_Journal(str(path))), name)


def read_journal(path: Path, name: str) -> Ledger:
    """The ledger in the journal file at `path` as it stands at this moment, to be read: a driver may be writing it.

    Raises FileNotFoundError when there is none, ValueError when it is damaged or knows no sweep of this name.
    """
    storage = JournalStorage(_Snapshot([json.loads(line) for line in _whole_lines(path).splitlines()]))
    if not any(study.study_name == name for study in storage.get_all_studies()):
        raise ValueError(f"{path} knows no sweep called {name}")
    return Ledger(storage, name)


def follow_journal(path: Path) -> BaseStorage:
    """The journal file at `path` for Optuna's own tools, with all that a driver adds; reading it takes no lock."""
    return JournalStorage(_Journal(str(path)))


def read_url(url: str, name: str) -> Ledger:
    """The ledger in a database, to be read. Raises ValueError when that knows no sweep of this name; none is made."""
    file = make_url(url).database if url.startswith("sqlite") else None
    if file and not Path(file).exists():
        raise ValueError(f"there is no file {file}, seen from {Path.cwd()}")
    storage = optuna.storages.get_storage(url)
    if not any(study.study_name == name for study in storage.get_all_studies()):
        raise ValueError(f"the database knows no sweep called {name}")
    return Ledger(storage, name)


def _whole_lines(path: Path) -> bytes:
    """A journal without a last line that has no end. ValueError when one of the others is damaged."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            _check(line)
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: the ledger is damaged ({error}). Restore the file from a backup, or move the"
                " sweep directory away to start from nothing."
            ) from error
    return whole


class _Snapshot(BaseJournalBackend):
    """A journal in memory that nothing is added to."""

    def __init__(self, logs: list[dict[str, Any]]) -> None:
        self._logs = logs

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return iter(self._logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise TypeError("this ledger was opened to be read")


class _Journal(JournalFileBackend):
    """Optuna's journal, each line with a checksum, which Optuna passes over when it reads."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        super().append_logs([{**entry, "checksum": _checksum(entry)} for entry in logs])


def _check(line: bytes) -> None:
    """ValueError when a line of the journal is not what was written. What other programs add has no checksum."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or entry.pop("checksum", None) not in (None, _checksum(entry)):
        raise ValueError("its checksum does not fit")


def _checksum(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def begun_by_newer(ledger: Ledger) -> str | None:
    """A sentence when a newer version of this program began the sweep."""
    began, ours = (ledger.noted("environment") or {}).get(PROGRAM, "0"), version(PROGRAM)
    if Version(began) <= Version(ours):
        return None
    return f"{PROGRAM} {began} began this sweep, and this is {ours}, which may not know all of it: {UPDATE}"


@dataclass(frozen=True)
class Observation:
    """A finished trial of another sweep, for the sampler; plain values, so that it can be noted in a ledger."""

    params: Mapping[str, Any]
    """Optuna parameters in the space of this sweep."""
    objective: float
    """Of a whole run the best, of a stopped one the newest."""
    stopped_at: int | None
    """The evaluation after which early stopping ended it, None when it is a whole run."""


def observed(entry: Entry, space: Space) -> Observation | None:
    """What a trial tells a sampler that searches `space`: None when it has not ended, has failed, or lies outside."""
    if entry.state not in (TrialState.COMPLETE, TrialState.PRUNED) or entry.best is None:
        return None
    try:
        params = space.params_of(entry.config.model_dump(mode="json"))
    except ValueError:
        return None
    if entry.state is TrialState.COMPLETE:
        return Observation(params, entry.best[1], None)
    return Observation(params, entry.objectives[entry.reported], entry.reported)


def as_trial(observation: Observation, space: Space) -> FrozenTrial:
    """As Optuna would have it after running it. ValueError when it lies outside of the space."""
    proposal = drawn(observation.params, space)
    at, objective = observation.stopped_at, observation.objective
    return optuna.create_trial(
        state=TrialState.COMPLETE if at is None else TrialState.PRUNED,
        value=objective if at is None else None,
        intermediate_values={} if at is None else {at: objective},
        params=dict(proposal.params),
        distributions=dict(proposal.distributions),
    )


@dataclass(frozen=True)
class Proposal:
    """A configuration to try, with the Optuna parameters that it came from."""

    config: QLoRAConfig
    params: Mapping[str, Any]
    distributions: Mapping[str, optuna.distributions.BaseDistribution]


class SpaceExhausted(Exception):
    """No configuration is left that the ledger does not have."""


def first_params(space: Space, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Optuna parameters of the `wanted` configurations, which are tried first; where none are, the documented defaults,
    if the space has them: a sweep should beat what people use."""
    if wanted:
        return [space.params_of(config) for config in wanted]
    try:
        return [space.params_of({})]
    except ValueError:
        return []


def propose(
    entries: Sequence[Entry],
    space: Space,
    sampler: Sampler,
    seed: int,
    first: Sequence[Mapping[str, Any]],
    known: Sequence[FrozenTrial] = (),
) -> Proposal:
    """The configuration to try next, a function of the ledger's entries, the space and the seed alone.

    `first` (Optuna parameters) is handed out before the sampler is asked, which learns from the entries and from what
    was `known` before them (`as_trial`). It is seeded anew for every trial and works on a copy in memory, so that a
    kill at any moment changes nothing. A configuration that an entry already has is never proposed again (what was
    known may be: only so can it win this sweep); raises `SpaceExhausted` when none is left.
    """
    tried = {entry.config for entry in entries}
    wanted = (drawn(params, space) for params in first)
    for proposal in chain(wanted, _draws(entries, space, sampler, seed, known)):
        if proposal.config not in tried:
            return proposal
    raise SpaceExhausted(f"all {len(tried)} configurations of the space have been tried")


def sample(space: Space, count: int, seed: int) -> list[QLoRAConfig]:
    """So many configurations of the space at random, doubles among them."""
    blank = optuna.create_study()
    return [_ask(blank, space, _sampler("random", _seed(seed, number, 0))).config for number in range(count)]


def _draws(
    entries: Sequence[Entry], space: Space, sampler: Sampler, seed: int, known: Sequence[FrozenTrial]
) -> Iterator[Proposal]:
    """Candidates in the order in which they are considered, those that were tried among them."""
    number = len(entries) + len(known)  # an earlier sweep with this seed has tried the draws before
    if sampler == "grid":
        yield from _grid(space)
        return
    blank = optuna.create_study(direction="minimize")
    study = blank
    if sampler != "random":  # which learns nothing from them
        study = optuna.create_study(direction="minimize")
        study.add_trials(map(_Shared, [*known, *(entry.trial for entry in entries)]))
    for attempt in range(RESAMPLES):
        yield _ask(study, space, _sampler(sampler, _seed(seed, number, attempt)))
    for attempt in range(RESAMPLES, RESAMPLES + RANDOM_RESAMPLES):
        yield _ask(blank, space, _sampler("random", _seed(seed, number, attempt)))
    if not space.continuous:
        yield from _grid(space)


class _Shared(FrozenTrial):
    """A trial that a study in memory has beside the ledger: its number there is its own, all else is shared.

    A study copies what is added to it deeply, which takes longer than the sampler does.
    """

    def __init__(self, trial: FrozenTrial) -> None:
        vars(self).update(vars(trial))

    def __deepcopy__(self, memo: object) -> "_Shared":
        return self


def _grid(space: Space) -> Iterator[Proposal]:
    return (drawn(params, space) for params in space.grid())


def drawn(params: Mapping[str, Any], space: Space) -> Proposal:
    """The configuration that these Optuna parameters stand for. ValueError when they lie outside of the space."""
    return _draw(optuna.trial.FixedTrial(dict(params)), space)


def _ask(study: optuna.Study, space: Space, sampler: optuna.samplers.BaseSampler) -> Proposal:
    study.sampler = sampler
    return _draw(study.ask(), space)


def _draw(trial: optuna.trial.BaseTrial, space: Space) -> Proposal:
    config = space.suggest(trial)
    return Proposal(config, dict(trial.params), dict(trial.distributions))


def _seed(seed: int, number: int, attempt: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{attempt}".encode()).digest()[:4], "big")


def _sampler(name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    with warnings.catch_warnings():
        # `group` may change with a newer Optuna; it is what lets conditional parameters be modelled together
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=6,  # random trials before the model is trusted; the usual 10 are half of a small sweep
            multivariate=True,
            group=True,
            constant_liar=True,
        )


def ranking(entries: Sequence[Entry]) -> list[Entry]:
    """Trials with an evaluation, best objective first; of equal ones a whole run before a stopped one."""
    scored = [
        (entry.best[1], entry.state is not TrialState.COMPLETE, entry.number, entry) for entry in entries if entry.best
    ]
    return [entry for *_, entry in sorted(scored, key=lambda row: row[:3])]
