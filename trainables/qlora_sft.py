"""One QLoRA trial: supervised fine-tuning of an adapter on a frozen 4-bit base, in time slices.

What a step computes is what TRL's SFTTrainer computes with the same rows: the loss is summed over the supervised
tokens of the whole step and divided by their number, gradients are clipped by their L2 norm, AdamW and the schedules
are those of torch and transformers. Two things differ on purpose: adapter weights stay in fp32, and the output head
sees only the positions that have a label.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from bitsandbytes.optim.adamw import PagedAdamW8bit
from numpy.typing import NDArray
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedModel, get_scheduler

from trainables import data, model
from trainables.checkpoint import Checkpoint
from trainables.config import ComputeDtype, QLoRAConfig
from trainables.protocol import Evaluation, Job, OutOfMemory, Slice, Step, Trial

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Names that transformers gives to the schedules."""
EVALUATION_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens, padding included, in one micro-batch of an evaluation: about a second of work on either device."""
LOGITS_AT_ONCE = 2**26
"""Logits that are held in fp32 at the same time (256 MiB) while the loss is taken."""

ADAPTER, STATE, FACTS = "adapter_model.safetensors", "training_state.safetensors", "state.json"


def start(config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None) -> Trial:
    """A trial before its first step, or exactly where `checkpoint` left it.

    Raises ValueError when config or budget differ from those of the checkpoint, when `target_modules` match nothing,
    or when the device cannot do what the config asks for; MemoryError when it has no room for the model.
    """
    try:
        return QLoRATrial(config, job, checkpoint)
    except RuntimeError as error:
        if out_of_memory(error):
            raise MemoryError(f"no room for the model: {error}") from error
        raise


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device ran out of memory, which not all libraries say in torch's way."""
    said = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


