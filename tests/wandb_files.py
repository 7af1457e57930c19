"""W&B's own files, read back with its own reader."""

import json
import subprocess
from pathlib import Path
from typing import Any


def records(fragment: Path) -> dict[str, list[dict[str, Any]]]:
    """All that wandb wrote to a file, by type."""
    from wandb.util import get_core_path

    inspect = ["leet", "inspect", "--json", "--no-observability", "--run-file", str(fragment), str(fragment.parent)]
    printed = subprocess.run([get_core_path(), *inspect], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[dict[str, Any]]] = {}
    for line in printed.splitlines():
        content = json.loads(line)
        found.setdefault(content["type"], []).append(content[content["type"]])
    return found


def history(fragment: Path) -> list[dict[str, Any]]:
    return [row["item"] for row in records(fragment).get("history", [])]


def final(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The summary that all updates add up to."""
    return {name: value for update in found["summary"] for name, value in update["update"].items()}
