"""A finished adapter on rows that had no part in finding it: its loss, and what it writes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from trainables import data
from trainables import model as models
from trainables.answers import Answers, in_micro_batches
from trainables.config import QLoRAConfig
from trainables.packed.adapter import Adapter
from trainables.packed.base import Row, Work
from trainables.protocol import Scored
from trainables.qlora_sft import EVALUATION_TOKENS, SCORED_AT_ONCE, set_weights


def score(
    model: str,
    config: QLoRAConfig,
    adapter: bytes | None,
    tokens: Path,
    split: str,
    *,
    halvings: int,
    loss: bool,
    completions: bool,
) -> Scored:
    """Score the rows of a split, `test` or `validation`, of `tokens`, as trials are scored.

    `adapter` is the content of its file as PEFT writes it; without one, the base is scored alone, quantised as `config`
    says. Micro-batches are halved so often, and as often again as memory runs out. Completions are greedy, each at most
    as long in tokens as the longest reference of the split, with the token that ends it. Raises `data.DataError` when
    the rows have no answers, `OutOfMemory` when a single row does not fit.
    """
    prepared = data.load(tokens)
    rows: data.Rows = getattr(prepared, split)
    base = models.base(model, config.quant_type, config.compute_dtype, config.double_quant)
    device = base.model.device
    # A new adapter adds nothing to the base.
    worker = Adapter(config, models.targets(base.layers, model, config.target_modules), device, base.model.dtype)
    if adapter is not None:
        set_weights(worker, load(adapter))
    base.seat(worker)
    try:
        found = None
        if loss:
            at_once = EVALUATION_TOKENS[device.type] >> halvings
            found = mean_loss(
                rows, at_once, lambda some: base.losses([Work(worker, some, None)], prepared.pad_token_id)[0]
            )
        if not completions:
            return Scored(len(rows), found)
        answers = Answers(tokens, rows, base, prepared.pad_token_id)
        at_once = SCORED_AT_ONCE[device.type] >> halvings
        for _ in answers.write(worker, at_once):
            pass
        return answers.done(found)
    finally:
        base.dismiss(worker)


def mean_loss(rows: data.Rows, tokens: int, losses: Callable[[Sequence[Row]], Tensor]) -> float:
    """Mean cross-entropy per supervised token, nats. `losses` gives that of every label of some rows, which have at
    most so many tokens with padding. Raises `OutOfMemory` when a single row does not fit."""
    total, labels = 0.0, 0
    lengths = np.diff(rows.offsets)
    with torch.no_grad():
        for _, found in in_micro_batches(lengths, tokens, lambda some: losses([rows[int(row)] for row in some])):
            total += float(found.sum())
            labels += len(found)
    return total / labels
