"""The whole YAML file as one typed, frozen object, or everything that is wrong with it, each with its line."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from sweep import document
from sweep import space as spaces
from sweep.criterion import LOSS, Criterion
from sweep.document import Document
from sweep.document import Problem as Problem
from sweep.document import SpecError as SpecError
from sweep.space import DEFAULTS, Space
from sweep.validation import Faults, Invalid, Key, did_you_mean, gathering, listed, shown, unknown_key, validated
from trainables.config import DataConfig
from trainables.protocol import Budget as TrialBudget

PAGED = "paged_adamw_8bit"

RIVALS: dict[Key, Key] = {("budget", "epochs"): ("budget", "steps"), ("budget", "steps"): ("budget", "epochs")}
"""Setting one of these on the command line removes the other one that the file has."""

FREE = {"budget.hours", "search.trials", "metric", "storage", "ledger", "trial_timeout"}
"""Keys that may change while a sweep is under way, besides all of FREE_SECTIONS; `metric` where it is no objective."""
FREE_SECTIONS = {"verify", "tracking", "resources", "packing", "preemption", "checkpoint", "cost"}
ROWS = {"data.train", "data.validation", "data.test"}
"""Keys whose files may move: what lies there is compared by its content."""

TAKEN = {"loss", "evaluation", "eval_loss", "step", LOSS.key}
"""Keys that an objective may not have: with eval/ or best_ before them they are columns in W&B."""

STORES = ("s3://",)
"""What the URL of an object store begins with."""

FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt", ".gguf", ".safetensors"}
"""What ends in one of these is a file and no Hub id."""
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")


def _file_name(name: str) -> str:
    if len(name) > 100 or ".." in name or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(
            "should be a file name of at most 100 letters, digits, '.', '_' and '-', without '..', that starts with a"
            " letter, a digit or '_'"
        )
    return name


def _function(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ValueError("should be a function such as package.module:function")
    return name


def _url(text: str) -> str:
    if "://" not in text:
        received = "what may hold a password" if "@" in text else shown(text)
        raise Invalid([((), f"received {received}, should be the URL of a database such as sqlite:///sweep.db")])
    return text


def _store(text: str) -> str:
    if "://" in text and not text.startswith(STORES):
        raise ValueError(f"should be a directory, or begin with {listed(STORES)}")
    if "://" in text and re.search("[@?#]", text):
        raise ValueError("should be s3://BUCKET/PREFIX alone; keys and endpoint come from AWS_* in the environment")
    return text


def repository(name: str) -> str:
    """A name that the Hub allows for a repository. Raises ValueError."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError("should be a repository of the Hub, such as you/pricer") from error
    return name


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("should be a whole number when it is above 1 (Ray shares single GPUs only)")
    return gpus


class Section(BaseModel):
    """A mapping in the file: no key but these, no value of another type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Budget(Section):
    """How long a trial trains, how often it is scored, and how long the sweep may take."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; this or `steps`."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps, at least one for each evaluation; this or `epochs`."""
    evaluations: Annotated[int, Field(ge=0)] = 5
    """Equal parts that the budget is cut into; the validation loss is taken at the end of each. With 0, as `rerun
    --all-data` sets it for a single trial, there is none, and the validation rows are trained on, too."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours of wall clock of one run of the command, after which it ends and can be resumed; no limit unless given."""

    @property
    def per_trial(self) -> TrialBudget:
        """What a trial is told of it."""
        return TrialBudget(self.epochs, self.steps, self.evaluations)


