"""A frozen 4-bit layer that serves the adapters of many trials at once.

The rows of a micro-batch belong to trials, those of one trial together. The layer is dequantised once for all of them
and multiplied once; then adapters of one shape add their own low-rank terms (LoRA, arXiv:2106.09685) in one batched
product. Nothing of one trial is ever multiplied with anything of another, so what is not finite stays with its trial.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from trainables.packed.kernels import kernel

UINT32 = 2**32 - 1


@dataclass(frozen=True)
class LowRank:
    """Adapters of one shape at one layer; the term that each adds to `x` is `scale * B @ A @ x`."""

    a: Tensor
    """(adapters, r, in), in the data type that products are taken in."""
    b: Tensor
    """(adapters, out, r), in the same."""
    a_gradient: Tensor
    """(adapters, r, in), fp32: backward passes add to it."""
    b_gradient: Tensor
    """(adapters, out, r), fp32."""


@dataclass(frozen=True)
class Dropout:
    """Which inputs of the adapters are dropped: a hash of the row's seed, the layer and the place in the row.

    So it depends neither on how rows are put into micro-batches nor on what else is in them.
    """

    keys: Tensor
    """(layers, rows, width), int32: hashes, to which a layer adds that of the input."""
    highest: Tensor
    """(rows, 1, 1), int32: an input with a hash above that of its row is dropped."""

    @classmethod
    def of(cls, seeds: Tensor, rates: Tensor, layers: int, width: int) -> "Dropout":
        """For rows of these seeds (rows,), int64 below 2**32, and rates (rows,), fp64: the share to be dropped."""
        counts = torch.arange(max(layers, width), device=seeds.device)
        of_layers = _mixed(seeds + _mixed(counts[:layers, None]) & UINT32)
        keys = _mixed(of_layers[..., None] + _mixed(counts[:width] + layers) & UINT32)
        highest = ((1 - rates) * 2**32).round().long() - 2**31 - 1
        return cls(keys.int(), highest.clamp(-(2**31), 2**31 - 1).int()[:, None, None])

    def mask(self, layer: int, inputs: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Sets to 0 what is dropped of a (rows, width, in) of this `dtype`; `inputs` are hashes of places in an input.

        Cheaper to make again in the backward pass than to keep until then.
        """
        keys = self.keys[layer, :, :, None]
        if keys.is_cuda and len(inputs) * dtype.itemsize % 4 == 0:
            return partial(_drop_on_gpu, keys, inputs, self.highest)
        hashes = keys ^ inputs
        hashes.mul_(MIX[0]).bitwise_xor_(hashes >> MIX[1]).mul_(MIX[2])
        kept = torch.le(hashes, self.highest, out=torch.empty_like(hashes, dtype=dtype))  # a bool is slow on a CPU
        return kept.mul


MIX = 0x2C1B3C6D, 15, 0x297A2D39
"""Mixes the bits of an exclusive or of hashes: times, shift, times."""
_IS_KEPT = f"""
template <typename T> bool is_kept(T key, T input, T highest) {{
    unsigned hash = (unsigned) (key ^ input) * {MIX[0]}u;
    hash ^= (unsigned) ((int) hash >> {MIX[1]});
    return (int) (hash * {MIX[2]}u) <= highest;
}}
"""
_DROP = """
template <typename T> T drop(T x, T key, T input, T highest) {
    return is_kept(key, input, highest) ? x : 0;
}
"""
_DROP_OF_TWO = """
template <typename T> T drop_of_two(T x, T key, T low, T high, T highest) {
    return x & ((is_kept(key, low, highest) ? 0x0000FFFFu : 0u) | (is_kept(key, high, highest) ? 0xFFFF0000u : 0u));
}
"""


def _drop_on_gpu(keys: Tensor, inputs: Tensor, highest: Tensor, x: Tensor) -> Tensor:
    """One kernel: seven operations on all inputs of all layers take up to half of a step.

    `x` in fp32 or bf16 is read and written as integers; two numbers of 16 bits are one.
    """
    bits = x.contiguous().view(torch.int32)
    dropped: Tensor
    if x.itemsize == 4:
        dropped = kernel(_IS_KEPT + _DROP)(bits, keys, inputs, highest)
    else:
        dropped = kernel(_IS_KEPT + _DROP_OF_TWO)(bits, keys, inputs[::2], inputs[1::2], highest)
    return dropped.view(x.dtype)


@dataclass(frozen=True)
class Part:
    """Rows of a micro-batch whose trials have adapters of one shape, as many rows of each."""

    rows: slice
    adapters: slice
    """Of those that are stacked."""
    stacked: Mapping[int, LowRank]
    """By number of the layer; a layer without them adds nothing."""
    scales: Tensor
    """(adapters, 1, 1), fp32, by which low-rank terms are multiplied; makes up for what dropout takes."""
    dropout: Dropout | None


@dataclass
class Plan:
    """What all layers of a base look up during a pass."""

    anchor: Tensor
    """A number that needs a gradient: has autograd come to the first layers, too, whose input needs none."""
    parts: Sequence[Part] = ()
    shape: tuple[int, int] = (0, 0)
    """Rows and width of the micro-batch."""


