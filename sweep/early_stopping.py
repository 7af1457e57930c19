"""ASHA (Li et al. 2018, arXiv:1810.05934) as a function of the ledger, inside a small Ray scheduler.

On each validation loss the order is: report to the ledger, decide, act. A kill between any two of them leaves the
ledger true: what was reported but not decided is decided when the trial is adopted again.
"""

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from sweep.preemption import Drain
from sweep.study import ENDED_AS, Entry, Ledger
from trainables.protocol import Slice

BREAKDOWNS = 5
"""So many lost processes without a result between them end the sweep: the machine needs help, not more trials."""


def rungs(evaluations: int, grace: int, reduction: float) -> tuple[int, ...]:
    """Evaluations after which a trial may be stopped: grace x reduction^k, rounded up, the last evaluation excluded."""
    found: list[int] = []
    while (rung := ceil(grace * reduction ** len(found) - 1e-9)) < evaluations:
        found.append(rung)
    return tuple(found)


def loses(loss: float, others: Sequence[float], reduction: float) -> bool:
    """Whether a trial with this loss at a rung is outside the best 1/reduction of those that came there before it.

    `others` are their losses; the first to come is let through. The cut-off is the 1/reduction quantile, linearly
    interpolated, as in Ray's ASHAScheduler.
    """
    return bool(others) and loss > float(np.percentile(others, 100 / reduction))


def settle(ledger: Ledger, number: int, evaluations: int, rungs: Sequence[int], reduction: float) -> bool:
    """Decide on what the trial reported last and write the decision; True when the trial is over.

    `rungs` is empty when early stopping is off. A rung is decided once: what was let through stays so.
    """
    entry = ledger.entry(number)
    rung = entry.reported
    if rung >= evaluations:
        ledger.complete(number)
        return True
    if rung in rungs and rung > entry.promoted:
        others = ledger.losses_at(rung, without=number)
        if loses(entry.losses[rung], others, reduction):
            best = f"the best 1/{reduction:g} of {len(others) + 1}"
            ledger.stop(number, f"ASHA: {entry.losses[rung]:.4f} at evaluation {rung} is not among {best}")
            return True
        ledger.promote(number, rung)
    return False


class Listener(Protocol):
    """Who is told what happens (the terminal)."""

    def note(self, line: str) -> None:
        """Something that the user must know."""

    def resumed(self, entries: Sequence[Entry]) -> None:
        """The trials that the ledger has from earlier runs."""

    def started(self, entry: Entry) -> None:
        """The trial has been given to a process."""

    def advanced(self, entry: Entry, slice_: Slice) -> None:
        """A slice came in; `entry` has its evaluation already."""

    def ended(self, entry: Entry) -> None:
        """The ledger has the trial's end."""


class LedgerScheduler(FIFOScheduler):
    """Takes every result of every trial: report, decide, act. Has no state of its own that the ledger has not."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        settle: Callable[[int], bool],
        hand_out_again: Callable[[int], None],
        drain: Drain,
        listener: Listener,
    ) -> None:
        """`settle` decides on the newest report of a trial and says whether it is over."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._settle = settle
        self._hand_out_again = hand_out_again
        self._drain = drain
        self._breakdowns = 0  # since a trial last got on
        self._listener = listener

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number: int = trial.config["assignment"].number
        slice_: Slice = result["slice"]
        if slice_.evaluation is not None and slice_.failure is None:
            self._ledger.report(number, slice_.evaluation.evaluation, slice_.evaluation.loss)
        self._breakdowns = 0
        draining = self._drain()
        if slice_.evaluation is not None or slice_.done or draining:
            self._ledger.spend(number, result["cost"])
        over = slice_.evaluation is not None and slice_.failure is None and self._settle(number)
        if slice_.failure is not None:
            self._ledger.fail(number, slice_.failure)
            over = True
        entry = self._ledger.entry(number)
        for line in (result["banner"], *result["notes"]):
            self._listener.note(line)
        self._listener.advanced(entry, slice_)
        if over:
            # A call to the process rather than the end of the run there: the process serves the next trial, and only
            # the driver knows why this one ended.
            trial.temporary_state.ray_actor.conclude.remote(ENDED_AS[entry.state], entry.reason)
            self._listener.ended(entry)
            return TrialScheduler.STOP
        return TrialScheduler.PAUSE if draining else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A lost process or a refusing disk is not the configuration's fault: the trial is handed out again."""
        number: int = trial.config["assignment"].number
        cause = _cause(trial)
        reason = f"{type(cause).__name__}: {cause}".strip()
        if isinstance(cause, RayActorError | OSError):
            self._breakdowns += 1
            self._listener.note(f"trial {number:3d} lost its process, it goes on from its last checkpoint ({reason})")
            self._hand_out_again(number)
            if self._breakdowns >= BREAKDOWNS:
                self._drain.request("breakdown", f"{BREAKDOWNS} trials in a row broke down, the last with {reason}")
            return
        self._ledger.fail(number, reason)
        if trial.temporary_state.ray_actor is not None:
            trial.temporary_state.ray_actor.conclude.remote("failed", reason)
        self._listener.ended(self._ledger.entry(number))

    def choose_trial_to_run(self, tune_controller: Any, **kwargs: Any) -> Any:
        return None if self._drain() else super().choose_trial_to_run(tune_controller, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Ray writes its pieces to disk for a restore that is never used."""
        return {}


def _cause(trial: Any) -> Any:
    """The exception that ended a Ray trial, from the file that Ray has just written on this machine.

    Ray's own `get_pickled_error` looks in the storage, where the file arrives later.
    """
    if trial.pickled_error_file is None:
        return RuntimeError(f"no exception was recorded; Ray's files are in {trial.local_path}")
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return getattr(error, "cause", None) or error
