"""The adapter of one trial, with its optimiser; and adapters of one shape, stacked for the layers.

Weights, gradients and moments are vectors over all layers, so that a step takes few operations whatever the model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from bitsandbytes.optim.adamw import PagedAdamW8bit
from torch import Tensor
from torch.optim import AdamW, Optimizer

from trainables.config import QLoRAConfig
from trainables.packed.layers import LowRank

PIECE = 1024
"""Numbers whose squares are summed in fp32."""
Layers = Mapping[int, tuple[str, int, int]]
"""Name, inputs and outputs of layers, by their number."""


class Adapter:
    """LoRA weights in fp32 as PEFT initialises them, and the optimiser of a trial."""

    def __init__(self, config: QLoRAConfig, layers: Layers, device: torch.device, base_dtype: torch.dtype) -> None:
        """`layers` are those that it adapts; initial weights are rounded to `base_dtype`, as PEFT does."""
        self.config = config
        self.layers = layers
        self.scale = config.alpha / (math.sqrt(config.r) if config.rslora else config.r)
        size = sum(config.r * (inputs + outputs) for _, inputs, outputs in layers.values())
        self.weights = torch.empty(size, device=device, dtype=torch.float32)
        self.gradient: Tensor
        """Of the weights; it is zero between steps, and a place in a `Stack`."""
        self.named = {
            f"{layers[number][0]}.lora_{which}.weight": view
            for number, which, view in views(self.weights, config.r, layers)
        }
        """Views of the weights: A (r, in) and B (out, r) of every layer."""
        for name, weight in self.named.items():
            if "lora_B" in name:
                weight.zero_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            for name, inputs, outputs in layers.values():
                a = _initial(inputs, outputs, config.r)
                self.named[f"{name}.lora_A.weight"].copy_(a.to(base_dtype))
        self.trained: dict[str, torch.nn.Parameter]
        """What the optimiser sees."""
        self.optimizer: Optimizer
        if config.optimizer == "paged_adamw_8bit":  # it decides weight by weight what is kept in 8 bits
            self.trained = {name: torch.nn.Parameter(weight) for name, weight in self.named.items()}
            self.optimizer = PagedAdamW8bit(self.trained.values(), weight_decay=config.weight_decay)
        else:
            self.trained = {"adapter": torch.nn.Parameter(self.weights)}
            self.optimizer = AdamW(self.trained.values(), weight_decay=config.weight_decay, fused=True)

    def begin(self) -> None:
        """Make the optimiser's state, which it would do in its first step: there memory may be lacking."""
        for weight in self.trained.values():
            if isinstance(self.optimizer, PagedAdamW8bit):
                self.optimizer.init_state(self.optimizer.param_groups[0], weight, 0, 0)
            else:
                moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}

    def norm(self) -> Tensor:
        """L2 norm of the gradient, fp32 (): of pieces in fp32, then of all in fp64.

        A sum of millions of squares loses the fourth digit in fp32, and a copy in fp64 takes twice their memory.
        """
        ends = self.gradient.numel() // PIECE * PIECE
        pieces = torch.linalg.vector_norm(self.gradient[:ends].view(-1, PIECE), dim=1)
        rest = torch.linalg.vector_norm(self.gradient[ends:])
        norm: Tensor = torch.linalg.vector_norm(torch.cat([pieces, rest[None]]), dtype=torch.float64)
        return norm.float()

    def update(self, norm: float, learning_rate: float) -> None:
        """Clip gradients of this `norm`, take an optimiser step, and forget them."""
        self.gradient.mul_(min(1.0, self.config.max_grad_norm / (norm + 1e-6)))  # as torch's clip_grad_norm_
        if len(self.trained) == 1:
            gradients: Iterator[Tensor] = iter([self.gradient])
        else:
            gradients = (view for _, _, view in views(self.gradient, self.config.r, self.layers))
        for weight, gradient in zip(self.trained.values(), gradients, strict=True):
            weight.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.gradient.zero_()

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state; nothing before `begin`."""
        return {
            # bitsandbytes keeps a number here, and one quantisation map for all weights
            f"{name}.{key}": torch.as_tensor(value).cpu().clone()
            for name, weight in self.trained.items()
            for key, value in self.optimizer.state[weight].items()
        }

    def set_moments(self, saved: Mapping[str, Tensor]) -> None:
        """After `begin`."""
        for name, weight in self.trained.items():
            state = self.optimizer.state[weight]
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.copy_(saved[f"{name}.{key}"])
                else:
                    state[key] = int(saved[f"{name}.{key}"])


class Stack:
    """Adapters of one shape: their weights in the data type of products, and the gradients that layers add to.

    The place of one that leaves is there for the next: nothing of the others is copied, which would take as much memory
    once more.
    """

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype, rounded: torch.dtype) -> None:
        """Weights are rounded to `rounded`; gradients must be zero, for they move here."""
        first = adapters[0]
        r, layers = first.config.r, first.layers
        self.adapters: list[Adapter | None] = list(adapters)
        """By place; None where one has left."""
        self.rounded = rounded
        self.copies = torch.empty((len(adapters), len(first.weights)), dtype=dtype, device=first.weights.device)
        self.gradients = torch.zeros_like(self.copies, dtype=torch.float32)
        for number, adapter in enumerate(adapters):
            self._copy(number, adapter)
        of_copies, of_gradients = views(self.copies, r, layers), views(self.gradients, r, layers)
        pairs = [
            (number, copy, gradient)
            for (number, _, copy), (_, _, gradient) in zip(of_copies, of_gradients, strict=True)
        ]
        self.layers = {
            number: LowRank(a, b, a_gradient, b_gradient)
            for (number, a, a_gradient), (_, b, b_gradient) in zip(pairs[::2], pairs[1::2], strict=True)
        }
        for adapter, gradient in zip(adapters, self.gradients, strict=True):  # last: memory may run out before
            adapter.gradient = gradient

    @property
    def present(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters if adapter is not None]

    def take(self, adapter: Adapter) -> bool:
        """Give the adapter a place that is free, if there is one."""
        if None not in self.adapters:
            return False
        number = self.adapters.index(None)
        self.adapters[number] = adapter
        self._copy(number, adapter)
        adapter.gradient = self.gradients[number].zero_()
        return True

    def leave(self, adapter: Adapter) -> None:
        self.adapters[self.adapters.index(adapter)] = None

    def refresh(self, adapter: Adapter) -> None:
        """Copy the weights of an adapter anew."""
        self._copy(self.adapters.index(adapter), adapter)

    def _copy(self, number: int, adapter: Adapter) -> None:
        weights = adapter.weights
        self.copies[number].copy_(weights if self.rounded == self.copies.dtype else weights.to(self.rounded))


def views(vectors: Tensor, r: int, layers: Layers) -> Iterator[tuple[int, str, Tensor]]:
    """Of vectors (…, size): number of the layer, "A" or "B", and the view (…, r, in) or (…, out, r), layer by layer."""
    end = 0
    for number, (_, inputs, outputs) in layers.items():
        for which, shape in (("A", (r, inputs)), ("B", (outputs, r))):
            first, end = end, end + shape[0] * shape[1]
            yield number, which, vectors[..., first:end].unflatten(-1, shape)


def _initial(inputs: int, outputs: int, r: int) -> Tensor:
    """(r, inputs): A as PEFT draws it, which makes and initialises two linear layers first."""
    uniform = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
    for shape in ((r, inputs), (outputs, r)):
        uniform(torch.empty(shape))
    return uniform(torch.empty(r, inputs))
