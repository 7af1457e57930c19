"""What does the framework itself cost per validation loss that a trial reports?

    python -m benchmarks.overhead                   # 100 and 1,000 trials of `toy`, which trains in microseconds

One trial at a time, ASHA on, W&B off. Per sampler and number of trials: wall clock from the first trial's start to the
last one's end, reported validation losses (the base's included), and their ratio. Growth is the ratio at the larger
number over that at the smaller: 1.0 is linear.
"""

import argparse
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from tests import sweeps

SPEC = sweeps.TOY.replace("{trials: 8, sampler: tpe, seed: 5}", "{trials: 8, seed: 5}")


def measure(sampler: str, trials: int) -> tuple[float, int]:
    """(seconds, reported losses) of one sweep."""
    with tempfile.TemporaryDirectory() as directory:
        space = Path(directory, "toy.yaml")
        space.write_text(SPEC)
        options = ("--set", f"search.trials={trials}", "--set", f"search.sampler={sampler}")
        process = sweeps.start(space, *options)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        entries = sweeps.entries(space)
        assert len(entries) == trials
        began = min(entry.trial.datetime_start or datetime.max for entry in entries)
        ended = max(entry.trial.datetime_complete or datetime.min for entry in entries)
        return (ended - began).total_seconds(), sum(len(entry.losses) for entry in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs=2, default=(100, 1000))
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    asked = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "optuna"))
    print(f"{time.strftime('%Y-%m-%d')}, {psutil.cpu_count()} cores, {packages}")
    print("sampler   trials   losses   seconds   ms a loss   growth")
    for sampler in asked.samplers:
        smaller = None
        for trials in asked.trials:
            seconds, losses = measure(sampler, trials)
            each = 1000 * seconds / losses
            growth = f"{each / smaller:.2f}" if smaller else ""
            print(f"{sampler:8} {trials:7,} {losses:8,} {seconds:9.1f} {each:11.1f}   {growth}", flush=True)
            smaller = each


if __name__ == "__main__":
    main()
