"""How much sooner are K trials a step further when their rows go through the base together?

    python -m benchmarks.packed_step                # SmolLM2-135M, K 8, r 16, rows of 64 tokens, nf4

Per batch size and compute data type: a step of each of K trials, one after the other, and a packed step of all of them.
Both are run in turn in one process; shown are medians, and the median of the ratios; then tokens a second of the packed
steps, what share of a product's speed they reach, in the data type in which the device multiplies (4 x quantised
parameters x tokens, which is what the base's products take), tokens a second of a validation of the same trials
together, and how long it takes from the end of a trial until another in its place can take its first step.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

from trainables import data
from trainables.config import QLoRAConfig
from trainables.model import device, product_dtype
from trainables.protocol import Budget, Job
from trainables.qlora_sft import EVALUATION_TOKENS, QLoRATrial, turn

SMOLLM2 = Path(__file__).parents[1] / "models/smollm2-135m"
SCORED = 16
"""Validation rows."""
PAIRS = [{"prompt": f"What does {n} times {n} cost?", "completion": f" ${n * n}"} for n in range(40)]


def job_on(model: str, directory: Path) -> Job:
    """A job on a few rows, which `trials_of` replaces."""
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    tokens = data.prepare(data.DataConfig(train=str(file), validation=0.2), model, directory / "tokens").path
    return Job(model, str(tokens), Budget(None, 100, 1))


def rows_of(tokens: int, rows: int, vocabulary: int) -> data.Rows:
    """Random rows of one length, the last quarter of each supervised."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary, rows * tokens, dtype=np.int32)
    supervised = np.tile(np.arange(tokens) >= 3 * tokens // 4, rows)
    return data.Rows(ids, supervised, np.arange(rows + 1, dtype=np.int64) * tokens)


def trials_of(
    job: Job, slots: int, tokens: int, settings: dict[str, object], ranks: Sequence[int] = (16,)
) -> list[QLoRATrial]:
    """One for each seed from 0 on, with rows of so many tokens, and the ranks in turn."""
    configs = [
        QLoRAConfig.model_validate(settings | {"seed": seed, "r": ranks[seed % len(ranks)]}) for seed in range(slots)
    ]
    trials = [QLoRATrial(config, job, None) for config in configs]
    rows = rows_of(tokens, 256, trials[0].base.model.config.vocab_size)
    for trial in trials:
        trial.train = rows
    return trials


def now() -> float:
    """Seconds, when the device has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(trials: list[QLoRATrial], runs: int) -> tuple[float, float, float]:
    """Seconds of K single steps and of a packed one, and their ratio: medians over the runs, the first left out."""
    alone, together = [], []
    for _ in range(runs + 1):
        began = now()
        for trial in trials:
            turn([trial])
        alone.append(now() - began)
        began = now()
        turn(trials)
        together.append(now() - began)
    ratios = [a / b for a, b in zip(alone[1:], together[1:], strict=True)]
    return statistics.median(alone[1:]), statistics.median(together[1:]), statistics.median(ratios)


def scoring_seconds(trials: list[QLoRATrial], rows: data.Rows) -> float:
    """Of a validation of all trials on these rows."""
    began = now()
    for trial in trials:
        trial.validation, trial.due = rows, {1: trial.step}
        trial.evaluation_batches = data.micro_batches(np.diff(rows.offsets), EVALUATION_TOKENS[trial.device.type])
    while any(trial.new_evaluation is None for trial in trials):
        turn(trials)
    return now() - began


def product_peak(dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices on the device."""
    left, right = (torch.randn(2048, 2048, device=device()).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        began = now()
        left @ right
        seconds.append(now() - began)
    return 2 * 2048**3 / statistics.median(seconds[2:])


def header() -> str:
    """Date, machine and versions."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"{time.strftime('%Y-%m-%d')}, {where}, {psutil.virtual_memory().total / 2**30:.0f} GiB, {packages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SMOLLM2))
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--r", type=int, nargs="+", default=[16], help="several are spread over the trials")
    parser.add_argument("--tokens", type=int, default=64, help="of a row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    print(header())
    print(f"K {asked.slots}, r {', '.join(map(str, asked.r))}, rows of {asked.tokens} tokens, {asked.runs} runs")
    with tempfile.TemporaryDirectory() as directory:
        job = job_on(asked.model, Path(directory))
        peaks = {dtype: product_peak(product_dtype(dtype, device())) for dtype in asked.dtypes}
        print(", ".join(f"products of {dtype}: {peak / 1e9:.0f} GFLOP/s" for dtype, peak in peaks.items()))
        print(
            "dtype  batch   K steps, s   packed, s   ratio   training tokens/s   share   validation tokens/s   next, s"
        )
        for dtype in asked.dtypes:
            for batch in asked.batches:
                settings = {"batch_size": batch, "compute_dtype": dtype}
                trials = trials_of(job, asked.slots, asked.tokens, settings, asked.r)
                alone, together, ratio = measure(trials, asked.runs)
                training = asked.slots * batch * asked.tokens / together
                rows = rows_of(asked.tokens, SCORED, trials[0].base.model.config.vocab_size)
                scoring = asked.slots * SCORED * asked.tokens / scoring_seconds(trials, rows)
                quantised = sum(inputs * outputs for _, inputs, outputs in trials[0].base.layers.values())
                share = 4 * quantised * training / peaks[dtype]
                began = now()
                ended = trials.pop()
                ended.close()
                trials.append(QLoRATrial(ended.config, job, None))
                next_one = now() - began
                for trial in trials:
                    trial.close()
                rates = f"{training:18,.0f}  {share:6.2f}  {scoring:20,.0f}  {next_one:8.2f}"
                print(f"{dtype:5}  {batch:5}  {alone:11.2f}  {together:10.2f}  {ratio:6.2f}  {rates}", flush=True)


if __name__ == "__main__":
    main()
