"""Does an adapter of a sweep score with plain PEFT what the sweep says that it does?

    python -m benchmarks.plain_peft sweeps/pricer       # best/, and the best checkpoint of every trial that has one

Loads each as its model card tells, scores the sweep's validation rows one by one with the loss of transformers' logits
(mean cross-entropy per supervised token), and prints it beside the recorded one. On a CPU without bf16 instructions
trials use other kernels than torch's own (`trainables.model.multiply_bf16_in_fp32`), which round differently: there,
bf16 adapters are scored with both.
"""

import json
import sys
import time
from pathlib import Path

import bitsandbytes
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sweep import spec
from sweep.paths import SweepPaths
from sweep.report import ranking
from sweep.study import read_journal
from trainables import checkpoint, data
from trainables import model as models
from trainables.config import QLoRAConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def score(model: str, config: QLoRAConfig, adapter: Path, rows: data.Rows) -> float:
    """Mean cross-entropy per supervised token of `rows`, without any code of ours."""
    dtype = DTYPES[config.compute_dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=config.double_quant,
    )
    device = models.device().type
    base = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantization, dtype=dtype, device_map={"": device}
    )
    for layer in base.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    total, labels = 0.0, 0
    for index in range(len(rows)):
        ids, supervised = (torch.from_numpy(array.copy()).to(device) for array in rows[index])
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=config.compute_dtype == "bf16"):
            logits = adapted(input_ids=ids[None].long()).logits[0, :-1].float()
        known = supervised[1:]
        total += F.cross_entropy(logits[known], ids[1:][known].long(), reduction="sum").item()
        labels += int(known.sum())
    return total / labels


def main(root: Path) -> None:
    paths = SweepPaths(root)
    recorded = spec.load(paths.spec, inputs=False)
    rows = data.load(next(paths.tokens.iterdir())).validation
    best = json.loads((paths.best / "sweep.json").read_text())
    wanted = [("best/", QLoRAConfig(**best["config"]), paths.best, best["validation_loss"])]
    for entry in ranking(read_journal(paths.ledger, recorded.name).entries()):
        found = checkpoint.best(paths.trial(entry.number))
        if found is not None and entry.number != best["trial"]:
            wanted.append((f"{entry.number:03d}", entry.config, found.path, found.loss))
    print(f"{len(rows)} validation rows, {torch.get_num_threads()} threads, torch {torch.__version__}")

    def show(name: str, config: QLoRAConfig, adapter: Path, loss: float, kernels: str) -> None:
        began = time.monotonic()
        plain = score(recorded.model, config, adapter, rows)
        print(
            f"{name:6} {config.quant_type} {config.compute_dtype}  recorded {loss:.6f}  plain PEFT {plain:.6f}"
            f"  difference {plain - loss:+.6f}  ({kernels} kernels, {time.monotonic() - began:.0f} s)",
            flush=True,
        )

    for each in wanted:
        show(*each, kernels="torch's")
    if models.device().type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        models.multiply_bf16_in_fp32()
        for name, config, adapter, loss in wanted:
            if config.compute_dtype == "bf16":
                show(name, config, adapter, loss, kernels="the sweep's")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
