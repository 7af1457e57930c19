"""The Ray side of a trial: hands it time slices, writes its checkpoints, and logs what happened.

One process serves many trials, one after another; what they share (imports, the quantised base, tokens) stays warm.
"""

import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from traceback import format_exception
from typing import Any, Literal

import ray
from ray import tune

from sweep import tracking
from sweep.criterion import LOSS, Criterion
from sweep.engine import EngineGone, EngineLost, PackedTrial
from sweep.place import Place
from sweep.repair import may_halve
from sweep.scoring import MetricFault, objective_of
from trainables import checkpoint
from trainables.config import QLoRAConfig
from trainables.protocol import Cost, Evaluation, Job, NoRoomYet, OutOfMemory, Slice, Trial, loses_device

SLICE_SECONDS = 2.0
"""Wall clock of one call: short enough to look alive and to stop quickly, long enough that calls cost nothing."""
WAIT_SECONDS = 9.0
"""How long an ending process waits for W&B; Ray kills it after 10."""
ROOM_SECONDS = 2.0
"""Between two attempts to start a trial for which its engine has no room yet."""
ASK_SECONDS = 5.0
"""How often an object store is asked whether the driver still is the driver."""
COST = "cost.json"
"""File in a checkpoint: what the trial had used by then."""
NOTHING = Slice((), None, None, False, 0)


@dataclass(frozen=True)
class Lease:
    """The right of one driver's trials to write into the sweep directory; the next driver's lease replaces it."""

    place: Place
    text: str

    def holds(self) -> bool:
        return self.place.text(self.place.paths.lock_holder) == self.text  # None when the directory was moved away


@dataclass(frozen=True)
class Failure:
    """An exception in a trial, as plain values."""

    reason: str
    traceback: str
    errno: int | None
    """Of the operating system."""
    environment: bool
    """Whether files, network or memory of the machine are to blame rather than the configuration."""
    engine: Literal["died", "gone"] | None
    """What became of the engine, if that is why: it died, or its machine is gone."""
    metric: bool
    """Whether the user's metric is to blame, which would fail again."""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        metric = isinstance(error, MetricFault)
        reason = str(error) if metric else f"{type(error).__name__}: {error}".strip()
        engine: Literal["died", "gone"] | None = None
        if isinstance(error, EngineLost):
            engine = "gone" if isinstance(error, EngineGone) else "died"
        machine = loses_device(error) or isinstance(error, OSError | MemoryError | ImportError)
        environment = engine is not None or machine
        return cls(reason, "".join(format_exception(error)), getattr(error, "errno", None), environment, engine, metric)


@dataclass(frozen=True)
class Assignment:
    """One trial, as the driver hands it to a process."""

    number: int
    trainable: str
    """Module under `trainables`."""
    config: QLoRAConfig
    job: Job
    lease: Lease
    """On the sweep directory, with the trial's checkpoints."""
    reported: int
    """Newest evaluation that the ledger has, -1 when none."""
    cost: Cost
    """Of earlier attempts."""
    first_rung: int
    """Evaluation after which a trial may be stopped for the first time."""
    tracking: tracking.Tracking
    sweep_id: str
    searched: tuple[str, ...]
    """Hyperparameters that differ between trials."""
    checkpoint_minutes: float
    engine: Any
    """Handle of the engine (`sweep.engine`) that trains it; None when its own process does."""
    criterion: Criterion = LOSS
    """What it is compared by."""
    metric: str | None = None
    """Function that gives that, `package.module:function`, of what `job.completions` ask for; None for the loss."""
    metric_seconds: float = math.inf
    """How long that may take."""


