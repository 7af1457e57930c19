"""The Ray scheduler of a sweep: takes every result and every loss of a process, and has the ledger know it first.

On each validation loss the order is: report to the ledger, decide, act. A kill between any two of them leaves the
ledger true: what was reported but not decided is decided when the trial is adopted again.
"""

import errno
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import ray
from ray import cloudpickle, tune
from ray.exceptions import RayActorError, RayError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from sweep.engine import Engines, node_is_gone
from sweep.preemption import Drain
from sweep.repair import may_halve
from sweep.requests import BY_HAND, Requests
from sweep.study import ENDED_AS, Entry, Ledger
from sweep.trainable import SLICE_SECONDS, Failure, Lease
from trainables.protocol import Slice

BREAKDOWNS = 5
"""So many errors and lost processes without progress between them end the sweep: the machine needs help."""
ACCIDENTS = 8
"""So often a trial may break down in one run; two deaths for each of three halvings, and two more, are eight."""
ENGINE_SECONDS = 30.0
"""In this time all trials of an engine have told that it is lost."""
LOOK_SECONDS = 1.0
"""How often the cluster is asked which of its machines are taken away, and the sweep directory for requests."""
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class Listener(Protocol):
    """Who is told what happens (the terminal)."""

    def note(self, line: str) -> None:
        """Something that the user must know."""

    def resumed(self, entries: Sequence[Entry]) -> None:
        """The trials that the ledger has from earlier runs."""

    def verifying(self, trials: int) -> None:
        """The search is done; so many trials, numbered anew, verify its winner."""

    def started(self, entry: Entry) -> None:
        """The trial has been given to a process."""

    def advanced(self, entry: Entry, slice_: Slice) -> None:
        """A slice came in; `entry` has its evaluation already."""

    def ended(self, entry: Entry) -> None:
        """The ledger has the trial's end."""


def shielded(listener: Listener) -> Listener:
    """The listener, whose own troubles are said and end nothing."""

    def shield(listen: Callable[..., None]) -> Callable[..., None]:
        def told(*what: Any) -> None:
            try:
                listen(*what)
            except Exception as error:  # noqa: BLE001 - it is told; a sweep does not end for its display
                warnings.warn(f"the progress display failed: {type(error).__name__}: {error}", stacklevel=2)

        return told

    methods = ("note", "resumed", "verifying", "started", "advanced", "ended")
    return cast(Listener, SimpleNamespace(**{name: shield(getattr(listener, name)) for name in methods}))


