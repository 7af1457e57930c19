"""What an adapter, or the base alone, writes in place of the answers of rows: greedy, a micro-batch at a time."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from trainables import data
from trainables.packed.adapter import Adapter
from trainables.packed.base import Base
from trainables.protocol import Scored


class Answers:
    """The first rows of a split, or all of them, that are to be answered."""

    def __init__(self, tokens: Path, split: data.Rows, base: Base, pad: int, count: int | None = None) -> None:
        """`tokens` is the directory of the rows.

        A completion is at most as long in tokens as the longest reference of the split, with the token that ends it.
        Raises `data.DataError` when the rows have no answers.
        """
        self._base = base
        self._pad = pad
        self._tokenizer = AutoTokenizer.from_pretrained(tokens / data.TOKENIZER)
        pairs = data.with_answers(split)
        self._longest = max(len(reference) for _, reference in pairs)
        self._pairs = pairs[:count]
        self._ends = base.ends() | ({self._tokenizer.eos_token_id} - {None})
        self.lengths = np.array([len(prompt) + self._longest for prompt, _ in self._pairs])
        """Tokens of each row, its answer included, at most."""
        self._written: dict[int, list[int]] = {}

    def write(self, adapter: Adapter, numbers: NDArray[np.int64]) -> int:
        """Write the answers of rows of these numbers; how many tokens went through the model."""
        rows = numbers.tolist()
        prompts = [self._pairs[row][0] for row in rows]
        found = self._base.continuations(adapter, prompts, self._pad, self._ends, self._longest)
        self._written |= dict(zip(rows, found, strict=True))
        return sum(map(len, [*prompts, *found]))

    def done(self, loss: float | None = None) -> Scored:
        """All that was written, once it is; `loss` is that of the rows."""
        prompts, references = zip(*self._pairs, strict=True)
        written = [self._written[row] for row in range(len(self._pairs))]
        return Scored(len(written), loss, self._texts(prompts), self._texts(references), self._texts(written))

    def _texts(self, ids: Iterable[Iterable[int]]) -> tuple[str, ...]:
        return tuple(self._tokenizer.batch_decode([list(each) for each in ids], skip_special_tokens=True))
