"""What is left of a sweep that is killed again and again?

    python -m benchmarks.chaos --concurrency 1 --kills 20 --seed 0

A real sweep (tiny random Llama, bitsandbytes, PEFT, Ray, Optuna, W&B offline) of 12 trials, joined to a Ray cluster
with a node for the trials. At random moments SIGKILL hits the driver, the process of a trial, or all of the node; the
driver and the node are started again each time, as a scheduler would. Between two validation losses the process of a
trial is killed once: a second time would be taken for memory that ran out, and change how the trial is computed (tests
have that). Every number that is printed is read from the files that are left: the ledger, the rows that each attempt of
a trial logged, W&B's own files. Kills end with the sweep: with fewer than were asked for, the sweep was too short.
"""

import argparse
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
from optuna.trial import TrialState

from sweep import tracking
from sweep.study import Entry, ranking
from tests import nodes, sweeps
from tests.tiny import make_tiny_llama, make_tiny_rows

STEPS, EVALUATIONS = 960, 12
SPEC = f"""
name: chaos
model: llama
data: {{train: train.jsonl, validation: validation.jsonl, max_length: 64}}
budget: {{steps: {STEPS}, evaluations: {EVALUATIONS}}}
search: {{trials: 12, seed: 3}}
early_stopping: {{grace: 2, reduction: 2}}
space:
  r: {{values: [4, 8, 16]}}
  alpha: {{times: r, values: [2, 8]}}
  learning_rate: {{min: 1e-4, max: 1e-2, log: true}}
  warmup_ratio: {{min: 0.0, max: 0.2}}
  compute_dtype: {{values: [bf16, fp32]}}
  quant_type: {{values: [nf4, fp4]}}
  dropout: 0.1
  batch_size: 16
tracking: {{mode: offline}}
storage: sweeps
"""
WAIT, WAIT_PER_TRIAL = 15.0, 15.0
"""Seconds between two kills, at most, and for each trial at a time: half is the start of driver, Ray and libraries."""


