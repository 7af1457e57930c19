"""Where a sweep directory is: on a file system that all its machines see, or on an object store.

On an object store (S3) every machine works on a copy of its own, and what must outlive the machine is pushed there:
checkpoints, their manifest last, so that a torn upload is none; the rows of each trial; the spec; best/. Objects appear
whole or not at all. On a file system there is one copy and nothing to do.
"""

import hashlib
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from sweep.paths import SweepPaths
from trainables.cache import home
from trainables.checkpoint import MANIFEST
from trainables.data import SUMMARY

PULSE_SECONDS = 5.0
"""How often the driver of a sweep on an object store shows that it lives."""

LAST = {MANIFEST, SUMMARY}
"""Files that are written last, and say that the directory is whole."""


def driver_named(holder: str | None) -> str:
    """A driver as people are told of it. What tells drivers apart has microseconds, too."""
    return re.sub(r"\.\d+ UTC$", " UTC", holder or "another process")


@dataclass(frozen=True)
class Place:
    """A sweep directory, the same on every machine; plain values, so that it can be sent to them.

    All methods take paths in `paths.root`, and raise OSError when the store refuses.
    """

    url: str
    """An absolute path, or a URL such as s3://bucket/sweeps/pricer."""
    verification: bool = False
    """See `SweepPaths`."""

    @classmethod
    def at(cls, where: str) -> "Place":
        """A directory, relative to the working directory, or a URL."""
        return cls(where.rstrip("/") if "://" in where else str(Path(where).expanduser().absolute()))

    @property
    def is_remote(self) -> bool:
        return "://" in self.url

    @property
    def paths(self) -> SweepPaths:
        """The directory, or this machine's copy of it."""
        return SweepPaths(_copy_of(self.url) if self.is_remote else Path(self.url), self.verification)

    @property
    def shown(self) -> str:
        """Its URL, or a path from the working directory when it lies below."""
        here = Path.cwd()
        below = not self.is_remote and Path(self.url).is_relative_to(here)
        return str(Path(self.url).relative_to(here)) if below else self.url

    def command(self, verb: str, *words: str) -> str:
        """What is typed to have a verb done to the sweep that is here, ready to be pasted into a shell."""
        return shlex.join(["python", "-m", "sweep", verb, self.shown, *words])

    def no_sweep(self, why: str = "") -> str:
        """That there is none, and what to do."""
        there = self.is_remote or Path(self.url).exists()
        what = f"{self.url} {'holds no sweep' if there else 'does not exist'}{why}"
        return (
            f"{what}; name the directory of one, which has a space.yaml, like sweeps/pricer, or begin one:"
            " python -m sweep run space.yaml"
        )

    def push(self, path: Path, confirm: Callable[[], object] = lambda: None) -> None:
        """Send a file, or a directory with all that is in it, the one last that says that it is whole.

        `confirm` is called before that one is sent, and may raise.
        """
        if self.is_remote:
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            for file in files:
                if file.name in LAST:
                    self._delete_there(file)  # an earlier directory of that name is whole no more
            for file in sorted(files, key=lambda file: (file.name in LAST, file)):
                if file.name in LAST:
                    confirm()
                system, there = self._there(file)
                copy_files(str(file), there, source_filesystem=LocalFileSystem(), destination_filesystem=system)

    def claim(self, sweep_id: str) -> None:
        """Forget what this machine has of the trials of an earlier sweep that was called the same."""
        if self.is_remote:
            trials = self.paths.trials
            owner = trials / "owner.txt"
            self.paths.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.paths.root / "claim.lock"):
                if not (owner.exists() and owner.read_text() == sweep_id):
                    shutil.rmtree(trials, ignore_errors=True)
                    trials.mkdir(parents=True)
                    owner.write_text(sweep_id)

    def pull_file(self, file: Path) -> None:
        """Have here what the store has as this file, or none when it has none."""
        if self.is_remote:
            if self.holds(file):
                self._fetch(file)
            else:
                file.unlink(missing_ok=True)

    def pull_directory(self, path: Path) -> None:
        """Fetch a directory that is not here; its content never changes."""
        if self.is_remote and not path.exists():
            system, there = self._there(path)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            for info in system.get_file_info(FileSelector(there, allow_not_found=True, recursive=True)):
                if info.type == FileType.File:
                    name = info.path.removeprefix(f"{there}/")
                    self._fetch(path / name, unfinished / name)
            if unfinished.exists() and not path.exists():  # else another process was faster
                unfinished.rename(path)

    def pull_log(self, path: Path) -> None:
        """Have here what the store has of a file that only grows; kept are lines that this machine could not send."""
        if self.is_remote:
            sent = self.text(path)
            if sent is not None and not (path.exists() and path.read_text().startswith(sent)):
                self._fetch(path)

    def pull_checkpoints(self, trial: Path, *, manifests_alone: bool = False) -> None:
        """Have here what the store has of a trial's checkpoints, or their manifests, which are enough to rank them."""
        if self.is_remote:
            system, there = self._there(trial)
            for info in system.get_file_info(FileSelector(there, allow_not_found=True)):
                checkpoint = trial / info.base_name
                manifest = self.text(checkpoint / MANIFEST)
                if info.type == FileType.Directory and manifest is not None:
                    here = checkpoint / MANIFEST
                    known = here.exists() and here.read_text() == manifest
                    for file in system.get_file_info(FileSelector(info.path, recursive=True)):
                        local = checkpoint / file.path.removeprefix(f"{info.path}/")
                        wanted = local.name == MANIFEST or not manifests_alone
                        if file.type == FileType.File and wanted and not (known and local.exists()):
                            self._fetch(local)

    def prune(self, trial: Path) -> None:
        """Delete the checkpoints there that are not here any more."""
        if self.is_remote:
            system, there = self._there(trial)
            for info in system.get_file_info(FileSelector(there, allow_not_found=True)):
                checkpoint = trial / info.base_name
                if info.type == FileType.Directory and not checkpoint.exists():
                    self.delete(checkpoint / MANIFEST)  # first, so that half of one is not taken for a whole one
                    system.delete_dir(info.path)

    def is_driven(self) -> bool:
        """Whether a driver shows that it lives, on an object store; one that was killed does not. Takes 15 s."""
        before = self.text(self.paths.pulse) if self.is_remote else None
        if before is None:
            return False
        time.sleep(3 * PULSE_SECONDS)
        return self.text(self.paths.pulse) not in (before, None)

    def holds(self, path: Path) -> bool:
        """Whether the file is there."""
        if not self.is_remote:
            return path.exists()
        system, there = self._there(path)
        return bool(system.get_file_info(there).type == FileType.File)

    def text(self, path: Path) -> str | None:
        """What a small file says at this moment; None when there is none."""
        try:
            if not self.is_remote:
                return path.read_text()
            system, there = self._there(path)
            with system.open_input_stream(there) as stream:
                return bytes(stream.read()).decode()
        except FileNotFoundError:
            return None

    def put(self, path: Path, text: str) -> None:
        """Make a small file, which appears whole or not at all."""
        if self.is_remote:
            system, there = self._there(path)
            with system.open_output_stream(there) as stream:
                stream.write(text.encode())
        else:
            path.parent.mkdir(exist_ok=True)
            unfinished = path.with_name(f".{path.name}")
            unfinished.write_text(text)
            unfinished.rename(path)

    def files(self, directory: Path) -> list[Path]:
        """Files of a directory, by name, those left out that are hidden; none when it is not there."""
        if self.is_remote:
            system, there = self._there(directory)
            found = system.get_file_info(FileSelector(there, allow_not_found=True))
            names = [info.base_name for info in found if info.type == FileType.File]
        else:
            names = [path.name for path in directory.iterdir()] if directory.exists() else []
        return [directory / name for name in sorted(names) if not name.startswith(".")]

    def delete(self, path: Path) -> None:
        """Delete a file, here and there; it need not exist."""
        path.unlink(missing_ok=True)
        if self.is_remote:
            self._delete_there(path)

    def _delete_there(self, path: Path) -> None:
        if self.holds(path):
            system, there = self._there(path)
            system.delete_file(there)

    def _fetch(self, file: Path, here: Path | None = None) -> None:
        """Make `file`, or `here`, from what the store has as `file`; it appears whole or not at all."""
        system, there = self._there(file)
        here = here or file
        here.parent.mkdir(parents=True, exist_ok=True)
        unfinished = here.with_name(f".{here.name}.{threading.get_native_id()}")
        copy_files(there, str(unfinished), source_filesystem=system, destination_filesystem=LocalFileSystem())
        unfinished.rename(here)

    def _there(self, path: Path) -> tuple[FileSystem, str]:
        """The store, and the name that `path` has in it."""
        system, root = _store(self.url)
        return system, f"{root}/{path.relative_to(self.paths.root).as_posix()}"


@cache
def _store(url: str) -> tuple[FileSystem, str]:
    system, root = FileSystem.from_uri(url)
    return system, root.rstrip("/")


def _copy_of(url: str) -> Path:
    return home() / hashlib.sha256(url.encode()).hexdigest()[:12] / url.rstrip("/").rpartition("/")[2]
