"""Adapters of many trials over one frozen base, trained and scored together.

What a slot computes is what it computes alone, as `trainables.qlora_sft` says it: a packed step only lets the rows of
all slots go through the base at once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from trainables import data, model
from trainables.config import QLoRAConfig
from trainables.packed.layers import LowRank, Part, Plan, packed
from trainables.qlora_sft import collate, label_losses, learning_rates, rows_of_step

Row = tuple[NDArray[np.int32], NDArray[np.bool_]]


@dataclass(frozen=True)
class Share:
    """What one slot got out of a packed pass."""

    loss: float
    """Sum over its labels, nats; not finite where the slot diverged."""
    labels: int
    tokens: int
    """Padding not counted."""


class Slot:
    """One adapter with its optimiser and its clock. Weights, gradients and moments are one vector each."""

    def __init__(self, config: QLoRAConfig, total_steps: int, base: "Base") -> None:
        self.config = config
        self.total_steps = total_steps
        self.step = 0
        warmup_steps = math.ceil(config.warmup_ratio * total_steps)
        self.learning_rate: Callable[[int], float] = learning_rates(
            config.schedule, config.learning_rate, warmup_steps, total_steps
        )
        targets = {n: layer for n, layer in base.layers.items() if _is_target(layer[0], config.target_modules)}
        size = sum(config.r * (inputs + outputs) for _, inputs, outputs in targets.values())
        self.weights = torch.nn.Parameter(torch.empty(size, device=base.device))
        self.weights.grad = torch.zeros_like(self.weights)
        self.copy = self.weights.detach().to(base.dtype, copy=True)
        scale = config.alpha / (math.sqrt(config.r) if config.rslora else config.r)
        self.adapter: dict[int, LowRank] = {}
        self.named: dict[str, Tensor] = {}
        """Views of the weights under the names of their layers."""
        first = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for number, (name, inputs, outputs) in targets.items():
                middle, end = first + config.r * inputs, first + config.r * (inputs + outputs)
                shapes = {"a": (first, middle, (config.r, inputs)), "b": (middle, end, (outputs, config.r))}
                views = {
                    f"{which}{kind}": vector[start:stop].view(shape)
                    for which, (start, stop, shape) in shapes.items()
                    for kind, vector in (("", self.copy), ("_gradient", self.weights.grad))
                }
                self.adapter[number] = LowRank(**views, scale=scale)
                a, b = (self.weights.detach()[start:stop].view(shape) for start, stop, shape in shapes.values())
                a.copy_(_initial(inputs, outputs, config.r).to(base.dtype))  # rounded, as PEFT does
                b.zero_()
                self.named |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                first = end
        self.copy.copy_(self.weights.detach())
        self.optimizer: Optimizer = AdamW([self.weights], weight_decay=config.weight_decay, fused=True)

    def dropout_seeds(self, rows: int) -> list[tuple[int, ...]]:
        """For each of the rows of the next step one seed a layer."""
        if not self.config.dropout:
            return [()] * rows
        sources = (np.random.SeedSequence((self.config.seed, self.step, row)) for row in range(rows))
        return [tuple(source.generate_state(max(self.adapter) + 1).tolist()) for source in sources]

    def update(self) -> float:
        """Take the step that the gradients ask for, and forget them; gives their norm before clipping.

        When it is not finite nothing is updated.
        """
        gradient = self.weights.grad
        assert gradient is not None
        norm = torch.nn.utils.clip_grad_norm_([self.weights], self.config.max_grad_norm).item()
        if math.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.step)
            self.optimizer.step()
            self.copy.copy_(self.weights.detach())
            self.step += 1
        gradient.zero_()
        return norm


class Base:
    """A quantised model whose layers serve slots, from `with` to its end."""

    def __init__(self, quantised: PreTrainedModel, pad: int) -> None:
        self.model = quantised
        self.pad = pad
        self.device = model.device()
        self.dtype = quantised.dtype
        self.plan = Plan(anchor=torch.zeros((), device=self.device, requires_grad=True))
        self.layers: Mapping[int, tuple[str, int, int]] = {}

    @contextmanager
    def lent(self) -> Iterator["Base"]:
        with packed(self.model, self.plan) as self.layers:
            yield self

    def train(self, slots: Sequence[Slot], rows: data.Rows, tokens_at_once: int) -> list[Share]:
        """Do the next optimiser step of each slot on its own rows, but for the update.

        `tokens_at_once` with padding go through the base together.
        """
        wanted = [rows_of_step(s.step, len(rows), s.config.batch_size, s.config.seed) for s in slots]
        pairs = [(i, rows[int(row)]) for i, numbers in enumerate(wanted) for row in numbers]
        seeds = [s for slot, numbers in zip(slots, wanted, strict=True) for s in slot.dropout_seeds(len(numbers))]
        labels = [sum(int(row[1][1:].sum()) for j, row in pairs if j == i) for i in range(len(slots))]
        batches = micro_batches([(i, len(row[0])) for i, row in pairs], tokens_at_once)
        losses = torch.zeros(len(slots), device=self.device)
        for chosen in batches:
            batch = [pairs[place] for place in chosen]
            parts = _parts(slots, batch, [seeds[place] for place in chosen])
            mine = self._losses(batch, parts)
            present = [i for i in range(len(slots)) if parts[i].end > parts[i].first]
            sums = torch.stack([mine[i].sum() / labels[i] for i in present])
            sums.sum().backward()
            losses[torch.tensor(present)] += sums.detach() * torch.tensor([labels[i] for i in present])
        tokens = [sum(len(row[0]) for j, row in pairs if j == i) for i in range(len(slots))]
        return [Share(*of_slot) for of_slot in zip(losses.tolist(), labels, tokens, strict=True)]

    def score(self, slots: Sequence[Slot], rows: Sequence[Row]) -> list[Share]:
        """The losses of the rows, the same ones for every slot."""
        batch = [(i, row) for i in range(len(slots)) for row in rows]
        with torch.no_grad():
            losses = self._losses(batch, _parts(slots, batch, None))
        labels, tokens = sum(int(row[1][1:].sum()) for row in rows), sum(len(row[0]) for row in rows)
        sums = torch.stack([each.sum() for each in losses]).tolist()
        return [Share(loss, labels, tokens) for loss in sums]

    def _losses(self, batch: Sequence[tuple[int, Row]], parts: Sequence[Part]) -> list[Tensor]:
        """Loss of every label, by slot."""
        self.plan.parts = tuple(part for part in parts if part.end > part.first)
        counts = [sum(int(row[1][1:].sum()) for _, row in batch[part.first : part.end]) for part in parts]
        collated = collate([row for _, row in batch], self.pad, self.device)
        return list(label_losses(self.model, collated, "fp32").split(counts))  # without autocast


def micro_batches(rows: Sequence[tuple[int, int]], tokens: int) -> list[list[int]]:
    """Places of (slot, length) pairs, cut into micro-batches of at most `tokens` with padding; a longer row is alone.

    Rows of like length come together, and within a micro-batch those of a slot.
    """
    batches: list[list[int]] = [[]]
    for place in sorted(range(len(rows)), key=lambda place: (rows[place][1], place)):
        if batches[-1] and (len(batches[-1]) + 1) * rows[place][1] > tokens:
            batches.append([])
        batches[-1].append(place)
    return [sorted(batch) for batch in batches]


def _parts(
    slots: Sequence[Slot], batch: Sequence[tuple[int, Row]], seeds: Sequence[tuple[int, ...]] | None
) -> list[Part]:
    """For every slot its rows in the batch, which lie together. `seeds` of the dropout, by row; None while scoring."""
    parts = []
    end = 0
    for i, slot in enumerate(slots):
        first, end = end, end + sum(owner == i for owner, _ in batch)
        lengths = tuple(len(ids) for _, (ids, _) in batch[first:end])
        dropout, mine = (0.0, ()) if seeds is None else (slot.config.dropout, tuple(seeds[first:end]))
        parts.append(Part(first, end, slot.adapter, dropout, lengths, mine))
    return parts


def _is_target(name: str, target_modules: str | tuple[str, ...]) -> bool:
    return target_modules == "all-linear" or any(f".{name}".endswith(f".{target}") for target in target_modules)


def _initial(inputs: int, outputs: int, r: int) -> Tensor:
    """(r, inputs): A as PEFT draws it, which makes and initialises two linear layers first."""
    uniform = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
    for shape in ((r, inputs), (outputs, r)):
        uniform(torch.empty(shape))
    return uniform(torch.empty(r, inputs))
