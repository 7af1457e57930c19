"""A quantised base through which the rows of many trials go together."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trainables.packed import fused
from trainables.packed.adapter import Adapter, Stack
from trainables.packed.fused import cross_entropy, cross_entropy_of, fuse, fusible
from trainables.packed.layers import Dropout, Part, Plan, pack

Row = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids, and which of them are supervised."""


@dataclass(frozen=True)
class Work:
    """Rows of one trial that go through the base."""

    adapter: Adapter
    rows: Sequence[Row]
    seeds: Sequence[int] | None
    """Of the dropout, one a row, below 2**32; None while scoring, when nothing is dropped."""

    @property
    def labels(self) -> int:
        return sum(labels_of(row) for row in self.rows)


def labels_of(row: Row) -> int:
    """Supervised tokens but the first: nothing predicts that one."""
    return int(np.count_nonzero(row[1][1:]))


class Base:
    """A frozen quantised model and the adapters that it serves."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, notes: Sequence[str] = ()) -> None:
        """Replaces the quantised layers of `model`; `dtype` is that in which they multiply.

        `notes` are what the user should know of how it was loaded, a line each.
        """
        self.model = model
        self.dtype = dtype
        self.notes = notes
        self.plan = Plan(torch.zeros((), device=model.device, requires_grad=True))
        self.layers = pack(model, self.plan, dtype)
        fuse(model, fusible(model))
        self._stacks: dict[tuple[object, ...], Stack] = {}
        self._checkpointing = False

    @property
    def vocabulary(self) -> int:
        """Logits of a label."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def _decoder(self) -> Any:
        """See `decoder_of`; where there is none, all logits of a micro-batch are held at once."""
        self.plan.parts = ()
        return decoder_of(self.model)

    @property
    def idle(self) -> bool:
        """Whether it serves no adapter."""
        return not self._stacks

    def seat(self, adapter: Adapter) -> None:
        """Serve this adapter, too. Between optimiser steps only."""
        self.plan.parts = ()
        key = _shape(adapter)
        stack = self._stacks.get(key)
        if stack is None or not stack.take(adapter):
            others = stack.present if stack else []
            self._stacks[key] = Stack([*others, adapter], self.dtype, self.model.dtype)

    def dismiss(self, adapter: Adapter) -> None:
        """Serve it no longer. Between optimiser steps only."""
        self.plan.parts = ()
        key = _shape(adapter)
        stack = self._stacks[key]
        stack.leave(adapter)
        others = stack.present
        if not others:
            del self._stacks[key]
        elif 2 * len(others) <= len(stack.adapters):  # what is free is worth a copy of the rest
            with suppress(torch.OutOfMemoryError):  # else it serves them as it is
                self._stacks[key] = Stack(others, self.dtype, self.model.dtype)

    def refresh(self, adapter: Adapter) -> None:
        """Take over the weights of an adapter that have changed."""
        self._stacks[_shape(adapter)].refresh(adapter)

    def losses(self, works: Sequence[Work], pad: int) -> list[Tensor]:
        """Cross-entropy of the labels of each work in nats, fp32 (labels,). A backward pass adds to the gradients."""
        places = []
        keys = list(self._stacks)
        for i, work in enumerate(works):
            key = _shape(work.adapter)
            places.append((keys.index(key), self._stacks[key].adapters.index(work.adapter), i))
        places.sort()
        ordered = [works[i] for _, _, i in places]
        batch = collate([row for work in ordered for row in work.rows], pad, self.model.device)
        at_once = max(1, fused.LOGITS // self.vocabulary)
        decoder = self._decoder if len(batch.labels) > at_once else None
        self.plan.parts = self._parts([(keys[stack], seat) for stack, seat, _ in places], ordered, batch)
        rows, width = batch.input_ids.shape
        self.plan.shape = (rows, width)
        self._checkpoint(any(work.adapter.config.gradient_checkpointing for work in works))
        if decoder is None:
            losses = label_losses(self.model, batch)
        else:
            losses = label_losses_in_parts(self.model, decoder, batch, at_once)
        of_works = losses.split([work.labels for work in ordered])
        found = {i: each for (_, _, i), each in zip(places, of_works, strict=True)}
        return [found[i] for i in range(len(works))]

    def ends(self) -> set[int]:
        """Tokens that end an answer, as the model's own settings have them; none when they have none."""
        settings = self.model.generation_config
        found = None if settings is None else settings.eos_token_id
        return set(found if isinstance(found, list) else [] if found is None else [found])

    def continuations(
        self, adapter: Adapter, prompts: Sequence[NDArray[np.int32]], pad: int, ends: Collection[int], most: int
    ) -> list[list[int]]:
        """Token ids that follow each prompt, the most probable one each time, up to the first of `ends` or to `most`.

        The end itself is left out.
        """
        width = max(map(len, prompts))
        input_ids = np.full((len(prompts), width), pad, dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for i, prompt in enumerate(prompts):
            input_ids[i, width - len(prompt) :] = prompt
            mask[i, width - len(prompt) :] = 1
        key = _shape(adapter)
        rows = [(prompt, np.zeros(len(prompt), np.bool_)) for prompt in prompts]
        seat = (key, self._stacks[key].adapters.index(adapter))
        self.plan.parts = self._parts([seat], [Work(adapter, rows, None)], collate(rows, pad, self.model.device))
        self._checkpoint(False)

        def before(_: torch.nn.Module, positional: object, named: dict[str, Tensor]) -> None:
            self.plan.shape = (len(prompts), named["input_ids"].shape[1])  # all of the prompts, then token by token

        hook = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            model: Any = self.model
            written: Tensor = model.generate(
                torch.from_numpy(input_ids).to(self.model.device),
                attention_mask=torch.from_numpy(mask).to(self.model.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    max_new_tokens=most,
                    pad_token_id=pad,
                    eos_token_id=sorted(ends),
                ),
            )
        finally:
            hook.remove()
        return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in written[:, width:].tolist()]

    def _parts(
        self, seats: Sequence[tuple[tuple[object, ...], int]], works: Sequence[Work], batch: "Batch"
    ) -> list[Part]:
        """Neighbours in a stack with as many rows each are one part."""
        runs: list[list[int]] = []
        for i, (key, seat) in enumerate(seats):
            if runs:
                before = runs[-1][-1]
                if (key, seat - 1) == seats[before] and len(works[i].rows) == len(works[before].rows):
                    runs[-1].append(i)
                    continue
            runs.append([i])
        parts = []
        end = 0
        device = batch.input_ids.device
        for run in runs:
            key, seat = seats[run[0]]
            mine = [works[i] for i in run]
            first, end = end, end + sum(len(work.rows) for work in mine)
            dropout = None
            rates = [0.0 if work.seeds is None else work.adapter.config.dropout for work in mine]
            if any(rates):
                of_rows = [rate for rate, work in zip(rates, mine, strict=True) for _ in work.rows]
                seeds = [seed for work in mine for seed in work.seeds or ()]
                dropout = Dropout.of(
                    torch.tensor(seeds, device=device),
                    torch.tensor(of_rows, dtype=torch.float64, device=device),
                    len(self.layers),
                    batch.input_ids.shape[1],
                )
            scales = [work.adapter.scale / (1 - rate) for rate, work in zip(rates, mine, strict=True)]
            parts.append(
                Part(
                    slice(first, end),
                    slice(seat, seat + len(run)),
                    self._stacks[key].layers,
                    torch.tensor(scales, dtype=torch.float32, device=device)[:, None, None],
                    dropout,
                )
            )
        return parts

    def _checkpoint(self, wanted: bool) -> None:
        """Whether activations are computed again in backward passes, which models do in training mode only."""
        if self._checkpointing != wanted:  # walks through all modules
            self._checkpointing = wanted
            self.model.train(wanted)
            if wanted:
                self.model.activation_checkpointing_enable({"use_reentrant": False})
                self.model.disable_input_require_grads()  # only the reentrant kind needs gradients at the embeddings
            else:
                self.model.activation_checkpointing_disable()


def _shape(adapter: Adapter) -> tuple[object, ...]:
    return (adapter.config.r, *adapter.layers)


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch, on the device."""

    input_ids: Tensor
    """(rows, width), padded on the right."""
    positions: Tensor
    """(labels,): place of each token that predicts a label, counted through the flattened (rows, width)."""
    labels: Tensor
    """(labels,): the tokens to be predicted, each the one after its position."""


def collate(rows: Sequence[Row], pad: int, device: torch.device) -> Batch:
    """Pad (token ids, label mask) pairs to one width. A row's first token is never a label: nothing predicts it."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = np.full((len(rows), width), pad, dtype=np.int64)
    predicts = np.zeros((len(rows), width), dtype=np.bool_)
    for i, (ids, supervised) in enumerate(rows):
        input_ids[i, : len(ids)] = ids
        predicts[i, : len(ids) - 1] = supervised[1:]
    positions = np.flatnonzero(predicts)
    labels = input_ids.ravel()[positions + 1]
    return Batch(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(positions).to(device),
        torch.from_numpy(labels).to(device),
    )


def label_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy of each label of the batch in nats: fp32, (labels,).

    The output head gets the hidden states of the labelled positions alone, through a hook, so that whatever the
    model does to its logits (scaling, soft-capping) still happens. No attention mask is passed: padding stands to
    the right of every token that counts, where causal attention cannot see it.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0].flatten(0, 1).index_select(0, batch.positions),))
    try:
        logits: Tensor = model(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        hook.remove()
    return cross_entropy(logits, batch.labels)


def label_losses_in_parts(model: PreTrainedModel, decoder: Any, batch: Batch, at_once: int) -> Tensor:
    """The same, with logits of so many labels at a time. `decoder` is what `decoder_of` gives."""
    outputs = decoder(input_ids=batch.input_ids, use_cache=False)

    def head(hidden: Tensor) -> Tensor:
        answer = type(outputs)(**{**outputs, "last_hidden_state": hidden[None]})
        with _answering(decoder, answer):
            logits: Tensor = model(input_ids=batch.input_ids[:1], use_cache=False).logits
        return logits[0]

    hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)
    return cross_entropy_of(hidden, batch.labels, head, at_once)


@torch.no_grad()
def decoder_of(model: PreTrainedModel) -> Any:
    """The module whose answer becomes logits by the model's own code; None where that is not found."""
    decoder = model.get_decoder()
    if decoder is model:
        return None
    tokens = torch.tensor([[0, 1, 2]], device=model.device)
    own = model(input_ids=tokens, use_cache=False).logits
    outputs = decoder(input_ids=tokens, use_cache=False)
    with _answering(decoder, outputs) as asked:
        found = model(input_ids=tokens[:, :1], use_cache=False).logits
    same = found.shape == own.shape and torch.allclose(found, own, rtol=1e-2, atol=1e-2)
    return decoder if len(asked) == 1 and same else None


@contextmanager
def _answering(module: Any, answer: object) -> Iterator[list[object]]:
    """Have a module give this answer rather than compute one; gives a list of what it was asked."""
    asked: list[object] = []

    def forward(*positional: object, **named: object) -> object:
        asked.append((positional, named))
        return answer

    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield asked
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
