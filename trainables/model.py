"""The base model in 4 bits: loaded once per process, for all its trials, and quantised once per machine."""

import gc
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from trainables import base_cache
from trainables.config import ComputeDtype, QuantType
from trainables.packed.adapter import Adapter, Layers
from trainables.packed.base import Base

SHORT = 256
"""Tokens up to which attention is quicker in fp32 on a CPU that has bf16 instructions."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Key = tuple[str, QuantType, ComputeDtype, bool]
"""What `base` is called with."""
_warm: dict[Key, Base] = {}
"""Bases of this process, least recently used first."""
_aten = torch.library.Library("aten", "IMPL", "CPU")
"""Holds what `multiply_bf16_in_fp32` registers."""


def device() -> torch.device:
    """The first GPU that this process may use (CUDA_VISIBLE_DEVICES says which), or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def check_device() -> None:
    """Raises OSError when this process was given a GPU that torch does not find: the CPU would take its place."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if re.match(r"\d|GPU-|MIG-", given) and not torch.cuda.is_available():
        raise OSError(
            f"torch {torch.__version__} finds no GPU, though this process was given one (CUDA_VISIBLE_DEVICES is"
            f" {given}); install a build of torch for CUDA, see whether nvidia-smi answers, or set resources.gpus: 0"
        )


def base(model: str, quant_type: QuantType, compute_dtype: ComputeDtype, double_quant: bool) -> Base:
    """The frozen base on `device()`: linear layers but the output head in 4 bits, the rest in `compute_dtype`.

    It drops nothing while training: adapters have their own dropout, which depends on nothing but the trial.
    What quantising made of the model is kept on disk for the next process (see `base_cache`), bit by bit.

    A second call with the same arguments returns the same object. Bases of other settings stay warm beside it as long
    as all together take at most a quarter of the device's memory; else the least recently used ones go that serve no
    trial.
    Raises ValueError when the GPU cannot compute in `compute_dtype`, or when `model` is stored in another 4-bit type.
    """
    key = (model, quant_type, compute_dtype, double_quant)
    loaded = _warm.pop(key, None)
    if loaded is None:
        _make_room()
        loaded = _load(model, quant_type, compute_dtype, double_quant)
    _warm[key] = loaded
    return loaded


def check_compute_dtype(compute_dtype: ComputeDtype) -> None:
    """Raises ValueError when `device()` cannot compute in `compute_dtype`."""
    on = device()
    if on.type == "cuda" and compute_dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(on)
        raise ValueError(f"compute_dtype bf16: {name} cannot compute in bf16; set compute_dtype: fp32")


def _load(model: str, quant_type: QuantType, compute_dtype: ComputeDtype, double_quant: bool) -> Base:
    check_device()
    check_compute_dtype(compute_dtype)
    dtype, of_products = DTYPES[compute_dtype], product_dtype(compute_dtype, device())
    if of_products != dtype:
        multiply_bf16_in_fp32()
    elif dtype == torch.bfloat16 and device().type == "cpu":
        attend_in_fp32(SHORT)
    notes: list[str] = []
    cached = base_cache.locate(model, notes.append, quant_type, compute_dtype, double_quant, _kind())
    loaded = None if cached is None else cached.read(_read)
    if loaded is None:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            revision=(cached and cached.revision) or "main",
            dtype=dtype,
            device_map={"": device()},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant_type,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=double_quant,
            ),
        )
        assert isinstance(loaded, PreTrainedModel)
        if cached is not None and not loaded._hf_peft_config_loaded:  # of which nothing else would be saved
            cached.write(loaded.get_memory_footprint(), partial(loaded.save_pretrained, max_shard_size="1GB"))
    for layer in loaded.modules():
        if isinstance(layer, Linear4bit):
            assert isinstance(layer.weight, Params4bit)
            if (stored := layer.weight.quant_state.quant_type) != quant_type:
                raise ValueError(f"{model} is stored in {stored}, quant_type is {quant_type}; use unquantised weights")
    for module in loaded.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    loaded.requires_grad_(False).train(False)
    return Base(loaded, of_products, notes)


def product_dtype(compute_dtype: ComputeDtype, on: torch.device) -> torch.dtype:
    """In which products are taken on a device, see `multiply_bf16_in_fp32`."""
    slow = compute_dtype == "bf16" and on.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if slow else DTYPES[compute_dtype]


def _read(directory: Path) -> PreTrainedModel:
    """A base as it was quantised. Raises ValueError when the files do not hold all of it."""
    found: Any = AutoModelForCausalLM.from_pretrained(
        directory, device_map={"": device()}, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    loaded, about = found
    if about["missing_keys"]:
        raise ValueError(f"it lacks {', '.join(sorted(about['missing_keys']))}")
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _kind() -> str:
    """Of the device, as far as the last bit of quantisation constants goes: a CPU sums up by thread."""
    on = device()
    if on.type == "cuda":
        return torch.cuda.get_device_name(on)
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@cache
def multiply_bf16_in_fp32() -> None:
    """From now on, have this process multiply bf16 matrices on the CPU with torch's fp32 kernels, in attention as well.

    For CPUs without bf16 instructions, where torch's own bf16 kernels are 7 to 40 times slower (measured on AMD Zen 3).
    The result is the same but for the order of summation: either way bf16 products are summed up in fp32 and the sum
    is rounded to bf16.
    """
    with warnings.catch_warnings():  # of what is meant to happen
        warnings.filterwarnings("ignore", message=r"[\s\S]*Overriding a previously registered kernel")
        for name in ("mm", "bmm", "addmm"):
            _aten.impl(name, partial(_multiply, getattr(torch, name)))
    attend_in_fp32(math.inf)


def _multiply(product: Callable[..., Tensor], *operands: Tensor, **scales: float) -> Tensor:
    """`product` of its last two operands, by the kernel that writes into a given tensor: that one is not replaced."""
    rounded = operands[-1].dtype
    if rounded == torch.bfloat16:
        operands = tuple(operand.float() for operand in operands)
    left, right = operands[-2:]
    result = left.new_empty((*left.shape[:-1], right.shape[-1]))
    return product(*operands, **scales, out=result).to(rounded)


@cache
def attend_in_fp32(longest: float) -> None:
    """From now on, have models of this process attend in fp32 to rows of up to so many tokens.

    With bf16 instructions, too, the backward pass of torch's bf16 attention takes more than twice as long on a CPU when
    rows are short. On AMD Zen 4, both passes of 9 heads of 64: 8 rows of 72 tokens 21 ms in bf16 and 10 in fp32, 2 of
    256 18 to 23 and 16 to 18, one of 1,024 72 and 86 to 98.
    """
    AttentionInterface.register("sdpa", partial(_attend, longest))


def _attend(
    longest: float, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """The attention that models of transformers take by default. `query` is (rows, heads, tokens, n)."""
    if query.shape[-2] > longest:
        result, _ = sdpa_attention_forward(module, query, key, value, mask, **how)
        return result, None
    result, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **how)
    return result.to(query.dtype), None


def _make_room() -> None:
    """Drop least recently used bases until one more, as large as the largest, fits into a quarter of the memory."""
    held = {key: footprint(base)[0] for key, base in _warm.items()}
    for key in [key for key, base in _warm.items() if base.idle]:
        if sum(held.values()) + max(held.values()) <= memory_of(device()) / 4:
            break
        del held[key], _warm[key]
    _collect()


def drop_idle(wanted: Key | None = None) -> bool:
    """Memory ran out: drop all bases that serve no trial, but for the one that is `wanted`; whether there were any."""
    idle = [key for key, base in _warm.items() if base.idle and key != wanted]
    for key in idle:
        del _warm[key]
    _collect()
    return bool(idle)


def _collect() -> None:
    """Give back the memory of what nobody needs: a 4-bit weight and its layer refer to each other."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def memory_of(on: torch.device) -> int:
    """All memory of the device, bytes."""
    return torch.cuda.mem_get_info(on)[1] if on.type == "cuda" else psutil.virtual_memory().total


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device ran out of memory, which not all libraries say in torch's way."""
    said = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def targets(layers: Layers, called: str, target_modules: str | tuple[str, ...]) -> Layers:
    """Those of a base's layers that `target_modules` mean; `called` is the model's name.

    Raises ValueError when a name among them ends no linear layer.
    """
    if target_modules == "all-linear":
        return dict(layers)
    names = [name for name, _, _ in layers.values()]
    _check_names(names, called, tuple(target_modules))
    return {
        number: layer
        for number, layer in layers.items()
        if any(f".{layer[0]}".endswith(f".{target}") for target in target_modules)
    }


