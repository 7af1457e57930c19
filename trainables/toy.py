"""A closed-form loss with the protocol of a real trial: the framework's tests run on it in milliseconds.

The validation loss falls exponentially towards a floor that is lowest at r 16, alpha 32, learning rate 3e-4, nf4 and
bf16. Training losses carry noise whose generator is part of the state, so that a resume that loses state shows.
A learning rate above 0.05 diverges to NaN. Asked for completions, it writes its validation loss in place of a 1.
"""

import json
import math
import os
import random
import time
from pathlib import Path

from trainables.checkpoint import Checkpoint
from trainables.config import QLoRAConfig
from trainables.protocol import Evaluation, Job, OutOfMemory, Scored, Slice, Step

ROWS = 480
"""Training rows that an epoch is taken to have."""


def start(config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None) -> "Toy":
    """A toy trial, fresh or from where `checkpoint` left it.

    For tests that disturb trials, in the environment: TOY_STEP_SECONDS makes every step take that long. TOY_FAULT
    `exit:10` ends the process at step 10 of a trial that was not started from a checkpoint, `raise:10` raises there,
    `hang:10` stays there. TOY_ROWS is the largest micro-batch that fits into memory.
    """
    return Toy(config, job, checkpoint)


def loss_floor(config: QLoRAConfig) -> float:
    """Loss that an endless training of `config` would reach."""
    return (
        1.0
        + 0.20 * abs(math.log10(config.learning_rate / 3e-4))
        + 0.05 * abs(math.log2(config.r / 16))
        + 0.05 * abs(math.log2(config.alpha / config.r / 2))
        + (0.02 if config.quant_type == "fp4" else 0.0)
        + (0.01 if config.compute_dtype == "fp32" else 0.0)
        + 0.10 * abs(config.warmup_ratio - 0.05)
    )


class Toy:
    banner = "toy: no model"

    def __init__(self, config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None) -> None:
        self.config = config
        self.total_steps = job.budget.total_steps(ROWS, config.batch_size)
        self.due = job.budget.evaluation_steps(self.total_steps)
        self.score_base = job.score_base
        self.completions = job.completions
        self.seconds_per_step = float(os.environ.get("TOY_STEP_SECONDS", "0"))
        self.fault, _, at = os.environ.get("TOY_FAULT", ":-1").partition(":")
        self.fault_step = int(at) if checkpoint is None else -1
        self.fits = config.micro_batch(job.halvings) <= int(os.environ.get("TOY_ROWS", config.batch_size))
        self.noise = random.Random(config.seed)
        self.momentum = 0.0
        self.step = 0
        self.evaluations: tuple[Evaluation, ...] = ()
        if checkpoint is not None:
            state = json.loads((checkpoint.path / "state.json").read_text())
            self.step, self.evaluations, self.momentum = checkpoint.step, checkpoint.evaluations, state["momentum"]
            version, internal, gauss = state["noise"]
            self.noise.setstate((version, tuple(internal), gauss))

    def advance(self, seconds: float) -> Slice:
        began = time.monotonic()
        steps: list[Step] = []
        while True:
            done = len([e for e in self.evaluations if e.evaluation > 0])
            if self.score_base and not self.evaluations and self.step == 0:
                return self._evaluate(0, tuple(steps))
            if done < len(self.due) and self.step == self.due[done]:
                return self._evaluate(done + 1, tuple(steps))
            if not self.due and self.step == self.total_steps:
                return Slice(tuple(steps), None, None, True, 0)
            if steps and time.monotonic() - began >= seconds:
                return Slice(tuple(steps), None, None, False, 0)
            if not self.fits:
                raise OutOfMemory("TOY_ROWS do not fit")
            steps.append(self._train())
            if not math.isfinite(steps[-1].loss):
                return Slice(tuple(steps), None, f"training loss is {steps[-1].loss} at step {self.step}", True, 0)

    def _train(self) -> Step:
        time.sleep(self.seconds_per_step)
        self.step += 1
        if self.step == self.fault_step:
            if self.fault == "exit":
                os._exit(1)
            if self.fault == "hang":
                time.sleep(3600)
            raise ValueError(f"TOY_FAULT at step {self.step}, [in brackets]")
        self.momentum = 0.9 * self.momentum + 0.1 * self.noise.gauss(0.0, 0.05)
        loss = math.nan if self.config.learning_rate > 0.05 else self._loss() + self.momentum
        learning_rate = self.config.learning_rate * (1 - (self.step - 1) / self.total_steps)
        return Step(self.step, loss, learning_rate, 1.0, self.config.batch_size, self.seconds_per_step)

    def _evaluate(self, number: int, steps: tuple[Step, ...]) -> Slice:
        evaluation = Evaluation(number, self.step, self._loss() + 0.1 * self.momentum)
        self.evaluations += (evaluation,)
        return Slice(steps, evaluation, None, self.step == self.total_steps, 0, written=self._written(evaluation.loss))

    def _written(self, loss: float) -> Scored | None:
        rows = self.completions
        prompts = tuple(f"row {row}" for row in range(rows))
        return Scored(rows, None, prompts, ("1",) * rows, (f"{loss:.9f}",) * rows) if rows else None

    def _loss(self) -> float:
        speed = 6.0 * min(1.0, self.config.learning_rate / 1e-4)
        return loss_floor(self.config) + 2.0 * math.exp(-speed * self.step / self.total_steps)

    def hold(self) -> Slice:
        return Slice((), None, None, False, 0)

    def save(self, directory: Path) -> None:
        state = {"momentum": self.momentum, "noise": self.noise.getstate()}
        (directory / "state.json").write_text(json.dumps(state))

    def close(self) -> None:
        pass
