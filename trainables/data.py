"""Dataset -> tokens, once, memory-mapped and shared by all trials.

`prepare` reads and checks the rows, splits off a validation part, has TRL tokenise them and writes arrays under the
hash of all that went in; a machine tokenises the same content once. `load` opens the arrays in a trial.

A row is prompt and completion (two strings, or two lists of messages), messages (a chat), or text. The loss is taken
on the completion, on the assistant's turns, or on the whole text. Templates, end-of-text tokens and label masks are
TRL's: a stock `SFTTrainer` prepares the rows.
"""

import csv
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainables.apart import one_process
from trainables.cache import Cached, Tell, home, not_kept
from trainables.checkpoint import MANIFEST
from trainables.config import DataConfig

SUMMARY = "summary.json"
TOKENIZER = "tokenizer"
"""Directory beside the arrays with the model's tokenizer as `save_pretrained` writes it."""
LAYOUT = 1
"""Part of the content hash: raise it when what `prepare` writes changes, in form or content."""
VERSIONS = ("trl", "transformers", "tokenizers")
"""Packages that decide which tokens a row becomes."""
FIELDS = {"prompt/completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
ALLOWED = "a row has prompt and completion, or messages, or text"
SUFFIXES = (".jsonl", ".csv", ".parquet")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

Row = dict[str, Any]


class DataError(ValueError):
    """Data or a base model cannot be used; the message names what was found, what is allowed and what to do."""


# What a trial reads


@dataclass(frozen=True)
class Rows:
    """Tokenised rows, one after the other in memory-mapped arrays."""

    input_ids: NDArray[np.int32]
    """(tokens,)"""
    supervised: NDArray[np.bool_]
    """(tokens,): True where the token is a label. A row's first token may be one too, but nothing predicts it."""
    offsets: NDArray[np.int64]
    """(rows + 1,): row i is tokens offsets[i] to offsets[i + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids and label mask of one row, both (tokens of the row,), as views."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        span = slice(self.offsets[row], self.offsets[row + 1])
        return self.input_ids[span], self.supervised[span]


@dataclass(frozen=True)
class Tokens:
    """What the trials of a sweep train on and are scored with. Every row has something to predict."""

    train: Rows
    validation: Rows
    test: Rows | None
    pad_token_id: int

    def trained_on(self, evaluations: int) -> Rows:
        """The rows of a trial that is evaluated so many times; of one that is not, those of the validation, too."""
        if evaluations:
            return self.train
        parts = (self.train, self.validation)
        return Rows(
            np.concatenate([rows.input_ids for rows in parts]),
            np.concatenate([rows.supervised for rows in parts]),
            np.concatenate([self.train.offsets, self.train.offsets[-1] + self.validation.offsets[1:]]),
        )


def load(path: Path) -> Tokens:
    """Open what `prepare` wrote at `path`; costs milliseconds and no memory of its own."""
    summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    return Tokens(
        train=_open(path / "train"),
        validation=_open(path / "validation"),
        test=_open(path / "test") if (path / "test").is_dir() else None,
        pad_token_id=summary["pad_token_id"],
    )


def with_answers(rows: Rows) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Token ids of each row's last answer, which are its last supervised ones, and before them those of what leads to
    it: (prompt, answer). DataError when a row is nothing but an answer, as plain text is.
    """
    found = []
    for number in range(len(rows)):
        ids, supervised = rows[number]
        end = int(np.flatnonzero(supervised)[-1]) + 1
        led_to = np.flatnonzero(~supervised[:end])
        if not len(led_to):
            raise DataError("metric: the rows are text, of which nothing is an answer; use prompt and completion")
        start = int(led_to[-1]) + 1
        found.append((ids[:start], ids[start:end]))
    return found


def micro_batches(lengths: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Row numbers cut into micro-batches of at most `tokens` tokens with padding; a longer row stands alone.

    Rows of like length come together, shortest first, so that there is little padding.
    """
    batches: list[list[int]] = [[]]
    for row in np.argsort(lengths, kind="stable").tolist():
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > tokens:
            batches.append([])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches]


def _open(directory: Path) -> Rows:
    def array(name: str) -> Any:
        return np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    return Rows(array("input_ids"), array("supervised"), array("offsets"))


# What the driver does once


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made. The dictionaries go by split: train, validation and, where there is one, test."""

    path: Path
    """Directory for `load`; its name is the hash of all that decides the arrays."""
    rows: dict[str, int]
    tokens: dict[str, int]
    cut_off: dict[str, int]
    """Rows that lost labels to max_length."""
    dropped: dict[str, int]
    """Those of them that were left with nothing to predict, and are not among `rows`."""
    duplicates: int
    """Validation rows that stand in the training rows too."""
    first_duplicates: tuple[int, ...]
    """Line (JSONL, CSV) or row (others) of the first few of them in the file they came from."""
    notes: tuple[str, ...]
    """Sentences on what a user must know."""


def prepare(data: DataConfig, model: str, directory: Path) -> Prepared:
    """Tokenise the rows of `data` for `model` into `directory/<content hash>`, unless that stands already.

    The directory appears by rename, complete or not at all. Another sweep may have had the same rows: what was made
    for it is kept on this machine (see `cache`). DataError when rows or model cannot be used.
    """
    tokenizer = check_model(model)
    splits = _read_splits(data)
    target = directory / _tokens_hash(splits, tokenizer, data.max_length)
    told: list[str] = []
    if not target.is_dir():
        temporary = directory / f".{target.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            kept = _kept(splits, tokenizer, target.name, told.append)
            if kept is None or not _copied(kept, temporary):
                _write(splits, tokenizer, data.max_length, temporary)
                if kept is not None:
                    size = sum(file.stat().st_size for file in temporary.rglob("*"))
                    kept.write(size, partial(_copy, temporary))
            _publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    summary = json.loads((target / SUMMARY).read_text(encoding="utf-8"))
    del summary["pad_token_id"]
    summary |= {"first_duplicates": tuple(summary["first_duplicates"]), "notes": (*summary["notes"], *told)}
    return Prepared(path=target, **summary)


def content_hashes(data: DataConfig, model: str) -> dict[str, str]:
    """Hashes of all that a sweep reads, by key of its spec: raises what `prepare` does.

    Rows that others are split off from count as `data.train`, all of them; the tokenizer is the model's, told apart.
    """
    tokenizer = check_model(model)
    splits = _read_splits(data)
    parts = [name for name in splits if not isinstance(getattr(data, name), str)]
    hashes = {"data.train": _rows_hash(splits.pop("train"), *map(splits.pop, parts))} if parts else {}
    hashes |= {f"data.{name}": _rows_hash(split) for name, split in splits.items()}
    return {"model": model_hash(model), "tokenizer": _tokenizer_hash(tokenizer), **hashes}


def model_hash(model: str) -> str:
    """Hash of a base model's config and weights; for a model on the Hub, that of its commit.

    Of each weights file the size and 64 blocks of 64 KiB, evenly spread, are hashed: files of many gigabytes would
    take minutes, and weights that were trained on differ everywhere.
    """
    directory = check_model(model)
    digest = hashlib.sha256()
    if is_hub_id(model):
        digest.update(directory.name.encode())  # snapshots/COMMIT
        return digest.hexdigest()
    digest.update((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"\n{file.name}: {size} bytes\n".encode())
        with file.open("rb") as stream:
            for start in sorted({size * block // 64 for block in range(64)}):
                stream.seek(start)
                digest.update(stream.read(2**16))
    return digest.hexdigest()


def is_hub_id(name: str) -> bool:
    """Whether `name` can only mean something on the Hub: `name` or `owner/name`, and nothing like it on this disk."""
    return (
        re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
        and not name.endswith((*SUFFIXES, ".json", ".txt", ".gguf"))
        and not Path(name).exists()
    )


def check_model(model: str) -> Path:
    """Directory with the config and the tokenizer of `model`: itself, or the Hub's cache. DataError when incomplete."""
    if is_hub_id(model):
        directory, remedy = _from_hub(model), "name another model"
    else:
        directory, remedy = Path(model), "`make setup` makes the demo's; or give another directory, or a Hub id"
        if not directory.is_dir():
            what = "is a file, where a directory is due" if directory.exists() else "there is no such directory"
            raise DataError(f"model {model}: {what}; {remedy}")
    for complaint in _missing_files(directory, weights=not is_hub_id(model)):
        raise DataError(f"model {model}: {complaint}; {remedy}")
    return directory


def _missing_files(directory: Path, weights: bool) -> Iterator[str]:
    if not (directory / "config.json").is_file():
        yield "config.json is missing"
    if not any((directory / name).is_file() for name in VOCABULARIES):
        yield f"no tokenizer (any of {', '.join(VOCABULARIES)})"
    index = directory / "model.safetensors.index.json"
    for file in (directory / "config.json", directory / "tokenizer.json", index):
        try:
            json.loads(file.read_text(encoding="utf-8") if file.is_file() else "{}")
        except ValueError as error:
            yield f"{file.name} is not JSON ({error})"
    if weights and index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))
        shards = named.get("weight_map") if isinstance(named, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            yield f"{index.name} has no weight_map of weights to files"
            return
        for shard in sorted(set(shards.values())):
            if not (directory / shard).is_file():
                yield f"{shard}, which {index.name} names, is missing"
    elif weights and not any(directory.glob("*.safetensors")):
        yield "there are no weights (*.safetensors)"


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["config.json", *TOKENIZER_FILES, *TEMPLATE_FILES]))
    except (OSError, ValueError) as error:
        raise DataError(
            f"model {model}: there is no such directory, and the Hub said: {_one_line(error)}; "
            "give a model directory (`make setup` makes the demo's) or the id of a model you have access to"
        ) from error


# Reading


@dataclass(frozen=True)
class _Split:
    """Checked rows of one kind, with where each of them came from."""

    source: str
    kind: str
    """A key of FIELDS, with ` as messages` where prompt and completion are lists of messages."""
    numbers: list[int]
    rows: list[Row]
    unused: set[str]
    """What the rows hold besides the fields of their kind."""

    def at(self, numbers: list[int]) -> str:
        """The first few of `numbers` as words."""
        unit = _unit(self.source) + ("s" if len(numbers) > 1 else "")
        return f"{unit} {', '.join(map(str, numbers[:5]))}{' …' if len(numbers) > 5 else ''}"

    def select(self, indices: Iterable[int]) -> "_Split":
        indices = list(indices)
        numbers, rows = [self.numbers[i] for i in indices], [self.rows[i] for i in indices]
        return _Split(self.source, self.kind, numbers, rows, self.unused)


def _read_splits(data: DataConfig) -> dict[str, _Split]:
    splits = {"train": _read(data.train, "train")}
    total = len(splits["train"].rows)
    for name, source in (("validation", data.validation), ("test", data.test)):
        if isinstance(source, str):
            splits[name] = _read(source, name)
        elif source is not None:
            count = max(1, round(total * source))
            splits["train"], splits[name] = _split_off(splits["train"], name, count, data.split_seed)
    kind = splits["train"].kind
    for split in splits.values():
        if split.kind != kind:
            raise DataError(
                f"{split.source}: rows are {split.kind}, those of {data.train} are {kind}; bring them into one format"
            )
    return splits


def _split_off(split: _Split, name: str, count: int, seed: int) -> tuple[_Split, _Split]:
    """(the others, `count` rows drawn by seed); both keep the order of the file. `name` is that of the second."""
    total = len(split.rows)
    if count >= total:
        raise DataError(f"{split.source}: {total} rows cannot be split into training and {name}; add rows")
    drawn = set(random.Random(seed).sample(range(total), count))
    return split.select(i for i in range(total) if i not in drawn), split.select(sorted(drawn))


def _read(source: str, split: str) -> _Split:
    kind: str | None = None
    numbers, rows, unused = [], [], set()
    for number, found in _records(source, split):
        at = f"{source}, {_unit(source)} {number}"
        found_kind, row = _checked(found, at, kind)
        if kind not in (None, found_kind):
            raise DataError(f"{at}: is {found_kind}, while the rows before are {kind}; bring them into one format")
        kind = found_kind
        numbers.append(number)
        rows.append(row)
        unused |= _unused(found, row)
    if kind is None:
        raise DataError(f"{source}: there are no rows; {ALLOWED}")
    return _Split(source, kind, numbers, rows, unused)


def _unit(source: str) -> str:
    return "line" if source.endswith((".jsonl", ".csv")) else "row"


def _records(source: str, split: str) -> Iterator[tuple[int, Any]]:
    """(line or row number from 1, whatever stands there) of a file, a saved dataset or a dataset on the Hub."""
    path = Path(source)
    if path.is_dir():
        return enumerate(_saved_dataset(path, split), 1)
    if is_hub_id(source):
        return enumerate(_hub_dataset(source, split), 1)
    if not path.is_file():
        raise DataError(f"{source}: there is no such file or directory")
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".csv":
        return _csv_lines(path)
    if path.suffix == ".parquet":
        return enumerate(_parquet(path), 1)
    raise DataError(f"{source}: unknown kind of file; allowed are {', '.join(SUFFIXES)}, a saved dataset or a Hub id")


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    start = 0
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    with stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8: byte {start + error.start} of the file is "
                    f"0x{line[error.start]:02x}; save the file as UTF-8"
                ) from error
            start += len(line)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _text_lines(path):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                raise DataError(
                    f"{path}, line {number}: the last line is cut off ({error.msg} at column {error.colno}); "
                    "complete or delete it, or copy the file again"
                ) from error
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); a line is one JSON object"
            ) from error
        except (RecursionError, ValueError) as error:  # nested without end, or a number of thousands of digits
            raise DataError(f"{path}, line {number}: cannot be read ({_one_line(error)}); remove the line") from error


