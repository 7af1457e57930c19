"""A finished adapter on rows that had no part in finding it: its loss, and what it writes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from trainables import data
from trainables import model as models
from trainables.answers import Answers
from trainables.config import QLoRAConfig
from trainables.packed.adapter import Adapter
from trainables.packed.base import Row, Work
from trainables.protocol import OutOfMemory, Scored
from trainables.qlora_sft import EVALUATION_TOKENS, SCORED_AT_ONCE, out_of_memory, set_weights

T = TypeVar("T")


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
        for _ in in_micro_batches(answers.lengths, at_once, lambda numbers: answers.write(worker, numbers)):
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


def in_micro_batches(
    lengths: NDArray[np.int64], tokens: int, work: Callable[[NDArray[np.int64]], T]
) -> Iterator[tuple[NDArray[np.int64], T]]:
    """Row numbers of each micro-batch, see `data.micro_batches`, and what `work` makes of them.

    When memory runs out, that one and all that follow get half its size. Raises `OutOfMemory` when not even a row fits.
    """
    left = data.micro_batches(lengths, tokens)
    while left:
        numbers = left.pop(0)
        try:
            done = work(numbers)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error)  # the error itself holds on to the tensors of its frames
        else:
            yield numbers, done
            continue
        longest = int(lengths[numbers].max())
        if len(numbers) == 1:
            raise OutOfMemory(
                f"a single row of {longest} tokens does not fit beside the model; free memory of the device, or take"
                f" one that has more ({reason})"
            )
        rest = np.concatenate([numbers, *left])
        left = [rest[some] for some in data.micro_batches(lengths[rest], len(numbers) * longest // 2)]
