"""Engines: processes that hold the base and take many trials further together, one for each device.

A trial keeps its own process (Ray's view of it, checkpoints, W&B), which needs no torch; the training is the engine's.
"""

import importlib
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from trainables.checkpoint import Checkpoint
from trainables.config import QLoRAConfig
from trainables.protocol import Evaluation, Forgotten, Job, Slice, Started

CALLER_CPUS = 0.01
"""CPU cores that the process of a packed trial is counted with."""
START_SECONDS = 60.0
"""How long an engine may take to come back; where no machine has room for it, it never does."""
CALLER_BYTES = 250_000_000
"""About what the process of a packed trial holds."""
REACH_SECONDS = 1.0
"""How soon a machine answers that lives."""
LOOK_SECONDS = 2.0
"""How often a machine is asked."""


class EngineLost(Exception):
    """The engine has died, or has forgotten the trial, as when it came back: no fault of the trial."""


class EngineProcess:
    """`trainables.packed.engine.Engine` as a Ray actor."""

    def __init__(self, threads: int) -> None:
        self._engine = importlib.import_module("trainables.packed.engine").Engine(threads)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._engine, method)(*arguments)

    def node(self) -> str:
        """Of the cluster, on which it runs."""
        node: str = ray.get_runtime_context().get_node_id()
        return node


class Engines:
    """The engines of a sweep, and which of them has which trial."""

    def __init__(self, engines: Iterable[Any], slots: int, draining: Callable[[], set[str]]) -> None:
        """`slots` are those of each; `draining` gives the nodes that are being taken away."""
        self._engines = list(engines)
        self._slots = slots
        self._draining = draining
        self._nodes: dict[int, str] = {}  # where each was last seen
        self._gone: dict[str, tuple[float, bool]] = {}  # by node: time.monotonic() of the answer, and the answer
        self._places: dict[int, int] = {}  # of trials

    def ready(self, running: int) -> bool:
        """Whether one has room for another trial than those that run: not one whose machine is gone, or going."""
        return running < self._slots * sum(not self._lost(i) for i in range(len(self._engines)))

    def choose(self, number: int, running: Sequence[int]) -> Any:
        """The engine with the fewest of the running trials, on a machine that stays; each forgets the trials that it
        has no longer.

        One that was never seen to run is the last choice: the cluster may have no room for it.
        """
        loads = Counter(self._places[other] for other in running if other != number and other in self._places)
        chosen = min(
            range(len(self._engines)),
            key=lambda i: (self._lost(i), loads[i] >= self._slots, i not in self._nodes, loads[i]),
        )
        for other, where in list(self._places.items()):
            if other not in running or (other == number and where != chosen):
                self._engines[where].call.remote("forget", other)
                del self._places[other]
        self._places[number] = chosen
        return self._engines[chosen]

    def _lost(self, i: int) -> bool:
        """Whether its machine is gone, or going; one that is being started, again perhaps, is not lost."""
        state, node = _state(self._engines[i])
        if state == "ALIVE" or self._is_gone(node):
            self._nodes[i] = node
        last = self._nodes.get(i)
        return last is not None and (last in self._draining() or self._is_gone(last))

    def _is_gone(self, node: str) -> bool:
        now = time.monotonic()
        asked, gone = self._gone.get(node, (-LOOK_SECONDS, False))
        if now - asked >= LOOK_SECONDS:
            gone = node_is_gone(node)
            self._gone[node] = time.monotonic(), gone
        return gone


def _state(engine: Any) -> tuple[str, str]:
    """Of an engine: what Ray says of it (`ALIVE`, `RESTARTING`, …), and the node on which it runs or is being started;
    while none has room for it, that of the driver."""
    known = ray._private.state.actors(engine._actor_id.hex())
    return known["State"], known["Address"]["NodeID"]


def node_is_gone(node_id: str) -> bool:
    """Whether a node of the cluster is dead, or does not answer: Ray itself takes up to half a minute to see that."""
    for node in ray.nodes():
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
        began = time.monotonic()
        while True:
            try:
                started: Started = self._call("start", number, config, job, checkpoint, patience=START_SECONDS)
                self.node: str = self._answer(engine.node.remote(), 0.0)
                break
            except EngineLost:  # another one is being started, where there is room for it
                if time.monotonic() - began > START_SECONDS or self._machine_is_gone():
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

    def close(self) -> None:
        with suppress(EngineLost):
            self._call("close")

    def _noted(self, slice_: Slice) -> Slice:
        self.step += len(slice_.steps)
        if slice_.evaluation is not None:
            self.evaluations += (slice_.evaluation,)
        return slice_

    def _call(self, method: str, *arguments: Any, patience: float = 0.0) -> Any:
        """See `_answer`."""
        return self._answer(self._engine.call.remote(method, self._key, *arguments), patience)

    def _answer(self, asked: Any, patience: float) -> Any:
        """What comes of a call; an engine that is being started again may take `patience` seconds for it.

        Ray itself holds a call back until the engine is there again, be it for ever, and a process that waits for one
        cannot end.
        """
        lived = time.monotonic()
        while not ray.wait([asked], timeout=LOOK_SECONDS)[0]:
            now = time.monotonic()
            if _state(self._engine)[0] != "RESTARTING":
                lived = now
            if self._machine_is_gone() or now - lived > patience:
                ray.cancel(asked)
                raise EngineLost("the engine is gone, or its machine")
        try:
            return ray.get(asked)
        except RayTaskError as error:
            if isinstance(error.cause, Forgotten):
                raise EngineLost(str(error.cause)) from None
            raise error.cause from error
        except RayActorError as error:
            raise EngineLost(str(error).splitlines()[0]) from None

    def _machine_is_gone(self) -> bool:
        return node_is_gone(_state(self._engine)[1])
