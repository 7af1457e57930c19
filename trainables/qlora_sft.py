"""One QLoRA trial: supervised fine-tuning of an adapter on a frozen 4-bit base, in time slices.

What a step computes is what TRL's SFTTrainer computes with the same rows: the loss is summed over the supervised
tokens of the whole step and divided by their number, gradients are clipped by their L2 norm, AdamW and the schedules
are those of torch and transformers. Two things differ on purpose: adapter weights stay in fp32, and the output head
sees only the positions that have a label.

Trials of one base go through it together (`turn`); each computes what it computes alone.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pynvml
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from trainables import data, model
from trainables.answers import Answers
from trainables.checkpoint import ADAPTER, Checkpoint, disk_errors
from trainables.config import QLoRAConfig
from trainables.packed.adapter import Adapter
from trainables.packed.base import Row, Work, labels_of
from trainables.protocol import Evaluation, Job, OutOfMemory, Scored, Slice, Step, Trial

T = TypeVar("T")

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Names that transformers gives to the schedules."""
EVALUATION_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens, padding included, in one micro-batch of an evaluation: about a second of work on either device."""
SCORED_AT_ONCE = {"cpu": 4096, "cuda": 16384}
"""Tokens, padding included, of the micro-batches of many trials that are scored together."""
LEARNT_AT_ONCE = {"cpu": 1024, "cuda": 16384}
"""Tokens, padding included, of the micro-batches of many trials that are learnt from together: more keep either device
no busier and take memory."""
PADDED_FOR_FREE = {"cpu": 128, "cuda": 4096}
"""Tokens, padding included, up to which a pass through the base takes about as long, however few they are."""

STATE, FACTS = "training_state.safetensors", "state.json"


def start(config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None) -> Trial:
    """A trial before its first step, or exactly where `checkpoint` left it.

    Raises ValueError when config or budget differ from those of the checkpoint, when `target_modules` match nothing,
    or when the device cannot do what the config asks for; MemoryError when it has no room for the model.
    """

    def made() -> QLoRATrial:
        try:
            return QLoRATrial(config, job, checkpoint)
        except RuntimeError as error:
            if model.out_of_memory(error):
                raise MemoryError(f"no room for the model: {error}") from error
            raise

    return _with_room(made, MemoryError, (job.model, config.quant_type, config.compute_dtype, config.double_quant))


def gpu_load(device: torch.device) -> float | None:
    """See `Slice.gpu_load`; a millisecond's work for the driver of the GPU."""
    try:
        return torch.cuda.utilization(device) / 100
    except (pynvml.NVMLError, RuntimeError):  # as on a part of a GPU (MIG), and where the library of NVML is missing
        return None