class Search(Section):
    """How many configurations are tried, and how they are chosen."""

    trials: Annotated[int, Field(ge=1)]
    """Trials in total, those of earlier runs of the sweep included."""
    sampler: Literal["tpe", "random", "grid", "gp"] = "tpe"
    """How Optuna proposes: `tpe`, `random`, `grid` (wants lists of values) or `gp` (wants early_stopping: false)."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """With the ledger it decides what is proposed."""
    first: tuple[dict[str, Any], ...] = ()
    """Configurations to try before the sampler is asked; what an entry does not name is as the space fixes it, else the
    documented default. Unless given, the documented defaults where the space has them."""
    from_: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), alias="from")
    """Directories, from the working directory as `storage` is, or s3:// URLs, of earlier sweeps over the same model,
    data and budget: what they found in this space is known to the sampler from the start."""


class EarlyStopping(Section):
    """ASHA: a trial goes on only when it is among the best at its rungs."""

    grace: Annotated[int, Field(ge=1)] = 1
    """Evaluations that every trial gets."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """At each rung the best 1/reduction go on; rungs are this factor apart."""


class Verify(Section):
    """Is the winner real? Once the search is done its best configurations are trained again, with other seeds."""

    top: Annotated[int, Field(ge=1)] = 3
    """Configurations that are trained again, the best ones of the search; their checkpoints are kept."""
    seeds: Annotated[int, Field(ge=2)] = 3
    """Times that each of them is trained, to its end, with a seed that it did not have in the search."""


class Objective(Section):
    """What is searched for in place of the lowest validation loss: the best value of `metric`, taken at each evaluation
    of what the trial writes. It decides on early stopping, proposals, checkpoints and the winner."""

    value: Annotated[str, Field(min_length=1)] | None = None
    """Name of the value, where `metric` gives several by name."""
    direction: Literal["minimize", "maximize"]
    """Whether less of it is better (`minimize`), or more (`maximize`)."""
    rows: Annotated[int, Field(ge=1)] = 64
    """Validation rows, the first ones, whose answers are written at each evaluation."""


class Tracking(Section):
    """Weights & Biases."""

    project: Annotated[str, Field(min_length=1)] | None = None
    """W&B project; the sweep's name unless given."""
    entity: Annotated[str, Field(min_length=1)] | None = None
    """W&B user or team; the key's own unless given."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`online`, `offline`, `disabled`, or `auto`: online with a key and offline without."""


class Resources(Section):
    """What one trial gets, and how many run at a time."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores of a trial, or of the process that trains `packing.slots` of them."""
    gpus: Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] = 0.0
    """GPUs of the same; 0.5 puts two on one."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Trials at a time; as many as the machine has room for unless given."""


class Packing(Section):
    """Trials that share a device: their rows go through one 4-bit base together."""

    slots: Annotated[int, Field(ge=1)]
    """Trials that one process trains together over one 4-bit base, on what `resources` gives to one; 1 gives each trial
    a process of its own."""


class Preemption(Section):
    """What happens when the machine is taken away."""

    grace: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that trials have to checkpoint after a signal."""


class CheckpointPolicy(Section):
    """How often trials are saved, and what is kept."""

    every: Annotated[float, Field(gt=0)] = 5.0
    """Minutes between two checkpoints of a trial, besides those of its best evaluations."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Best ended trials whose checkpoints are kept."""
    push_to: Annotated[str, AfterValidator(repository)] | None = None
    """Repository of the Hub that gets the best adapter whenever there is a better one, made private if new."""


class Cost(Section):
    """What is paid for the machine."""

    per_hour: Annotated[float, Field(gt=0)] | None = None
    """Price of a machine for an hour, in any currency: `plan --probe`, the ranking, `status` and report.html then say
    what trials cost."""


