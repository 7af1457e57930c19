"""Engines: processes that hold the base and take many trials further together, one for each device.

A trial keeps its own process (Ray's view of it, checkpoints, W&B), which needs no torch; the training is the engine's.
"""

import importlib
import math
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from trainables.checkpoint import Checkpoint
from trainables.config import QLoRAConfig
from trainables.protocol import Evaluation, Forgotten, Job, Slice, Started, loses_device

CALLER_CPUS = 0.01
"""CPU cores that the process of a packed trial is counted with."""
START_SECONDS = 60.0
"""How long an engine may take to come back; where no machine has room for it, it never does."""
COMING_SECONDS = 60.0
"""How long one that was never seen to run gets its share of the trials: it may just be starting."""
FIRST_SECONDS = 300.0
"""How long it may take to start: from a disk that is cold, or far away, imports take minutes."""
CALLER_BYTES = 250_000_000
"""About what the process of a packed trial holds."""
REACH_SECONDS = 1.0
"""How soon a machine answers that lives."""
LOOK_SECONDS = 3.0
"""How often a machine is asked; longer than a slice of a trial, whose answer says as much."""


class EngineLost(Exception):
    """The engine has died, or has forgotten the trial, as when it came back: no fault of the trial."""


class EngineGone(EngineLost):
    """Its machine is gone, or there is no room for it on any: no fault of the engine either."""


class EngineProcess:
    """`trainables.packed.engine.Engine` as a Ray actor."""

    def __init__(self, threads: int) -> None:
        self._engine = importlib.import_module("trainables.packed.engine").Engine(threads)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._engine, method)(*arguments)

    @ray.method(max_task_retries=2)
    def check(self, model: str, layers: Sequence[tuple[str, ...]], bf16: bool) -> None:
        """See `check`."""
        check(model, layers, bf16)

    def node(self) -> str:
        """Of the cluster, on which it runs."""
        node: str = ray.get_runtime_context().get_node_id()
        return node


def check(model: str, layers: Sequence[tuple[str, ...]], bf16: bool) -> None:
    """What only torch can tell, which the driver does without: whether the names of `layers` are names of the model's,
    whether it finds the GPU that this process was given, if any, and with `bf16` whether that computes in bf16.

    Raises ValueError or OSError, and says what is wrong.
    """
    models = importlib.import_module("trainables.model")
    models.check_device()
    if bf16:
        models.check_compute_dtype("bf16")
    models.check_target_modules(model, layers)


