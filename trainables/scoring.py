"""A finished adapter on rows that had no part in finding it: its loss, and what it writes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor
from transformers import AutoTokenizer

from trainables import data
from trainables import model as models
from trainables.config import QLoRAConfig
from trainables.packed.adapter import Adapter
from trainables.packed.base import Row, Work
from trainables.protocol import OutOfMemory, Scored
from trainables.qlora_sft import EVALUATION_TOKENS, SCORED_AT_ONCE, out_of_memory, rows_of_evaluation, set_weights

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
        tokenizer = AutoTokenizer.from_pretrained(tokens / data.TOKENIZER)
        pairs = data.with_answers(rows)
        longest = max(len(reference) for _, reference in pairs)
        ends = base.ends() | ({tokenizer.eos_token_id} - {None})
        lengths = np.array([len(prompt) + longest for prompt, _ in pairs])
        written: dict[int, list[int]] = {}

        def continued(numbers: NDArray[np.int64]) -> list[list[int]]:
            prompts = [pairs[number][0] for number in numbers]
            return base.continuations(worker, prompts, prepared.pad_token_id, ends, longest)

        for numbers, some in in_micro_batches(lengths, SCORED_AT_ONCE[device.type] >> halvings, continued):
            written |= dict(zip(numbers.tolist(), some, strict=True))
    finally:
        base.dismiss(worker)

    def texts(ids: Sequence[Sequence[int]]) -> tuple[str, ...]:
        return tuple(tokenizer.batch_decode([list(each) for each in ids], skip_special_tokens=True))

    prompts, references = zip(*pairs, strict=True)
    return Scored(len(rows), found, texts(prompts), texts(references), texts([written[i] for i in range(len(pairs))]))


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
    """Row numbers of each micro-batch, see `rows_of_evaluation`, and what `work` makes of them.

    When memory runs out, that one and all that follow get half its size. Raises `OutOfMemory` when not even a row fits.
    """
    left = rows_of_evaluation(lengths, tokens)
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
        left = [rest[some] for some in rows_of_evaluation(lengths[rest], len(numbers) * longest // 2)]
