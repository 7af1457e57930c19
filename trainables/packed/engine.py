"""Many trials in one process, taken further together: one thread works, the others ask.

Everything that touches trials or their bases happens in that thread, between two turns, so it needs no lock, and what
is attached, saved or closed is so at an optimiser step. Between two calls of `advance` a trial goes on by itself up to
its next evaluation: only there somebody has to decide whether it may.
"""

import itertools
import math
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from trainables import qlora_sft
from trainables.checkpoint import Checkpoint
from trainables.config import QLoRAConfig
from trainables.model import base
from trainables.packed.base import Base
from trainables.packed.measure import measure
from trainables.packed.slots import Measured
from trainables.protocol import Forgotten, Job, NoRoomYet, OutOfMemory, Slice, Started, loses_device
from trainables.qlora_sft import QLoRATrial, turn

T = TypeVar("T")

TELLING_SECONDS = 1.0
"""How long a process that cannot go on lives yet, so that callers get to know why."""


@dataclass
class Member:
    """A trial of the engine."""

    number: int
    trial: QLoRATrial
    running: bool = False
    """Whether it may go on."""
    asked: "Future[tuple[Slice, list[str]]] | None" = None
    """Who waits for its news."""
    deadline: float = 0.0
    """When they get them, `time.monotonic()`."""
    error: Exception | None = None
    crowd: int = 0
    """Members of the engine when that happened."""
    turn: int = 0
    """The last one that it was part of."""

    @property
    def goes_on(self) -> bool:
        return self.running and self.error is None and not self.trial.over and self.trial.new_evaluation is None