class QLoRATrial:
    """See `protocol.Trial`."""

    def __init__(self, config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None) -> None:
        self.device = model.device()
        if config.optimizer == "paged_adamw_8bit" and self.device.type != "cuda":
            raise ValueError("optimizer paged_adamw_8bit needs a CUDA device and there is none; set optimizer: adamw")
        self.config = config
        self.model = job.model
        tokens = data.load(Path(job.tokens))
        self.train, self.validation = tokens.trained_on(job.budget.evaluations), tokens.validation
        self.pad = tokens.pad_token_id
        self.total_steps = job.budget.total_steps(len(self.train), config.batch_size)
        self.due = dict(enumerate(job.budget.evaluation_steps(self.total_steps), start=1))
        if job.score_base:
            self.due[0] = 0
        self.micro_batch = config.micro_batch(job.halvings)
        self.written_at_once = SCORED_AT_ONCE[self.device.type] >> job.halvings
        lengths = np.diff(self.validation.offsets)
        self.evaluation_batches = data.micro_batches(lengths, EVALUATION_TOKENS[self.device.type] >> job.halvings)
        self.step = 0
        self.evaluations: tuple[Evaluation, ...] = ()
        self.failure: str | None = None
        self.scored = 0
        """Micro-batches of the evaluation that is under way; after those of the loss come those of the answers."""
        self.loss, self.seconds = 0.0, 0.0
        """Sum over what is scored, nats, and how long it took."""
        self.tokens_written = 0
        """Tokens that went through the model for answers."""
        self.new_steps: list[Step] = []
        self.new_evaluation: Evaluation | None = None
        self.new_written: Scored | None = None
        warmup_steps = math.ceil(config.warmup_ratio * self.total_steps)
        self.learning_rate = learning_rates(config.schedule, config.learning_rate, warmup_steps, self.total_steps)
        self.facts = {
            "config": config.model_dump(mode="json"),
            "total_steps": self.total_steps,
            "warmup_steps": warmup_steps,
            "training_rows": len(self.train),
        }

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.base = model.base(job.model, config.quant_type, config.compute_dtype, config.double_quant)
        layers = model.targets(self.base.layers, job.model, config.target_modules)
        self.adapter = Adapter(config, layers, self.device, self.base.model.dtype)
        self.banner = model.banner(self.base, self.adapter)
        self.answers: Answers | None = None
        self.writing: Iterator[int] | None = None
        """Of the evaluation that is under way."""
        if job.completions:
            self.answers = Answers(Path(job.tokens), self.validation, self.base, self.pad, job.completions)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.base.seat(self.adapter)  # before `begin`: bitsandbytes never gives paged memory back
        try:
            self.adapter.begin()
            if checkpoint is not None and self.step:
                self.adapter.set_moments(load_file(checkpoint.path / STATE))
        except Exception:
            self.base.dismiss(self.adapter)
            raise
        self.closed = False

    def advance(self, seconds: float) -> Slice:
        deadline = time.monotonic() + seconds
        while not self.over and self.new_evaluation is None:
            try:
                turn([self])
            except OutOfMemory:
                if not self.new_steps:
                    raise
                break  # they are told first; the next call comes here again
            if time.monotonic() >= deadline:
                break
        return self.news()

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.failure is not None or (self.step == self.total_steps and self.evaluation_due is None)

    @property
    def evaluation_due(self) -> int | None:
        """The evaluation that comes before the next step, if any."""
        finished = {evaluation.evaluation for evaluation in self.evaluations}
        return next((n for n, step in self.due.items() if step == self.step and n not in finished), None)

    def news(self) -> Slice:
        """What happened since the last call."""
        if self.device.type == "cuda":
            memory, load = torch.cuda.max_memory_allocated(self.device), gpu_load(self.device)
        else:
            memory, load = psutil.Process().memory_info().rss, None
        slice_ = Slice(
            tuple(self.new_steps), self.new_evaluation, self.failure, self.over, memory, load, self.new_written
        )
        self.new_steps, self.new_evaluation, self.new_written = [], None, None
        return slice_

    def hold(self) -> Slice:
        return self.news()

    def next_rows(self) -> NDArray[np.int64]:
        """Row numbers of the next step."""
        return rows_of_step(self.step, len(self.train), self.config.batch_size, self.config.seed)

    def micro_batches(self, numbers: NDArray[np.int64]) -> list[Work]:
        """A step on these rows. What dropout draws follows from seed, step and place in the batch alone.

        Rows of like length come together, so that there is little padding.
        """
        rows = [self.train[int(number)] for number in numbers]
        sources = (np.random.SeedSequence((self.config.seed, self.step, place)) for place in range(len(rows)))
        seeds = [int(source.generate_state(1)[0]) for source in sources]
        places = list(range(len(rows)))
        if len(rows) > self.micro_batch:
            places.sort(key=lambda place: len(rows[place][0]))
        parts = [places[i : i + self.micro_batch] for i in range(0, len(places), self.micro_batch)]
        return [Work(self.adapter, [rows[i] for i in part], [seeds[i] for i in part]) for part in parts]

    def learn(self, loss: float, norm: float) -> None:
        """Take the step that the gradients, of this norm, ask for. What is not finite must not reach the weights."""
        for name, value in (("training loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                self.failure = f"{name} is {value} in step {self.step + 1}"
                self.adapter.gradient.zero_()
                return
        self.adapter.update(norm, self.learning_rate(self.step))
        self.base.refresh(self.adapter)
        self.step += 1

    def note_learned(self, loss: float, norm: float, tokens: int, seconds: float) -> None:
        """Note the step that was taken last."""
        self.new_steps.append(Step(self.step, loss, self.learning_rate(self.step - 1), norm, tokens, seconds))

    def note_scored(self, loss: float, seconds: float) -> None:
        """Note the sum of losses of one more micro-batch, and the evaluation when it was the last."""
        self.scored += 1
        self.loss += loss
        self.seconds += seconds
        if self.scored == len(self.evaluation_batches) and (self.answers is None or not math.isfinite(self.loss)):
            self.note_evaluated()

    def write(self) -> None:
        """Write the next micro-batch of answers, or, when that was the last, note the evaluation."""
        assert self.answers is not None
        began = time.perf_counter()
        if self.writing is None:
            self.writing = self.answers.write(self.adapter, self.written_at_once)
        tokens = next(self.writing, None)
        self.seconds += time.perf_counter() - began
        if tokens is None:
            self.new_written = self.answers.done()
            self.note_evaluated()
        else:
            self.tokens_written += tokens
            self.scored += 1

    def note_evaluated(self) -> None:
        """Note the evaluation that is due."""
        number = self.evaluation_due
        assert number is not None
        labels = sum(labels_of(self.validation[row]) for row in range(len(self.validation)))
        tokens = len(self.validation.input_ids) + self.tokens_written
        evaluation = Evaluation(number, self.step, self.loss / labels, tokens, self.seconds)
        self.new_evaluation = evaluation
        self.evaluations += (evaluation,)
        if not math.isfinite(evaluation.loss):
            self.failure = f"validation loss is {evaluation.loss} after step {self.step}"
        self.forget_scored()

    def forget_scored(self) -> None:
        """The evaluation under way begins again."""
        self.scored, self.loss, self.seconds, self.tokens_written = 0, 0.0, 0.0, 0
        self.writing = None

    def save(self, directory: Path) -> None:
        config = self.config
        names = {name.rpartition(".")[2] for name, _, _ in self.adapter.layers.values()}
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.model,
            inference_mode=True,
            r=config.r,
            # PEFT declares an int and divides whatever it gets; whole ones are stored as the int that others expect
            lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=sorted(names if config.target_modules == "all-linear" else config.target_modules),
            use_rslora=config.rslora,
        )
        weights = {f"base_model.model.{name}": weight.cpu().clone() for name, weight in self.adapter.named.items()}
        evaluations = [asdict(evaluation) for evaluation in self.evaluations]
        with disk_errors(directory):
            lora.save_pretrained(str(directory))
            save_file(weights, directory / ADAPTER, {"format": "pt"})
            save_file(self.adapter.moments(), directory / STATE)
        (directory / FACTS).write_text(json.dumps(self.facts | {"step": self.step, "evaluations": evaluations}))

    def _restore(self, checkpoint: Checkpoint) -> None:
        facts = json.loads((checkpoint.path / FACTS).read_text())
        for name, ours in self.facts.items():
            if facts[name] != ours:
                raise ValueError(f"checkpoint {checkpoint.path} has {name} {facts[name]}, this trial has {ours}")
        self.step, self.evaluations = checkpoint.step, checkpoint.evaluations
        set_weights(self.adapter, load_file(checkpoint.path / ADAPTER))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.forget_scored()
            self.base.dismiss(self.adapter)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # another process may share the GPU


def set_weights(adapter: Adapter, saved: Mapping[str, torch.Tensor]) -> None:
    """Have the adapter's weights be those of a file as PEFT writes it."""
    for name, weight in adapter.named.items():
        weight.copy_(saved[f"base_model.model.{name}"])


def turn(trials: Sequence[QLoRATrial]) -> None:
    """Take unfinished trials of one base further: an optimiser step each, or a part of the evaluations that are due.

    Raises `OutOfMemory` when there is no room for a micro-batch of all. After any error each trial stands at its last
    step.
    """

    def take() -> None:
        going = [trial for trial in trials if not trial.over]  # all, unless an error came amid their steps
        scoring = [trial for trial in going if trial.evaluation_due is not None]
        with _nothing_lost(trials):
            if scoring:
                _score(scoring)
            else:
                _train(going, [trial.micro_batches(trial.next_rows()) for trial in going])

    _with_room(take, OutOfMemory)


def _with_room(work: Callable[[], T], lacking: type[Exception], wanted: model.Key | None = None) -> T:
    """What comes of `work`, which is done once more without the bases that nobody needs when it is `lacking` memory.

    The base that is `wanted` stays: it may serve nobody yet.
    """
    try:
        return work()
    except lacking:
        if not model.drop_idle(wanted):
            raise
    return work()  # not before the error is gone, which holds on to the tensors of its frames


def try_out(trials: Sequence[QLoRATrial], rows: NDArray[np.int64]) -> None:
    """Have trials of one base that nobody needs take an optimiser step on the same rows, for its time and memory.

    Raises as `turn` does.
    """
    with _nothing_lost(trials):
        _train(trials, [trial.micro_batches(rows) for trial in trials])


@contextmanager
def _nothing_lost(trials: Sequence[QLoRATrial]) -> Iterator[None]:
    """After an error each trial stands at its last step; one for want of memory is an `OutOfMemory`."""
    try:
        yield
    except Exception as error:
        for trial in trials:
            trial.adapter.gradient.zero_()
            trial.forget_scored()
        if isinstance(error, RuntimeError) and model.out_of_memory(error):
            raise OutOfMemory(str(error)) from error
        raise


def _train(trials: Sequence[QLoRATrial], steps: Sequence[Sequence[Work]]) -> None:
    """An optimiser step of each, on its micro-batches."""
    began = time.perf_counter()
    base, pad, kind = trials[0].base, trials[0].pad, trials[0].device.type
    labels = [sum(work.labels for work in step) for step in steps]
    losses = [torch.zeros((), device=base.model.device) for _ in trials]
    for number in range(max(len(step) for step in steps)):
        present = {i: step[number] for i, step in enumerate(steps) if number < len(step)}
        for some in in_groups(present, LEARNT_AT_ONCE[kind], PADDED_FOR_FREE[kind]):
            of_labels = base.losses([present[i] for i in some], pad)
            means = [each.sum() / labels[i] for i, each in zip(some, of_labels, strict=True)]
            torch.stack(means).sum().backward()
            for i, mean in zip(some, means, strict=True):
                losses[i] += mean.detach()
    norms = [trial.adapter.norm() for trial in trials]
    values = torch.stack([*losses, *norms]).tolist()  # one wait for the device
    tokens = [sum(len(ids) for work in step for ids, _ in work.rows) for step in steps]
    taken = []
    try:
        for trial, loss, norm, count in zip(trials, values, values[len(trials) :], tokens, strict=False):
            trial.learn(loss, norm)
            if trial.failure is None:
                taken.append((trial, loss, norm, count))
    finally:  # also of those whose step was taken before that of another one failed
        seconds = time.perf_counter() - began
        for trial, loss, norm, count in taken:
            trial.note_learned(loss, norm, count, seconds * count / sum(tokens))


def in_groups(works: Mapping[int, Work], at_once: int, for_free: int) -> list[list[int]]:
    """Keys of works that go through the base together: of like length, `at_once` tokens with padding at most.

    Where padding would be more than half of the tokens themselves, a pass more is quicker, unless all are so few that
    it is `for_free`. A work that takes more than `at_once` stands alone.
    """
    widths = {key: max(len(ids) for ids, _ in work.rows) for key, work in works.items()}
    groups: list[list[int]] = []
    rows = tokens = 0
    for key in sorted(works, key=lambda key: widths[key]):
        own = [len(ids) for ids, _ in works[key].rows]
        rows, tokens = rows + len(own), tokens + sum(own)
        padded = rows * widths[key]
        if not groups or padded > at_once or padded > max(for_free, 1.5 * tokens):
            groups.append([])
            rows, tokens = len(own), sum(own)
        groups[-1].append(key)
    return groups


def _score(trials: Sequence[QLoRATrial]) -> None:
    """Score the next micro-batch of those that are least far. Answers are written for one at a time."""
    began = time.perf_counter()
    least = min(trial.scored for trial in trials)
    first = next(trial for trial in trials if trial.scored == least)
    if least >= len(first.evaluation_batches):
        first.write()
        return
    numbers = first.evaluation_batches[least]
    alike = [trial for trial in trials if trial.scored == least < len(trial.evaluation_batches)]
    together = [trial for trial in alike if np.array_equal(trial.evaluation_batches[least], numbers)]
    rows: list[Row] = [first.validation[int(number)] for number in numbers]
    most = SCORED_AT_ONCE[first.device.type] // (len(rows) * max(len(ids) for ids, _ in rows))
    together = together[: max(1, most)]
    with torch.no_grad():
        losses = first.base.losses([Work(trial.adapter, rows, None) for trial in together], first.pad)
    sums = torch.stack([each.sum() for each in losses]).tolist()
    seconds = (time.perf_counter() - began) / len(together)
    for trial, loss in zip(together, sums, strict=True):
        trial.note_scored(loss, seconds)


def rows_of_step(step: int, rows: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """Row numbers of the optimiser step after `step` others: a new permutation every epoch, its last step may be short.

    They follow from the arguments alone, so a resumed trial needs no position.
    """
    epoch, index = divmod(step, -(-rows // batch_size))
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order[index * batch_size : (index + 1) * batch_size]


def learning_rates(schedule: str, peak: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Learning rate as a function of the optimiser steps done before, by transformers' schedules.

    It follows from the arguments alone, so a resumed trial needs no schedule state.
    """
    unused = torch.optim.SGD([torch.zeros(())], lr=peak)
    factor = get_scheduler(SCHEDULES[schedule], unused, warmup_steps, total_steps).lr_lambdas[0]
    return lambda step: peak * factor(step)