class SweepSpec(Section):
    """One sweep. Made by `load`, which resolves paths; every instance is free of contradictions."""

    name: Annotated[str, AfterValidator(_file_name)]
    """Names the sweep's directory, its study and its W&B group."""
    trainable: Literal["qlora_sft", "toy"] = "qlora_sft"
    """What a trial trains; `toy` is a formula that answers in milliseconds and needs neither model nor data."""
    model: Annotated[str, Field(min_length=1)] | None = None
    """Base model: directory or Hub id."""
    data: DataConfig | None = None
    """Training and validation rows."""
    budget: Budget
    """How long a trial trains."""
    search: Search
    """How configurations are chosen."""
    early_stopping: EarlyStopping | Literal[False] = EarlyStopping()
    """ASHA; false trains every trial to its end."""
    space: Space
    """What is searched, by field of the configuration: a plain value is fixed, a mapping is searched."""
    verify: Verify | None = None
    """Is the winner real?"""
    metric: Annotated[str, AfterValidator(_function)] | None = None
    """Function (`package.module:function`) of what the winner writes on the test rows, or the validation rows where
    there are none: it gets prompts, references and completions and returns a number, or several by name."""
    objective: Objective | None = None
    """What is searched for, when that is not the lowest validation loss."""
    tracking: Tracking = Tracking()
    """Weights & Biases."""
    resources: Resources = Resources()
    """What a trial gets."""
    packing: Packing | Literal["auto"] = "auto"
    """Trials that share a device: `auto` measures how many should, or a mapping says it."""
    storage: Annotated[str, Field(min_length=1), AfterValidator(_store)] = "sweeps"
    """Where sweep directories are made: a directory, relative to the working directory, or `s3://bucket/prefix`."""
    ledger: Annotated[str, AfterValidator(_url)] | None = None
    """URL of a database that Optuna can keep a study in, a must on s3://; a journal file in the sweep directory unless
    given."""
    trial_timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds without a sign of life (the loading of the model counts as none) after which a trial's process is killed;
    a second time, the trial fails. Of several that share a device none is blamed when all are silent: what trains them
    is killed, and they go on from their checkpoints."""
    preemption: Preemption = Preemption()
    """What happens when the machine is taken away."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    """How often trials are saved."""
    cost: Cost = Cost()
    """What is paid for the machine."""

    @property
    def directory(self) -> str:
        """The sweep's directory, or its URL."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def criterion(self) -> Criterion:
        """What trials are compared by."""
        if self.objective is None or self.metric is None:
            return LOSS
        name = self.objective.value or self.metric.partition(":")[2]
        return Criterion(name, maximized=self.objective.direction == "maximize")

    @property
    def completions(self) -> int:
        """Answers that are written at each evaluation, when there are so many validation rows."""
        return 0 if self.objective is None else self.objective.rows

    @model_validator(mode="after")
    def _is_free_of_contradictions(self) -> Self:
        found = list(_contradictions(dict(_flat(self))))
        if found:
            raise ValueError("; ".join(f"{'.'.join(map(str, key))}: {text}" for key, text in found))
        return self


def keys(section: type[BaseModel] = SweepSpec, above: str = "") -> dict[str, FieldInfo]:
    """Every key of the file, dotted, with its type, default and description. `space` holds its own names."""
    found: dict[str, FieldInfo] = {}
    for name, field in _fields(section).items():
        inner = _section(field)
        if inner is None or isinstance(field.default, str):  # or what may stand in place of the mapping
            found[f"{above}{name}"] = field
        found |= keys(inner, f"{above}{name}.") if inner else {}
    return found


def load(path: str | Path, overrides: Sequence[str] = (), *, inputs: bool = True) -> SweepSpec:
    """The spec in the YAML file at `path`, changed by `overrides` such as `budget.steps=40` (the value is YAML).

    Paths of model and data, also in overrides, start at the file's directory and come out absolute; a Hub id stays as
    it is. Setting one of budget.steps and budget.epochs removes the other. Raises SpecError with every problem of the
    file at once. With `inputs` false the model and data that it names may be missing, as in a recorded spec.
    """
    path = Path(path)
    found = _read(path)
    wrong_overrides = [document.override(found, assignment, RIVALS) for assignment in overrides]
    return _sound(found, path.absolute().parent, inputs, filter(None, wrong_overrides))


def load_known(path: Path) -> tuple[SweepSpec, list[str]]:
    """The recorded spec at `path`, for whoever only looks at its sweep: without the keys that this version does not
    know, for a newer one wrote them. And those keys, dotted. Raises SpecError as `load` does."""
    found = _read(path)
    unknown = list(_unknown(found.data))
    for *above, name in unknown:
        del reduce(getitem, above, found.data)[name]
    return _sound(found, path.absolute().parent, inputs=False), [".".join(map(str, key)) for key in unknown]


def dump(spec: SweepSpec) -> str:
    """The spec as YAML with every default written out; `load` makes an equal one of it, wherever the file lies."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 4096  # no line is folded
    values = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    if not values["cost"]:
        del values["cost"]
    yaml.dump(values, stream)
    return stream.getvalue()


def portable(spec: SweepSpec) -> SweepSpec:
    """The spec as it may be run elsewhere: names in place of this machine's paths and of URLs, no ledger, no upload."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items() if key not in ("ledger", "push_to")}
        if isinstance(value, list):
            return [named(inner) for inner in value]
        is_place = isinstance(value, str) and (value.startswith("/") or "://" in value)
        return Path(value).name or value if is_place else value

    return SweepSpec.model_validate_json(
        json.dumps(named(spec.model_dump(mode="json", exclude_none=True, by_alias=True)))
    )