def check_target_modules(model: str, layers: Iterable[tuple[str, ...]]) -> None:
    """Raises ValueError when a name in `layers` ends no linear layer of `model`, of which the config is enough."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = skeleton.get_output_embeddings()
    kinds = torch.nn.Linear, Conv1D
    linear = [n for n, m in skeleton.named_modules() if isinstance(m, kinds) and m is not head]
    for names in layers:
        _check_names(linear, model, names)


def _check_names(linear: Sequence[str], called: str, target_modules: Sequence[str]) -> None:
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            endings = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"target_modules: {target!r} ends the name of no linear layer of {called} "
                f"(the output head takes no adapter); name some of {', '.join(endings)}, or all-linear"
            )


def footprint(base: Base) -> tuple[int, int, int]:
    """Bytes of the base's weights as held in 4 bits, in 16 bits and in 32 bits.

    The first counts what stays in the compute data type (embeddings, norms) and the quantisation constants as well.
    """
    held = parameters = 0
    for weight in base.model.parameters():
        held += weight.nbytes
        if isinstance(weight, Params4bit):
            state = weight.quant_state
            parameters += math.prod(state.shape)
            held += sum(each.absmax.nbytes + each.code.nbytes for each in (state, state.state2) if each is not None)
        else:
            parameters += weight.numel()
    return held, 2 * parameters, 4 * parameters


def banner(base: Base, adapter: Adapter) -> str:
    """Lines on what is trained: the base's size in 4, 16 and 32 bits, that of the adapter, and the base's notes."""
    in_4, in_16, in_32 = footprint(base)
    lines = (
        f"base {in_32 / 4e6:.1f} M parameters: {in_4 / 1e6:.1f} MB in 4 bits "
        f"({in_16 / 1e6:.1f} MB in 16, {in_32 / 1e6:.1f} MB in 32)",
        f"adapter r={adapter.config.r} on {len(adapter.layers)} layers: {len(adapter.weights) / 1e6:.1f} M parameters, "
        f"{adapter.weights.nbytes / 1e6:.1f} MB",
        *base.notes,
    )
    return "\n".join(lines)