class QLoRATrial:
    """See `protocol.Trial`."""

    def __init__(self, config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None) -> None:
        self.device = model.device()
        if config.optimizer == "paged_adamw_8bit" and self.device.type != "cuda":
            raise ValueError("optimizer paged_adamw_8bit needs a CUDA device and there is none; set optimizer: adamw")
        self.config = config
        tokens = data.load(Path(job.tokens))
        self.train, self.validation, self.pad = tokens.train, tokens.validation, tokens.pad_token_id
        self.total_steps = job.budget.total_steps(len(self.train), config.batch_size)
        self.due = dict(enumerate(job.budget.evaluation_steps(self.total_steps), start=1))
        if job.score_base:
            self.due[0] = 0
        self.micro_batch = config.micro_batch(job.halvings)
        self.evaluation_tokens = EVALUATION_TOKENS[self.device.type] >> job.halvings
        self.step = 0
        self.evaluations: tuple[Evaluation, ...] = ()
        self.failure: str | None = None
        self.closed = False
        self.evaluation_pass: Iterator[Evaluation | None] | None = None

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.base = model.base(job.model, config.quant_type, config.compute_dtype, config.double_quant)
        self.random_state: list[Tensor] = []
        with self._own_random_state():
            torch.manual_seed(config.seed)
            self.adapted = model.attach(
                self.base, config.r, config.alpha, config.dropout, config.target_modules, config.rslora
            )
        try:
            self.banner = model.banner(self.adapted, config.r)
            if config.gradient_checkpointing:
                self.base.activation_checkpointing_enable({"use_reentrant": False})
                self.base.disable_input_require_grads()  # only the reentrant kind needs gradients at the embeddings
            self.weights = {name: weight for name, weight in self.adapted.named_parameters() if weight.requires_grad}
            optimizer = PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else partial(AdamW, fused=True)
            self.optimizer: Optimizer = optimizer(self.weights.values(), weight_decay=config.weight_decay)
            warmup_steps = math.ceil(config.warmup_ratio * self.total_steps)
            self.learning_rate = learning_rates(config.schedule, config.learning_rate, warmup_steps, self.total_steps)
            self.facts = {
                "config": config.model_dump(mode="json"),
                "total_steps": self.total_steps,
                "warmup_steps": warmup_steps,
                "training_rows": len(self.train),
            }
            if checkpoint is not None:
                self._restore(checkpoint)
        except BaseException:
            self.close()
            raise

    def advance(self, seconds: float) -> Slice:
        deadline = time.monotonic() + seconds
        steps: list[Step] = []
        with self._own_random_state():
            while self.failure is None and not self.done:
                if steps and time.monotonic() >= deadline:
                    break
                random_state = self._random_state()
                try:
                    number = self._evaluation_due()
                    if number is not None:
                        return self._slice(steps, self._evaluate(number, deadline))
                    step = self._train_step()
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    self.optimizer.zero_grad()
                    self.evaluation_pass = None
                    self._set_random_state(random_state)
                    if steps:  # told first; the next call comes here again
                        break
                    raise OutOfMemory(str(error)) from error
                if step is not None:
                    steps.append(step)
        return self._slice(steps, None)

    @property
    def done(self) -> bool:
        return self.step == self.total_steps and self._evaluation_due() is None

    def _slice(self, steps: list[Step], evaluation: Evaluation | None) -> Slice:
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = psutil.Process().memory_info().rss
        return Slice(tuple(steps), evaluation, self.failure, self.done or self.failure is not None, memory)

    def _train_step(self) -> Step | None:
        """Do the next optimiser step; None, with `failure` set and the weights untouched, when it is not finite."""
        began = time.perf_counter()
        rows = rows_of_step(self.step, len(self.train), self.config.batch_size, self.config.seed)
        starts = range(0, len(rows), self.micro_batch)
        batches = [self._batch(self.train, rows[i : i + self.micro_batch]) for i in starts]
        labels = sum(len(batch.labels) for batch in batches)
        self._set_mode(training=True)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            part = label_losses(self.base, batch, self.config.compute_dtype).sum() / labels
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.max_grad_norm)
        # The only wait for the device in a step: what is not finite must not reach the weights.
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        for name, value in (("training loss", loss_value), ("gradient norm", norm_value)):
            if not math.isfinite(value):
                self.optimizer.zero_grad()
                self.failure = f"{name} is {value} in step {self.step + 1}"
                return None
        learning_rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = sum(batch.tokens for batch in batches)
        return Step(self.step, loss_value, learning_rate, norm_value, tokens, time.perf_counter() - began)

    def _evaluation_due(self) -> int | None:
        finished = {evaluation.evaluation for evaluation in self.evaluations}
        return next((n for n, step in self.due.items() if step == self.step and n not in finished), None)

    def _evaluate(self, number: int, deadline: float) -> Evaluation | None:
        """Go on with evaluation `number` until the deadline; None when it is not finished by then."""
        if self.evaluation_pass is None:
            self.evaluation_pass = self._evaluation_pass(number)
        for evaluation in self.evaluation_pass:
            if evaluation is not None:
                self.evaluation_pass = None
                self.evaluations += (evaluation,)
                if not math.isfinite(evaluation.loss):
                    self.failure = f"validation loss is {evaluation.loss} after step {self.step}"
                return evaluation
            if time.monotonic() >= deadline:
                break
        return None

    def _evaluation_pass(self, number: int) -> Iterator[Evaluation | None]:
        """Score one micro-batch after the other, with None in between and the evaluation at the end."""
        seconds = loss = 0.0
        labels = tokens = 0
        lengths = np.diff(self.validation.offsets)
        for i, rows in enumerate(rows_of_evaluation(lengths, self.evaluation_tokens)):
            if i:
                yield None
            began = time.perf_counter()
            self._set_mode(training=False)
            batch = self._batch(self.validation, rows)
            with torch.no_grad():
                loss += label_losses(self.base, batch, self.config.compute_dtype).sum().item()
            labels += len(batch.labels)
            tokens += batch.tokens
            seconds += time.perf_counter() - began
        yield Evaluation(number, self.step, loss / labels, tokens, seconds)

    def _set_mode(self, training: bool) -> None:
        if self.base.training != training:  # walks through all modules
            self.base.train(training)

    def _batch(self, rows: data.Rows, numbers: NDArray[np.int64]) -> "Batch":
        return collate([rows[int(number)] for number in numbers], self.pad, self.device)

    def save(self, directory: Path) -> None:
        state = {f"random.{number}": state for number, state in enumerate(self.random_state)}
        for name, weight in self.weights.items():
            for key, value in self.optimizer.state[weight].items():
                # bitsandbytes keeps a number here, and one quantisation map for all weights
                state[f"optimizer.{name}.{key}"] = torch.as_tensor(value).cpu().clone()
        evaluations = [asdict(evaluation) for evaluation in self.evaluations]
        try:
            self.adapted.save_pretrained(str(directory), save_embedding_layers=False)
            save_file(state, directory / STATE)
        except SafetensorError as error:  # a full disk is one of these, and no OSError
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else None, f"cannot write {directory}: {error}") from error
        (directory / FACTS).write_text(json.dumps(self.facts | {"step": self.step, "evaluations": evaluations}))

    def _restore(self, checkpoint: Checkpoint) -> None:
        facts = json.loads((checkpoint.path / FACTS).read_text())
        for name, ours in self.facts.items():
            if facts[name] != ours:
                raise ValueError(f"checkpoint {checkpoint.path} has {name} {facts[name]}, this trial has {ours}")
        self.step, self.evaluations = checkpoint.step, checkpoint.evaluations
        set_peft_model_state_dict(self.adapted, load_file(checkpoint.path / ADAPTER))
        state = load_file(checkpoint.path / STATE)
        self.random_state = [state[f"random.{number}"] for number in range(len(self.random_state))]
        for name, weight in self.weights.items():
            prefix = f"optimizer.{name}."
            saved = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if saved:  # there is nothing before the first step
                _restore_moments(self.optimizer, weight, saved)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.evaluation_pass = None
            model.detach(self.adapted)
            self.base.activation_checkpointing_disable()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # another process may share the GPU

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Draw from this trial's random state and leave that of the process as it was."""
        with torch.random.fork_rng(self._gpus):
            if self.random_state:
                self._set_random_state(self.random_state)
            try:
                yield
            finally:
                self.random_state = self._random_state()

    @property
    def _gpus(self) -> list[int]:
        return [self.device.index] if self.device.type == "cuda" else []

    def _random_state(self) -> list[Tensor]:
        """That of the process: of the CPU and, on a GPU, of that one."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self._gpus)]

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for gpu, of_gpu in zip(self._gpus, state[1:], strict=True):
            torch.cuda.set_rng_state(of_gpu, gpu)


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch, on the device."""

    input_ids: Tensor
    """(rows, width), padded on the right."""
    positions: Tensor
    """(labels,): place of each token that predicts a label, counted through the flattened (rows, width)."""
    labels: Tensor
    """(labels,): the tokens to be predicted, each the one after its position."""
    tokens: int
    """Tokens without padding."""


