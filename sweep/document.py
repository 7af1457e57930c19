"""A YAML file as plain values that know their line: loaded safely, with every fault told at its place."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from sweep.validation import Key, did_you_mean, shown

DEEPEST = 16
"""Levels of nesting that a file may have; a spec needs six."""

CORE = "tag:yaml.org,2002:"
PLAIN_TAGS = {CORE + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """The file as it was named, or the `--set KEY=VALUE` that the value came from."""
    line: int | None
    """1 for the first; None when no line is to blame."""
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.message}"


class SpecError(Exception):
    """A file that cannot be run, with everything that is wrong with it in the order of its lines."""

    def __init__(self, problems: list[Problem]) -> None:
        ordered = sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0))
        self.problems: tuple[Problem, ...] = tuple(dict.fromkeys(ordered))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass
class Document:
    """What stands in a file, and where."""

    name: str
    """The file, as it was named."""
    data: Any = None
    """Plain mappings, lists, text, numbers, booleans and None."""
    lines: dict[Key, int | str] = field(default_factory=dict)
    """The line of every value, or the `--set` that it came from."""
    unreadable: dict[Key, str] = field(default_factory=dict)
    """Values that are no plain ones, and why; what else is wrong with them is not told."""
    doubled: list[tuple[int, Key, int]] = field(default_factory=list)
    """Keys that stand twice in one mapping: line, key, and the line of the first."""

    def problem(self, key: Key, message: str) -> Problem:
        """What is wrong with the value at `key`, at its line or, where there is none, at that of its mapping."""
        dotted = ".".join(map(str, key))
        text = f"{dotted}: {message}" if dotted else message
        place = next((self.lines[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self.lines), None)
        return Problem(place, None, text) if isinstance(place, str) else Problem(self.name, place, text)

    def problems(self, found: Iterable[tuple[Key, str]]) -> list[Problem]:
        """What the file itself has wrong, and what was `found` in it besides."""
        doubled = [
            Problem(self.name, line, f"{'.'.join(map(str, key))}: stands twice, first on line {first}; keep one")
            for line, key, first in self.doubled
        ]
        told = [(key, text) for key, text in found if not any(key[:n] in self.unreadable for n in range(len(key) + 1))]
        return doubled + [self.problem(key, text) for key, text in [*self.unreadable.items(), *told]]


def read(path: Path) -> Document:
    """The YAML file at `path`; raises SpecError when it cannot be read or is no YAML at all."""

    def refuse(message: str, line: int | None = None) -> SpecError:
        return SpecError([Problem(str(path), line, message)])

    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        near = [sibling.name for sibling in path.parent.glob("*")]
        raise refuse(f"there is no such file{did_you_mean(path.name, near)}") from error
    except IsADirectoryError as error:
        raise refuse("is a directory; name the YAML file in it") from error
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise refuse(f"byte {content[error.start]:#04x} is not UTF-8; save the file as UTF-8", line) from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """The YAML in `text`, which messages call `name`; raises SpecError when it is no YAML at all."""
    document = Document(name)
    try:
        structure = _structure(text, name)
        if structure:
            raise SpecError(structure)
        yaml = YAML(typ="safe", pure=True)
        node = yaml.compose(text)
        if node is not None:
            document.data = _plain(document, yaml, (), node)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces" if r"'\t'" in str(error.problem) else ""
        said = ", ".join(filter(None, [error.context, error.problem]))
        raise SpecError([Problem(name, mark.line + 1 if mark else None, f"is not YAML: {said}{hint}")]) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(
            [Problem(name, line, f"is not YAML: character {error.character:#04x} is not allowed")]
        ) from error
    except YAMLError as error:
        raise SpecError([Problem(name, None, f"is not YAML: {error}")]) from error
    return document


def override(document: Document, assignment: str, rivals: dict[Key, Key]) -> Problem | None:
    """Set one value by `KEY=VALUE`, the key dotted, the value YAML; returns what is wrong with it.

    A key of `rivals` replaces its rival when that came from the file.
    """
    dotted, equals, text = assignment.partition("=")
    place = "--set ledger=…" if dotted.strip() == "ledger" else f"--set {assignment}"  # it may hold a password
    key: Key = tuple(int(part) if part.isdecimal() else part for part in dotted.strip().split("."))
    if not equals or "" in key:
        return Problem(place, None, "should be KEY=VALUE, such as budget.steps=40")
    try:
        value = parse(text, place)
    except SpecError as error:
        return Problem(place, None, error.problems[0].message)
    if value.doubled:
        return Problem(place, None, f"{value.doubled[0][1][-1]} stands twice; keep one")
    parent = document.data
    for depth, part in enumerate(key):
        inside = isinstance(part, int) and isinstance(parent, list) and part < len(parent)
        if not (inside or (isinstance(parent, dict) and isinstance(part, str))):
            above = ".".join(map(str, key[:depth]))
            return Problem(place, None, f"{above} is {shown(parent)}, which has no {part}; set {above} as a whole")
        if depth < len(key) - 1:
            if not inside and part not in parent:
                parent[part] = {}
                document.lines[key[: depth + 1]] = place
            parent = parent[part]
    rival = rivals.get(key)
    if rival is not None and rival[-1] in parent and not isinstance(document.lines.get(rival), str):
        del parent[rival[-1]]
        _forget(document, rival)
    _forget(document, key)
    parent[key[-1]] = value.data
    document.lines[key] = place
    document.unreadable |= {key + inner: why for inner, why in value.unreadable.items()}
    return None


def _forget(document: Document, key: Key) -> None:
    document.lines = {known: line for known, line in document.lines.items() if known[: len(key)] != key}
    document.unreadable = {known: why for known, why in document.unreadable.items() if known[: len(key)] != key}


def _structure(text: str, name: str) -> list[Problem]:
    """Faults that must be known before a tree is made of the text: aliases (bombs), depth, several documents."""
    problems, depth, documents = [], 0, 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        documents += isinstance(event, DocumentStartEvent)
        if isinstance(event, AliasEvent):
            problems.append(Problem(name, line, f"*{event.anchor}: aliases are not allowed; write the value out"))
        if depth > DEEPEST:
            return [*problems, Problem(name, line, f"is nested deeper than {DEEPEST} levels")]
        if documents > 1:
            return [*problems, Problem(name, line, "a second document starts here (---); a file holds one")]
    return problems


def _plain(document: Document, yaml: YAML, key: Key, node: Node) -> Any:
    """The value of a node, its line noted under `key`."""
    document.lines.setdefault(key, node.start_mark.line + 1)
    if node.tag not in PLAIN_TAGS:
        tag = str(node.tag).replace(CORE, "!!")
        document.unreadable[key] = f"the tag {tag} is not allowed; only plain values are"
        return None
    if isinstance(node, SequenceNode):
        return [_plain(document, yaml, (*key, index), item) for index, item in enumerate(node.value)]
    if isinstance(node, MappingNode):
        return _mapping(document, yaml, key, node)
    assert isinstance(node, ScalarNode)
    return _scalar(document, yaml, key, node)


def _mapping(document: Document, yaml: YAML, key: Key, node: MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, ScalarNode):
            document.lines[(*key, "?")] = line
            document.unreadable[(*key, "?")] = "a key should be a name"
        elif name.value in found:
            document.doubled.append((line, (*key, name.value), lines[name.value]))
        else:
            lines[name.value] = line
            stands = value if isinstance(value, ScalarNode) and value.value else name  # nothing has no line of its own
            document.lines[(*key, name.value)] = stands.start_mark.line + 1
            found[name.value] = _plain(document, yaml, (*key, name.value), value)
    return found


def _scalar(document: Document, yaml: YAML, key: Key, node: ScalarNode) -> Any:
    value: Any
    if node.tag in (CORE + "str", CORE + "timestamp", CORE + "merge"):
        value = str(node.value)
    else:
        try:
            value = yaml.constructor.construct_object(node)
        except (ValueError, KeyError):  # `!!int x`, or more digits than Python reads
            document.unreadable[key] = f"received {shown(node.value)}, which is no {str(node.tag).removeprefix(CORE)}"
            return None
    if isinstance(value, float) and not math.isfinite(value):
        document.unreadable[key] = f"received {node.value}, should be a finite number"
    if isinstance(value, str) and CONTROL.search(value):
        document.unreadable[key] = f"received {shown(value)}, which holds a control character"
    return value
