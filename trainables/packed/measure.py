"""What a step costs on this device, alone and together, measured with the rows of the sweep."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from trainables import model
from trainables.config import QLoRAConfig
from trainables.packed.slots import Measured
from trainables.protocol import Job
from trainables.qlora_sft import LEARNT_AT_ONCE, QLoRATrial, start, try_out

SECONDS = 2.0
"""How long steps of one number of trials are timed; at least one is."""
ROOM = {"cuda": 0.9, "cpu": 0.5}
"""Share of the free memory that trials may use: that of a CPU is not theirs alone."""


def measure(config: QLoRAConfig, rows: int, job: Job) -> Measured:
    """Time steps of one and of two trials on so many rows of median length, and see what memory a second trial of this
    configuration takes with the longest rows.

    Raises what `qlora_sft.start` raises, and `OutOfMemory` when two do not fit.
    """
    on = model.device()
    trials = [_start(config, 0, job)]
    try:
        lengths = np.diff(trials[0].train.offsets)
        by_length = np.argsort(lengths, kind="stable")
        median = by_length[max(0, len(by_length) - rows) // 2 :][:rows]
        longest = by_length[-config.micro_batch(job.halvings) :]
        alone, of_one = _seconds(trials, median), _peak(trials, longest, on)
        trials.append(_start(config, 1, job))
        of_two, together = _peak(trials, longest, on), _seconds(trials, median)
        each = max(together - alone, alone / 1000)  # what is lost in the noise is not for free
        return Measured(
            fixed=max(0.0, alone - each),
            each=each,
            room=int(ROOM[on.type] * _free(on)),
            base=model.footprint(trials[0].base)[0],
            # of weights, gradient, two moments and a copy of the weights a CPU may not have given back all before
            of_trial=max(of_two - of_one, 5 * trials[0].adapter.weights.nbytes),
            at_once=max(1, LEARNT_AT_ONCE[on.type] // (rows * int(lengths[median].max()))),
        )
    finally:
        for trial in trials:
            trial.close()


def _start(config: QLoRAConfig, seed: int, job: Job) -> QLoRATrial:
    trial = start(config.model_copy(update={"seed": seed}), job, None)
    assert isinstance(trial, QLoRATrial)
    return trial


def _seconds(trials: Sequence[QLoRATrial], rows: NDArray[np.int64]) -> float:
    """Of the fastest step on these rows, after one that does not count."""
    try_out(trials, rows)
    taken: list[float] = []
    while sum(taken) < SECONDS:
        began = time.perf_counter()
        try_out(trials, rows)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _peak(trials: Sequence[QLoRATrial], rows: NDArray[np.int64], on: torch.device) -> int:
    """Bytes of the process in a step, at most."""
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
        try_out(trials, rows)
        return torch.cuda.max_memory_allocated(on)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak, which was that of quantising
    try_out(trials, rows)
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) * 1024


def _free(on: torch.device) -> int:
    """Bytes of the device that nobody uses; what torch holds back for later counts."""
    if on.type == "cuda":
        return torch.cuda.mem_get_info(on)[0] + torch.cuda.memory_reserved(on) - torch.cuda.memory_allocated(on)
    return psutil.virtual_memory().available
