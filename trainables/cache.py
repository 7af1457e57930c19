"""What sweeps keep on this machine's disk, so that it is made once per machine: quantised bases, tokenised datasets.

The name of a thing is a hash of all that it follows from, so it may be missing but not out of date. It appears whole or
not at all; a damaged one is made anew. Processes that start at the same time each make it, and one of them keeps it. No
fault of it is one of a trial: what goes wrong is told, and the thing is made as if nothing were kept. A directory that
cannot be written to is read. Nothing here deletes what is in order; users may, at any time.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from trainables.checkpoint import MANIFEST, check_files, seal

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
    """Where something is kept, or would be: whole or not at all, with a manifest of checksums."""

    path: Path
    what: str
    """Its name, for those who are told."""
    tell: Tell = field(compare=False)

    def read(self, load: Callable[[Path], T]) -> T | None:
        """What `load` makes of the directory; None when there is none, or a damaged one, which is removed and told.

        Where `load` raises ValueError the files are as they were written, and would be so again: a file that says why
        takes their place, so that they are neither read nor written another time.
        """
        try:
            if self.path.is_file():
                self.tell(not_kept(self.what, f"{self.path} says why; delete it to have it tried again"))
            if not self.path.is_dir():
                return None
        except OSError as error:  # a directory of somebody else
            self.tell(not_kept(self.what, error))
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
                self.tell(not_kept(self.what, f"what was written is not read back: {error}"))
                shutil.rmtree(self.path, ignore_errors=True)
                with suppress(OSError):
                    self.path.write_text(f"It was written and not read back: {error}\n")
                return None
        self.tell(_line(f"{self.what} {self.path} is damaged ({flaw}); it is made anew"))
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
            self.tell(not_kept(self.what, error))


def _attempt(save: Callable[[Path], object], directory: Path) -> None:
    """Raises OSError for whatever `save` raises: a model's own code may run in it, and nothing depends on it."""
    try:
        save(directory)
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def not_kept(what: str, why: object) -> str:
    """The line for those who are told."""
    return _line(f"{what} is not kept for the next time: {why}")


def _line(text: str) -> str:
    return " ".join(text.split())
