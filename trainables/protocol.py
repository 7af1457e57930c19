"""What passes between the framework and a trial. Every trainable (`qlora_sft`, `toy`) speaks this; none imports Ray.

A trainable is a module with one function (what its trials share is made once per sweep, by `data.prepare`):

    start(config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None) -> Trial
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Budget:
    """How long a trial trains: exactly one of `epochs` and `steps` is set."""

    epochs: float | None
    """Passes over the training rows."""
    steps: int | None
    """Optimiser steps."""
    evaluations: int
    """Number of equal parts that the budget is cut into; the validation loss is taken at the end of each. With 0 there
    is none, and the validation rows are trained on, too."""

    def total_steps(self, rows: int, batch_size: int) -> int:
        """Optimiser steps of a whole trial over `rows` training rows, never fewer than `evaluations`.

        The last batch of an epoch may be short, as in the Hugging Face Trainer.
        """
        if self.steps is not None:
            return max(self.steps, self.evaluations)
        assert self.epochs is not None
        per_epoch = -(-rows // batch_size)
        return max(round(self.epochs * per_epoch), self.evaluations, 1)

    def evaluation_steps(self, total_steps: int) -> list[int]:
        """Step after which evaluation 1, 2, … is due; the last one is `total_steps`."""
        return [round(total_steps * k / self.evaluations) for k in range(1, self.evaluations + 1)]


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep have in common."""

    model: str
    """Model directory or Hub id."""
    tokens: str
    """Directory that `data.prepare` made."""
    budget: Budget
    score_base: bool = False
    """Also report evaluation 0: the validation loss before the first step, which is the quantised base's own."""
    completions: int = 0
    """Validation rows, the first ones, whose answers are written at each evaluation; there may be fewer."""
    halvings: int = 0
    """How often the micro-batch was halved because memory ran out; what a step learns from stays the same."""


class OutOfMemory(RuntimeError):
    """The device has no room for a micro-batch. The trial stands where it stood before and can be saved."""


class NoRoomYet(MemoryError):
    """There is no room for a trial beside those of others, which will end."""


class Forgotten(LookupError):
    """The engine does not have the trial, or no longer."""


def loses_device(error: object) -> bool:
    """Whether nothing works in this process any more, as after errors of CUDA other than a lack of memory."""
    said = str(error)
    memory = isinstance(error, OutOfMemory) or "out of memory" in said
    return isinstance(error, RuntimeError) and "CUDA error" in said and not memory


@dataclass(frozen=True)
class Step:
    """One optimiser step, as it is logged."""

    step: int
    """1 for the first."""
    loss: float
    """Mean cross-entropy per supervised token of this step's batch, nats."""
    learning_rate: float
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    tokens: int
    """Tokens that went through the model, padding not counted."""
    seconds: float
    """Wall clock of the step; of one taken together with other trials, the share of its tokens."""


@dataclass(frozen=True)
class Evaluation:
    """One pass over the validation rows."""

    evaluation: int
    """1 for the first of `Budget.evaluations`; 0 is the base before any training."""
    step: int
    """Optimiser steps done before it."""
    loss: float
    """Mean cross-entropy per supervised validation token, nats. May be non-finite when the trial diverged."""
    tokens: int = 0
    """Tokens that went through the model, padding not counted."""
    seconds: float = 0.0
    """Wall clock of the pass."""
    score: float | None = None
    """What is searched for when that is not the loss; less is better. The framework's business: trials leave it."""

    @property
    def objective(self) -> float:
        """What it is compared with others by, less is better."""
        return self.loss if self.score is None else self.score


@dataclass(frozen=True)
class Scored:
    """What a finished adapter, or the base alone, does on rows."""

    rows: int
    loss: float | None
    """Mean cross-entropy per supervised token, nats; None when it was not asked for."""
    prompts: tuple[str, ...] = ()
    """What leads to the answer of each row, as the model reads it, without special tokens."""
    references: tuple[str, ...] = ()
    """The answers."""
    completions: tuple[str, ...] = ()
    """What was written instead of them; all three are empty when that was not asked for."""