def _csv_lines(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # characters; the 131,072 of the module are too few for a document
    reader = csv.DictReader((line for _, line in _text_lines(path)), restkey="", strict=True)
    try:
        for row in reader:
            if "" in row:
                raise DataError(
                    f"{path}, line {reader.line_num}: more cells than the header has; quote cells with commas"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.reader.line_num}: not CSV ({error}); mend it, or save the rows as JSONL"
        ) from error


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a whole Parquet file ({_one_line(error)}); write or copy it again") from error
    return rows


def _saved_dataset(path: Path, split: str) -> Iterable[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a directory that datasets' save_to_disk wrote ({_one_line(error)}); "
            f"allowed are such a directory, files {', '.join(SUFFIXES)}, or a Hub id"
        ) from error
    if isinstance(saved, datasets.DatasetDict) and split not in saved:
        raise DataError(f"{path}: has splits {', '.join(saved)}, but none called {split}; save that split on its own")
    rows: Iterable[Row] = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    return rows


def _hub_dataset(name: str, split: str) -> Iterable[Row]:
    import datasets

    datasets.disable_progress_bars()
    try:
        found: Iterable[Row] = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: there is no such file or directory, and the Hub said of its split {split}: {_one_line(error)}; "
            "give a file, or the id of a dataset with that split that you have access to"
        ) from error
    return found