@dataclass(frozen=True)
class Kill:
    victim: str
    seconds: float
    """After the start, or after the kill before it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        calm, wild = Path(directory, "calm"), Path(directory, "wild")
        for place in (calm, wild):
            make_tiny_llama(place / "llama")
            make_tiny_rows(place, train=256, validation=64)
            (place / "space.yaml").write_text(SPEC)
        with nodes.cluster() as cluster:
            options = (
                *("--set", f"resources={{cpus: 1, concurrency: {asked.concurrency}}}"),
                *("--address", cluster.address),
            )
            began = time.monotonic()
            undisturbed(cluster, calm / "space.yaml", options, asked.concurrency)
            calm_seconds, began = time.monotonic() - began, time.monotonic()
            kills, restarts = disturbed(
                cluster, wild / "space.yaml", options, asked.concurrency, asked.kills, random.Random(asked.seed)
            )
            wild_seconds = time.monotonic() - began
        print(
            f"{time.strftime('%Y-%m-%d')}, {psutil.cpu_count()} cores, concurrency {asked.concurrency}, "
            f"seed {asked.seed}, " + ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "optuna"))
        )
        print(f"undisturbed {calm_seconds:.0f} s; disturbed {wild_seconds:.0f} s, {restarts} restarts of the driver")
        by_victim = Counter(kill.victim for kill in kills)
        print(f"kills survived            {len(kills)} ({', '.join(f'{n} {v}' for v, n in sorted(by_victim.items()))})")
        for name, value in compare(calm / "space.yaml", wild / "space.yaml", len(kills)).items():
            print(f"{name:25} {value}")


def undisturbed(cluster: nodes.Nodes, space: Path, options: tuple[str, ...], cpus: int) -> None:
    node = cluster.start(cpus)
    done = subprocess.run(
        sweeps.command(space, *options), cwd=space.parent, env=sweeps.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    nodes.kill(node)


def disturbed(
    cluster: nodes.Nodes, space: Path, options: tuple[str, ...], cpus: int, wanted: int, chance: random.Random
) -> tuple[list[Kill], int]:
    """Run the sweep to its end through `wanted` kills; also how often the driver was started again."""
    kills: list[Kill] = []
    restarts = 0
    killed_at = -1
    node = cluster.start(cpus)
    with (space.parent / "output.log").open("w") as output:

        def start() -> psutil.Popen:
            return psutil.Popen(
                sweeps.command(space, *options), cwd=space.parent, env=sweeps.environment(),
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

        driver = start()
        while True:
            wait = chance.uniform(0, WAIT + WAIT_PER_TRIAL * cpus) if len(kills) < wanted else None
            try:
                code = driver.wait(wait)
            except psutil.TimeoutExpired:
                training = nodes.trial_processes(node.children(recursive=True))
                here = sweeps.reported(space, "chaos")
                if here == killed_at:
                    training = []
                victim = chance.choice(["driver", "node", *(["trial"] if training else [])])
                kills.append(Kill(victim, wait or 0.0))
                if victim == "trial":
                    killed_at = here
                    chance.choice(training).kill()
                elif victim == "node":
                    nodes.kill(node)
                    node = cluster.start(cpus)
                else:
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                    driver, restarts = start(), restarts + 1
            else:
                if code == 0:
                    return kills, restarts
                assert code == 1, (space.parent / "output.log").read_text()  # five breakdowns in a row
                driver, restarts = start(), restarts + 1


def compare(calm: Path, wild: Path, kills: int) -> dict[str, object]:
    """The disturbed sweep beside the undisturbed one."""
    expected, found = (sweeps.entries(space, "chaos") for space in (calm, wild))
    repeated = [steps for entry in found for steps in repeats(wild, entry)]
    doubled, missing = in_wandb(wild, found)
    configs = Counter(entry.config.model_dump_json() for entry in found)
    same = [a.config == b.config and dict(a.losses) == dict(b.losses) for a, b in zip(expected, found, strict=False)]
    order = [[entry.number for entry in ranking(entries)] for entries in (expected, found)]
    return {
        "trials lost": 12 - sum(entry.state.is_finished() for entry in found),
        "trials failed": sum(entry.state is TrialState.FAIL for entry in found),
        "trials repeated": sum(steps >= entry.cost.steps for entry in found for steps in repeats(wild, entry)),
        "steps repeated": f"{max(repeated, default=0)} at most, {sum(repeated) / max(kills, 1):.1f} a kill"
        f" (a checkpoint is written every {STEPS // EVALUATIONS})",
        "configurations told twice": sum(n - 1 for n in configs.values()),
        "W&B steps doubled": doubled,
        "W&B steps missing": missing,
        "micro-batches halved": sum(entry.halvings for entry in found),
        "trials equal to the bit": f"{sum(same)} of {len(expected)}",
        "ranking equal": "yes" if order[0] == order[1] else f"no: {order[0]}, {order[1]}",
    }


def repeats(space: Path, entry: Entry) -> list[int]:
    """For each time that a trial was taken up again: how many steps it did that an earlier attempt had logged."""
    rows = tracking.logged(space.parent / "sweeps/chaos/trials" / f"{entry.number:03d}")
    steps = [row[tracking.STEP] for row in rows if "train/loss" in row]
    found, newest = [], 0
    for before, step in zip([0, *steps], steps, strict=False):
        newest = max(newest, before)
        if step <= before:
            found.append(newest - step + 1)
    return found


def in_wandb(space: Path, entries: list[Entry]) -> tuple[int, int]:
    """Optimiser steps that W&B's files of all attempts have twice, and those that they lack."""
    doubled = missing = 0
    for entry in entries:
        ids = run_ids(space, entry)
        files = [file for run_id in ids for file in tracking.fragments(str(space.parent / "sweeps/chaos"), run_id)]
        rows = [row for file in files for row in tracking.rows_in(tracking.records(file))]
        steps = Counter(row[tracking.STEP] for row in rows if "train/loss" in row)
        doubled += sum(n - 1 for n in steps.values())
        missing += sum(step not in steps for step in range(1, trained(entry) + 1))
    return doubled, missing


def run_ids(space: Path, entry: Entry) -> set[str]:
    """The id of a trial's run, as W&B names its files."""
    found = (space.parent / "sweeps/chaos/wandb").glob(f"*run-*/run-*-{entry.number:03d}.wandb")
    return {file.stem.removeprefix("run-") for file in found}


def trained(entry: Entry) -> int:
    """Optimiser steps up to the trial's last evaluation."""
    return round(STEPS * entry.reported / EVALUATIONS)


if __name__ == "__main__":
    main()