def changes(recorded: SweepSpec, asked: SweepSpec) -> list[str]:
    """What differs between two specs and may not while a sweep is under way: one line for each key or field.

    Of local rows the caller must compare the content (`trainables.data.content_hashes`): their paths may differ.
    """

    def free(key: str, was: object, now: object) -> bool:
        moved = key in ROWS and all(isinstance(path, str) and Path(path).is_absolute() for path in (was, now))
        if key == "metric" and asked.objective is not None:
            return False
        return moved or key in FREE or key.partition(".")[0] in FREE_SECTIONS

    before, after = (dict(_flat(spec)) for spec in (recorded, asked))
    pairs = [(key, before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after]) if key != "space"]
    old, new = recorded.space.plain(), asked.space.plain()
    # A section that one of them does not have, as with `early_stopping: false`, is one difference.
    lacking = [key for key, was, now in pairs if (was is True) != (now is True)]
    pairs = [pair for pair in pairs if pair[0].partition(".")[0] not in lacking]
    whole, other = (spec.model_dump(mode="json", by_alias=True) for spec in (recorded, asked))
    pairs += [(key, whole[key], other[key]) for key in lacking]
    pairs += [(f"space.{name}", old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]
    return [
        f"{key}: recorded {shown(was)}, asked {shown(now)}"
        for key, was, now in pairs
        if was != now and not free(key, was, now)
    ]


def _read(path: Path) -> Document:
    found = document.read(path)
    if not isinstance(found.data, dict):
        raise SpecError([found.problem((), f"received {shown(found.data)}, should be a mapping: name: …, space: …")])
    return found


def _sound(found: Document, directory: Path, inputs: bool, wrong: Iterable[Problem] = ()) -> SweepSpec:
    """The spec in a document, of which something is known to be `wrong`."""
    problems = [*wrong, *found.problems(_check(found.data, directory, inputs))]
    if problems:
        raise SpecError(problems)
    return SweepSpec.model_validate_json(json.dumps(_resolved(found.data, directory)))


def _unknown(data: Mapping[str, Any], section: type[BaseModel] = SweepSpec, above: Key = ()) -> Iterator[Key]:
    """Keys that no section has, and fields that no configuration has."""
    fields = _fields(section)
    for name, value in data.items():
        key = (*above, name)
        inner = _section(fields[name]) if name in fields else None
        if name not in fields:
            yield key
        elif inner and isinstance(value, dict):
            yield from _unknown(value, inner, key)
        elif key == ("space",) and isinstance(value, dict):
            yield from ((*key, field) for field in value if field not in DEFAULTS)
        elif key == ("search", "first") and isinstance(value, list):
            entries = [(index, entry) for index, entry in enumerate(value) if isinstance(entry, dict)]
            yield from ((*key, index, field) for index, entry in entries for field in entry if field not in DEFAULTS)


def _check(data: Mapping[str, Any], directory: Path, inputs: bool) -> Iterator[tuple[Key, str]]:
    """Everything that is wrong with the plain values of a file."""
    sound: dict[str, Any] = {}
    yield from _check_section(SweepSpec, data, (), sound)
    yield from _contradictions(sound)
    for key in ("model", "data.train", "data.validation", "data.test"):
        if inputs and isinstance(value := sound.get(key), str) and (problem := _missing(value, directory)):
            yield tuple(key.split(".")), problem


def _check_section(section: type[BaseModel], data: Mapping[str, Any], above: Key, sound: dict[str, Any]) -> Faults:
    """What is wrong with single values; those in order are added to `sound` under their dotted key."""
    elsewhere = [*keys(), *(f"space.{field}" for field in DEFAULTS)]
    fields = _fields(section)
    unknown = [name for name in data if name not in fields]
    faults: Faults = [((*above, name), unknown_key(name, fields, elsewhere)) for name in unknown]
    for name, field in fields.items():
        key, inner = (*above, name), _section(field)
        dotted = ".".join(map(str, key))
        if name not in data and field.is_required():
            faults.append((key, "is missing"))
        elif inner and (
            isinstance(data.get(name), dict) or (name not in data and isinstance(field.default, BaseModel))
        ):
            sound[dotted] = True
            faults += _check_section(inner, data.get(name, {}), key, sound)
        elif name not in data:
            sound[dotted] = field.default
        elif inner and shown(data[name]) not in map(shown, _instead(field)):
            instead = listed([f"a mapping ({', '.join(_fields(inner))})", *map(shown, _instead(field))])
            faults.append((key, f"received {shown(data[name])}, should be {instead}"))
        else:
            with gathering(faults, *key):
                sound[dotted] = validated(field, data[name])
    return faults


def _contradictions(found: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """What is wrong between values. `found` has those that are in order by themselves, by dotted key, and is not asked
    for others: of what depends on them nothing is told."""

    def given(*dotted: str) -> bool:
        return all(found.get(key) is not None for key in dotted)

    if found.keys() >= {"budget.epochs", "budget.steps"} and given("budget.epochs") == given("budget.steps"):
        received = "both" if given("budget.steps") else "neither"
        yield ("budget",), f"received {received} of epochs and steps, should be exactly one"
    if given("budget.steps", "budget.evaluations") and found["budget.steps"] < found["budget.evaluations"]:
        steps, evaluations = found["budget.steps"], found["budget.evaluations"]
        yield ("budget", "steps"), f"received {steps}, should be at least one for each of the {evaluations} evaluations"
    if given("early_stopping.grace", "budget.evaluations"):
        grace, evaluations = found["early_stopping.grace"], found["budget.evaluations"]
        if grace > evaluations > 0:
            yield ("early_stopping", "grace"), f"received {grace}, should be at most the {evaluations} evaluations"
    if found.get("budget.evaluations") == 0:
        chooses = found.get("search.trials", 1) > 1 or found.get("early_stopping") or found.get("verify")
        chooses = chooses or found.get("objective")
        if chooses or (given("metric") and "data.test" in found and not given("data.test")):
            yield (
                ("budget", "evaluations"),
                "received 0, which leaves no validation loss to go by; set search.trials: 1 and early_stopping: false,"
                " and leave verify and objective out, and metric where there is no data.test",
            )
    if found.get("trainable") == "qlora_sft":
        for key in ("model", "data"):
            if key in found and found[key] is None:
                yield (key,), "is missing; only trainable: toy goes without"
        if given("resources.gpus") and found["resources.gpus"] > 1:
            yield ("resources", "gpus"), f"received {shown(found['resources.gpus'])}, a qlora_sft trial uses at most 1"
        if given("space") and found.get("resources.gpus") == 0 and PAGED in found["space"].values("optimizer"):
            yield ("space", "optimizer"), f"received {PAGED}, which needs a GPU; set resources.gpus or optimizer: adamw"
    if found.get("trainable") == "toy" and given("checkpoint.push_to"):
        yield ("checkpoint", "push_to"), f"received {shown(found['checkpoint.push_to'])}, a toy has no adapter"
    if "metric" in found and found["metric"] is None and given("objective"):
        yield ("objective",), "is a value of `metric`, which is missing; write metric: package.module:function"
    if given("objective", "metric"):
        name = found.get("objective.value") or found["metric"].partition(":")[2]
        if Criterion(name).key in TAKEN:
            yield ("objective",), f"is called {name}, which something else is in W&B; give the value another name"
    elif found.get("trainable") == "toy" and given("metric"):
        yield (
            ("metric",),
            f"received {shown(found['metric'])}, but a toy writes nothing when it has ended; add objective",
        )
    if found.get("trainable") == "toy" and found.get("packing.slots", 1) > 1:
        yield ("packing", "slots"), f"received {found['packing.slots']}, only qlora_sft trials are packed"
    if "://" in str(found.get("storage", "")) and "ledger" in found and found["ledger"] is None:
        why = "an object store cannot append to a ledger file"
        yield ("ledger",), f"is missing; {why}, so name a database, such as postgresql://USER@HOST/DATABASE"
    if found.get("search.sampler") == "gp" and found.get("early_stopping"):
        yield ("search", "sampler"), "received gp, which learns from complete trials only; set early_stopping: false"
    if found.get("search.from") and (sampler := found.get("search.sampler")) in ("random", "grid"):
        yield (
            ("search", "from"),
            f"received other sweeps, from which {sampler} learns nothing; take tpe, or leave it out",
        )
    if given("space"):
        yield from _contradictions_of_space(found["space"], found.get("search.sampler"), found.get("search.trials"))
    yield from _contradictions_of_first(found.get("search.first", ()), found.get("space"), found.get("search.trials"))


def _contradictions_of_space(space: Space, sampler: str | None, trials: int | None) -> Iterator[tuple[Key, str]]:
    if trials is not None and trials > 1 and not space.searched:
        text = f"nothing is searched, so all {trials} trials would be equal; search a field or set search.trials: 1"
        yield ("space",), text
    if sampler == "grid":
        for name in space.continuous:
            yield ("space", name), "a range of real numbers has no grid; write {values: [...]} or take another sampler"


def _contradictions_of_first(
    first: Sequence[Mapping[str, Any]], space: Space | None, trials: int | None
) -> Iterator[tuple[Key, str]]:
    if trials is not None and len(first) > trials:
        yield ("search", "first"), f"received {len(first)} configurations, more than the {trials} trials"
    faults: Faults = []
    earlier: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(first):
        key = ("search", "first", index)
        if space is None:  # it has faults of its own
            for name, raw in entry.items():
                with gathering(faults, *key, name):
                    spaces.checked(name, raw)
            continue
        with gathering(faults, *key):
            params = space.params_of(entry)
            faults += [(key, f"is the same configuration as entry {n}") for n, p in earlier.items() if p == params]
            earlier[index] = params
    yield from faults


def _flat(section: BaseModel, above: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key; a section that is there counts as True."""
    for attribute, field in type(section).model_fields.items():
        value = getattr(section, attribute)
        inner = isinstance(value, BaseModel)
        key = f"{above}{field.alias or attribute}"
        yield key, True if inner else value
        if inner:
            yield from _flat(value, f"{key}.")


def _fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Its keys as they stand in the file; `from` is not allowed as the name of an attribute."""
    return {field.alias or attribute: field for attribute, field in section.model_fields.items()}


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The type of a key that holds a mapping of keys."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _instead(field: FieldInfo) -> list[object]:
    """Plain values that may stand where a section would."""
    kinds = get_args(field.annotation)
    literals = [plain for kind in kinds if get_origin(kind) is Literal for plain in get_args(kind)]
    return ([None] if NoneType in kinds else []) + literals


def _resolved(data: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The values of a file with absolute paths."""

    def resolve(section: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        paths = {name: _path(section[name], directory) for name in names if isinstance(section.get(name), str)}
        return {**section, **{name: str(path) for name, path in paths.items() if path}}

    resolved = resolve(data, ["model"])
    if isinstance(data.get("data"), dict):
        resolved["data"] = resolve(data["data"], ["train", "validation", "test"])
    if str(data.get("storage", "")).startswith("~/"):
        resolved["storage"] = str(Path(data["storage"]).expanduser())
    return resolved


def _path(text: str, directory: Path) -> Path | None:
    """The absolute path that `text` names, seen from `directory`; None when it is a Hub id."""
    path = directory / (Path(text).expanduser() if text.startswith("~/") else text)
    if _exists(path):
        return path.parent.resolve() / path.name  # a link keeps its name, and with it its suffix
    meant = text.startswith((".", "/", "~")) or path.suffix in FILE_SUFFIXES or ("/" in text and _exists(path.parent))
    return path if meant or not HUB_ID.fullmatch(text) else None


def _missing(text: str, directory: Path) -> str | None:
    """What is wrong when `text` names a file that is not there."""
    if not text:
        return 'received "", should not be empty'
    path = _path(text, directory)
    if path is None:
        if _exists(Path(text)):
            return f"received {shown(text)}, seen from the working directory; paths start at {directory}"
        return None
    if _exists(path):
        return None
    near = [sibling.name for sibling in path.parent.iterdir()] if _exists(path.parent) else []
    return f"received {shown(text)}, but there is no {path}{did_you_mean(path.name, near)}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False
