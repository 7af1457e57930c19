"""The search space: what a sweep may vary, one dimension for each field of `QLoRAConfig` that a spec names.

`parse` makes a space and refuses what could not be trained later: what a dimension can propose, `QLoRAConfig` takes.
Optuna is never imported here: its callers bring the trial.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import islice, product
from typing import TYPE_CHECKING, Any

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from sweep.validation import Faults, Invalid, Key, did_you_mean, gathering, listed, shown, unknown_key, validated
from trainables.config import QLoRAConfig

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

DEFAULTS: Mapping[str, Any] = QLoRAConfig().model_dump()
"""The documented default of every field."""

FORMS = ("value", "values", "min", "max", "log", "times", "when")
"""Keys of a dimension in the YAML file."""

COMBINATIONS = 100_000
"""So many pairs of batch size and accumulation are tried out when a space is made."""


@dataclass(frozen=True)
class Fixed:
    """One value: nothing is searched."""

    value: Any

    @property
    def values(self) -> Sequence[Any]:
        return (self.value,)

    @property
    def allowed(self) -> str:
        return shown(self.value)


@dataclass(frozen=True)
class Choice:
    """One of finitely many values, without an order."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("received [], should hold at least one value")
        twice = [value for index, value in enumerate(self.values) if value in self.values[:index]]
        if twice:
            raise ValueError(f"received {shown(twice[0])} twice in {shown(self.values)}; keep one")

    @property
    def allowed(self) -> str:
        return listed(shown(value) for value in self.values)

    def ask(self, trial: "BaseTrial", parameter: str) -> Any:
        choices = {_stored(value): value for value in self.values}
        return choices[trial.suggest_categorical(parameter, list(choices))]