class PackedLinear(torch.nn.Module):
    """In place of a `Linear4bit`, whose weight it uses."""

    def __init__(self, replaced: Linear4bit, name: str, number: int, plan: Plan, dtype: torch.dtype) -> None:
        """`dtype` is that of products."""
        super().__init__()
        self.name = name
        self.replaced = replaced
        self.number = number
        self.plan = plan
        self.dtype = dtype
        self.inputs = input_hashes(replaced.in_features, plan.anchor.device)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width, in) to (rows, width, out), or both with rows and width as one.

        Raises ValueError for another input, as of experts that get some tokens each, where the layer has adapters.
        """
        parts = [part for part in self.plan.parts if self.number in part.stacked]
        rows, width = self.plan.shape
        if parts and x.shape[:-1] not in ((rows, width), (rows * width,)):
            raise ValueError(
                f"target_modules: {self.name} gets an input of shape {tuple(x.shape)} rather than"
                f" {(rows, width, x.shape[-1])}, which cannot be told apart by trial; name other layers"
            )
        wanted = x.reshape(rows, width, -1) if parts else x
        anchor = self.plan.anchor if parts else None
        result: Tensor = _Apply.apply(wanted, anchor, self, parts)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], -1)

    def weight(self) -> Tensor:
        """(out, in), dequantised."""
        packed = self.replaced.weight
        assert isinstance(packed, Params4bit)
        weight: Tensor = dequantize_4bit(packed.data, packed.quant_state)
        return weight.to(self.dtype)


def pack(base: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> dict[int, tuple[str, int, int]]:
    """Have the quantised layers of `base` look up `plan` from now on; gives name, inputs and outputs of each."""
    found = [(name, module) for name, module in base.named_modules() if isinstance(module, Linear4bit)]
    for number, (name, module) in enumerate(found):
        base.set_submodule(name, PackedLinear(module, name, number, plan, dtype))
    return {number: (name, m.in_features, m.out_features) for number, (name, m) in enumerate(found)}


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, layer: PackedLinear, parts: Sequence[Part]) -> Tensor:
        wide = x.to(layer.dtype)
        bias = layer.replaced.bias
        # Rounded before the low-rank terms come to it: as with PEFT, what of them is below the last bit gets lost.
        y = F.linear(wide, layer.weight(), None if bias is None else bias.to(layer.dtype)).to(x.dtype)
        lows: list[Tensor] = []
        for part in parts:
            pair = part.stacked[layer.number]
            x_part = _mask(part, layer)(wide[part.rows])
            low = (_by_adapter(x_part, part) @ pair.a[part.adapters].mT * part.scales).to(layer.dtype)
            _add_product(_by_adapter(y[part.rows], part), low, pair.b[part.adapters].mT)
            lows.append(low)
        ctx.save_for_backward(x, *lows)
        ctx.layer, ctx.parts = layer, parts
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer: PackedLinear = ctx.layer
        gradient = gradients[0].to(layer.dtype)
        x, *lows = ctx.saved_tensors
        wide = x.to(layer.dtype)
        x_gradient = (gradient @ layer.weight()).to(x.dtype) if ctx.needs_input_grad[0] else None
        for part, low in zip(ctx.parts, lows, strict=True):
            pair = part.stacked[layer.number]
            y_gradient = _by_adapter(gradient[part.rows], part)
            mask = _mask(part, layer)
            _add_product(pair.b_gradient[part.adapters].mT, low.mT, y_gradient)
            low_gradient = (y_gradient @ pair.b[part.adapters] * part.scales).to(layer.dtype)
            _add_product(pair.a_gradient[part.adapters], low_gradient.mT, _by_adapter(mask(wide[part.rows]), part))
            if x_gradient is not None:
                to = x_gradient[part.rows]
                if part.dropout is None:
                    _add_product(_by_adapter(to, part), low_gradient, pair.a[part.adapters])
                else:
                    to += mask((low_gradient @ pair.a[part.adapters]).view(to.shape))
        return x_gradient, None, None, None


def _mask(part: Part, layer: PackedLinear) -> Callable[[Tensor], Tensor]:
    """Sets to 0 what is dropped of the rows of a part."""
    if part.dropout is None:
        return lambda x: x
    return part.dropout.mask(layer.number, layer.inputs, layer.dtype)


def _by_adapter(x: Tensor, part: Part) -> Tensor:
    """(rows, width, n) to (adapters, rows of each * width, n)."""
    return x.reshape(part.scales.shape[0], -1, x.shape[-1])


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add to a tensor of this or of another data type."""
    if left.dtype == to.dtype:
        to.baddbmm_(left, right)
    else:
        to.add_(left @ right)


def input_hashes(inputs: int, device: torch.device) -> Tensor:
    """(in,), int32: for `Dropout.mask`."""
    return _mixed(torch.arange(inputs, device=device) + 2**31).int()


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers, held in int64: `lowbias32` of Chris Wellons' hash-prospector."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & UINT32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & UINT32
    return x ^ (x >> 16)