class Engine:
    """Its methods may be called by many threads; each waits until the work is done."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads` of the CPU for the arithmetic; torch's own choice unless given."""
        self._threads = threads
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._members: dict[str, Member] = {}
        self._notes: list[str] = []
        self._most: WeakKeyDictionary[Base, int] = WeakKeyDictionary()  # trials that fit into memory together
        self._gave_way: dict[int, int] = {}
        """Trials that did not fit beside others, by number, and how many may be here with each, it included."""
        self._refused: dict[int, Set[int]] = {}
        """Trials that could not be started beside these others."""
        self._turns = itertools.count(1)
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def load(self, model: str, config: QLoRAConfig) -> None:
        """Have the base of trials that are to come in memory, as `model.base` does."""
        self._called(lambda: base(model, config.quant_type, config.compute_dtype, config.double_quant))

    def measure(self, config: QLoRAConfig, rows: int, job: Job) -> Measured:
        """See `measure.measure`; before any trial."""
        return self._called(lambda: measure(config, rows, job))

    def start(self, key: str, number: int, config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None) -> Started:
        """See `qlora_sft.start`. The trial is called `key` from now on; an earlier attempt at `number` ends.

        Raises `NoRoomYet` when there is no room beside other trials.
        """

        def call() -> Started:
            self._close(lambda member: member.number == number)
            present = {member.number for member in self._members.values()}
            if not self._may_try(number, present):
                raise NoRoomYet("it does not fit beside the trials that are here")
            full = None
            try:
                trial = qlora_sft.start(config, job, checkpoint)
            except MemoryError as error:
                if not present:
                    raise
                full = str(error)  # the error itself holds on to the tensors of its frames
            if full is not None:
                self._refused[number] = present
                raise NoRoomYet(full)
            assert isinstance(trial, QLoRATrial)
            self._refused.pop(number, None)
            self._members[key] = Member(number, trial)
            self._most.clear()
            return Started(trial.total_steps, trial.step, trial.evaluations, trial.banner)

        return self._called(call)

    def _may_try(self, number: int, present: Set[int]) -> bool:
        """Whether a trial may be started beside those that are here: not while all are here beside which that has
        failed, not beside one that needs more room, and not before one that has given way."""
        if not present:
            return True
        if number in self._refused and self._refused[number] <= present:
            return False
        waiting = [other for other in self._gave_way if other not in present]
        most = min((self._gave_way[other] for other in {*present, number} & self._gave_way.keys()), default=math.inf)
        return len(present) < most and waiting[:1] in ([], [number])

    def advance(self, key: str, seconds: float) -> tuple[Slice, list[str]]:
        """What happened since the last call, after about `seconds` or at the end of an evaluation; and notes.

        Raises `OutOfMemory` when a step of the trial does not fit into memory even by itself.
        """
        future: Future[tuple[Slice, list[str]]] = Future()

        def call() -> None:
            member = self._member(key)
            member.running, member.asked, member.deadline = True, future, time.monotonic() + seconds

        self._called(call)
        return future.result()

    def hold(self, key: str) -> Slice:
        """Have the trial wait for the next `advance`; what happened since the last one."""

        def call() -> Slice:
            member = self._member(key)
            member.running = False
            return member.trial.news()

        return self._called(call)

    def save(self, key: str, directory: Path) -> None:
        """See `protocol.Trial`; the trial must be held or have told of an evaluation."""
        self._called(lambda: self._member(key).trial.save(directory))

    def give_way(self, key: str) -> bool:
        """Close a trial that did not fit beside the others, to be started again when there is room for it.

        False, and nothing is done, when it was alone: then it does not fit at all.
        """

        def call() -> bool:
            member = self._member(key)
            if member.crowd == 1:
                return False
            if len(self._members) >= member.crowd:  # else others have left meanwhile, and it may try again at once
                self._gave_way[member.number] = member.crowd - 1
            self._close(lambda each: each is member)
            return True

        return self._called(call)

    def close(self, key: str) -> None:
        """End the trial, if it is there."""

        def call() -> None:
            if key in self._members:
                self._end(self._members[key].number)

        self._called(call)

    def forget(self, number: int) -> None:
        """End the trial of this number, if it is there or waits: the process that asked for it may have been killed."""
        self._called(lambda: self._end(number))

    def _end(self, number: int) -> None:
        self._gave_way.pop(number, None)
        self._refused.pop(number, None)
        self._close(lambda member: member.number == number)

    def _member(self, key: str) -> Member:
        if key not in self._members:
            raise Forgotten("the engine does not have the trial any more")
        return self._members[key]

    def _called(self, call: Callable[[], T]) -> T:
        """Have the worker call, between two turns."""
        future: Future[T] = Future()

        def answer() -> None:
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)  # it is the caller's
                if loses_device(error):
                    raise

        self._calls.put(answer)
        return future.result()

    def _close(self, ends: Callable[[Member], bool]) -> None:
        for key in [key for key, member in self._members.items() if ends(member)]:
            member = self._members.pop(key)
            self._most.clear()
            if member.asked is not None:
                member.asked.set_exception(Forgotten(f"trial {member.number} was closed"))
            member.trial.close()

    def _work(self) -> None:
        try:
            self._work_on()
        except BaseException as error:  # noqa: BLE001 - nobody would answer any more: callers learn that
            traceback.print_exc()
            for member in self._members.values():
                if member.asked is not None:
                    member.asked.set_exception(error)
            time.sleep(TELLING_SECONDS)
            os._exit(1)

    def _work_on(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # of this thread; Ray allows one when a process has less than a core
        while True:
            waiting = not any(member.goes_on for member in self._members.values())
            for call in self._pending(waiting):
                call()
            group = self._group()
            if group:
                self._turn(group)
            self._deliver()

    def _pending(self, wait: bool) -> Iterator[Callable[[], None]]:
        """Calls that have come; with `wait`, at least one."""
        if wait:
            yield self._calls.get()
        for _ in range(self._calls.qsize()):  # not those that come meanwhile: trials are to get their turns
            yield self._calls.get()

    def _group(self) -> list[Member]:
        """The members that go on of one base, of each base in turn, as many as fit together."""
        by_base: dict[Base, list[Member]] = {}
        for member in self._members.values():
            if member.goes_on:
                by_base.setdefault(member.trial.base, []).append(member)
        if not by_base:
            return []
        next_one = min(by_base, key=lambda each: max(member.turn for member in by_base[each]))
        group = sorted(by_base[next_one], key=lambda member: member.turn)  # those that waited longest
        return group[: self._most.get(next_one, len(group))]

    def _turn(self, group: Sequence[Member]) -> None:
        number = next(self._turns)
        for member in group:
            member.turn = number
        try:
            turn([member.trial for member in group])
            return
        except OutOfMemory as error:
            failure: Exception = OutOfMemory(str(error))  # the error itself holds on to the tensors of its frames
        except Exception as error:  # it is the trial's, whose process decides
            if loses_device(error):
                raise
            failure = error.with_traceback(None)
        if len(group) == 1:
            group[0].error, group[0].crowd = failure, len(self._members)
        elif isinstance(failure, OutOfMemory):
            half = -(-len(group) // 2)
            self._most[group[0].trial.base] = half
            self._notes.append(f"{len(group)} trials do not fit into memory together: {half} at a time")
        else:
            self._notes.append(f"{type(failure).__name__} in a step of {len(group)} trials: each takes it alone")
            for member in group:
                if member.goes_on:  # a step that it took before the error may have been its last
                    self._turn([member])

    def _deliver(self) -> None:
        for member in self._members.values():
            asked = member.asked
            if asked is None or (member.goes_on and time.monotonic() < member.deadline):
                continue
            member.asked = None
            if member.error is not None and not member.trial.new_steps:
                error, member.error, member.running = member.error, None, False
                asked.set_exception(error)
            else:
                news = member.trial.news()
                member.running = member.running and news.evaluation is None
                notes, self._notes = self._notes, []
                asked.set_result((news, notes))