class Watch(tune.Callback, tune.Stopper):
    """Kills processes that give no sign of life, sees machines that are taken away, and ends Tune's loop when the sweep
    has drained."""

    def __init__(self, drain: Drain, trial_timeout: float, *, alone: bool) -> None:
        """`alone`: the cluster is this machine, and nobody brings it back when Ray has ended here."""
        self._drain = drain
        self._alone = alone
        self._heard: dict[str, float] = {}  # Ray's trial id -> time.monotonic() of its newest sign of life
        self._told: set[str] = set()  # of which a result has come
        self._unsaved = 0
        self._drained: float | None = None  # time.monotonic() when the sweep was seen to drain
        self._looked = 0.0  # time.monotonic() when the cluster was last asked
        self.trial_timeout = trial_timeout
        self.silenced: set[str] = set()
        """Ray's ids of trials whose process was killed."""
        self.stranded: set[str] = set()
        """Ray's ids of trials of which nothing but the end of their engine is to be heard: it was killed, because
        nothing was heard of any of them."""
        self.draining: set[str] = set()
        """Nodes of the cluster that are being taken away."""
        self.engines: Engines | None = None
        """To be looked after, when trials share devices."""
        self.requests: Requests | None = None
        """To be acted on."""
        self.saving: list[ray.ObjectRef[str | None]] = []
        """Last checkpoints that are being written; each gives the reason when it could not be."""

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Ray writes its pieces to disk for a restore that is never used."""
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self._heard[trial.trial_id] = time.monotonic()
        self._told.add(trial.trial_id)
        self.stranded.discard(trial.trial_id)  # the scheduler has had the result

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self.draining = set(ray._private.state.state.get_draining_nodes())  # as Ray Train asks: no public way
            if self._alone and not any(node["Alive"] for node in ray.nodes()):
                self._drain.request("breakdown", "Ray has ended on this machine, and the trials with it")
            if self.engines is not None:
                try:
                    self.engines.look()
                except RuntimeError as error:
                    self._drain.request("breakdown", str(error))
            if self.requests is not None:
                self.requests.look({trial.config["assignment"].number for trial in trials if not trial.is_finished()})
        running = [trial for trial in trials if trial.status == "RUNNING"]
        for trial in running:
            self._heard.setdefault(trial.trial_id, now)
        for trial in running:
            if now - self._heard[trial.trial_id] > self.trial_timeout:
                self._end_silence(trial, running, now)
        if self._drained is None and self._drain():
            self._drained = now
        # A trial that has told nothing is in its first slice, or loads its model still: then there is nothing to save.
        patient = self._drained is None or now - self._drained < 2 * SLICE_SECONDS
        self._unsaved = sum(patient or trial.trial_id in self._told for trial in running)

    def _end_silence(self, trial: Any, running: Sequence[Any], now: float) -> None:
        """Kill what a silent trial hangs in: its engine, when nothing is heard of the others there (of those that have
        told something before: the rest may be loading); its process, when the engine works for others, or has been
        killed already; both, when there are no others."""
        engine, actor = trial.config["assignment"].engine, trial.temporary_state.ray_actor
        if trial.trial_id in self.silenced or actor is None:
            return
        sharing = [each for each in running if engine is not None and each.config["assignment"].engine == engine]
        others = [each.trial_id for each in sharing if each is not trial]
        newest = max((self._heard[each] for each in others if each in self._told), default=-math.inf)
        if others and now - newest > self.trial_timeout and trial.trial_id not in self.stranded:
            ray.kill(engine, no_restart=False)
            for each in (trial.trial_id, *others):
                self.stranded.add(each)
                self._heard[each] = now
        elif not others or now - newest < self.trial_timeout / 2 or trial.trial_id in self.stranded:
            self.silenced.add(trial.trial_id)
            ray.kill(actor)
            if engine is not None and not others:
                ray.kill(engine, no_restart=False)
        # Else it shows in a moment whether the others are silent, too.

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether Tune's loop may end; it would give the processes 10 seconds and then kill them."""
        if not self._drain() or self._unsaved:
            return False
        return not self.saving or not ray.wait(self.saving, num_returns=len(self.saving), timeout=0)[1]

    def unsaved(self) -> list[str]:
        """Why last checkpoints could not be written."""
        done = ray.wait(self.saving, num_returns=len(self.saving), timeout=0)[0] if self.saving else []
        said = []
        for each in done:
            with suppress(RayError):  # the process was lost meanwhile: it goes on from the checkpoint before
                said.append(ray.get(each))
        return [reason for reason in said if reason is not None]