# Checking


def _checked(found: Any, at: str, kind: str | None) -> tuple[str, Row]:
    """The kind of the row that was `found` and its fields; `kind` is that of the rows before it."""
    if not isinstance(found, dict):
        raise DataError(f"{at}: is {_name(found)}, where an object with named fields is due; {ALLOWED}")
    whole = [name for name, fields in FIELDS.items() if all(found.get(field) is not None for field in fields)]
    if len(whole) > 1:
        raise DataError(f"{at}: is both {' and '.join(whole)}; {ALLOWED}, so remove the fields that are not meant")
    if not whole:
        due = FIELDS[kind.removesuffix(" as messages")] if kind else ()
        missing = [field for field in due if found.get(field) is None]
        lacking = f"field {' and '.join(missing)} is missing" if missing else "no format is complete"
        raise DataError(f"{at}: {lacking} (it has {', '.join(map(str, found)) or 'no field'}); {ALLOWED}")
    name, fields = whole[0], FIELDS[whole[0]]
    if name == "messages" or (name == "prompt/completion" and isinstance(found["prompt"], list)):
        row: Row = {field: _messages(found[field], f"{at}: {field}") for field in fields}
        if not any(message["role"] == "assistant" for message in row[fields[-1]]):
            raise DataError(
                f"{at}: {fields[-1]} has no assistant turn, so there is nothing to train on; remove the row"
            )
        return name if name == "messages" else f"{name} as messages", row
    row = {field: _string(found[field], f"{at}: {field}") for field in fields}
    if not row[fields[-1]]:
        raise DataError(f"{at}: {fields[-1]} is empty, so there is nothing to train on; remove the row")
    return name, row


