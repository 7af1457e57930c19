"""What packing is worth on a GPU, and what it takes.

    make bench-gpu                                   # 1B, then 8B

Llama models of 1B and 8B with random weights, made on the spot: no network and no Ray is needed. Steps are timed in
turn in one process, one trial after the other and all together; shown are medians of 5 runs and the median of the
ratios. Speed is compared with a product of two 8192 x 8192 bf16 matrices in the same run, counting four operations for
each token and parameter of a quantised layer (two forward, two for the gradient of the input; LoRA, attention, the
output head and dequantising are not counted).
"""

import argparse
import gc
import os
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.packed_step import header, job_on, measure, now, trials_of
from tests.tiny import tiny_tokenizer
from trainables import model
from trainables.config import QLoRAConfig
from trainables.memory import estimate, largest_micro_batch
from trainables.packed.engine import Engine
from trainables.protocol import Budget, Job, Step
from trainables.qlora_sft import QLoRATrial, turn

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
"""Those of Llama 3.2 1B and Llama 3.1 8B (their config.json), which have these in common:"""
COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
GIB = 2**30


def make_llama(name: str, directory: Path) -> Job:
    """Save a random Llama in bf16 with a small tokenizer; a job on it."""
    config = LlamaConfig(**SHAPES[name], **COMMON, dtype="bfloat16")
    with torch.device("cuda"):
        llama = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    llama.save_pretrained(directory / name)
    tiny_tokenizer().save_pretrained(directory / name)
    return job_on(str(directory / name), directory)


def matmul_peak() -> float:
    """Operations a second of a bf16 product."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = now()
        for _ in range(5):
            left @ right
        seconds.append((now() - began) / 5)
    return 2 * 8192**3 / statistics.median(seconds[3:])


def used() -> float:
    """GiB of the device that are taken, by whatever."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def close(trials: list[QLoRATrial]) -> None:
    """And forget them, so that their memory is free."""
    while trials:
        trials.pop().close()
    gc.collect()
    torch.cuda.empty_cache()


def steps(name: str, job: Job, slots: int, rows: int, tokens: int, dropout: float, peak: float) -> None:
    """A line of the table of steps."""
    trials = trials_of(job, slots, tokens, {"batch_size": rows, "dropout": dropout})
    alone, together, ratio = measure(trials, 5)
    parameters = sum(inputs * outputs for _, inputs, outputs in trials[0].base.layers.values())
    share = 4 * parameters * slots * rows * tokens / together / peak
    close(trials)
    print(
        f"{name:5} {slots:3} {rows * tokens:14,} {dropout:8} {alone:11.3f} {together:10.3f}"
        f" {ratio:6.2f} {slots * rows * tokens / together:10,.0f} {share:6.2f}",
        flush=True,
    )


def memory(name: str, job: Job, slots: int, tokens: int) -> None:
    """What a process of one trial takes of the device, and one of many."""

    def taken(count: int) -> float:
        trials = trials_of(job, count, tokens, {"batch_size": 1})
        for _ in range(3):
            turn(trials)
        found = used()
        close(trials)
        return found

    one, many = taken(1), taken(slots)
    print(
        f"{name}: a trial alone takes {one:.2f} GiB of the device, {slots} packed take {many:.2f} GiB: "
        f"{many / (slots * one):.2f} of {slots} processes"
    )


def estimates(name: str, job: Job, rows: int, tokens: int) -> None:
    """What `plan` says that a trial's tensors take, beside the most that torch had in use."""
    for checkpointing in (False, True):
        settings = {"batch_size": rows, "gradient_checkpointing": checkpointing}
        (trial,) = trials = trials_of(job, 1, tokens, settings)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            turn([trial])
        most = torch.cuda.max_memory_allocated()
        told = estimate(job.model, trial.config, *largest_micro_batch(trial.train, trial.config)).total
        close(trials)
        print(
            f"{name}, {rows} rows of {tokens} tokens, {'with' if checkpointing else 'without'} gradient checkpointing:"
            f" {told / GIB:.2f} GiB estimated, {most / GIB:.2f} measured, {told / most:.2f}"
        )


def replacement(name: str, job: Job) -> None:
    """From the end of a trial to the first step of the next one in the same process, seconds."""
    seconds = []
    for _ in range(4):
        trials = trials_of(job, 2, 256, {"batch_size": 1})
        turn(trials)
        began = now()
        trials.pop().close()
        trials.append(QLoRATrial(trials[0].config.model_copy(update={"seed": 9}), job, None))
        turn(trials)
        seconds.append(now() - began)
        close(trials)
    print(f"{name}: {statistics.median(seconds[1:]):.2f} s from the end of a trial to the first step of the next")


