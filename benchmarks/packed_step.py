"""How much sooner are K trials a step further when their rows go through the base together?

    python -m benchmarks.packed_step                # SmolLM2-135M, K 8, r 16, rows of 64 tokens, nf4

Per batch size and compute data type: K optimiser steps one after the other, each a trial of its own (`qlora_sft`), and
one packed step of K slots. Both are run in turn in one process; shown are medians, and the median of the ratios.
"""

import argparse
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

from trainables import data, model
from trainables.config import QLoRAConfig
from trainables.packed.pack import Base, Slot
from trainables.protocol import Budget, Job
from trainables.qlora_sft import QLoRATrial

SMOLLM2 = Path(__file__).parents[1] / "models/smollm2-135m"
PAIRS = [{"prompt": f"What does {n} times {n} cost?", "completion": f" ${n * n}"} for n in range(40)]


def rows_of(tokens: int, rows: int, vocabulary: int) -> data.Rows:
    """Random rows of one length, the last quarter of each supervised."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary, rows * tokens, dtype=np.int32)
    supervised = np.tile(np.arange(tokens) >= 3 * tokens // 4, rows)
    return data.Rows(ids, supervised, np.arange(rows + 1, dtype=np.int64) * tokens)


def alone_seconds(config: QLoRAConfig, job: Job, rows: data.Rows, steps: int) -> float:
    """So many steps of one trial, after a first one."""
    trial = QLoRATrial(config, job, None)
    trial.train = rows
    trial._train_step()
    began = now()
    for _ in range(steps):
        trial._train_step()
    spent = now() - began
    trial.close()
    return spent


def packed_seconds(slots: list[Slot], base: Base, rows: data.Rows, at_once: int) -> float:
    """A step of all slots, after a first one."""
    began = 0.0
    for _ in range(2):
        began = now()
        base.train(slots, rows, at_once)
        for slot in slots:
            slot.update()
    return now() - began


def now() -> float:
    """Seconds, when the device has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(job: Job, dtype: str, batch: int, asked: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of K single steps and of a packed one, and their ratio: medians over the runs."""
    settings = {"r": asked.r, "batch_size": batch, "compute_dtype": dtype}
    configs = [QLoRAConfig.model_validate(settings | {"seed": seed}) for seed in range(asked.slots)]
    base = model.base(job.model, "nf4", configs[0].compute_dtype, True)
    rows = rows_of(asked.tokens, 256, base.config.vocab_size)
    alone, together = [], []
    for run in range(asked.runs + 1):
        spent = alone_seconds(configs[0], job, rows, asked.slots)
        with Base(base, pad=0).lent() as lent:
            packed = packed_seconds([Slot(config, 100, lent) for config in configs], lent, rows, asked.at_once)
        if run:  # the first warms up
            alone.append(spent)
            together.append(packed)
    ratios = [a / b for a, b in zip(alone, together, strict=True)]
    return statistics.median(alone), statistics.median(together), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SMOLLM2))
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of a row")
    parser.add_argument("--at-once", type=int, default=2048, help="tokens in a micro-batch of the pack")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    print(f"{time.strftime('%Y-%m-%d')}, {where}, {psutil.virtual_memory().total / 2**30:.0f} GiB, {packages}")
    print(f"K {asked.slots}, r {asked.r}, rows of {asked.tokens} tokens, {asked.at_once} at once, {asked.runs} runs")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "rows.jsonl")
        file.write_text("".join(f"{row}\n".replace("'", '"') for row in PAIRS))
        settings = data.DataConfig(train=str(file), validation=0.2)
        tokens = data.prepare(settings, asked.model, Path(directory, "tokens")).path
        job = Job(asked.model, str(tokens), Budget(None, 100, 1))
        print("dtype  batch   K steps, s   packed, s   ratio")
        for dtype in asked.dtypes:
            for batch in asked.batches:
                alone, together, ratio = measure(job, dtype, batch, asked)
                print(f"{dtype:5}  {batch:5}  {alone:11.2f}  {together:10.2f}  {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
