"""What a trial must save to go on exactly where it stood: written atomically, verified when read.

A checkpoint is a directory `step-000120/` beside its siblings. Its files are written and flushed under a temporary
name, then the manifest with their checksums, and only then the directory gets its name: it appears whole or not at
all. A directory without a manifest, or with a file that differs from it, is not a checkpoint.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from trainables.protocol import Evaluation

MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
"""The adapter's weights, by PEFT's name for them."""
FORMAT = 2
"""Of the training state; adapters of format 1 are the same."""


@dataclass(frozen=True)
class Checkpoint:
    """One valid checkpoint on disk."""

    path: Path
    step: int
    evaluations: tuple[Evaluation, ...]
    """All evaluations that were finished when it was written."""

    @property
    def loss(self) -> float | None:
        """Validation loss of exactly these weights; None when it was not taken at this step."""
        return None if self.evaluation is None else self.evaluation.loss

    @property
    def objective(self) -> float | None:
        """What its trial is compared by, of exactly these weights; None as for `loss`."""
        return None if self.evaluation is None else self.evaluation.objective

    @property
    def evaluation(self) -> Evaluation | None:
        """That of exactly these weights."""
        return next((e for e in self.evaluations if e.step == self.step), None)


def path_of(trial_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimiser steps is, or would be."""
    return trial_dir / f"step-{step:06d}"


def write(trial_dir: Path, step: int, evaluations: tuple[Evaluation, ...], save: Callable[[Path], None]) -> Checkpoint:
    """Make `trial_dir/step-XXXXXX` from what `save` writes into an empty directory.

    A checkpoint of the same step is replaced. Raises OSError when the disk refuses, and leaves all others intact, that
    of the same step too.
    """
    trial_dir.mkdir(parents=True, exist_ok=True)
    target = path_of(trial_dir, step)
    temporary, replaced = _hidden(target, "new"), _hidden(target, "old")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        save(temporary)
        seal(temporary, {"format": FORMAT, "step": step, "evaluations": [asdict(e) for e in evaluations]})
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(trial_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(target, step, evaluations)


def newest(trial_dir: Path, warn: Callable[[str], object] = warnings.warn) -> Checkpoint | None:
    """The valid checkpoint with the most steps, or None. Warns of each newer one that is torn or altered.

    One that a killed `write` was about to replace gets its name back: the caller is the trial that owns the directory.
    """
    for replaced in trial_dir.glob(".step-*.old"):
        target = trial_dir / replaced.name.split(".")[1]
        if not target.exists():
            replaced.rename(target)
    found = None
    damaged = []
    for path in sorted(_all(trial_dir), key=_steps, reverse=True):
        try:
            found = read(path)
            break
        except ValueError as error:
            damaged.append(str(error))
    for what in damaged:
        warn(f"{what}; {f'{found.path.name}, the one before it, is used' if found else 'none is left'}")
    return found


def before(found: Checkpoint) -> Path | None:
    """The checkpoint beside this one with the most steps below its own, whatever its state; None when there is none."""
    earlier = [path for path in _all(found.path.parent) if _steps(path) < found.step]
    return max(earlier, key=_steps, default=None)


def best(trial_dir: Path) -> Checkpoint | None:
    """The checkpoint with the best evaluation of its own, or None. Reads manifests only: `read` verifies."""
    scored: list[tuple[float, int, Checkpoint]] = []
    for path in _all(trial_dir):
        try:
            found, _ = _manifest(path, (1, FORMAT))
        except ValueError:  # torn: `newest` warns of it
            continue
        mine = found.evaluation
        if mine is not None and math.isfinite(mine.objective) and found.step > 0:
            scored.append((mine.objective, found.step, found))
    return min(scored, key=lambda row: row[:2], default=(None, None, None))[2]


def last(trial_dir: Path) -> Checkpoint | None:
    """The checkpoint with the most steps, or None when there is none, or its manifest is torn. Reads that alone."""
    path = max(_all(trial_dir), key=_steps, default=None)
    try:
        return None if path is None else _manifest(path, (FORMAT,))[0]
    except ValueError:
        return None


def read(path: Path) -> Checkpoint:
    """Verify every checksum of the checkpoint at `path`; ValueError names the first thing that does not fit."""
    found, files = _manifest(path, (FORMAT,))
    try:
        check_files(path, files)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from error
    return found


def seal(directory: Path, facts: Mapping[str, object]) -> None:
    """Flush what stands in `directory` and write its manifest, last: the `facts`, and a checksum of each file."""
    files = list(_files(directory))
    for file in files:
        _flush(file)
    with ThreadPoolExecutor() as pool:
        checksums = pool.map(checksum_of, files)
        names = (file.relative_to(directory).as_posix() for file in files)
        manifest = {**facts, "files": dict(zip(names, checksums, strict=True))}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush(directory / MANIFEST)
    _flush(directory)


def check_files(directory: Path, files: Mapping[str, str]) -> None:
    """Compare `files`, checksums by name, with what stands in `directory`; ValueError names the first that differs."""

    def flaw(name: str) -> str | None:
        try:
            return None if checksum_of(directory / name) == files[name] else f"{name} was altered"
        except OSError as error:
            return f"{name} is missing or unreadable ({error})"

    with ThreadPoolExecutor() as pool:
        found = next(filter(None, pool.map(flaw, files)), None)
    if found is not None:
        raise ValueError(found)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """While safetensors writes to `directory`: a full disk, of which it makes an error of its own, is an OSError."""
    try:
        yield
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, f"cannot write {directory}: {error}") from error


def _manifest(path: Path, formats: Collection[int]) -> tuple[Checkpoint, dict[str, str]]:
    """What the manifest of the checkpoint at `path` says: the checkpoint, and the checksum of each file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] not in formats:
            raise ValueError(f"it has format {manifest['format']}, this version reads {FORMAT}")
        evaluations = tuple(Evaluation(**evaluation) for evaluation in manifest["evaluations"])
        return Checkpoint(path, int(manifest["step"]), evaluations), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} is torn: {MANIFEST} is missing or unreadable ({error})") from error


def prune(trial_dir: Path, keep: set[Path]) -> None:
    """Delete every checkpoint (and leftover of an unfinished one) in `trial_dir` that is not in `keep`."""
    kept = {path.resolve() for path in keep}
    for leftover in trial_dir.glob(".step-*"):
        shutil.rmtree(leftover)
    for path in _all(trial_dir):
        if path.resolve() not in kept:
            hidden = _hidden(path, "gone")
            path.rename(hidden)  # first, so that a half-deleted directory is not taken for a checkpoint
            shutil.rmtree(hidden)


def _hidden(checkpoint: Path, age: str) -> Path:
    """Name for a checkpoint that is not there yet, or no longer; `prune` removes what a killed process leaves of it."""
    return checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.{age}")


def _all(trial_dir: Path) -> list[Path]:
    return [path for path in trial_dir.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def checksum_of(file: Path) -> str:
    """SHA-256 of the content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
