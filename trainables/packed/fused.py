"""Norms, gates and the loss of a model, each as one operation that keeps little but its input for the backward pass.

Transformers writes them as a dozen operations on all tokens, and autograd keeps what lies between, some of it in fp32.
What is rounded is rounded where the model's own code rounds; only sums may be taken in another order.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module, SiLU
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from trainables.packed.kernels import kernel

LOGITS = 2**27
"""Logits that exist at the same time, in the model's data type: 256 MiB in bf16, and as much for their gradients."""
FP32_LOGITS = 2**24
"""Those of them that are held in fp32 at the same time (64 MiB) while the loss is taken."""
Operation = Callable[[Any, Tensor], Tensor]
"""What a module computes."""


def fusible(model: Module) -> dict[str, Operation]:
    """Modules that compute an operation of this file, by name. They may lie on the meta device."""
    found: dict[str, Operation] = {}
    for name, module in model.named_modules():
        kind: Any = type(module)
        if hasattr(module, "weight") and hasattr(module, "variance_epsilon") and _computes(kind, norm):
            found[name] = norm
        elif isinstance(getattr(module, "act_fn", None), (SiLU, SiLUActivation)) and _computes(kind, gated):
            found[name] = gated
    return found


def fuse(model: Module, found: Mapping[str, Operation]) -> None:
    """Have these modules compute in one operation from now on."""
    for name, operation in found.items():
        module = model.get_submodule(name)
        module.forward = partial(operation, module)


def norm(module: Any, x: Tensor) -> Tensor:
    """Root mean square normalisation (arXiv:1910.07467) over the last dimension, which `weight` has."""
    result: Tensor = _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return result


def gated(module: Any, x: Tensor) -> Tensor:
    """A feed-forward layer whose gate is a SiLU (SwiGLU, arXiv:2002.05202)."""
    product = _Gate.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    result: Tensor = module.down_proj(product)
    return result


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each label, in nats: fp32 (labels,). `logits` (labels, vocabulary) may have any data type."""
    losses: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses


def cross_entropy_of(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], at_once: int) -> Tensor:
    """The same of hidden states (labels, width), of which `head` makes logits, so many labels at a time.

    Nothing but the gradient of each label's loss is kept: (labels, width) in place of (labels, vocabulary), as in Liger
    Kernel (arXiv:2410.10989). `head` must be frozen.
    """
    losses: Tensor = _HeadCrossEntropy.apply(hidden, labels, head, at_once)  # type: ignore[no-untyped-call]
    return losses


@cache
def _computes(kind: Any, operation: Operation) -> bool:
    """Whether modules of this class do, tried on a stand-in that has what the operation needs and nothing else.

    In bf16 on the CPU and to the bit, so that it is rounded at the same places.
    """
    drawn = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn).bfloat16()

    gate, up, down = (partial(F.linear, weight=numbers(8, 8)) for _ in range(3))
    has = {"weight": numbers(8), "variance_epsilon": 0.1, "gate_proj": gate, "up_proj": up, "down_proj": down}
    stand_in: Any = SimpleNamespace(**has, act_fn=F.silu)
    x = numbers(2, 5, 8)
    if len(signature(kind.forward).parameters) != 2:  # itself and one input
        return False
    try:
        return bool(torch.equal(kind.forward(stand_in, x), operation(stand_in, x)))
    except (AttributeError, TypeError):  # it needs other attributes
        return False


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit: Tensor
        if x.is_cuda:
            unit, scale = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, eps)
        else:
            wide = x.float()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            unit = (wide * scale).to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return weight * unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        of_unit = (gradients[0] * weight).to(x.dtype)
        if x.is_cuda:
            of_x, _ = torch.ops.aten._fused_rms_norm_backward(of_unit, x, x.shape[-1:], scale, None, [True, False])
        else:
            wide, unit = of_unit.float(), x * scale
            of_x = wide.addcmul(unit, (wide * unit).mean(-1, keepdim=True), value=-1).mul_(scale).to(x.dtype)
        return of_x, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if gate.is_cuda:
            product: Tensor = kernel(_ROUNDED[gate.dtype] + _GATE)(gate, up)
            return product
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        if gate.is_cuda:
            of_gate, of_up = kernel(_ROUNDED[gate.dtype] + _GATE_BACKWARD, results=2)(gradient, gate, up)
            return of_gate, of_up
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.at_once = max(1, FP32_LOGITS // logits.shape[-1])
        highest = logits.amax(1, keepdim=True).float()
        sums = [
            (some - most).exp_().sum(1)
            for some, most in zip(*(x.split(ctx.at_once) for x in (logits, highest)), strict=True)
        ]
        logarithm = torch.cat(sums).log_()[:, None]
        losses: Tensor = logarithm + (highest - logits.gather(1, labels[:, None]))  # the sum first would cancel
        ctx.save_for_backward(logits, labels, highest + logarithm, losses)
        return losses[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, labels, scales, losses = ctx.saved_tensors
        gradient = gradients[0][:, None]
        result = torch.empty_like(logits)
        for to, some, scale, factor in zip(
            *(each.split(ctx.at_once) for each in (result, logits, scales, gradient)), strict=True
        ):
            to.copy_((some - scale).exp_().mul_(factor))
        result.scatter_(1, labels[:, None], ((-losses).expm1_() * gradient).to(result.dtype))
        return result, None


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], at_once: int) -> Tensor:
        wanted: bool = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for some, of_some in zip(hidden.split(at_once), labels.split(at_once), strict=True):
            with torch.set_grad_enabled(wanted):
                some = some.detach().requires_grad_(wanted)
                found = cross_entropy(head(some), of_some)
                if wanted:
                    gradients += torch.autograd.grad(found.sum(), some)
            losses.append(found.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return (of_hidden * gradients[0][:, None]).to(of_hidden.dtype), None, None, None


_ROUNDED = {
    torch.float32: "template <typename T> T rounded(T x) { return x; }",
    torch.bfloat16: """
template <typename T> T rounded(T x) {  // to the nearest, or the even one; what is not a number stays so
    unsigned bits = __float_as_uint(x);
    return x == x ? __uint_as_float((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u) : x;
}
""",
}
_GATE = """
template <typename T> T product(T gate, T up) {
    return rounded(gate / (1 + expf(-gate))) * up;
}
"""
_GATE_BACKWARD = """
template <typename T> void gradients(T gradient, T gate, T up, T& of_gate, T& of_up) {
    T share = 1 / (1 + expf(-gate));
    of_gate = rounded(gradient * up) * share * (1 + gate * (1 - share));
    of_up = gradient * rounded(gate / (1 + expf(-gate)));
}
"""
