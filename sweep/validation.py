"""One plain value against its type, and the words for what is wrong: received, allowed, did you mean."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Key = tuple[str | int, ...]
"""Where a value stands: the keys and list indexes that lead to it."""

Faults = list[tuple[Key, str]]
"""What is wrong, each with where it stands."""


class Refused(Exception):
    """What was asked for cannot be done as things stand; the message says why, and what to do. Nothing was begun."""


SYNONYMS = {
    "asha": "early_stopping",
    "choices": "values",
    "dtype": "compute_dtype",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "gradient_accumulation_steps": "accumulation",
    "high": "max",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "r",
    "low": "min",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "max_seq_length": "max_length",
    "max_steps": "steps",
    "n_trials": "trials",
    "num_samples": "trials",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "per_device_train_batch_size": "batch_size",
    "quantization": "quant_type",
    "rank": "r",
    "use_rslora": "rslora",
    "warmup": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
}
"""What people write -> the name that is used here."""

TYPES = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "text",
    "tuple_type": "a list",
}
"""Pydantic's error type -> what is allowed, in the words of somebody who writes YAML."""


class Invalid(ValueError):
    """Everything that is wrong with a value."""

    def __init__(self, faults: Faults) -> None:
        self.faults = tuple(faults)
        """Each with the key at which it stands inside of the value."""
        super().__init__("; ".join(": ".join(filter(None, [".".join(map(str, key)), text])) for key, text in faults))

    def under(self, *above: str | int) -> Faults:
        """The faults, seen from further up."""
        return [((*above, *key), text) for key, text in self.faults]


@contextmanager
def gathering(faults: Faults, *above: str | int) -> Iterator[None]:
    """Add what is found Invalid in the block to `faults`, and go on after it."""
    try:
        yield
    except Invalid as error:
        faults += error.under(*above)


def validated(field: FieldInfo, raw: object) -> Any:
    """`raw`, as a YAML file can hold it, as a value of `field`. Raises Invalid.

    Nothing is coerced, but that a whole number is a number, too, and a list stands for a tuple.
    """
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        return TypeAdapter(kind).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise Invalid(_reasons(error)) from error


def shown(value: object) -> str:
    """`value` as it is written in YAML, shortened."""
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(values: Iterable[object]) -> str:
    """`a, b or c`, shortened."""
    words = [value if isinstance(value, str) else shown(value) for value in values]
    if len(words) > 20:
        return f"{', '.join(words[:10])} … {words[-1]}"
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def counted(number: int, noun: str) -> str:
    """Such as `1 trial`, `12 trials`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def did_you_mean(key: object, allowed: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """`; did you mean r?`, or nothing: synonyms, then close spellings, first of `allowed`, then of `elsewhere`.

    `elsewhere` are dotted keys, which are compared by their last part.
    """
    allowed, elsewhere, name = list(allowed), list(elsewhere), str(key).strip().lower().replace("-", "_")
    name = SYNONYMS.get(name, name)
    last = [dotted.rpartition(".")[2] for dotted in elsewhere]
    found = [a for a in allowed if a == name] or [e for e, part in zip(elsewhere, last, strict=True) if part == name]
    if not found:
        found = get_close_matches(name, allowed, n=1, cutoff=0.5)
    if not found:
        close = get_close_matches(name, last, n=1, cutoff=0.75)
        found = [e for e, part in zip(elsewhere, last, strict=True) if part in close]
    return f"; did you mean {listed(found)}?" if found else ""


def unknown_key(key: object, allowed: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """What to say of a key that does not exist."""
    allowed = list(allowed)
    return f"unknown key{did_you_mean(key, allowed, elsewhere)} (allowed: {', '.join(allowed)})"


def complaints(error: ValidationError) -> str:
    """What pydantic found wrong with a whole object, in a line."""
    found = error.errors(include_url=False)
    return "; ".join(": ".join([*map(str, each["loc"]), each["msg"]]) for each in found)


def _reasons(error: ValidationError) -> Faults:
    """What pydantic found wrong with one value: the list index inside of it (often none) and the message.

    The members of a union each complain: only those that come closest to the value are told, in one message.
    """
    found: dict[Key, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, Invalid):  # a validator that looks inside
            return list(cause.faults)
        index = tuple(part for part in details["loc"] if isinstance(part, int))  # text is the name of a union's member
        found.setdefault(index, []).append(details)
    deepest = max(map(len, found))
    return [(index, _message(group)) for index, group in found.items() if len(index) == deepest]


def _message(group: list[ErrorDetails]) -> str:
    bounds = [e for e in group if e["type"] not in TYPES and e["type"] != "literal_error"]
    told = bounds or group
    received = told[0]["input"]
    allowed = listed(dict.fromkeys(_allowed(e) for e in told))
    hints = dict.fromkeys(filter(None, (_hint(e["type"], e.get("ctx", {}), received) for e in told)))
    return f"received {shown(received)}, {allowed}{''.join(hints)}".replace(" or should be ", " or ")


def _allowed(details: ErrorDetails) -> str:
    if details["type"] in TYPES:
        return f"should be {TYPES[details['type']]}"
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    if details["type"] == "string_too_short":
        return "should not be empty"
    if details["type"] == "literal_error":
        return f"should be {listed(_choices(details['ctx']))}"
    return re.sub("^.*(?=should)", "", details["msg"])


def _choices(context: dict[str, object]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context["expected"]))


def _hint(kind: str, context: dict[str, object], received: object) -> str:
    if kind == "literal_error":
        return did_you_mean(received, _choices(context))
    if kind == "string_type" and isinstance(received, int | float) and not isinstance(received, bool):
        return f'; did you mean "{shown(received)}" (in quotes)?'
    if kind in ("int_type", "float_type") and isinstance(received, str) and re.fullmatch(r"[-+.\deE]*\d", received):
        return f"; did you mean {received} (without quotes)?"
    if kind == "int_type" and isinstance(received, float) and received.is_integer():
        return f"; did you mean {int(received)}?"
    if kind == "bool_type" and isinstance(received, str):
        truth = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
        return f"; did you mean {truth[received.lower()]}?" if received.lower() in truth else ""
    return ""
