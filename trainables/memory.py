"""What a trial takes of a device's memory, from the config of its base model: nothing is loaded, nothing is trained.

The model's own code runs once on tensors without content (torch's FakeTensorMode), through the layers that trials train
with, and what autograd keeps for the backward pass is added up. So no formula has to know the architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import psutil
import torch
from bitsandbytes.functional import create_dynamic_map, name2qmap, quantize_4bit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from trainables.config import ComputeDtype, QLoRAConfig, QuantType
from trainables.data import Rows
from trainables.model import DTYPES, device, memory_of, product_dtype, targets
from trainables.packed.adapter import Layers
from trainables.packed.base import Batch, label_losses
from trainables.packed.fused import FP32_LOGITS, LOGITS, fuse, fusible
from trainables.packed.layers import LowRank, PackedLinear, Part, Plan

PROCESS = {"cpu": 600_000_000, "cuda": 2**29}
"""Bytes that a process takes of a device besides tensors: on a CPU those of Python, Ray, torch and transformers once
imported (570 to 610 MB with torch 2.13), on a GPU CUDA's own (a little more than 0.5 GiB on an H100)."""
BLOCK = 64
"""Weights that share a quantisation constant, as transformers has bitsandbytes quantise."""

# Trials pass no mask, and torch makes attention causal without one. Transformers sees that by looking at positions,
# which have no content here.
UNMASKED = "unmasked"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, lambda *given, **named: None)


@dataclass(frozen=True)
class Memory:
    """Bytes of a trial's tensors at its peak; its process takes `PROCESS` besides."""

    base: int
    """Weights in 4 bits with their constants, and what stays unquantised."""
    adapter: int
    """Its weights in fp32, and their copy in the data type of products."""
    optimizer: int
    """Gradient and moments; paged moments are counted, which move to the host when the device is full."""
    activations: int
    """What the forward pass of one micro-batch keeps for the backward pass; with gradient checkpointing, the inputs of
    its blocks."""
    passing: int
    """What the loss takes (gradients of logits, a few in fp32), or one layer dequantised with its gradients, whichever
    is more. With gradient checkpointing, or where logits are many, the one has the logits besides; with gradient
    checkpointing the other has a block that is computed again."""

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.optimizer + self.activations + self.passing


@dataclass(frozen=True)
class Shapes:
    """A base model without its weights."""

    parameters: int
    layers: Layers
    """The linear layers that are quantised."""
    vocabulary: int
    blocks: int
    """Layers of the transformer."""
    width: int
    """Of the hidden states."""


@cache
def shapes(model: str) -> Shapes:
    """Those of a model's directory or Hub id; its config.json is enough."""
    skeleton, linear = _on("meta", model, torch.bfloat16)
    config = skeleton.config.get_text_config()
    return Shapes(
        parameters=sum(weight.numel() for weight in skeleton.parameters()),
        layers={i: (name, layer.in_features, layer.out_features) for i, (name, layer) in enumerate(linear.items())},
        vocabulary=config.vocab_size,
        blocks=config.num_hidden_layers,
        width=config.hidden_size,
    )


@cache
def base_bytes(model: str, quant_type: QuantType, compute_dtype: ComputeDtype, double_quant: bool) -> int:
    """What `model.footprint` says of the base when it is loaded."""
    skeleton, linear = _on("meta", model, DTYPES[compute_dtype])
    quantised = {id(layer.weight) for layer in linear.values()}
    held: int = sum(weight.nbytes for weight in skeleton.parameters() if id(weight) not in quantised)
    name2qmap.setdefault("dynamic", create_dynamic_map())  # bitsandbytes would keep one without content
    for layer in linear.values():
        packed, state = quantize_4bit(
            layer.weight.data, blocksize=BLOCK, quant_type=quant_type, compress_statistics=double_quant
        )
        held += packed.nbytes
        held += sum(each.absmax.nbytes + each.code.nbytes for each in (state, state.state2) if each is not None)
    return held


def device_of(gpus: float) -> torch.device:
    """That of this machine on which trials run that get so many GPUs."""
    return device() if gpus else torch.device("cpu")


def this_device(on: torch.device | None = None) -> tuple[str, int]:
    """Its name and all of its memory, bytes."""
    on = on or device()
    return torch.cuda.get_device_name(on) if on.type == "cuda" else "a CPU", memory_of(on)


def free(on: torch.device) -> int:
    """Bytes of a device that nobody has taken."""
    if on.type == "cpu":
        return int(psutil.virtual_memory().available)
    return torch.cuda.mem_get_info(on)[0] + PROCESS["cuda"]  # what this process took to ask, it gives back


def of_a_process(on: torch.device) -> int:
    """Bytes that a process takes of a device besides tensors."""
    return PROCESS[on.type]


