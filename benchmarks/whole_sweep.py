"""How long does the same sweep take as the libraries' documentation shows it, and here?

    python -m benchmarks.whole_sweep --sides naive serial packed

The same configurations, rows and trained steps on the price data with a base in nf4; nothing is stopped early. `naive`
is `benchmarks.naive_sweep`; `serial` is `python -m sweep run` with a process for each trial, as many side by side as
there are cores (or, with --gpus, GPUs); `packed` is the same with all trials in one process. Each side is a command of
its own, from its start to its end. Beside it are shown the most memory that all its processes had at a time (what they
share counts once), for `packed` how its wall clock relates to the seconds that steps and validations took, and the last
validation loss of every trial. Each run begins without a quantised base on disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

from sweep.study import Entry, read_journal

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/smollm2-135m"
ROWS = ROOT / "search_spaces/data/pricer-train.jsonl"
LOOK_SECONDS = 5.0
"""How often memory is looked at, which takes some time itself."""
SIDES = ["naive", "serial", "packed"]
PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "trl", "wandb", "optuna")


def configurations(count: int) -> list[dict[str, float]]:
    """Fixed ones, spread over ranks and learning rates."""
    return [{"r": (8, 16)[i % 2], "learning_rate": float(f"{10 ** (-4 + i / count):.2g}")} for i in range(count)]


def write_rows(directory: Path, train: int, validation: int) -> None:
    lines = ROWS.read_text().splitlines(keepends=True)
    (directory / "train.jsonl").write_text("".join(lines[:train]))
    (directory / "validation.jsonl").write_text("".join(lines[train : train + validation]))


@dataclass(frozen=True)
class Work:
    """What all sides do."""

    model: str
    train: str
    validation: str
    configs: list[dict[str, float]]
    steps: int
    evaluations: int
    batch_size: int
    max_length: int
    compute_dtype: str
    cpus: float
    """Of a trial."""
    gpus: float
    """Of a trial, or of all that are packed."""


def llama(name: str, place: Path) -> str:
    """Directory of the model; the process that makes it ends, and gives the GPU's memory back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_llama, name, place).result()


def _llama(name: str, place: Path) -> str:
    from benchmarks.gpu import make_llama

    return make_llama(name, place).model


@dataclass(frozen=True)
class Done:
    """A side, when it has ended."""

    output: str
    seconds: float
    memory: int
    """Bytes of all its processes, at most."""


def naive(directory: Path, work: Work) -> tuple[Done, list[float]]:
    """With the last loss of every trial."""
    file = directory / "work.json"
    file.write_text(json.dumps(asdict(work)))
    done = run(["-m", "benchmarks.naive_sweep", str(file)], directory)
    told = next(line for line in reversed(done.output.splitlines()) if line.startswith('{"losses"'))
    losses: list[float] = json.loads(told)["losses"]
    return done, losses


def ours(directory: Path, work: Work, slots: int) -> tuple[Done, list[Entry]]:
    spec = {
        "name": "ours",
        "model": work.model,
        "data": {"train": work.train, "validation": work.validation, "max_length": work.max_length},
        "budget": {"steps": work.steps, "evaluations": work.evaluations},
        "search": {
            "trials": len(work.configs),
            "sampler": "random",
            "first": [config | {"alpha": 2 * config["r"]} for config in work.configs],
        },
        "early_stopping": False,
        "space": {
            "r": {"values": [8, 16]},
            "alpha": {"times": "r", "values": [2]},
            "learning_rate": {"min": 1e-5, "max": 1e-2, "log": True},
            "compute_dtype": work.compute_dtype,
            "batch_size": work.batch_size,
        },
        "tracking": {"mode": "offline"},
        "resources": {"cpus": 2 if slots > 1 else work.cpus, "gpus": work.gpus},
        "packing": {"slots": slots},
        "storage": str(directory / f"ours-{slots}"),
    }
    file = directory / f"ours-{slots}.yaml"
    file.write_text(json.dumps(spec))
    done = run(["-m", "sweep", "run", str(file)], directory)
    return done, read_journal(directory / f"ours-{slots}/ours/study.log", "ours").entries()


def run(command: list[str], directory: Path) -> Done:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, "XDG_CACHE_HOME": str(directory / "cache")}
    began = time.monotonic()
    memory = 0
    with (directory / "output.txt").open("w+") as output:
        process = psutil.Popen(
            [sys.executable, *command], cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            memory = max(memory, sum(map(held, [process, *process.children(recursive=True)])))
            with suppress(psutil.TimeoutExpired):
                process.wait(LOOK_SECONDS)
        seconds = time.monotonic() - began
        output.seek(0)
        said = output.read()
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{said[-3000:]}")
    return Done(said, seconds, memory)


def held(process: psutil.Process) -> int:
    """Bytes of a process; of what it shares with others its part."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has just ended
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--llama", choices=["1B", "8B"], help="random weights, made on the GPU, not SmolLM2-135M")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--evaluations", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--validation-rows", type=int, default=48)
    parser.add_argument("--compute-dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--cpus", type=float, default=1, help="of a trial: 0.25 has eight side by side on two cores")
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--runs", type=int, default=1)
    asked = parser.parse_args()
    if asked.llama and not asked.gpus:
        parser.error(f"--llama {asked.llama} is made and trained on a GPU; give --gpus 1")
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, " + ", ".join(f"{p} {version(p)}" for p in PACKAGES))
    print(
        f"{asked.trials} trials of {asked.steps} steps of {asked.batch_size} rows, {asked.evaluations} evaluations of"
        f" {asked.validation_rows} rows, nf4, {asked.compute_dtype}, {asked.llama or MODEL.name}"
    )
    seconds: dict[str, list[float]] = {side: [] for side in asked.sides}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        work = Work(
            llama(asked.llama, place) if asked.llama else str(MODEL),
            str(place / "train.jsonl"),
            str(place / "validation.jsonl"),
            configurations(asked.trials),
            asked.steps,
            asked.evaluations,
            asked.batch_size,
            256 if asked.llama else 128,  # the Llama's small tokenizer makes up to 177 tokens of a row
            asked.compute_dtype,
            asked.cpus,
            asked.gpus,
        )
        write_rows(place, asked.steps * asked.batch_size, asked.validation_rows)
        for number in range(asked.runs):
            for side in asked.sides:
                directory = place / f"{side}-{number}"
                directory.mkdir()
                if side == "naive":
                    done, losses = naive(directory, work)
                    apart = ""
                else:
                    done, entries = ours(directory, work, _slots(side, work))
                    losses = [entry.losses[entry.reported] for entry in entries]
                    busy = sum(entry.cost.seconds for entry in entries)
                    apart = f"  {done.seconds / busy:.2f} x its steps" if side == "packed" else ""
                seconds[side].append(done.seconds)
                memory = f"{done.memory / 2**30:.2f} GiB"
                shown = " ".join(f"{loss:.4f}" for loss in losses)
                print(f"run {number + 1}  {side:6} {done.seconds:7.1f} s {memory:>10}{apart}  {shown}", flush=True)
    for side in asked.sides[1:]:
        ratio = np.mean(seconds[asked.sides[0]]) / np.mean(seconds[side])
        print(f"{asked.sides[0]} / {side}: {ratio:.2f}")


def _slots(side: str, work: Work) -> int:
    return len(work.configs) if side == "packed" else 1


if __name__ == "__main__":
    main()