def collate(rows: list[tuple[NDArray[np.int32], NDArray[np.bool_]]], pad: int, device: torch.device) -> Batch:
    """Pad (token ids, label mask) pairs to one width. A row's first token is never a label: nothing predicts it."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = np.full((len(rows), width), pad, dtype=np.int64)
    predicts = np.zeros((len(rows), width), dtype=np.bool_)
    for i, (ids, supervised) in enumerate(rows):
        input_ids[i, : len(ids)] = ids
        predicts[i, : len(ids) - 1] = supervised[1:]
    positions = np.flatnonzero(predicts)
    labels = input_ids.ravel()[positions + 1]
    return Batch(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(positions).to(device),
        torch.from_numpy(labels).to(device),
        sum(len(ids) for ids, _ in rows),
    )


def label_losses(base: PreTrainedModel, batch: Batch, compute_dtype: ComputeDtype) -> Tensor:
    """Cross-entropy of each label of the batch in nats: fp32, (labels,).

    The output head gets the hidden states of the labelled positions alone, through a hook, so that whatever the
    model does to its logits (scaling, soft-capping) still happens. No attention mask is passed: padding stands to
    the right of every token that counts, where causal attention cannot see it.
    """
    head = base.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0].flatten(0, 1).index_select(0, batch.positions),))
    try:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=compute_dtype == "bf16"):
            logits: Tensor = base(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        hook.remove()
    at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    if len(logits) <= at_once:
        return _cross_entropy(logits, batch.labels)
    chunks = zip(torch.split(logits, at_once), torch.split(batch.labels, at_once), strict=True)
    return torch.cat([recompute(_cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def rows_of_step(step: int, rows: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """Row numbers of the optimiser step after `step` others: a new permutation every epoch, its last step may be short.

    They follow from the arguments alone, so a resumed trial needs no position.
    """
    epoch, index = divmod(step, -(-rows // batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order[index * batch_size : (index + 1) * batch_size]


def rows_of_evaluation(lengths: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Row numbers cut into micro-batches of at most `tokens` tokens with padding; a longer row stands alone.

    Rows of like length come together, shortest first, so that there is little padding.
    """
    batches: list[list[int]] = [[]]
    for row in np.argsort(lengths, kind="stable").tolist():
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > tokens:
            batches.append([])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches]


def learning_rates(schedule: str, peak: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Learning rate as a function of the optimiser steps done before, by transformers' schedules.

    It follows from the arguments alone, so a resumed trial needs no schedule state.
    """
    unused = torch.optim.SGD([torch.zeros(())], lr=peak)
    factor = get_scheduler(SCHEDULES[schedule], unused, warmup_steps, total_steps).lr_lambdas[0]
    return lambda step: peak * factor(step)


def _restore_moments(optimizer: Optimizer, weight: torch.nn.Parameter, saved: dict[str, Tensor]) -> None:
    if isinstance(optimizer, PagedAdamW8bit):
        optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)  # allocates, in paged memory what is large
        state = optimizer.state[weight]
        state["step"] = int(saved.pop("step"))
        for key, value in saved.items():
            state[key].copy_(value)
    else:
        optimizer.state[weight] = {key: value.to(weight.device) for key, value in saved.items()}
