"""How long the steps and the evaluations of a configuration take on this device, alone, with the rows of the sweep."""

import math
import time
from dataclasses import replace

import torch
from transformers.utils import logging

from trainables import memory, model
from trainables.config import QLoRAConfig
from trainables.protocol import Budget, Job, Timed
from trainables.qlora_sft import start

STEPS = 2
"""Optimiser steps that are timed, after one that does not count."""


def probe(config: QLoRAConfig, job: Job, threads: int, on_gpu: bool) -> Timed:
    """Train three steps of a configuration and evaluate once; `job.budget` is left aside.

    Raises what `qlora_sft.start` raises, `OutOfMemory`, and ValueError when there is no GPU for what is to run on one
    or the loss is not finite.
    """
    if on_gpu and model.device().type != "cuda":
        raise ValueError("resources.gpus: trials ask for a GPU, and this machine has none; probe where they will run")
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    began = time.perf_counter()
    trial = start(config, replace(job, budget=Budget(None, STEPS + 1, 1)), None)
    try:
        started = time.perf_counter() - began
        slice_ = trial.advance(math.inf)
        while slice_.evaluation is None and slice_.failure is None:  # memory ran out after a step: this call says so
            slice_ = slice_.followed_by(trial.advance(math.inf))
    finally:
        trial.close()
    if slice_.failure is not None or slice_.evaluation is None:
        raise ValueError(f"a trial that was to be timed failed: {slice_.failure}")
    device, _ = memory.this_device()
    timed = [step.seconds for step in slice_.steps[1:]]
    return Timed(device, torch.cuda.device_count(), started, sum(timed) / len(timed), slice_.evaluation.seconds)