def _messages(value: Any, at: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{at} is {_name(value)}, where a list of messages with role and content is due")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f"{at}, message {number}: has no role and content (it is {_name(message)})")
    return [
        {key: _string(message[key], f"{at}, message {number}: {key}") for key in ("role", "content")}
        for number, message in enumerate(value, 1)
    ]


def _string(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{at} is {_name(value)}, where a string is due")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{at} holds half a character ({value[error.start]!a}), which no tokenizer reads") from error
    return value


def _name(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    shown = json.dumps(value, default=str)
    return f"{names.get(type(value), type(value).__name__)} {shown if len(shown) < 40 else shown[:40] + '…'}"


def _unused(found: Row, row: Row) -> set[str]:
    """Names of what `found` holds and `row` leaves out."""
    unused = {str(field) for field, value in found.items() if field not in row and value is not None}
    for field in row:
        for message in found[field] if isinstance(found[field], list) else ():
            kept = ("role", "content")
            unused |= {f"{key} of {field}" for key, value in message.items() if key not in kept and value is not None}
    return unused


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# Hashing and writing


def _canonical(row: Row) -> str:
    return json.dumps(row, sort_keys=True)


def _tokens_hash(splits: dict[str, _Split], tokenizer: Path, max_length: int) -> str:
    """sha256 over all that decides the arrays: rows and how they are split, tokenizer, length, versions."""
    versions = {package: version(package) for package in VERSIONS}
    rows = {name: _rows_hash(split) for name, split in splits.items()}
    decides = [LAYOUT, max_length, versions, rows, _tokenizer_hash(tokenizer)]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _rows_hash(*splits: _Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(f"\n{len(split.rows)} rows\n".encode())
        for row in split.rows:
            digest.update(_canonical(row).encode() + b"\n")
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in (*TOKENIZER_FILES, *TEMPLATE_FILES) for file in tokenizer.glob(pattern)}):
        if file.is_file():
            digest.update(f"\n{file.relative_to(tokenizer).as_posix()}: {file.stat().st_size} bytes\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _kept(splits: dict[str, _Split], tokenizer: Path, name: str, tell: Tell) -> Cached | None:
    """Where this machine keeps them. Unlike the arrays, the notes follow from files and line numbers, too."""
    what = "the tokenised dataset"
    places = {name: [split.source, split.numbers, sorted(split.unused)] for name, split in splits.items()}
    config = (tokenizer / "config.json").read_text(encoding="utf-8")  # by which transformers chooses a class
    follows_from = json.dumps([name, places, config, version("qlora-sweep")])
    try:
        return Cached(home() / "tokens" / hashlib.sha256(follows_from.encode()).hexdigest(), what, tell)
    except OSError as error:
        tell(not_kept(what, error))
        return None


def _copied(kept: Cached, directory: Path) -> bool:
    """Whether what is kept, if anything, is in `directory` now, which is empty otherwise."""
    found = kept.read(lambda path: path)
    if found is None:
        return False
    try:
        _copy(found, directory)
    except OSError as error:  # deleted in this moment
        kept.tell(not_kept(kept.what, error))
        shutil.rmtree(directory)
        directory.mkdir()
        return False
    return True


def _copy(source: Path, to: Path) -> None:
    """Files alone, without their modes: what is kept may be read-only, what is copied is the user's to delete."""
    for file in source.rglob("*"):
        if file.is_file() and file.name != MANIFEST:
            copy = to / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _write(splits: dict[str, _Split], tokenizer: Path, max_length: int, directory: Path) -> None:
    # In a process of its own: TRL brings torch, threads and settings of the whole process that a driver must not have.
    with one_process(_leave_signals_to_the_parent) as pool:
        tokenised = pool.submit(_tokenise, splits, tokenizer, directory / TOKENIZER).result()
    summary: dict[str, Any] = {"pad_token_id": tokenised.pad_token_id}
    summary |= {key: {} for key in ("rows", "tokens", "cut_off", "dropped")}
    notes = []
    unused = sorted(set().union(*(split.unused for split in splits.values())))
    if unused:
        notes.append(f"The rows hold more than is trained on; left aside: {', '.join(unused)}.")
    for name, split in splits.items():
        longest = int(np.diff(tokenised.rows[name].offsets).max())
        kept, cut_off, dropped = _truncate(tokenised.rows[name], max_length)
        cut_off_at, dropped_at = ([split.numbers[i] for i in np.flatnonzero(mask)] for mask in (cut_off, dropped))
        if len(kept) == 0:
            raise DataError(
                f"{split.source}: all {len(cut_off)} {name} rows lose their whole completion to max_length "
                f"{max_length}; raise it (the longest row has {longest} tokens)"
            )
        if cut_off_at:
            notes.append(
                f"{len(cut_off_at)} of {len(cut_off)} {name} rows lose part of their completion to max_length "
                f"{max_length} ({split.at(cut_off_at)} of {split.source}); {len(dropped_at)} of them lose all of it "
                f"and are left out. The longest row has {longest} tokens."
            )
        _save(kept, directory / name)
        counts = {
            "rows": len(kept),
            "tokens": len(kept.input_ids),
            "cut_off": len(cut_off_at),
            "dropped": len(dropped_at),
        }
        for key, count in counts.items():
            summary[key][name] = count
    duplicates = {name: _duplicates(splits["train"], split) for name, split in splits.items() if name != "train"}
    for name, numbers in duplicates.items():
        if numbers:
            notes.append(
                f"{len(numbers)} of {len(splits[name].rows)} {name} rows stand in the training rows too "
                f"({splits[name].at(numbers)} of {splits[name].source}): the {name} loss will look better than it is."
            )
    summary |= {"duplicates": len(duplicates["validation"]), "first_duplicates": duplicates["validation"][:5]}
    summary["notes"] = [*notes, *tokenised.notes]
    (directory / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _duplicates(train: _Split, other: _Split) -> list[int]:
    """Numbers of the rows of `other` that stand in `train` too."""
    standing = {_canonical(row) for row in train.rows}
    return [number for number, row in zip(other.numbers, other.rows, strict=True) if _canonical(row) in standing]


def _truncate(rows: Rows, max_length: int) -> tuple[Rows, NDArray[np.bool_], NDArray[np.bool_]]:
    """(rows of at most `max_length` tokens that have something to predict, which lost labels, which were dropped).

    The masks are (rows before,). Cuts as SFTTrainer does: the end goes.
    """
    lengths = np.diff(rows.offsets)
    row = np.repeat(np.arange(len(rows)), lengths)
    position = np.arange(len(row)) - rows.offsets[row]
    predicted = rows.supervised & (position > 0)  # the first token has nothing before it to be predicted from
    kept = position < max_length
    labels = np.bincount(row[predicted], minlength=len(rows))
    labels_left = np.bincount(row[predicted & kept], minlength=len(rows))
    alive = labels_left > 0
    keep = kept & alive[row]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_length)[alive])])
    return Rows(rows.input_ids[keep], rows.supervised[keep], offsets), labels_left < labels, ~alive


