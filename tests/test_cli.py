"""What holds for every verb: its help, how soon that is there, and that a shell completes it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sweep.cli import app

VERBS = sorted(get_command(app).commands)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_and_the_exit_codes(verb):
    shown = " ".join(CliRunner().invoke(app, [verb, "--help"]).output.split())
    assert f"Example: python -m sweep {verb} " in shown
    assert re.search(r"Exit codes: 0 \w.*\b2 \w", shown)


def test_help_imports_nothing_heavy():
    check = f"""
import runpy, sys
for words in [[], *[[verb] for verb in {VERBS}]]:
    sys.argv = ["sweep", *words, "--help"]
    try:
        runpy.run_module("sweep", run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0
heavy = ("torch", "ray", "optuna", "plotly", "wandb", "pandas", "transformers", "huggingface_hub", "optuna_dashboard")
sys.exit(str([name for name in heavy if name in sys.modules]))
"""
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert shown.stderr == "[]\n"
    assert shown.stdout.count("Usage: python -m sweep") == len(VERBS) + 1


COMPLETE = """
source <(python -m sweep --show-completion bash)
COMP_WORDS=(qlora-sweep {words}) COMP_CWORD={number}
_qlora_sweep_completion qlora-sweep
echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(("words", "completed"), [("sta", "status"), ("export --me", "--merge")])
def test_bash_completes(words, completed):
    """`python -m sweep` gives the script of the command that it is installed as: `python` itself is left alone."""
    there = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": there, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # it looks at its parent process
    script = COMPLETE.format(words=words, number=len(words.split()))
    done = subprocess.run(["bash", "-c", script], env=os.environ | variables, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{completed}\n", "")