def differences(job: Job) -> None:
    """How far losses of 50 steps are apart between runs of the same work, alone and packed."""
    job = replace(job, budget=Budget(None, 50, 1))
    settings = {"r": 16, "batch_size": 4, "learning_rate": 1e-3, "dropout": 0.05}
    configs = [QLoRAConfig.model_validate(settings | {"seed": seed}) for seed in range(2)]

    def curves(groups: list[list[QLoRAConfig]]) -> list[list[float]]:
        found = []
        for group in groups:
            trials = [QLoRATrial(config, job, None) for config in group]
            done: list[list[Step]] = [[] for _ in trials]
            while not trials[0].over:
                turn(trials)
                for each, trial in zip(done, trials, strict=True):
                    each += trial.news().steps
            found += [[step.loss for step in each] for each in done]
            close(trials)
        return found

    def apart(one: list[list[float]], other: list[list[float]]) -> float:
        return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))

    first, second = (curves([[config] for config in configs]) for _ in range(2))
    packed = curves([configs])
    print(
        f"losses of 2 trials of 50 steps in bf16, 1B: from {first[0][0]:.4f} to {first[0][-1]:.4f}; two runs alone"
        f" differ by {apart(first, second):.1e} at most, packed and alone by {apart(packed, first):.4f}"
    )


def scarce(job: Job) -> None:
    """Eight trials in an engine with memory for some of them: what it says, and whether all come to their end."""
    job = replace(job, budget=Budget(None, 4, 1))
    settings = {"r": 16, "batch_size": 32}
    trials = [QLoRATrial(QLoRAConfig.model_validate(settings), job, None)]
    idle = torch.cuda.memory_allocated()
    turn(trials)
    one = torch.cuda.max_memory_allocated() - idle
    close(trials)
    torch.cuda.set_per_process_memory_fraction((idle + 4 * one) / torch.cuda.mem_get_info()[1])
    engine = Engine()
    said: list[str] = []
    ends: list[bool] = []

    def run(seed: int) -> None:
        config = QLoRAConfig.model_validate(settings | {"seed": seed})
        engine.start(str(seed), seed, config, job, None)
        while True:
            slice_, notes = engine.advance(str(seed), 1.0)
            said.extend(notes)
            if slice_.done:
                ends.append(slice_.failure is None)
                engine.close(str(seed))
                return

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.set_per_process_memory_fraction(1.0)
    print(
        f"memory for 4 times {one / GIB:.2f} GiB over {idle / GIB:.2f} GiB: {sum(ends)} of 8 trials came to their end"
        f" ({'; '.join(said) or 'nothing was said'})"
    )


def profile(job: Job, slots: int, rows: int) -> None:
    """Print what takes the time in a packed step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    trials = trials_of(job, slots, 256, {"batch_size": rows})
    for _ in range(2):
        turn(trials)
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        turn(trials)
        torch.cuda.synchronize()
    close(trials)
    print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="1B")
    parser.add_argument("--profile", action="store_true", help="print what takes the time, too")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; benchmarks.packed_step measures on a CPU, too")
    name = asked.model
    print(header())
    peak = matmul_peak()
    print(f"bf16 product: {peak / 1e12:.0f} TFLOP/s")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = directory  # bases with random weights are of no use to anybody
        began = time.perf_counter()
        job = make_llama(name, Path(directory))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        made = time.perf_counter()
        model.base(job.model, "nf4", "bf16", True)
        took, held, most = now() - made, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        model._warm.clear()
        gc.collect()
        began_again = now()
        model.base(job.model, "nf4", "bf16", True)
        print(
            f"{name}: made in {made - began:.1f} s, loaded, quantised and kept on disk in {took:.1f} s, from there in"
            f" {now() - began_again:.1f} s, {held / GIB:.2f} GiB, while loading {most / GIB:.2f}"
        )
        print("model   K  tokens a step  dropout  K steps, s  packed, s  ratio   tokens/s  share", flush=True)
        small = {"1B": 16, "8B": 8}[name]
        large = {"1B": 32, "8B": 16}[name]
        for dropout in (0.05, 0.0):
            steps(name, job, small, 1, 256, dropout, peak)
        for dropout in (0.05, 0.0):
            steps(name, job, 2, large, 256, dropout, peak)
        memory(name, job, 8, 256)
        for rows in (1, large):
            estimates(name, job, rows, 256)
        replacement(name, job)
        if name == "1B":
            differences(job)
            scarce(job)
        if asked.profile:
            profile(job, small, 1)
            profile(job, 1, large)


if __name__ == "__main__":
    main()
