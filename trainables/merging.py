"""The base model with an adapter added to its weights, and what it scores then."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trainables import data, model
from trainables.packed.base import collate, label_losses
from trainables.qlora_sft import EVALUATION_TOKENS
from trainables.scoring import mean_loss

SHARE = 0.8
"""Of a device's free memory that the merged model may take to be scored there."""


def merge(base: str, adapter: Path, to: Path, tokens: Path | None) -> float | None:
    """Write the model `base` with the adapter in a directory, in bf16, to another one.

    It is made in the host's memory: the device may have room for the base in 4 bits alone. Raises ValueError when it
    cannot be merged, `OutOfMemory` when a single row does not fit beside it. Returns the mean cross-entropy per
    supervised token of the validation rows of `tokens`, which are the sweep's; without them nothing is scored.
    """
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": "cpu"})
    if getattr(loaded, "is_quantized", False):
        raise ValueError(
            f"{base} is stored quantised, and nothing can be added to its weights; merge into unquantised ones"
        )
    merged = (
        PeftModel.from_pretrained(loaded, str(adapter), torch_device="cpu").merge_and_unload(safe_merge=True).eval()
    )
    merged.save_pretrained(to)
    if tokens is None:
        return None
    on = model.device()
    if on.type == "cuda" and merged.get_memory_footprint() > SHARE * torch.cuda.mem_get_info(on)[0]:
        on = torch.device("cpu")
    merged.to(on)
    if on.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        model.multiply_bf16_in_fp32()
    rows = data.load(tokens)
    return mean_loss(
        rows.validation,
        EVALUATION_TOKENS[on.type],
        lambda some: label_losses(merged, collate(some, rows.pad_token_id, on)),
    )
