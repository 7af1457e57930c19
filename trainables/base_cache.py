"""Quantised bases on this machine's disk: read and quantised once per machine, not whenever a process starts.

A base is a directory in `home()/bases`, what transformers' `save_pretrained` writes; see `cache` for how it is kept. It
takes as much of the disk as the base takes of memory, and there is one for every model, quantisation, data type, kind
of device and version of the libraries.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from trainables.cache import Cached, Tell, home, not_kept
from trainables.checkpoint import checksum_of
from trainables.data import DataError, check_model, is_hub_id

VERSIONS = ("bitsandbytes", "torch", "transformers")
"""Packages that decide what tensors a base consists of."""


WHAT = "the quantised base"


@dataclass(frozen=True)
class CachedBase(Cached):
    revision: str | None
    """The commit on the Hub that it is made from; None when the model is a directory."""


def locate(model: str, tell: Tell, *decides: object) -> CachedBase | None:
    """Where the base of `model` is kept; `decides` is what it follows from, besides files and versions.

    None when nothing is to be kept, because `model` is stored quantised; or when nothing can be, which is told.
    """
    try:
        directory = check_model(model) if is_hub_id(model) else Path(model)
        config = (directory / "config.json").read_text(encoding="utf-8")
        if '"quantization_config"' in config:
            return None
        revision = directory.name if is_hub_id(model) else None
        writing = directory / "generation_config.json"  # a base has its settings: with which token an answer ends
        settings = writing.read_text(encoding="utf-8") if revision is None and writing.exists() else None
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
        key = json.dumps([config, settings, revision, weights, versions, *decides])
        return CachedBase(bases / hashlib.sha256(key.encode()).hexdigest(), WHAT, tell, revision)
    except (OSError, DataError) as error:
        tell(not_kept(WHAT, error))
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
