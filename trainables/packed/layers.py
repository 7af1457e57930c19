"""A frozen 4-bit layer that serves the adapters of many trials at once.

The rows of a micro-batch belong to slots, those of one slot together. The layer is dequantised once for all of them and
multiplied once; then each slot's rows get the low-rank term of their own adapter (LoRA, arXiv:2106.09685). Nothing of
one slot is ever multiplied with anything of another one, so what is not finite stays with its slot.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LowRank:
    """The adapter of one slot at one layer; the term that it adds is `scale * B @ A @ x`."""

    a: Tensor
    """(r, in), in the compute data type."""
    b: Tensor
    """(out, r), in the compute data type."""
    a_gradient: Tensor
    """(r, in), fp32: backward passes add to it."""
    b_gradient: Tensor
    """(out, r), fp32."""
    scale: float


@dataclass(frozen=True)
class Part:
    """The rows of one slot in a micro-batch."""

    first: int
    end: int
    adapter: Mapping[int, LowRank]
    """By number of the layer; a layer without one adds nothing."""
    dropout: float
    """Probability that an input of the adapter is dropped; 0 while scoring."""
    lengths: tuple[int, ...]
    """Of the rows, padding not counted."""
    seeds: tuple[tuple[int, ...], ...]
    """Of the dropout, by row and number of the layer: what is dropped depends on nothing else."""


@dataclass
class Plan:
    """What all layers of a base look up during a pass."""

    parts: tuple[Part, ...] = ()
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    """Makes autograd come to the first layer, too, whose input needs no gradient."""


class PackedLinear(torch.nn.Module):
    """In place of a `Linear4bit`, whose weight it uses."""

    def __init__(self, replaced: Linear4bit, number: int, plan: Plan) -> None:
        super().__init__()
        self.replaced = replaced
        self.number = number
        self.plan = plan

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width, in) to (rows, width, out)."""
        result: Tensor = _Apply.apply(x, self.plan.anchor, self)  # type: ignore[no-untyped-call]
        return result

    def weight(self) -> Tensor:
        """(out, in), dequantised."""
        packed = self.replaced.weight
        assert isinstance(packed, Params4bit)
        weight: Tensor = dequantize_4bit(packed.data, packed.quant_state)
        return weight


@contextmanager
def packed(base: PreTrainedModel, plan: Plan) -> Iterator[dict[int, tuple[str, int, int]]]:
    """Have the quantised layers of `base` look up `plan` for the block; gives name, inputs and outputs of each."""
    found = {name: module for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    layers = {}
    for number, (name, module) in enumerate(found.items()):
        base.set_submodule(name, PackedLinear(module, number, plan))
        layers[number] = (name, module.in_features, module.out_features)
    try:
        yield layers
    finally:
        for name, module in found.items():
            base.set_submodule(name, module)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: PackedLinear) -> Tensor:
        kept: list[Tensor] = []
        used: list[tuple[Part, LowRank, bool]] = []
        y = F.linear(x, layer.weight(), layer.replaced.bias)
        for part in layer.plan.parts:
            pair = part.adapter.get(layer.number)
            if pair is None:
                continue
            x_part = x[part.first : part.end].flatten(0, -2)
            if part.dropout:
                mask = _mask(part, layer.number, x)
                x_part = x_part * mask
                kept.append(mask)
            low = x_part @ pair.a.t()
            y_part = y[part.first : part.end].flatten(0, -2)
            y_part.copy_(torch.addmm(y_part, low, pair.b.t(), alpha=pair.scale))
            kept.append(low)
            used.append((part, pair, part.dropout > 0))
        ctx.save_for_backward(x, *kept)
        ctx.layer, ctx.used = layer, used
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        x, *kept = ctx.saved_tensors
        x_gradient = gradient @ ctx.layer.weight() if ctx.needs_input_grad[0] else None
        tensors = iter(kept)
        for part, pair, dropped in ctx.used:
            x_part = x[part.first : part.end].flatten(0, -2)
            y_gradient = gradient[part.first : part.end].flatten(0, -2)
            mask = next(tensors) if dropped else None
            low = next(tensors)
            pair.b_gradient.add_(y_gradient.t() @ low, alpha=pair.scale)
            low_gradient = (y_gradient @ pair.b) * pair.scale
            pair.a_gradient.add_(low_gradient.t() @ (x_part if mask is None else x_part * mask))
            if x_gradient is not None:
                into = x_gradient[part.first : part.end].flatten(0, -2)
                if mask is None:
                    into.copy_(torch.addmm(into, low_gradient, pair.a))
                else:
                    into.add_((low_gradient @ pair.a) * mask)
        return x_gradient, None, None


def _mask(part: Part, layer: int, x: Tensor) -> Tensor:
    """(rows * width, in): 0 where an input is dropped, else what makes up for those."""
    kept = 1 - part.dropout
    mask = x.new_zeros((part.end - part.first, *x.shape[1:]))
    for row, (length, seeds) in enumerate(zip(part.lengths, part.seeds, strict=True)):
        generator = torch.Generator(x.device).manual_seed(seeds[layer])
        mask[row, :length].bernoulli_(kept, generator=generator).div_(kept)
    return mask.flatten(0, -2)