class LedgerScheduler(FIFOScheduler):
    """Takes every result of every trial: report, decide, act. What must outlive it is in the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        settle: Callable[[int], bool],
        put_back: Callable[[int], None],
        drain: Drain,
        listener: Listener,
        lease: Lease,
        watch: Watch,
    ) -> None:
        """`settle` decides on the newest report of a trial and says whether it is over; `listener` is `shielded`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._settle = settle
        self._put_back = put_back
        self._drain = drain
        self._listener = listener
        self._lease = lease
        self._watch = watch
        self._breakdowns = 0  # since a trial last got on
        self._accidents: Counter[int] = Counter()  # of each trial, in this run
        self._engine_deaths: Counter[tuple[int, int]] = Counter()  # by trial and its newest evaluation, in this run
        self._engine_ended = -math.inf  # time.monotonic() when the loss of an engine was last counted
        self._made_fewer = -math.inf  # time.monotonic() when trials that share a device were last made fewer
        self._leaving: dict[int, str] = {}  # trials whose process was asked to end, and why

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number: int = trial.config["assignment"].number
        try:
            if result["slice"].evaluation is not None and self._displaced():
                return TrialScheduler.STOP
            decision = self._take(number, result, trial)
            entry = self._ledger.entry(number)
        except Exception as error:  # noqa: BLE001 - whatever the ledger's storage raises
            self._ledger_failed(error)
            return self._save(trial)
        for line in (*result["banner"].splitlines(), *result["notes"]):
            self._listener.note(line)
        self._listener.advanced(entry, result["slice"])
        if entry.state.is_finished():
            self._conclude(entry, trial)
        if decision == TrialScheduler.CONTINUE and self._drain():
            return self._save(trial)
        return decision

    def _take(self, number: int, result: dict[str, Any], trial: Any) -> str:
        """Write a result to the ledger and decide."""
        slice_: Slice = result["slice"]
        actor = trial.temporary_state.ray_actor
        if result["failure"] is not None:
            self._ledger.spend(number, result["cost"])
            again = self._failed(number, result["failure"], hung=trial.trial_id in self._watch.stranded)
            if again is None or self._drain():
                return TrialScheduler.STOP
            return self._send_away(number, actor, again, save=False)
        if result["halvings"] > self._ledger.entry(number).halvings:
            self._halve(number, result["halvings"], "ran out of memory")
        if slice_.evaluation is not None and slice_.failure is None:
            done = slice_.evaluation
            loss = None if done.score is None else done.loss
            self._ledger.report(number, done.evaluation, done.objective, loss)
        if slice_.steps or slice_.evaluation is not None:
            self._breakdowns = 0
        if slice_.evaluation is not None or slice_.done or self._drain():
            self._ledger.spend(number, result["cost"])
        if slice_.failure is not None:
            self._ledger.fail(number, slice_.failure)
            return TrialScheduler.STOP
        if slice_.evaluation is not None and self._settle(number):
            return TrialScheduler.STOP
        if slice_.done and slice_.evaluation is None:  # there are no validation rows to settle it by
            self._ledger.complete(number)
            return TrialScheduler.STOP
        if self._watch.requests is not None and number in self._watch.requests.to_stop:
            self._ledger.spend(number, result["cost"])
            self._ledger.stop(number, BY_HAND)
            return TrialScheduler.STOP
        if result["nodes"] & self._watch.draining and not self._drain():
            self._ledger.spend(number, result["cost"])
            return self._send_away(number, actor, "leaves a machine that is taken away", save=True)
        return TrialScheduler.CONTINUE

    def _send_away(self, number: int, actor: Any, why: str, *, save: bool) -> str:
        """Have the process of a trial end; when it is gone the trial is handed out again.

        Not before: two processes must not write into one directory.
        """
        self._leaving[number] = why
        actor.exit.remote(save)
        return TrialScheduler.CONTINUE

    def _displaced(self) -> bool:
        """Whether another driver has the sweep, as after a long pause of this machine: then nothing is written."""
        try:
            if self._lease.holds():
                return False
        except OSError:  # the object store does not answer; it will, and before that nobody can take anything over
            return False
        self._drain.request("breakdown", f"Another driver has taken over {self._lease.place.url}")
        return True

    def _save(self, trial: Any) -> str:
        """Have the process write a last checkpoint, for which `Watch` waits, and let go of it."""
        self._watch.saving.append(trial.temporary_state.ray_actor.save_and_leave.remote())
        return TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The process of a trial is lost: no fault of the configuration, it is handed out again."""
        number: int = trial.config["assignment"].number
        try:
            if self._displaced():
                return
            cause = _cause(trial)
            if number in self._leaving:
                self._hand_out_again(number, self._leaving.pop(number))
            elif trial.trial_id in self._watch.silenced:
                self._fell_silent(number)
            elif isinstance(cause, RayActorError):
                self._lost(number, cause)
            elif (again := self._failed(number, Failure.of(cause), hung=False)) is not None:
                self._hand_out_again(number, again)
            entry = self._ledger.entry(number)
        except Exception as error:  # noqa: BLE001 - whatever the ledger's storage raises
            self._ledger_failed(error)
            return
        if entry.state.is_finished():
            self._conclude(entry, trial)

    def _ledger_failed(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            self._disk_is_full(error.errno)
        else:
            self._drain.request("breakdown", f"The ledger cannot be written ({type(error).__name__}: {error})")

    def _disk_is_full(self, number: int) -> None:
        why = f"{os.strerror(number)}: {_where_space_went(self._lease.place.paths.root)}"
        self._drain.request("breakdown", why)

    def _conclude(self, entry: Entry, trial: Any) -> None:
        """Tell the process, if it lives, and the user how a trial ended.

        A call to the process rather than the end of the run there: the process serves the next trial, and only the
        driver knows why this one ended.
        """
        if trial.temporary_state.ray_actor is not None:
            trial.temporary_state.ray_actor.conclude.remote(ENDED_AS[entry.state], entry.reason)
        if self._watch.engines is not None:  # it may have no process, or wait for room
            self._watch.engines.forget(entry.number)
        self._listener.ended(entry)

    def _lost(self, number: int, cause: RayActorError) -> None:
        """A process died. Twice at the same place, for no reason that is known, is taken for the machine's memory."""
        reason = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        if cause.preempted or _machine_is_gone(cause):
            self._hand_out_again(number, f"lost its machine ({reason})")
        else:
            entry = self._ledger.died(number)
            here = entry.deaths.count(entry.reported)
            if here % 2:
                self._hand_out_again(number, f"lost its process ({reason})")
            elif may_halve(entry.config, entry.halvings):
                self._halve(number, entry.halvings + 1, f"lost its process {here} times at the same place")
                self._hand_out_again(number, f"lost its process ({reason})")
            else:
                rows = entry.config.micro_batch(entry.halvings)
                self._ledger.fail(number, f"its process died {here} times, the last time with a micro-batch of {rows}")
        self._broke_down(number, reason)

    def _fell_silent(self, number: int) -> None:
        reason = f"nothing was heard of it for {self._watch.trial_timeout:g} s"
        if self._ledger.silent(number).silences > 1:
            self._ledger.fail(number, f"{reason}, twice")
        else:
            self._hand_out_again(number, f"was killed: {reason}")
        self._broke_down(number, reason)

    def _failed(self, number: int, failure: Failure, *, hung: bool) -> str | None:
        """An exception: says why the trial is to be handed out again, None when it is not.

        A full disk ends the sweep, what else the machine is to blame for is tried again. `hung`: its engine was killed,
        for nothing was heard of it.
        """
        if failure.errno in DISK_FULL:
            self._disk_is_full(failure.errno)
            return None
        if failure.metric:
            self._drain.request("breakdown", f"{failure.reason}. Mend it; no trial is blamed")
            return None
        if failure.engine is not None:
            self._engine_lost(number, failure.reason, died=failure.engine == "died", hung=hung)
            if self._ledger.entry(number).state.is_finished():
                return None
            silence = f", of which nothing was heard for {self._watch.trial_timeout:g} s" if hung else ""
            return f"lost its engine{silence}"
        if not failure.environment:
            self._ledger.fail(number, failure.reason, failure.traceback)
        self._broke_down(number, failure.reason)
        return f"broke down ({failure.reason})" if failure.environment else None

    def _engine_lost(self, number: int, reason: str, *, died: bool, hung: bool) -> None:
        """All trials of an engine tell of its end; it counts once."""
        if died:
            here = (number, self._ledger.entry(number).reported)
            self._engine_deaths[here] += 1
            if self._engine_deaths[here] % 2 == 0:
                self._relieve(number, self._engine_deaths[here], hung=hung)
        now = time.monotonic()
        self._accidents[number] += 1
        if now - self._engine_ended > ENGINE_SECONDS or self._accidents[number] > ACCIDENTS:
            self._engine_ended = now
            self._accidents[number] -= 1
            self._broke_down(number, reason)

    def _relieve(self, number: int, ends: int, *, hung: bool) -> None:
        """An engine that died twice at the same place is taken for the machine's memory, as a process is.

        None of its trials is blamed while they are several: micro-batches are halved; where they are single rows, and
        where the engine `hung`, fewer trials share one.
        """
        entry, now, engines = self._ledger.entry(number), time.monotonic(), self._watch.engines
        assert engines is not None
        why = f"lost its engine {ends} times at the same place"
        if may_halve(entry.config, entry.halvings) and not hung:
            self._halve(number, entry.halvings + 1, why)
        elif not engines.shared(number):
            rows = entry.config.micro_batch(entry.halvings)
            self._ledger.fail(number, f"it {why}, the last time alone there, with a micro-batch of {rows}")
        elif now - self._made_fewer > ENGINE_SECONDS and (most := engines.fewer()) is not None:
            self._made_fewer = now
            self._breakdowns = 0  # this run has few such remedies
            self._accidents.clear()
            shared = f"{most} trials at most share an engine" if most > 1 else "each trial has an engine to itself"
            self._listener.note(f"trial {number:3d} {why}: from now on {shared}")

    def _halve(self, number: int, halvings: int, why: str) -> None:
        self._ledger.halve(number, halvings)
        rows = self._ledger.entry(number).config.micro_batch(halvings)
        self._listener.note(f"trial {number:3d} {why}: it goes on with a micro-batch of {rows}")

    def _hand_out_again(self, number: int, why: str) -> None:
        self._listener.note(f"trial {number:3d} {why}; it goes on from its last checkpoint")
        if self._watch.engines is not None:
            self._watch.engines.put_back(number)
        self._put_back(number)

    def _broke_down(self, number: int, reason: str) -> None:
        self._breakdowns += 1
        self._accidents[number] += 1
        if self._breakdowns >= BREAKDOWNS:
            self._drain.request("breakdown", f"{BREAKDOWNS} trials in a row broke down, the last with {reason}")
        if self._accidents[number] > ACCIDENTS:
            times = self._accidents[number]
            self._drain.request("breakdown", f"trial {number} broke down for the {times}th time, with {reason}")

    def choose_trial_to_run(self, tune_controller: Any, **kwargs: Any) -> Any:
        return None if self._drain() else super().choose_trial_to_run(tune_controller, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Ray writes its pieces to disk for a restore that is never used."""
        return {}


def _machine_is_gone(cause: RayActorError) -> bool:
    """Whether the node of a lost process is dead, or does not answer."""
    if cause.actor_id is None:
        return False
    return node_is_gone(ray._private.state.actors(cause.actor_id)["Address"]["NodeID"])


def _where_space_went(directory: Path) -> str:
    """What to free, when the disk of a sweep is full. What is there is intact, and the ledger is true."""
    sizes = {
        path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        for path in directory.iterdir()
        if path.is_dir()
    }
    used = ", ".join(f"{name} {size:,.1f} MB" for name, size in sorted(sizes.items(), key=lambda item: -item[1]))
    return f"free space on the disk of {directory} (it holds {used}); what was written is intact"


def _cause(trial: Any) -> Any:
    """The exception that ended a Ray trial, from the file that Ray has just written on this machine.

    Ray's own `get_pickled_error` looks in the storage, where the file arrives later.
    """
    if trial.pickled_error_file is None:
        return RuntimeError(f"no exception was recorded; Ray's files are in {trial.local_path}")
    error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return getattr(error, "cause", None) or error