def compute_dtype() -> ComputeDtype:
    """bf16 where this device has it."""
    return "bf16" if device().type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def estimate(
    model: str, config: QLoRAConfig, rows: int, width: int, labels: int, on: torch.device | None = None
) -> Memory:
    """Of a trial whose largest micro-batch has so many rows of so many tokens, with so many labels in all, on this
    device unless another one is given.

    Raises ValueError when `target_modules` name no layer of the model.
    """
    found = shapes(model)
    adapted = targets(found.layers, model, config.target_modules)
    dtype, of_products = DTYPES[config.compute_dtype], product_dtype(config.compute_dtype, on or device())
    together = min(labels, max(1, LOGITS // found.vocabulary))
    logits = found.vocabulary * together * dtype.itemsize
    kept = _kept(model, dtype, of_products, config.r, tuple(adapted), rows, width, together)
    in_parts = together < labels  # then logits pass, and kept is the gradient of what they are made of
    of_hidden = labels * found.width * dtype.itemsize if in_parts else 0
    kept -= logits if in_parts else 0
    layer = max(
        of_products.itemsize * (inputs * outputs + rows * width * (inputs + 2 * outputs))
        for _, inputs, outputs in found.layers.values()
    )
    at_once = min(together, max(1, FP32_LOGITS // found.vocabulary))
    of_loss = logits + found.vocabulary * 2 * at_once * 4
    if in_parts or config.gradient_checkpointing:
        of_loss += logits
    if config.gradient_checkpointing:  # logits are gone before the last block is computed again
        layer += (kept - (0 if in_parts else logits)) // found.blocks
        kept = found.blocks * rows * width * found.width * dtype.itemsize
    return Memory(
        base=base_bytes(model, config.quant_type, config.compute_dtype, config.double_quant),
        adapter=size(model, config) * (4 + of_products.itemsize),
        optimizer=trained_bytes(model, config),
        activations=kept + of_hidden,
        passing=max(of_loss, layer),
    )


def largest_micro_batch(rows: Rows, config: QLoRAConfig) -> tuple[int, int, int]:
    """(rows, tokens of the longest, labels) of a micro-batch that happens to have the longest rows."""
    lengths = np.diff(rows.offsets)
    longest = np.argsort(lengths, kind="stable")[::-1][: config.micro_batch()]
    labels = sum(int(np.count_nonzero(rows[int(row)][1][1:])) for row in longest)
    return len(longest), int(lengths[longest[0]]), labels


def size(model: str, config: QLoRAConfig) -> int:
    """Parameters of the adapter."""
    adapted = targets(shapes(model).layers, model, config.target_modules)
    return sum(config.r * (inputs + outputs) for _, inputs, outputs in adapted.values())


def trained_bytes(model: str, config: QLoRAConfig) -> int:
    """Of gradient and moments; in a checkpoint the weights, in fp32, take the place of the gradient."""
    # A moment in 8 bits has a constant of 32 bits for each 256.
    moments = 8.0 if config.optimizer == "adamw" else 2 * (1 + 4 / 256)
    return int((4 + moments) * size(model, config))


@cache
def _kept(
    model: str,
    dtype: torch.dtype,
    of_products: torch.dtype,
    r: int,
    adapted: tuple[int, ...],
    rows: int,
    width: int,
    labels: int,
) -> int:
    """Bytes that autograd keeps of a forward pass of one micro-batch, the weights of the model left aside."""
    found = fusible(_on("meta", model, dtype)[0])  # which takes numbers
    with FakeTensorMode():
        skeleton, linear = _on("cpu", model, dtype)
        fuse(skeleton, found)
        skeleton.requires_grad_(False).train(False)
        if skeleton.config._attn_implementation == "sdpa":
            skeleton.set_attn_implementation(UNMASKED)
        plan = Plan(torch.zeros((), requires_grad=True))
        stacked: dict[int, LowRank] = {}
        for number, (name, layer) in enumerate(linear.items()):
            skeleton.set_submodule(name, _Dense(layer, name, number, plan, of_products))
            if number in adapted:
                a = torch.empty(1, r, layer.in_features, dtype=of_products)
                b = torch.empty(1, layer.out_features, r, dtype=of_products)
                stacked[number] = LowRank(a, b, a.float(), b.float())
        plan.parts = [Part(slice(0, rows), slice(0, 1), stacked, torch.ones(1, 1, 1), None)]
        plan.shape = rows, width
        nothing = torch.zeros(labels, dtype=torch.long)
        batch = Batch(torch.zeros(rows, width, dtype=torch.long), nothing, nothing)
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            label_losses(skeleton, batch)
        for weight in skeleton.parameters():
            kept.pop(weight.untyped_storage()._cdata, None)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _Dense(PackedLinear):
    """One that is not quantised: the dequantised weight is not kept either way."""

    def weight(self) -> Tensor:
        weight: Tensor = self.replaced.weight
        return weight.to(self.dtype)


def _on(device: str, model: str, dtype: torch.dtype) -> tuple[Any, Mapping[str, Any]]:
    """The model without content, and its linear layers but the output head, by name."""
    with torch.device(device):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)
        for name, layer in list(skeleton.named_modules()):
            if isinstance(layer, Conv1D):  # GPT-2's, a linear layer that is quantised as any other
                skeleton.set_submodule(name, torch.nn.Linear(layer.nx, layer.nf, dtype=dtype))
    head = skeleton.get_output_embeddings()
    linear = {n: m for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    if not linear:
        raise ValueError(f"{model} has no linear layers that could be quantised")
    return skeleton, linear
