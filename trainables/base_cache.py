"""Quantised bases on this machine's disk: read and quantised once per machine, not whenever a process starts.

A base is a directory in `home()/bases`: what transformers' `save_pretrained` writes, and a manifest of checksums. Its
name is a hash of all that its tensors follow from, so it may be missing but not out of date. It appears whole or not
at all; a damaged one is made anew. Processes that start at the same time each quantise, and one of them keeps it.
No fault of it is one of a trial: what goes wrong is told, and the base is read and quantised as if nothing were kept.
A directory that cannot be written to is read.

It takes as much of the disk as the base takes of memory, and nothing deletes it: there is one for every model,
quantisation, data type, kind of device and version of the libraries. Users may, at any time.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from trainables.checkpoint import MANIFEST, check_files, checksum_of, seal
from trainables.data import DataError, check_model, is_hub_id

VERSIONS = ("bitsandbytes", "torch", "transformers")
"""Packages that decide what tensors a base consists of."""

T = TypeVar("T")
Tell = Callable[[str], object]
"""Gets one line for each thing that the user should know."""


def home() -> Path:
    """What sweeps keep on this machine: `qlora-sweep` in XDG_CACHE_HOME, or in ~/.cache.

    Raises OSError when there is neither.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-sweep"
    except RuntimeError as error:
        raise OSError(f"{error}; set XDG_CACHE_HOME") from error


@dataclass(frozen=True)
class Cached:
    """Where a base is kept, or would be."""

    path: Path
    revision: str | None
    """The commit on the Hub that it is made from; None when the model is a directory."""
    tell: Tell = field(compare=False)

    def read(self, load: Callable[[Path], T]) -> T | None:
        """What `load` makes of the directory; None when there is none, or a damaged one, which is removed and told.

        Where `load` raises ValueError the files are as they were written, and would be so again: a file that says why
        takes their place, so that they are neither read nor written another time.
        """
        if self.path.is_file():
            _tell(self.tell, f"{self.path} says why; delete it to have it tried again")
        if not self.path.is_dir():
            return None
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            check_files(self.path, manifest["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            flaw = str(error)
        else:
            try:
                return load(self.path)
            except OSError as error:  # deleted in this moment
                flaw = str(error)
            except ValueError as error:
                _tell(self.tell, f"what was written is not read back: {error}")
                shutil.rmtree(self.path, ignore_errors=True)
                with suppress(OSError):
                    self.path.write_text(f"It was written and not read back: {error}\n")
                return None
        self.tell(_line(f"the quantised base {self.path} is damaged ({flaw}); it is made anew"))
        shutil.rmtree(self.path, ignore_errors=True)
        return None

    def write(self, size: int, save: Callable[[Path], object]) -> None:
        """Keep what `save` writes to the directory that it is given, `size` bytes; nothing while another process does.

        Where the machine refuses, or `save` fails, it is told and nothing is kept. That the disk is nearly full counts:
        checkpoints need it more.
        """
        unfinished = self.path.with_name(f".{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=0):
                if self.path.exists():
                    return
                shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
                if (free := shutil.disk_usage(self.path.parent).free) < 2 * size:
                    raise OSError(errno.ENOSPC, f"it takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
                try:
                    unfinished.mkdir()
                    _attempt(save, unfinished)
                    seal(unfinished, {})
                    unfinished.rename(self.path)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
        except Timeout:
            pass
        except OSError as error:
            _tell(self.tell, error)


def locate(model: str, tell: Tell, *decides: object) -> Cached | None:
    """Where the base of `model` is kept; `decides` is what it follows from, besides files and versions.

    None when nothing is to be kept, because `model` is stored quantised; or when nothing can be, which is told.
    """
    try:
        directory = check_model(model) if is_hub_id(model) else Path(model)
        config = (directory / "config.json").read_text(encoding="utf-8")
        if '"quantization_config"' in config:
            return None
        revision = directory.name if is_hub_id(model) else None
        bases = home() / "bases"
        bases.mkdir(parents=True, exist_ok=True)
        if not any(path.is_dir() for path in bases.glob("?" * 64)):  # else weights would be hashed for nothing
            probe = bases / ".probe"  # whose name is the same in each process, as is then what they tell
            probe.write_bytes(b"may be written")
            probe.unlink(missing_ok=True)
        with ThreadPoolExecutor() as pool:
            files = [] if revision else sorted(directory.glob("*.safetensors*"))
            weights = [(file.name, checksum) for file, checksum in zip(files, pool.map(_known, files), strict=True)]
        versions = [version(package) for package in VERSIONS]
        key = json.dumps([config, revision, weights, versions, *decides])
        return Cached(bases / hashlib.sha256(key.encode()).hexdigest(), revision, tell)
    except (OSError, DataError) as error:
        _tell(tell, error)
        return None


def _known(file: Path) -> str:
    """Its checksum, which is remembered for as long as the file is not touched: many gigabytes take seconds to read."""
    stat = file.stat()
    untouched = [str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    memory = home() / "bases" / "checksums" / hashlib.sha256(json.dumps(untouched).encode()).hexdigest()
    with suppress(OSError):
        if re.fullmatch("[0-9a-f]{64}", found := memory.read_text(errors="replace")):
            return found
    found = checksum_of(file)
    with suppress(OSError):  # the next process takes it again
        memory.parent.mkdir(exist_ok=True)
        unfinished = memory.with_name(f".{memory.name}.{os.getpid()}")
        unfinished.write_text(found)
        unfinished.replace(memory)
    return found


def _attempt(save: Callable[[Path], object], directory: Path) -> None:
    """Raises OSError for whatever `save` raises: a model's own code runs in it, and the base is there without it."""
    try:
        save(directory)
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _tell(tell: Tell, why: object) -> None:
    tell(_line(f"the quantised base is not kept for the next start of a process: {why}"))


def _line(text: str) -> str:
    return " ".join(text.split())
