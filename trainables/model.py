"""The base model in 4 bits: loaded and quantised once per process, lent to one trial after the other.

`base` gives a frozen model that later calls find warm; `attach` puts one adapter on it; `detach` takes that off again
and leaves the base as it was.
"""

import gc
import math
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial

import psutil
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trainables.config import ComputeDtype, QuantType

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_warm: dict[tuple[str, QuantType, ComputeDtype, bool], PreTrainedModel] = {}
"""Bases of this process, least recently used first."""
_aten = torch.library.Library("aten", "IMPL", "CPU")
"""Holds what `multiply_bf16_in_fp32` registers."""


def device() -> torch.device:
    """The first GPU that this process may use (CUDA_VISIBLE_DEVICES says which), or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def base(model: str, quant_type: QuantType, compute_dtype: ComputeDtype, double_quant: bool) -> PreTrainedModel:
    """The frozen base on `device()`: linear layers but the output head in 4 bits, the rest in `compute_dtype`.

    A second call with the same arguments returns the same object. Bases of other settings stay warm beside it as long
    as all together take at most a quarter of the device's memory; else the least recently used ones go.
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


def _load(model: str, quant_type: QuantType, compute_dtype: ComputeDtype, double_quant: bool) -> PreTrainedModel:
    check_compute_dtype(compute_dtype)
    if compute_dtype == "bf16" and device().type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        multiply_bf16_in_fp32()
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=DTYPES[compute_dtype],
        device_map={"": device()},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_compute_dtype=DTYPES[compute_dtype],
            bnb_4bit_use_double_quant=double_quant,
        ),
    )
    assert isinstance(loaded, PreTrainedModel)
    for layer in loaded.modules():
        if isinstance(layer, Linear4bit):
            assert isinstance(layer.weight, Params4bit)
            if (stored := layer.weight.quant_state.quant_type) != quant_type:
                raise ValueError(f"{model} is stored in {stored}, quant_type is {quant_type}; use unquantised weights")
            # The first forward without gradients would repack the weights for AVX512-BF16; from then on forwards with
            # gradients take the repacked path too, which has no backward.
            layer.support_avx512bf16_for_cpu = False
    loaded.requires_grad_(False).train(False)
    return loaded


@cache
def multiply_bf16_in_fp32() -> None:
    """From now on, have this process multiply bf16 matrices on the CPU with torch's fp32 kernels.

    For CPUs without bf16 instructions, where torch's own bf16 kernels are 7 to 40 times slower (measured on AMD Zen 3).
    The result is the same but for the order of summation: either way bf16 products are summed up in fp32 and the sum
    is rounded to bf16.
    """
    with warnings.catch_warnings():  # of what is meant to happen
        warnings.filterwarnings("ignore", message=r"[\s\S]*Overriding a previously registered kernel")
        for name in ("mm", "bmm", "addmm"):
            _aten.impl(name, partial(_multiply, getattr(torch, name)))


def _multiply(product: Callable[..., Tensor], *operands: Tensor, **scales: float) -> Tensor:
    """`product` of its last two operands, by the kernel that writes into a given tensor: that one is not replaced."""
    rounded = operands[-1].dtype
    if rounded == torch.bfloat16:
        operands = tuple(operand.float() for operand in operands)
    left, right = operands[-2:]
    result = left.new_empty((*left.shape[:-1], right.shape[-1]))
    return product(*operands, **scales, out=result).to(rounded)


def _make_room() -> None:
    """Drop least recently used bases until one more, as large as the largest, fits into a quarter of the memory."""
    on = device()
    held = {key: footprint(model)[0] for key, model in _warm.items()}
    while held and sum(held.values()) + max(held.values()) > _memory(on) / 4:
        oldest = next(iter(held))
        del held[oldest], _warm[oldest]
    gc.collect()  # a 4-bit weight and its layer refer to each other
    if on.type == "cuda":
        torch.cuda.empty_cache()


def _memory(on: torch.device) -> int:
    """All memory of the device, bytes."""
    return torch.cuda.mem_get_info(on)[1] if on.type == "cuda" else psutil.virtual_memory().total


def attach(
    model: PreTrainedModel,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | tuple[str, ...],
    rslora: bool,
) -> PeftModel:
    """Put a new LoRA adapter with fp32 weights on `model`, in place, drawing A from torch's global random state.

    Raises ValueError when a name in `target_modules` ends no linear layer, RuntimeError when `model` has an adapter.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise RuntimeError("the base carries the adapter of another trial in this process: close that trial first")
    if target_modules != "all-linear":
        _check_names(model, str(model.name_or_path), tuple(target_modules))
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        # PEFT declares an int and divides whatever it gets; whole ones are stored as the int that others expect
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        use_rslora=rslora,
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 under an old name whether gradient checkpointing is on
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = get_peft_model(model, adapter)
    assert isinstance(adapted, PeftModel)
    adapted.train(model.training)  # new layers come in training mode, whatever that of the base
    return adapted


def detach(adapted: PeftModel) -> None:
    """Take the adapter off its base again: modules and modes are those that `base` gave."""
    adapted.unload().train(False)


def check_target_modules(model: str, layers: Iterable[tuple[str, ...]]) -> None:
    """Raises ValueError when a name in `layers` ends no linear layer of `model`, of which the config is enough."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    for names in layers:
        _check_names(skeleton, model, names)


def _check_names(model: PreTrainedModel, called: str, target_modules: tuple[str, ...]) -> None:
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            endings = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"target_modules: {target!r} ends the name of no linear layer of {called} "
                f"(the output head takes no adapter); name some of {', '.join(endings)}, or all-linear"
            )


def footprint(model: torch.nn.Module) -> tuple[int, int, int]:
    """Bytes of the base's weights as held in 4 bits, in 16 bits and in 32 bits; an adapter is not counted.

    The first counts what stays in the compute data type (embeddings, norms) and the quantisation constants as well.
    """
    held = parameters = 0
    for weight in model.parameters():
        if weight.requires_grad:
            continue  # an adapter's
        held += weight.nbytes
        if isinstance(weight, Params4bit):
            state = weight.quant_state
            parameters += math.prod(state.shape)
            held += sum(tensor.nbytes for tensor in state.as_dict().values() if isinstance(tensor, torch.Tensor))
        else:
            parameters += weight.numel()
    return held, 2 * parameters, 4 * parameters


def banner(adapted: PeftModel, r: int) -> str:
    """Two lines on what is trained: the base's size in 4, 16 and 32 bits, and that of its adapter of rank `r`."""
    in_4, in_16, in_32 = footprint(adapted)
    layers = sum(isinstance(module, BaseTunerLayer) for module in adapted.modules())
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    return (
        f"base {in_32 / 4e6:.1f} M parameters: {in_4 / 1e6:.1f} MB in 4 bits "
        f"({in_16 / 1e6:.1f} MB in 16, {in_32 / 1e6:.1f} MB in 32)\n"
        f"adapter r={r} on {layers} layers: {sum(weight.numel() for weight in trained) / 1e6:.1f} M parameters, "
        f"{sum(weight.nbytes for weight in trained) / 1e6:.1f} MB"
    )
