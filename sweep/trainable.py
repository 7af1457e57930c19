"""The Ray side of a trial: hands it time slices, writes its checkpoints, and logs what happened.

One process serves many trials, one after another; what they share (imports, the quantised base, tokens) stays warm.
"""

import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from sweep import tracking
from trainables import checkpoint
from trainables.config import QLoRAConfig
from trainables.protocol import Cost, Evaluation, Job, Slice, Trial, best

SLICE_SECONDS = 2.0
"""Wall clock of one call: short enough to look alive and to stop quickly, long enough that calls cost nothing."""
WAIT_SECONDS = 9.0
"""How long an ending process waits for W&B; Ray kills it after 10."""


@dataclass(frozen=True)
class Assignment:
    """One trial, as the driver hands it to a process."""

    number: int
    trainable: str
    """Module under `trainables`."""
    config: QLoRAConfig
    job: Job
    directory: Path
    """Where its checkpoints are."""
    reported: int
    """Newest evaluation that the ledger has, -1 when none."""
    cost: Cost
    """Of earlier attempts."""
    first_rung: int
    """Evaluation after which a trial may be stopped for the first time."""
    tracking: tracking.Tracking
    run_id: str
    searched: tuple[str, ...]
    """Hyperparameters that differ between trials."""
    checkpoint_minutes: float


class SlicedTrial(tune.Trainable):
    """Ray's view of a trial: `train` is one time slice."""

    def setup(self, config: dict[str, Any]) -> None:
        self._assignment: Assignment = config["assignment"]
        self._trial: Trial | None = None
        self._run: tracking.Run | None = None
        self._unreported: list[Evaluation] = []
        self._cost = self._assignment.cost
        self._saved = time.monotonic()
        self._saved_as = (0, 0)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave("preempted", None)  # nothing to do for a trial that was concluded or paused
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._trial is None:
            self._trial = self._enter()
        if self._unreported:
            evaluation, *self._unreported = self._unreported
            slice_ = Slice((), evaluation, None, self._trial.step == self._trial.total_steps, 0)
        else:
            slice_ = self._trial.advance(SLICE_SECONDS)
        self._cost = self._cost.plus(slice_)
        assert self._run is not None
        # Before the checkpoint: a kill between the two then repeats rows, which W&B's side knows, and loses none.
        tracking.log(self._run, slice_)
        evaluated = slice_.evaluation is not None and slice_.evaluation.step > 0
        due = time.monotonic() - self._saved >= 60 * self._assignment.checkpoint_minutes
        if slice_.failure is None and (evaluated or due):
            self._save()
        return {"slice": slice_, "cost": self._cost, "banner": self._trial.banner, "notes": tracking.notes()}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Called when the sweep drains: the trial's own checkpoint is written, Ray's directory stays empty."""
        if self._trial is not None and self._trial.step > 0:
            self._save()
        self._leave("preempted", None)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A trial finds its newest checkpoint by itself, when it starts."""

    def conclude(self, state: tracking.State, reason: str | None) -> None:
        """The driver's word on how the trial ended."""
        self._leave(state, reason)

    def cleanup(self) -> None:
        self._leave("preempted", None)
        tracking.close(WAIT_SECONDS)

    def _enter(self) -> Trial:
        mine = self._assignment
        name = tracking.run_name(mine.number, mine.config, mine.searched)
        facts = {"trial": mine.number, "model": mine.job.model, "sweep": mine.tracking.group}
        self._run = tracking.start(mine.tracking, mine.run_id, name, mine.config.model_dump() | facts)
        module = importlib.import_module(f"trainables.{mine.trainable}")
        trial: Trial = module.start(mine.config, mine.job, checkpoint.newest(mine.directory))
        self._unreported = [e for e in trial.evaluations if e.evaluation > mine.reported]
        self._saved_as = (trial.step, len(trial.evaluations))
        return trial

    def _save(self) -> None:
        """Write a checkpoint; of the older ones only that of the best evaluation stays."""
        assert self._trial is not None
        state = (self._trial.step, len(self._trial.evaluations))
        if state != self._saved_as:
            written = checkpoint.write(
                self._assignment.directory, self._trial.step, self._trial.evaluations, self._trial.save
            )
            lowest = checkpoint.best(self._assignment.directory)
            checkpoint.prune(self._assignment.directory, {written.path, *([lowest.path] if lowest else [])})
        self._saved_as, self._saved = state, time.monotonic()

    def _leave(self, state: tracking.State, reason: str | None) -> None:
        """End the run and give the trial's memory back; nothing when that was done."""
        run, self._run = self._run, None
        trial, self._trial = self._trial, None
        if run is not None:
            tracking.finish(run, state, summary(trial, self._assignment.first_rung) | {"stop_reason": reason})
        if trial is not None:
            trial.close()


def summary(trial: Trial | None, first_rung: int) -> dict[str, Any]:
    """What W&B shows of a run in its table; nothing of a trial that could not be started."""
    if trial is None:
        return {}
    lowest = best(trial.evaluations)
    return {
        "best_eval_loss": lowest.loss if lowest else None,
        "best_step": lowest.step if lowest else None,
        "first_rung_eval_loss": next((e.loss for e in trial.evaluations if e.evaluation == first_rung), None),
        "budget_share": trial.step / trial.total_steps,
    }