@dataclass(frozen=True)
class Range:
    """Every number from `low` to `high`, both included; whole numbers when both are `int`."""

    low: int | float
    high: int | float
    log: bool = False
    """Uniform in the logarithm."""

    def __post_init__(self) -> None:
        if self.low == self.high:
            raise ValueError(f"received min {self.low} and max {self.high}: an empty range; for one value use value")
        if self.low > self.high:
            raise ValueError(f"received min {self.low} and max {self.high}, min should be below max")
        if self.log and self.low <= 0:
            raise ValueError(f"received min {self.low} with log, should be above 0; raise min or drop log")

    @property
    def values(self) -> Sequence[int] | None:
        """All values, None when they cannot be listed."""
        return range(self.low, self.high + 1) if isinstance(self.low, int) and isinstance(self.high, int) else None

    @property
    def allowed(self) -> str:
        return f"{self.low} to {self.high}"

    def nearest(self, value: int | float, base: int | float) -> int | float:
        """The number in the range that comes closest to `value` when it is multiplied by `base`."""
        return min(max(value // base if isinstance(self.low, int) else value / base, self.low), self.high)

    def ask(self, trial: "BaseTrial", parameter: str) -> int | float:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(parameter, self.low, self.high, log=self.log)
        return trial.suggest_float(parameter, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Dimension:
    """One field of `QLoRAConfig`, and where its value comes from."""

    name: str
    source: Fixed | Choice | Range
    """Of the value or, with `times`, of a factor."""
    times: str | None = None
    """The value is the factor times the value of this field."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """In effect only where each of these fields has one of these values; elsewhere the documented default holds."""

    @property
    def parameter(self) -> str:
        """Name of the Optuna parameter; the factor of a derived field is called `alpha/r`."""
        return f"{self.name}/{self.times}" if self.times else self.name

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields whose value must be known before this one's."""
        return (self.times, *self.when) if self.times else tuple(self.when)

    def in_effect(self, values: Mapping[str, Any]) -> bool:
        """Whether it decides its field, given the values of the fields before it."""
        return all(_get(values, name) in allowed for name, allowed in self.when.items())

    def value(self, drawn: Any, values: Mapping[str, Any]) -> Any:
        """The field's value, given what was drawn from the source and the values of the fields before it."""
        return _product(drawn, _get(values, self.times)) if self.times else drawn

    def drawn(self, value: Any, values: Mapping[str, Any]) -> Any:
        """What must be drawn from the source to get `value`; ValueError tells what is allowed."""
        base = _get(values, self.times) if self.times else 1
        source = self.source
        candidates = source.values if not isinstance(source, Range) else [source.nearest(value, base)]
        for candidate in candidates:
            if self.value(candidate, values) == value:
                return candidate
        raise ValueError(f"should be {source.allowed}{f' times {self.times}, which is {base}' if self.times else ''}")

    def plain(self) -> Any:
        """As it stands in a YAML file."""
        form: dict[str, Any] = {"times": self.times} if self.times else {}
        match self.source:
            case Fixed(value):
                form["value"] = value
            case Choice(values):
                form["values"] = list(values)
            case Range(low, high, log):
                form |= {"min": low, "max": high, "log": log}
        if self.when:
            form["when"] = {name: list(values) for name, values in self.when.items()}
        return form["value"] if form.keys() == {"value"} else form


@dataclass(frozen=True)
class Space:
    """All that a sweep may vary. What it does not name keeps its documented default."""

    dimensions: Mapping[str, Dimension]
    """By field, each after those that it needs."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """In a pydantic model a space is read by `parse` and written by `plain`."""
        return core_schema.no_info_plain_validator_function(
            parse, serialization=core_schema.plain_serializer_function_ser_schema(cls.plain)
        )

    @property
    def searched(self) -> tuple[str, ...]:
        """Fields that are not fixed."""
        return tuple(name for name, dimension in self.dimensions.items() if not isinstance(dimension.source, Fixed))

    @property
    def continuous(self) -> tuple[str, ...]:
        """Fields with more values than can be listed."""
        return tuple(name for name, dimension in self.dimensions.items() if dimension.source.values is None)

    def values(self, name: str) -> tuple[Any, ...]:
        """What the field `name`, which has no range, may be in a configuration of the space."""
        dimension = self.dimensions.get(name)
        if dimension is None:
            return (DEFAULTS[name],)
        return (*(dimension.source.values or ()), *((DEFAULTS[name],) if dimension.when else ()))

    def suggest(self, trial: "BaseTrial") -> QLoRAConfig:
        """The configuration of an Optuna trial, which is asked for every searched parameter that is in effect."""
        values: dict[str, Any] = {}
        for name, dimension in self.dimensions.items():
            if dimension.in_effect(values):
                source = dimension.source
                drawn = source.value if isinstance(source, Fixed) else source.ask(trial, dimension.parameter)
                values[name] = dimension.value(drawn, values)
        return QLoRAConfig(**values)

    def grid(self) -> Iterator[dict[str, Any]]:
        """The Optuna parameters of every configuration, one by one; ValueError names the fields without a list."""
        if self.continuous:
            raise ValueError(f"{listed(self.continuous)} should have values that can be listed, not a range of numbers")
        return (params for params, _ in _combinations(list(self.dimensions.values()), {}, {}))

    def params_of(self, config_values: Mapping[str, Any]) -> dict[str, Any]:
        """The Optuna parameters of a configuration; the inverse of `suggest`.

        A field that is not named has the value that the space fixes, else its documented default. Raises Invalid (a
        ValueError) with all that lies outside of the space.
        """
        faults: Faults = []
        named: dict[str, Any] = {}
        for name, raw in config_values.items():
            with gathering(faults, name):
                named[name] = checked(name, raw)
        for name, value in named.items():
            if name not in self.dimensions and value != DEFAULTS[name]:
                faults.append(((name,), f"received {shown(value)}, but the space has no {name}: {_by_default(name)}"))
        params: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for name, dimension in self.dimensions.items():
            try:
                values[name], searched = _located(dimension, named.get(name), values)
                params |= searched
            except ValueError as error:
                values[name] = _get(named, name)
                if name in named or name not in config_values:  # else its value has been refused already
                    faults.append(((name,), str(error)))
        if faults:
            raise Invalid(faults)
        return params

    def plain(self) -> dict[str, Any]:
        """As it stands in a YAML file; `parse` makes an equal space of it."""
        return {name: dimension.plain() for name, dimension in self.dimensions.items()}


def checked(name: str, raw: object) -> Any:
    """`raw`, a plain value, as the field `name` of `QLoRAConfig` holds it. Raises Invalid; nothing is coerced."""
    if name not in DEFAULTS:
        raise Invalid([((), unknown_key(name, DEFAULTS))])
    value = validated(QLoRAConfig.model_fields[name], raw)
    if isinstance(value, float) and not math.isfinite(value):
        raise Invalid([((), f"received {shown(raw)}, should be a finite number")])
    if value == () or (isinstance(value, tuple) and "" in value):
        raise Invalid([((), f"received {shown(raw)}, should name at least one layer and no empty name")])
    return value


def parse(entries: object) -> Space:
    """The space of a YAML mapping. Raises Invalid with everything that is wrong with it."""
    if isinstance(entries, Space):
        return entries
    if not isinstance(entries, dict):
        example = "r: {values: [8, 16]}"
        raise Invalid([((), f"received {shown(entries)}, should be a mapping of fields such as {example}")])
    faults: Faults = []
    found: dict[str, Dimension] = {}
    for name in sorted(entries, key=_order):
        with gathering(faults, name):
            found[name] = _dimension(name, entries[name])
    wrong = entries.keys() - found.keys()  # nothing is told of what depends on these
    while circle := _circle(found):
        faults.append(((circle[0],), f"depends on itself: {' needs '.join(circle)}"))
        wrong |= set(circle)
        found = {name: dimension for name, dimension in found.items() if name not in wrong}
    ordered = TopologicalSorter({name: dimension.needs for name, dimension in found.items()}).static_order()
    dimensions = {name: found[name] for name in ordered if name in found}
    for name, dimension in dimensions.items():
        if wrong.isdisjoint(dimension.needs):
            refused = [((name, *key), text) for key, text in _relations(dimension, dimensions)]
            faults += refused
            wrong |= {name} if refused else set()
        else:
            wrong.add(name)
    if wrong.isdisjoint(_with_needs(dimensions, ["accumulation", "batch_size"])):
        faults += _indivisible(dimensions)
    if faults:
        raise Invalid(faults)
    return Space(dimensions)


def _dimension(name: str, entry: object) -> Dimension:
    """One entry of the mapping, as far as it can be judged alone."""
    if name not in DEFAULTS:
        raise Invalid([((), unknown_key(name, DEFAULTS))])
    if not isinstance(entry, dict):
        try:
            return Dimension(name, Fixed(checked(name, entry)))
        except Invalid as error:
            if not isinstance(entry, list) or name == "target_modules":  # which is a list itself
                raise
            hint = f"; to search a list write {{values: {shown(entry)}}}"
            raise Invalid([(key, text + hint) for key, text in error.faults]) from error
    faults: Faults = [((key,), unknown_key(key, FORMS)) for key in entry if key not in FORMS]
    times = entry.get("times")
    if "times" in entry:
        if not isinstance(times, str) or times not in DEFAULTS:
            text = f"received {shown(times)}, should be a field of the configuration"
            faults.append((("times",), text + did_you_mean(times, DEFAULTS)))
        elif not _is_number(name) or not _is_number(times) or (_is_whole(name) and not _is_whole(times)):
            faults.append((("times",), f"{name} cannot be {times} times a factor: {_kind(name)}, {_kind(times)}"))
    with gathering(faults):
        source = _source(name, entry)
    with gathering(faults, "when"):
        when = _when(entry.get("when", {}))
    if faults:
        raise Invalid(faults)
    return Dimension(name, source, times, when)


def _source(name: str, entry: Mapping[str, Any]) -> Fixed | Choice | Range:
    given = [form for form in ("value", "values", "min", "max") if form in entry]
    if given not in (["value"], ["values"], ["min", "max"]):
        if not entry.keys() <= set(FORMS):
            raise Invalid([])  # told already: it is probably one of these, misspelt
        text = f"received {' and '.join(given) or 'nothing to choose from'}, should be value, or values, or min and max"
        raise Invalid([((), text)])
    if "log" in entry and (given != ["min", "max"] or not isinstance(entry["log"], bool)):
        raise Invalid([(("log",), f"received {shown(entry['log'])}, should be true or false beside min and max")])
    if given == ["min", "max"] and not _is_number(name):
        raise Invalid([((), f"received a range, but {_kind(name)}; write {{values: [...]}}")])
    raw: dict[Key, object] = {(form,): entry[form] for form in given}
    if given == ["values"]:
        if not isinstance(entry["values"], list):
            raise Invalid([(("values",), f"received {shown(entry['values'])}, should be a list")])
        raw = {("values", index): one for index, one in enumerate(entry["values"])}
    faults: Faults = []
    values = []
    for key, one in raw.items():
        with gathering(faults, *key):
            values.append(_factor(name, one) if "times" in entry else checked(name, one))
    if faults:
        raise Invalid(faults)
    try:
        if given == ["value"]:
            return Fixed(values[0])
        return Choice(tuple(values)) if given == ["values"] else Range(values[0], values[1], entry.get("log", False))
    except ValueError as error:
        raise Invalid([((given[0],), str(error))]) from error


def _factor(name: str, raw: object) -> int | float:
    kind = "a whole number" if _is_whole(name) else "a number"
    if isinstance(raw, bool) or not isinstance(raw, int | float) or raw <= 0 or (_is_whole(name) and raw != int(raw)):
        raise Invalid([((), f"received {shown(raw)}, a factor should be {kind} above 0")])
    return int(raw) if _is_whole(name) else float(raw)


def _when(raw: object) -> dict[str, tuple[Any, ...]]:
    if not isinstance(raw, dict):
        raise Invalid([((), f"received {shown(raw)}, should be a mapping such as {{quant_type: nf4}}")])
    faults: Faults = []
    when: dict[str, tuple[Any, ...]] = {}
    for name, one in raw.items():
        with gathering(faults, name):
            if one == []:
                raise Invalid([((), unknown_key(name, DEFAULTS) if name not in DEFAULTS else "received an empty list")])
            when[name] = tuple(checked(name, value) for value in (one if isinstance(one, list) else [one]))
    if faults:
        raise Invalid(faults)
    return when


def _relations(dimension: Dimension, dimensions: Mapping[str, Dimension]) -> Iterator[tuple[Key, str]]:
    """What is wrong between a dimension and those that it needs."""
    if dimension.times:
        if min(_ends(dimension.times, dimensions)) <= 0:
            yield ("times",), f"{dimension.times} can be 0, and so would be every multiple"
            return
        for value in dict.fromkeys(_ends(dimension.name, dimensions)):
            try:
                checked(dimension.name, value)
            except Invalid as error:
                yield (), f"{dimension.source.allowed} times {dimension.times}: {error}"
    for name, wanted in dimension.when.items():
        key, other = ("when", name), dimensions.get(name) or Dimension(name, Fixed(DEFAULTS[name]))
        if other.times or other.source.values is None:
            yield key, f"the values of {name} cannot be listed; a condition needs a field with a list of values"
            continue
        default = (DEFAULTS[name],) if other.when else ()
        for value in wanted:
            if value not in other.source.values and value not in default:
                possible = listed([other.source.allowed, *map(shown, default)])
                yield key, f"received {shown(value)}, which {name} never is: it is {possible}"


def _indivisible(dimensions: Mapping[str, Dimension]) -> Faults:
    """The first pair of batch size and accumulation that no trial can have."""
    pair = [name for name in ("accumulation", "batch_size") if name in dimensions]
    wanted = _with_needs(dimensions, pair)
    for _, values in islice(_combinations([d for n, d in dimensions.items() if n in wanted], {}, {}), COMBINATIONS):
        try:
            QLoRAConfig(**values)
        except ValidationError as error:
            why = error.errors()[0]["ctx"]["error"]
            return [((pair[0],), f"{why}, which this space can propose")]
    return []


def _located(dimension: Dimension, value: Any, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value of a field (`value` when it is given) and the Optuna parameter for it; ValueError when outside."""
    name = dimension.name
    if not dimension.in_effect(values):
        if value is not None and value != DEFAULTS[name]:
            raise ValueError(f"received {shown(value)}, but its condition is not met: {_by_default(name)}")
        return DEFAULTS[name], {}
    if isinstance(dimension.source, Fixed):
        fixed = dimension.value(dimension.source.value, values)
        if value is not None and value != fixed:
            raise ValueError(f"received {shown(value)}, but the space fixes it to {shown(fixed)}")
        return fixed, {}
    wanted = DEFAULTS[name] if value is None else value
    try:
        return wanted, {dimension.parameter: _stored(dimension.drawn(wanted, values))}
    except ValueError as error:
        if value is None:
            raise ValueError(f"not named, so it has its default {shown(wanted)}, but {error}; name it here") from error
        raise ValueError(f"received {shown(value)}, {error}") from error


def _combinations(
    dimensions: Sequence[Dimension], params: dict[str, Any], values: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Optuna parameters and field values of every configuration of the dimensions."""
    if not dimensions:
        yield params, values
        return
    dimension, rest = dimensions[0], dimensions[1:]
    if not dimension.in_effect(values):
        yield from _combinations(rest, params, values)
        return
    for drawn in dimension.source.values or ():
        searched = {} if isinstance(dimension.source, Fixed) else {dimension.parameter: _stored(drawn)}
        yield from _combinations(rest, params | searched, values | {dimension.name: dimension.value(drawn, values)})


def _with_needs(dimensions: Mapping[str, Dimension], names: Sequence[str]) -> set[str]:
    """The names, and all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += dimensions[name].needs if name in dimensions else ()
    return found


def _circle(dimensions: Mapping[str, Dimension]) -> list[str] | None:
    """Fields that need each other in a circle, the first one again at the end."""
    try:
        TopologicalSorter({name: dimension.needs for name, dimension in dimensions.items()}).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle[::-1]  # graphlib tells it from the needed to the needing
    return None


def _ends(name: str, dimensions: Mapping[str, Dimension]) -> list[Any]:
    """Lowest and highest value that a number can have."""
    dimension = dimensions.get(name)
    if dimension is None:
        return [DEFAULTS[name]]
    source = dimension.source
    ends = [source.low, source.high] if isinstance(source, Range) else list(source.values)
    if dimension.times:
        ends = [_product(factor, base) for factor, base in product(ends, _ends(dimension.times, dimensions))]
    ends += [DEFAULTS[name]] if dimension.when else []
    return [min(ends), max(ends)]


def _get(values: Mapping[str, Any], name: str) -> Any:
    return values.get(name, DEFAULTS[name])


def _product(factor: int | float, base: int | float) -> int | float:
    """The product; of real numbers to 12 digits, so that 3 x 0.1 is 0.3 and value / base gives the factor back."""
    if isinstance(factor, int) and isinstance(base, int):
        return factor * base
    return float(f"{factor * base:.12g}")


def _stored(value: Any) -> Any:
    """What stands for a value in Optuna, which keeps no tuples."""
    return ",".join(value) if isinstance(value, tuple) else value


def _order(name: str) -> int:
    """Place of a field in `QLoRAConfig`: what is proposed must not depend on the order in the file."""
    return list(DEFAULTS).index(name) if name in DEFAULTS else len(DEFAULTS)


def _is_number(name: str) -> bool:
    return isinstance(DEFAULTS[name], int | float) and not isinstance(DEFAULTS[name], bool)


def _is_whole(name: str) -> bool:
    return _is_number(name) and isinstance(DEFAULTS[name], int)


def _kind(name: str) -> str:
    kind = "whole numbers" if _is_whole(name) else "numbers" if _is_number(name) else "no numbers"
    return f"{name} holds {kind}"


def _by_default(name: str) -> str:
    return f"it keeps its default {shown(DEFAULTS[name])}"
