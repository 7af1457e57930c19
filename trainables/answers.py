"""What an adapter, or the base alone, writes in place of the answers of rows: greedy, a micro-batch at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from trainables import data, model
from trainables.packed.adapter import Adapter
from trainables.packed.base import Base
from trainables.protocol import OutOfMemory, Scored

T = TypeVar("T")
Pair = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids of a prompt, and of its reference."""


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
            if not model.out_of_memory(error):
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


class Answers:
    """The first rows of a split, or all of them, that are to be answered."""

    def __init__(self, tokens: Path, split: data.Rows, base: Base, pad: int, count: int | None = None) -> None:
        """`tokens` is the directory of the rows.

        A completion is at most as long in tokens as the longest reference of the split, with the token that ends it.
        Raises `data.DataError` when the rows have no answers.
        """
        self._base = base
        self._pad = pad
        self._tokens = tokens
        pairs = data.with_answers(split)
        self._longest = max(len(reference) for _, reference in pairs)
        self._pairs = pairs[:count]
        self._ends = base.ends() | ({_tokenizer(tokens).eos_token_id} - {None})
        self._lengths = np.array([len(prompt) + self._longest for prompt, _ in self._pairs])
        self._written: dict[int, list[int]] = {}

    def write(self, adapter: Adapter, at_once: int) -> Iterator[int]:
        """Write the answers, at most so many tokens with padding together, a micro-batch with each `next`; gives how
        many tokens went through the model. Raises `OutOfMemory` when a single row does not fit."""

        def some(numbers: NDArray[np.int64]) -> int:
            rows = numbers.tolist()
            prompts = [self._pairs[row][0] for row in rows]
            found = self._base.continuations(adapter, prompts, self._pad, self._ends, self._longest)
            self._written |= dict(zip(rows, found, strict=True))
            return sum(map(len, [*prompts, *found]))

        return (tokens for _, tokens in in_micro_batches(self._lengths, at_once, some))

    def done(self, loss: float | None = None) -> Scored:
        """All that was written, once it is; `loss` is that of the rows."""
        written = [self._written[row] for row in range(len(self._pairs))]
        return _scored(self._tokens, self._pairs, written, loss)


def shifted(tokens: Path, split: data.Rows, count: int) -> Scored:
    """The first rows of a split, each answered with the reference of the next one: answers, and mostly wrong.

    `tokens` is the directory of the rows. Raises `data.DataError` when they have no answers.
    """
    pairs = data.with_answers(split)[:count]
    return _scored(tokens, pairs, [reference for _, reference in [*pairs[1:], pairs[0]]], None)


def _scored(tokens: Path, pairs: Sequence[Pair], written: Iterable[Iterable[int]], loss: float | None) -> Scored:
    def texts(ids: Iterable[Iterable[int]]) -> tuple[str, ...]:
        return tuple(_tokenizer(tokens).batch_decode([list(each) for each in ids], skip_special_tokens=True))

    prompts, references = zip(*pairs, strict=True)
    return Scored(len(pairs), loss, texts(prompts), texts(references), texts(written))


@lru_cache
def _tokenizer(tokens: Path) -> Any:
    """Kept: a process serves many trials."""
    return AutoTokenizer.from_pretrained(tokens / data.TOKENIZER)
