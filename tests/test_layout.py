"""What holds for the project as a whole: who imports whom, and that the README says what the code does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sweep.spec import keys
from trainables.config import QLoRAConfig

ROOT = Path(__file__).parent.parent


def imported(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_trainables_never_import_sweep_nor_ray():
    for file in (ROOT / "trainables").rglob("*.py"):
        assert not imported(file) & {"sweep", "ray", "optuna", "wandb"}, file


@pytest.mark.parametrize(
    "module",
    [
        *("cli", "page", "plan", "probe", "spec", "runner", "progress"),
        *("status", "trainable", "tracking", "sync", "dashboard"),
    ],
)
def test_sweep_imports_no_torch(module):
    check = f"import sys, sweep.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def default(field) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return {"None": "none", "()": "none", "True": "true", "False": "false"}.get(str(value), f"`{value}`")


def test_readme_has_every_key_with_its_default_and_meaning():
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    documented = keys() | QLoRAConfig.model_fields
    assert rows.keys() == documented.keys()
    for name, field in documented.items():
        assert rows[name] == f"| `{name}` | {default(field)} | {' '.join(field.description.split())} |"


@pytest.mark.parametrize("command", ["make demo", "make test", "make setup"])
def test_readme_commands_exist(command):
    assert command in (ROOT / "README.md").read_text()
    target = command.removeprefix("make ")
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()