class Engines:
    """The engines of a sweep, and which of them has which trial."""

    def __init__(
        self, engines: Iterable[Any], slots: int, draining: Callable[[], set[str]], note: Callable[[str], None]
    ) -> None:
        """`slots` are those of each, at first; `draining` gives the nodes that are being taken away."""
        self._engines = list(engines)
        self._slots = slots
        self._draining = draining
        self._note = note
        self._looked = -math.inf  # time.monotonic()
        self._nodes: dict[int, str] = {}  # where each was last seen
        self._down: dict[int, float] = {}  # time.monotonic() since when each does not run
        self._lost: set[int] = set()
        self._places: dict[int, int] = {}  # of trials
        self._away: set[int] = set()  # those of them that are to be handed out again
        self._shared: set[int] = set()  # those that have not been alone there since they were handed out

    def look(self) -> None:
        """See which of them are lost: the machine is gone, or going, or no machine has room for them.

        To be called all the time: of a machine that has ended Ray soon knows no more that an engine was there.
        Raises RuntimeError when all are dead for good, as when their imports fail.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        states = [_state(engine) for engine in self._engines]
        if all(state == "DEAD" for state, _ in states):
            raise RuntimeError("no engine can be started; Ray's logs, in the directory of its session, say why")
        waited = len(self._lost) == len(self._engines)
        self._lost.clear()
        for i, (state, node) in enumerate(states):
            if state == "ALIVE":
                self._down.pop(i, None)
            since = now if state == "ALIVE" else self._down.setdefault(i, now)
            if state == "ALIVE" or node in self._draining() or node_is_gone(node):
                self._nodes[i] = node
            last = self._nodes.get(i)
            machine = last is not None and (last in self._draining() or node_is_gone(last))
            if machine or state == "DEAD" or now - since > (START_SECONDS if state == "RESTARTING" else FIRST_SECONDS):
                self._lost.add(i)
        if len(self._lost) == len(self._engines) and not waited:
            self._note("No machine is left that trials can share: the sweep waits until one has room for them")

    def ready(self, running: int) -> bool:
        """Whether one that is not lost has room for another trial than those that run."""
        self.look()
        return running < self._slots * (len(self._engines) - len(self._lost))

    def choose(self, number: int, running: Sequence[int]) -> Any:
        """The engine with the fewest of the running trials that is not lost; each forgets the trials that it has no
        longer.

        One that was not seen to run in a minute is the last choice: the cluster may have no room for it.
        """
        self.look()
        now = time.monotonic()
        unseen = {i for i, since in self._down.items() if i not in self._nodes and now - since > COMING_SECONDS}
        here = [other for other in running if other != number and other in self._places and other not in self._away]
        loads = Counter(self._places[other] for other in here)
        chosen = min(
            range(len(self._engines)),
            key=lambda i: (i in self._lost, loads[i] >= self._slots, i in unseen, loads[i]),
        )
        for other, where in list(self._places.items()):
            if other not in running or (other == number and where != chosen):
                self.forget(other)
        company = [other for other in here if self._places[other] == chosen]
        self._places[number] = chosen
        self._away.discard(number)
        self._shared.discard(number)
        if company:
            self._shared.update(company, [number])
        return self._engines[chosen]

    def put_back(self, number: int) -> None:
        """The trial has lost its process, or its engine, and is to be handed out again."""
        self._away.add(number)

    def shared(self, number: int) -> bool:
        """Whether its engine had other trials, too, at any time since the trial was last handed out."""
        return number in self._shared

    def forget(self, number: int) -> None:
        """Have the engine of a trial end it, if it has it still; not when the trial may come back there at once."""
        where = self._places.pop(number, None)
        if where is not None and where not in self._down:  # one that starts again has none
            self._engines[where].call.remote("forget", number)

    def fewer(self) -> int | None:
        """Have half as many trials share each from now on as did; gives how many, None when it is one already."""
        if self._slots == 1:
            return None
        most = max(Counter(self._places.values()).values(), default=self._slots)
        self._slots = -(-min(self._slots, most) // 2)
        return self._slots

    def end(self) -> None:
        """End them all, so that others get their devices."""
        for each in self._engines:
            ray.kill(each)


def _state(engine: Any) -> tuple[str, str]:
    """Of an engine: what Ray says of it (`ALIVE`, `RESTARTING`, …), and the node on which it runs, is being started, or
    waits for room. Empty while Ray cannot say."""
    try:
        known = ray._private.state.actors(engine._actor_id.hex())
    except RayError:
        known = {}
    return known.get("State", ""), known.get("Address", {}).get("NodeID", "")


def node_is_gone(node_id: str) -> bool:
    """Whether a node of the cluster is dead, or does not answer: Ray itself takes up to half a minute to see that.

    False while Ray cannot say.
    """
    try:
        nodes = ray.nodes()
    except RayError:
        return False
    for node in nodes:
        if node["NodeID"] == node_id:
            if not node["Alive"]:
                return True
            try:
                socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), REACH_SECONDS).close()
            except OSError:
                return True
    return False


def launch(cpus: float, gpus: float, slots: int) -> Any:
    """An engine for so many trials that ends with this process and comes back when it dies."""
    actor: Any = ray.remote(EngineProcess)
    options = actor.options(
        num_cpus=max(0.0, cpus - slots * CALLER_CPUS),
        num_gpus=gpus,
        max_concurrency=2 * slots + 8,
        max_restarts=-1,
    )
    return options.remote(max(1, int(cpus)))


class PackedTrial:
    """See `protocol.Trial`: one that lives in an engine. Raises `EngineLost` when that does not have it any more, and
    `NoRoomYet` when it cannot start beside others."""

    def __init__(
        self, engine: Any, number: int, config: QLoRAConfig, job: Job, checkpoint: Checkpoint | None, notes: list[str]
    ) -> None:
        """`notes` get what the engine has to say."""
        self._engine = engine
        self._key = secrets.token_hex(8)
        self._notes = notes
        self.node = ""
        self._seen = began = time.monotonic()  # when it was last known to run
        while True:
            try:
                started: Started = self._call("start", number, config, job, checkpoint, patient=True)
                self.node = self._answer(engine.node.remote(), patient=False)
                break
            except EngineGone:
                raise
            except EngineLost:  # another one is being started
                if time.monotonic() - began > START_SECONDS or _state(engine)[0] == "DEAD":
                    raise
                time.sleep(1)
        self.total_steps = started.total_steps
        self.step = started.step
        self.evaluations: tuple[Evaluation, ...] = started.evaluations
        self.banner = started.banner

    def advance(self, seconds: float) -> Slice:
        slice_, notes = self._call("advance", seconds)
        self._notes += notes
        return self._noted(slice_)

    def hold(self) -> Slice:
        return self._noted(self._call("hold"))

    def save(self, directory: Path) -> None:
        self._call("save", directory)

    def give_way(self) -> bool:
        """See `trainables.packed.engine.Engine.give_way`."""
        gave: bool = self._call("give_way")
        return gave

    def close(self) -> None:
        with suppress(EngineLost):
            self._call("close")

    def _noted(self, slice_: Slice) -> Slice:
        self.step += len(slice_.steps)
        if slice_.evaluation is not None:
            self.evaluations += (slice_.evaluation,)
        return slice_

    def _call(self, method: str, *arguments: Any, patient: bool = False) -> Any:
        return self._answer(self._engine.call.remote(method, self._key, *arguments), patient)

    def _answer(self, asked: Any, patient: bool) -> Any:
        """What comes of a call. `patient`: the engine may be starting.

        Ray itself holds a call back until the engine runs, be it for ever, and a process that waits for one cannot end.
        """
        missed = 0
        while not ray.wait([asked], timeout=LOOK_SECONDS)[0]:
            state, node = _state(self._engine)
            now = time.monotonic()
            if state in ("ALIVE", ""):
                self._seen = now
            missed = missed + 1 if node_is_gone(node) or node_is_gone(self.node) else 0
            limit = (START_SECONDS if state == "RESTARTING" else FIRST_SECONDS) if patient else 0.0
            if missed > 1 or (now - self._seen > limit and not missed):  # once may be a lost packet
                ray.cancel(asked)
                if missed or patient:
                    raise EngineGone("the machine of its engine is gone, or there is none with room for it")
                raise EngineLost("its engine died")
        try:
            return ray.get(asked)
        except RayTaskError as error:
            if isinstance(error.cause, Forgotten) or loses_device(error.cause):
                raise EngineLost(str(error.cause)) from None
            raise error.cause from error
        except RayActorError as error:
            gone = node_is_gone(_state(self._engine)[1]) or node_is_gone(self.node)
            raise (EngineGone if gone else EngineLost)(str(error).splitlines()[0]) from None