def _save(rows: Rows, directory: Path) -> None:
    directory.mkdir()
    for name, dtype in (("input_ids", np.int32), ("supervised", np.bool_), ("offsets", np.int64)):
        np.save(directory / f"{name}.npy", getattr(rows, name).astype(dtype), allow_pickle=False)


def _publish(temporary: Path, target: Path) -> None:
    """Rename, once every byte is on disk. When another process was faster, its directory holds the same and stays."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise


# Tokenising, in a process of its own


def _leave_signals_to_the_parent() -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a job."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Tokenised:
    rows: dict[str, Rows]
    """By split; not yet cut to max_length."""
    pad_token_id: int
    notes: list[str]


def _tokenise(splits: dict[str, _Split], tokenizer_files: Path, save_to: Path) -> _Tokenised:
    """What a stock SFTTrainer makes of the rows; the tokenizer is saved to `save_to` as it was loaded."""
    import datasets
    from jinja2 import TemplateError
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    datasets.disable_progress_bars()
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_files)
    except Exception as error:  # whatever the readers of damaged files raise
        raise DataError(
            f"tokenizer {tokenizer_files}: cannot be loaded ({type(error).__name__}: {_one_line(error)});"
            " copy the model's files again"
        ) from error
    tokenizer.save_pretrained(save_to)
    kind = splits["train"].kind
    _check_tokenizer(tokenizer, kind, tokenizer_files)
    tokenizer.model_max_length = int(1e30)  # rows are cut to max_length later: no warning of long ones is due
    heard = _Listener("trl")
    tables = {name: datasets.Dataset.from_list(split.rows) for name, split in splits.items()}
    train, others = tables.pop("train"), tables
    with TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            max_length=None,  # cut by `_truncate`, which counts what is lost
            assistant_only_loss=kind == "messages",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
        )
        # A trainer wants a model, its preparation of the rows does not look at it.
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
        try:
            trainer = SFTTrainer(model, settings, train_dataset=train, eval_dataset=others, processing_class=tokenizer)
        except TemplateError as error:
            refused = next((at for split in splits.values() for at in _refused(split, tokenizer)), "a row")
            raise DataError(
                f"{refused}: the model's chat template refuses it ({error}); mend or remove the row"
            ) from error
    assert isinstance(trainer.eval_dataset, dict)
    prepared = {"train": trainer.train_dataset, **trainer.eval_dataset}
    rows = {name: _rows(table.with_format("arrow")[:]) for name, table in prepared.items()}
    return _Tokenised(rows, tokenizer.pad_token_id, heard.sentences)


def _check_tokenizer(tokenizer: Any, kind: str, path: Path) -> None:
    """DataError when TRL could not prepare rows of this kind with it."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if tokenizer.eos_token is None:
        raise DataError(f"tokenizer {path}: has no eos_token, so nothing ends a completion; name one in its config")
    if "messages" in kind and tokenizer.chat_template is None:
        raise DataError(
            f"tokenizer {path}: has no chat template, so it cannot read {kind}; use prompt/completion strings"
        )
    if kind == "messages" and not has_generation_markers(tokenizer.chat_template):
        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            raise DataError(
                f"tokenizer {path}: its chat template does not say which tokens are the assistant's, and TRL has no "
                "substitute for it; put {% generation %} and {% endgeneration %} around the assistant's turn in "
                "chat_template.jinja, or write each row as prompt and completion, both lists of messages"
            ) from error


def _refused(split: _Split, tokenizer: Any) -> Iterator[str]:
    """Where the rows stand that the chat template raises an error for."""
    from jinja2 import TemplateError

    for number, row in zip(split.numbers, split.rows, strict=True):
        try:
            tokenizer.apply_chat_template(
                [message for messages in row.values() for message in messages], tokenize=False
            )
        except TemplateError:
            yield f"{split.source}, {_unit(split.source)} {number}"


class _Listener(logging.Handler):
    """Keeps what a library warns of, for the user to read where it matters, rather than between other lines."""

    def __init__(self, library: str) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []
        logger = logging.getLogger(library)
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(f"{record.name.partition('.')[0]} says: {record.getMessage()}")


def _rows(table: Any) -> Rows:
    """The columns input_ids and labels of an Arrow table as arrays."""
    lists = table["input_ids"].combine_chunks()
    labels = table["labels"].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return Rows(
        lists.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int32),
        labels.values.to_numpy()[labels.offsets[0].as_py() : labels.offsets[-1].as_py()] != -100,
        offsets - offsets[0],
    )
