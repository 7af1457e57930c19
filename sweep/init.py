"""A first space.yaml for a model and a data file: what follows from both is filled in, every range says why."""

import importlib
import json
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from trainables import data
from trainables.config import DataConfig, QLoRAConfig

LONGEST = 4096
"""Tokens of a row at most, unless the user says otherwise: memory grows with the longest row."""
ENOUGH = 50
"""Validation rows, where a fifth of the rows are as many: losses on fewer differ by chance."""
FEWEST = 5
"""Steps between two evaluations: after fewer, warm-up has hardly let a trial learn."""
HIGHEST_RANK = 64
SHARE = 0.9
"""Of a device's memory that a trial may take."""


def starter(model: str, train: str, file: Path) -> str:
    """The text of a YAML `file`, from whose directory it names model and rows.

    Raises `trainables.data.DataError` when these cannot be used.
    """
    directory, named = file.absolute().parent, shlex.quote(str(file))
    rows = DataConfig(train=train, validation=0.05, max_length=2**20)
    data.check_model(model)  # a wrong name need not wait for the import
    with TemporaryDirectory(prefix="qlora-init-") as scratch, ThreadPoolExecutor(1) as beside:
        importing = beside.submit(importlib.import_module, "trainables.memory")  # seconds, as tokenising takes
        prepared = data.prepare(rows, model, Path(scratch))
        memory = importing.result()
        tokens = data.load(prepared.path).train
        lengths = np.diff(tokens.offsets)
        longest = int(lengths.max())
        max_length = min(LONGEST, -(-longest // 64) * 64)
        count = len(tokens) + prepared.rows["validation"]
        validation = min(0.2, max(0.05, round(ENOUGH / count, 2)))
        parameters = memory.shapes(model).parameters
        device, room = memory.this_device()
        on_gpu = device != "a CPU"
        dtype = memory.compute_dtype()
        config = QLoRAConfig(r=HIGHEST_RANK, batch_size=8 if count < 2000 else 16, compute_dtype=dtype)
        batch = memory.largest_micro_batch(tokens, config)
        width = min(batch[1], max_length)
        config = _fitting(memory, model, config, width, min(batch[2] / batch[0], width - 1), int(SHARE * room))
    epochs = 3 if count < 2000 else 2 if count < 20000 else 1
    steps = epochs * -(-int((1 - validation) * count) // config.batch_size)
    evaluations = max(2, min(9, steps // FEWEST))
    large, small = parameters > 30e9, parameters < 1e9
    if small:
        rates = "{min: 1e-4, max: 5e-3, log: true}"
        why = "SmolLM2-135M, the demo's, was best between 9e-4 and 3e-3; large models want less"
    else:
        rates = "{min: 2e-5, max: 5e-4, log: true}" if large else "{min: 4e-5, max: 1e-3, log: true}"
        why = f"[QLoRA] used {'1e-4 for 33B and 65B' if large else '2e-4 for 7B and 13B'}: a factor of 5 to both sides"
    return f"""# python -m sweep plan {named}     says what it would do
# python -m sweep run {named}      does it
#
# A start for {Path(model).name} on {Path(train).name}: {count:,} rows, the longest has {longest:,} tokens; {device}.
# Sources: [QLoRA] Dettmers et al. 2023, arXiv:2305.14314; [LoRA] Hu et al. 2021, arXiv:2106.09685.

name: {json.dumps(re.sub("[^A-Za-z0-9_-]+", "-", Path(train).stem).strip("-") or "sweep")}
model: {_from(directory, model)}
data:
  train: {_from(directory, train)}
  validation: {validation:g} # of the rows, split off by seed; or a file of its own
  max_length: {max_length} # tokens; longer rows are cut off

budget: {{epochs: {epochs}, evaluations: {evaluations}}} # {steps:,} steps
search: {{trials: 24}}
early_stopping: {{grace: 1, reduction: 3}} # trials that look poor at the first evaluation end there

space:
  # [QLoRA] found the rank to matter little once every linear layer has an adapter; small ones cost less memory.
  r: {{values: [8, 16, 32, {HIGHEST_RANK}]}}
  # [LoRA] tunes alpha like a learning rate: two factors are enough when the learning rate is searched too.
  alpha: {{times: r, values: [1, 2]}}
  # {why}.
  learning_rate: {rates}
  # [QLoRA] used 0.03 of all steps; longer warm-ups make up for high learning rates.
  warmup_ratio: {{min: 0.0, max: 0.1}}
  # [QLoRA] used 0.1 for 7B and 13B, 0.05 for larger ones; 0 is the cheapest.
  dropout: {{values: [0.0, 0.05, 0.1]}}
  # [QLoRA] found nf4 better than fp4 throughout; searched to confirm it on this model.
  quant_type: {{values: [nf4, fp4]}}
  # fixed: bf16 has the range of fp32 and is faster on GPUs that have it; {{values: [bf16, fp32]}} searches it.
  compute_dtype: {dtype}
  # fixed: [QLoRA] trained 7B to 13B with 16 rows a step; fewer where rows are few.
  batch_size: {config.batch_size}
  # fixed: what fits into {room / 1e9:.0f} GB with the longest rows and the highest rank.
  accumulation: {config.accumulation}
  gradient_checkpointing: {str(config.gradient_checkpointing).lower()}

tracking: {{mode: auto}} # online with a key, offline without
resources: {{cpus: {min(4, os.cpu_count() or 1) if on_gpu else 1}, gpus: {int(on_gpu)}}} # of a trial
"""


def _fitting(memory: Any, model: str, config: QLoRAConfig, width: int, labels: float, room: int) -> QLoRAConfig:
    """The first of ever more sparing configurations that fits, else the most sparing one.

    `width` is that of the longest row, `labels` are those of such a row.
    """
    for checkpointing in (False, True):
        for accumulation in (2**n for n in range(config.batch_size.bit_length())):
            change = {"accumulation": accumulation, "gradient_checkpointing": checkpointing}
            tried = config.model_copy(update=change)
            rows = tried.micro_batch()
            if memory.estimate(model, tried, rows, width, max(1, int(labels * rows))).total <= room:
                return tried
    return tried


def _from(directory: Path, name: str) -> str:
    """A path as it is seen from a directory, unless that is far away, in YAML; a Hub id stays as it is."""
    if Path(name).exists():
        seen = os.path.relpath(name, directory)
        name = str(Path(name).absolute()) if seen.startswith("../../") else seen
    return json.dumps(name, ensure_ascii=False)