@dataclass(frozen=True)
class Slice:
    """What happened in one call of `Trial.advance`."""

    steps: tuple[Step, ...]
    """Optimiser steps finished since the last slice, oldest first."""
    evaluation: Evaluation | None
    """Set when an evaluation was finished; a slice ends there."""
    failure: str | None
    """Set when the configuration cannot be trained on (non-finite loss or gradient), with the reason."""
    done: bool
    """True when the budget is used up (or `failure` is set)."""
    peak_memory: int
    """Bytes of the process, with all trials that it holds: on a GPU the most that was allocated since the trial
    started, on a CPU the resident set."""
    gpu_load: float | None = None
    """Share of the last moment, up to a second, in which the GPU was computing, for whatever process; None where there
    is no GPU, or it does not say."""
    written: Scored | None = None
    """Set with an evaluation, unless it failed, when `Job.completions` are asked for."""

    def followed_by(self, later: "Slice") -> "Slice":
        """Both as one, where this one has no evaluation."""
        return replace(later, steps=self.steps + later.steps, peak_memory=max(self.peak_memory, later.peak_memory))


@dataclass(frozen=True)
class Cost:
    """What a trial has used, over all attempts."""

    seconds: float = 0.0
    """Wall clock of steps and evaluations."""
    steps: int = 0
    """Optimiser steps, those that were repeated after an interruption counted again."""
    tokens: int = 0
    """Tokens that went through the model in training and validation."""
    peak_memory: int = 0
    """Bytes; the most that an attempt used."""
    elapsed: float = 0.0
    """Wall clock in which it was in training: what other trials of its process took and checkpoints included, loading
    the model not."""
    gpu_seconds: float = 0.0
    """Part of `elapsed` in which the GPU was computing, for whatever process."""

    def plus(self, slice_: Slice, elapsed: float) -> "Cost":
        """This cost and that of one more slice, `elapsed` seconds after the one before."""
        evaluation = slice_.evaluation
        return Cost(
            seconds=self.seconds + sum(s.seconds for s in slice_.steps) + (evaluation.seconds if evaluation else 0.0),
            steps=self.steps + len(slice_.steps),
            tokens=self.tokens + sum(s.tokens for s in slice_.steps) + (evaluation.tokens if evaluation else 0),
            peak_memory=max(self.peak_memory, slice_.peak_memory),
            elapsed=self.elapsed + elapsed,
            gpu_seconds=self.gpu_seconds + elapsed * (slice_.gpu_load or 0.0),
        )


@dataclass(frozen=True)
class Timed:
    """How long a configuration takes on a device, alone."""

    device: str
    devices: int
    """GPUs of the machine."""
    start: float
    """Seconds to load the base and to make the adapter."""
    step: float
    """Seconds of an optimiser step, the mean of two."""
    evaluation: float
    """Seconds of a pass over the validation rows."""


@dataclass(frozen=True)
class Started:
    """Of a trial before its first call of `advance`."""

    total_steps: int
    step: int
    evaluations: tuple[Evaluation, ...]
    banner: str


class Trial(Protocol):
    """One training run, advanced in time slices, all by one thread."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole budget."""

    @property
    def step(self) -> int:
        """Optimiser steps finished."""

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All evaluations finished so far, those before the checkpoint that it was started from included."""

    @property
    def banner(self) -> str:
        """Lines on what is trained: footprint of the base, parameters of the adapter, what loading them had to tell."""

    def advance(self, seconds: float) -> Slice:
        """Train whole optimiser steps for about `seconds`, at least one, or to the end of the next evaluation.

        A long evaluation spans several slices; those carry no steps and no evaluation. Raises `OutOfMemory` when not
        even one step, or part of an evaluation, fits into memory.
        """

    def hold(self) -> Slice:
        """What happened since the last slice, in a trial that goes on between two calls; now it waits for the next."""

    def save(self, directory: Path) -> None:
        """Write into the empty `directory` all that `start` needs to go on after `step`; after `hold`."""

    def close(self) -> None:
        """Give back what only this trial holds; what is shared (base model, tokens) stays warm."""