class SlicedTrial(tune.Trainable):
    """Ray's view of a trial: `train` is one time slice."""

    def setup(self, config: dict[str, Any]) -> None:
        self._assignment: Assignment = config["assignment"]
        self._trial: Trial | None = None
        self._looked = False  # for what the trial goes on from
        self._found: checkpoint.Checkpoint | None = None
        self._waits = False  # until its engine has room
        self._run: tracking.Run | None = None
        self._banner = ""
        self._notes: list[str] = []
        self._evaluations: tuple[Evaluation, ...] = ()  # those of the trial, judged
        self._reported = self._assignment.reported
        self._unreported: list[Evaluation] = []
        self._cost = self._assignment.cost
        self._saved = time.monotonic()
        self._saved_as = (0, 0)
        self._place = self._assignment.lease.place
        self._directory = self._place.paths.trial(self._assignment.number)
        self._checked = time.monotonic()
        self._attempt: str | None = None
        self._attempt_file = self._directory / "attempt.txt"

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._leave("preempted", None)  # nothing to do for a trial that was concluded or paused
        untold = self._notes
        self.setup(new_config)
        self._notes = untold
        return True

    def step(self) -> dict[str, Any]:
        if not self._place.is_remote or time.monotonic() - self._checked > ASK_SECONDS:
            self._checked = time.monotonic()
            with suppress(OSError):  # the store does not answer: it is asked again before anything is written
                self._assert_lease()
        try:
            try:
                return self._told(self._advance())
            except OutOfMemory as error:
                reason = str(error)  # the error itself holds on to the tensors of its frames
            return self._told(self._make_room(reason))
        except NoRoomYet:
            self._note_waiting()
            time.sleep(ROOM_SECONDS)
            return self._told(NOTHING)
        except Exception as error:  # noqa: BLE001 - the driver decides; Tune ends the run on one it cannot unpickle
            return self._told(NOTHING) | {"failure": Failure.of(error)}

    def _assert_lease(self) -> None:
        """End this process when it has outlived its driver, or when the trial has been given to another one.

        The driver gives it away when it cannot reach this process, which may live on behind a broken network.
        """
        if not self._may_write():
            os._exit(1)

    def _may_write(self) -> bool:
        replaced = self._attempt is not None and self._place.text(self._attempt_file) != self._attempt
        return not replaced and self._assignment.lease.holds()

    def _told(self, slice_: Slice) -> dict[str, Any]:
        """What the driver gets to know of a slice."""
        notes = [*self._notes, *tracking.notes()]
        self._notes.clear()
        return {
            "slice": slice_,
            "cost": self._cost,
            "banner": self._banner,
            "notes": notes,
            "halvings": self._assignment.job.halvings,
            "nodes": self._nodes(),
            "failure": None,
        }

    def _nodes(self) -> set[str]:
        """Of the cluster, which the trial needs: that of this process and that of its engine."""
        engine = {self._trial.node} if isinstance(self._trial, PackedTrial) else set()
        return {ray.get_runtime_context().get_node_id()} | engine

    def _advance(self) -> Slice:
        if self._trial is None:
            self._trial = self._enter()
        due = False
        if self._unreported:
            evaluation, *self._unreported = self._unreported
            slice_ = Slice((), evaluation, None, self._trial.step == self._trial.total_steps, 0)
        else:
            slice_ = self._trial.advance(SLICE_SECONDS)
            due = time.monotonic() - self._saved >= 60 * self._assignment.checkpoint_minutes
            if due and slice_.evaluation is None:
                slice_ = slice_.followed_by(self._trial.hold())
            slice_ = self._judged(slice_)
            self._cost = self._cost.plus(slice_, self._elapsed())
        # Before the checkpoint: a kill between the two then repeats rows, which tracking knows, and loses none.
        self._log(slice_)
        if slice_.evaluation is not None:
            self._reported = slice_.evaluation.evaluation
        evaluated = slice_.evaluation is not None and slice_.evaluation.step > 0
        if slice_.failure is None and (evaluated or due or slice_.done):
            self._save()
        return slice_

    def _judged(self, slice_: Slice) -> Slice:
        """The slice with what its evaluation is compared by. A metric is called here, not in an engine, where other
        trials would wait for it.

        Raises MetricFault; then the evaluation is lost, and what led to it since the last checkpoint is done again.
        """
        evaluation, mine = slice_.evaluation, self._assignment
        if evaluation is None:
            return slice_
        if mine.metric is not None and slice_.failure is None:
            assert slice_.written is not None  # or its loss would be compared with values of the metric
            value = objective_of(mine.metric, mine.criterion.name, slice_.written, mine.metric_seconds)
            evaluation = replace(evaluation, score=mine.criterion.turned(value))
        self._evaluations += (evaluation,)
        return replace(slice_, evaluation=evaluation, written=None)

    def _log(self, slice_: Slice) -> None:
        assert self._run is not None
        tracking.log(self._run, slice_, self._assignment.criterion)

    def _make_room(self, reason: str) -> Slice:
        """The next slice goes on from here with the micro-batch halved or, where it must not be smaller, as soon as the
        engine has room for the trial."""
        assert self._trial is not None
        mine, job = self._assignment, self._assignment.job
        halves, packed = may_halve(mine.config, job.halvings), isinstance(self._trial, PackedTrial)
        if self._trial.step > 0 and (halves or packed):
            self._save()
        if halves:
            self._trial.close()
            self._assignment = replace(mine, job=replace(job, halvings=job.halvings + 1))
        elif isinstance(self._trial, PackedTrial) and self._trial.give_way():
            self._note_waiting()
        else:
            rows = mine.config.micro_batch(job.halvings)
            return Slice((), None, f"out of memory with a micro-batch of {rows}: {reason}", True, 0)
        self._trial, self._looked = None, False
        return NOTHING

    def _note_waiting(self) -> None:
        if not self._waits:
            number = self._assignment.number
            self._notes.append(f"trial {number:3d} does not fit into memory beside the others: it waits for room")
        self._waits = True

    def save_and_leave(self) -> str | None:
        """The sweep drains: write a checkpoint and end this attempt; gives the reason when that was not possible.

        Tune's own `save` would copy a directory to a storage that all machines must see.
        """
        reason = None
        try:
            if self._trial is not None:
                slice_ = self._judged(self._trial.hold())
                self._cost = self._cost.plus(slice_, self._elapsed())
                self._log(slice_)
                if self._trial.step > 0 and slice_.failure is None:
                    self._save()
        except (OSError, EngineLost, MetricFault) as error:  # the checkpoint before it is intact, and so is the ledger
            reason = f"trial {self._assignment.number}: no last checkpoint: {error}"
        self._leave("preempted", reason)
        return reason

    def exit(self, save: bool) -> None:
        """End the process and with it this attempt, so that the trial goes on in another one, maybe elsewhere."""
        if save:
            self.save_and_leave()
        self.cleanup()
        ray.actor.exit_actor()

    def conclude(self, state: tracking.State, reason: str | None) -> None:
        """The driver's word on how the trial ended."""
        self._leave(state, reason)

    def cleanup(self) -> None:
        self._leave("preempted", None)
        tracking.close(WAIT_SECONDS)

    def _enter(self) -> Trial:
        mine = self._assignment
        if not self._looked:
            self._place.pull_file(self._place.paths.spec)  # makes this copy one that `sweep.sync` knows
            self._place.claim(mine.sweep_id)
            self._begin_attempt()
            self._place.pull_log(self._directory / tracking.ROWS)
            self._place.pull_checkpoints(self._directory)
        try:
            if not self._looked:  # else there was no room, and nothing has changed
                self._found, self._looked = checkpoint.newest(self._directory, self._notes.append), True
            found = self._found
            if found is not None:
                # The driver may not have got to know of the slice that led there.
                costs = mine.cost, Cost(**json.loads((found.path / COST).read_text()))
                self._cost = max(costs, key=lambda cost: (cost.steps, cost.tokens))
            trial = self._start(found)
        finally:  # also of a trial that cannot start; one that is killed while it loads leaves no run behind
            self._run = self._run or self._record()
        if found is not None:
            self._notes.append(f"trial {mine.number:3d} goes on from step {found.step}")
        self._waits = False
        self._banner = trial.banner
        self._evaluations = trial.evaluations
        self._unreported = [e for e in trial.evaluations if e.evaluation > self._reported]
        self._counted = time.monotonic()
        self._saved_as = (trial.step, len(trial.evaluations))
        return trial

    def _elapsed(self) -> float:
        """Seconds since this was called last, or the trial was ready."""
        before, self._counted = self._counted, time.monotonic()
        return self._counted - before

    def _start(self, found: checkpoint.Checkpoint | None) -> Trial:
        mine = self._assignment
        if mine.engine is not None:
            return PackedTrial(mine.engine, mine.number, mine.config, self._job(), found, self._notes)
        module = importlib.import_module(f"trainables.{mine.trainable}")
        trial: Trial = module.start(mine.config, self._job(), found)
        return trial

    def _begin_attempt(self) -> None:
        """From here on no earlier process of this trial writes into its directory."""
        self._attempt = secrets.token_hex(8)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._attempt_file.write_text(self._attempt)
        self._place.push(self._attempt_file)

    def _job(self) -> Job:
        """The job with its tokens on this machine."""
        job = self._assignment.job
        if not job.tokens:
            return job
        tokens = self._place.paths.tokens / Path(job.tokens).name
        self._place.pull_directory(tokens)
        return replace(job, tokens=str(tokens))

    def _record(self) -> tracking.Run:
        mine = self._assignment
        name = tracking.run_name(mine.number, mine.config, mine.searched)
        config = tracking.run_config(mine.number, mine.config, mine.job.model, mine.tracking.group)
        here = replace(mine.tracking, directory=str(self._place.paths.tracking))
        run_id = tracking.run_id(mine.sweep_id, mine.number)
        return tracking.start(here, run_id, name, config, self._directory, self._place.push)

    def _save(self) -> None:
        """Write a checkpoint; of the older ones stay that of the best evaluation and, should this one get damaged, the
        one before it."""
        assert self._trial is not None
        state = (self._trial.step, len(self._evaluations))
        if state != self._saved_as:
            written = checkpoint.write(self._directory, self._trial.step, self._evaluations, self._write)
            lowest = checkpoint.best(self._directory)
            kept = (written.path, checkpoint.before(written), lowest.path if lowest else None)
            self._assert_lease()
            checkpoint.prune(self._directory, {path for path in kept if path is not None})
            self._place.push(self._directory / tracking.ROWS)
            self._place.push(written.path, confirm=self._assert_lease)
            self._place.prune(self._directory)
        self._saved_as, self._saved = state, time.monotonic()

    def _write(self, directory: Path) -> None:
        """Write the checkpoint's files; it gets its name only as long as this process may write at all."""
        assert self._trial is not None
        self._trial.save(directory)
        (directory / COST).write_text(json.dumps(asdict(self._cost)))
        self._assert_lease()

    def _leave(self, state: tracking.State, reason: str | None) -> None:
        """End the run and give the trial's memory back; nothing when that was done."""
        run, self._run = self._run, None
        trial, self._trial = self._trial, None
        self._looked = False
        if run is not None:
            facts = {} if trial is None else _summary(trial, self._evaluations, self._assignment)
            tracking.finish(run, state, facts | {"stop_reason": reason})
            try:
                if self._place.is_remote and self._may_write():
                    self._place.push(self._directory / tracking.ROWS)
            except OSError as error:
                self._notes.append(f"{self._place.url} did not take the last rows of a trial: {error}")
        if trial is not None:
            trial.close()


def _summary(trial: Trial, evaluations: Sequence[Evaluation], assignment: Assignment) -> dict[str, Any]:
    """What W&B shows of a run in its table. `evaluations` are those of the trial, judged."""
    whole, done = assignment.job.budget.evaluations, max((each.evaluation for each in evaluations), default=0)
    return tracking.summary(
        {each.evaluation: each.objective for each in evaluations},
        {each.evaluation: each.loss for each in evaluations},
        {each.evaluation: each.step for each in evaluations},
        assignment.first_rung,
        done / whole if whole else trial.step / trial.total_steps,
        assignment.criterion,
    )
