"""Sweeps as a user runs them: one YAML file, one command, another process."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sweep.study import Entry, Ledger, read_journal

TOY = """
name: toy
trainable: toy
budget: {steps: 60, evaluations: 9}
search: {trials: 8, sampler: tpe, seed: 5}
early_stopping: {grace: 1, reduction: 3}
space:
  r: {values: [4, 8, 16, 32]}
  alpha: {times: r, values: [1, 2]}
  learning_rate: {min: 2e-5, max: 2e-3, log: true}
  quant_type: {values: [nf4, fp4]}
tracking: {mode: disabled}
resources: {concurrency: 1}
storage: sweeps
"""


def environment(**variables: str) -> dict[str, str]:
    """The environment of a sweep: no key, no hub, one thread."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "RAY_ADDRESS"))}
    return (
        clean
        | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        | {"RAY_worker_niceness": "0"}  # also for nodes that tests start
        | variables
    )


def command(space: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sweep", "run", str(space), *options]


def run(space: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the sweep to its end, in the directory of its YAML file."""
    return subprocess.run(
        command(space, *options),
        cwd=space.parent,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=280,
    )


def start(space: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
    """Begin the sweep, in a process group of its own."""
    return subprocess.Popen(
        command(space, *options),
        cwd=space.parent,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ledger(space: Path, name: str = "toy") -> Ledger:
    return read_journal(space.parent / "sweeps" / name / "study.log", name)


def entries(space: Path, name: str = "toy") -> list[Entry]:
    return ledger(space, name).entries()


def reported(space: Path, name: str = "toy") -> int:
    """Validation losses in the ledger of a sweep that runs (operation 7 of Optuna's journal)."""
    journal = space.parent / "sweeps" / name / "study.log"
    return journal.read_bytes().count(b'"op_code":7') if journal.exists() else 0


def history(found: Sequence[Entry]) -> list[tuple[object, ...]]:
    """What must not depend on interruptions: configurations, every loss to the last bit, and how trials ended."""
    return [(e.number, e.config, dict(e.losses), e.state, e.reason) for e in found]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait for a condition while the process lives."""
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}:\n{process.communicate()[0]}"
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.05)
