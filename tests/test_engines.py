"""Which engine gets a trial. What Ray knows of engines and nodes is made up here; tests/faults has it for real."""

from types import SimpleNamespace

import pytest
import ray

from sweep import engine
from sweep.engine import Engines


class World:
    """Engines a, b, … on nodes of these names."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forgotten: list[tuple[str, int]] = []
        self.starting: dict[str, str] = {}  # and where, as Ray has it
        self.other = "PENDING_CREATION"
        self.dead: set[str] = set()
        self.gone: set[str] = set()
        self.draining: set[str] = set()
        self.names = "abc"[:count]
        monkeypatch.setattr(ray._private.state, "actors", self.known)
        monkeypatch.setattr(engine, "node_is_gone", lambda node: node in self.gone)
        monkeypatch.setattr(engine, "LOOK_SECONDS", 0.0)
        self.notes: list[str] = []
        self.engines = Engines(map(self.handle, self.names), 2, lambda: self.draining, self.notes.append)

    def known(self, name: str) -> dict[str, object]:
        return {
            "State": "DEAD" if name in self.dead else self.other if name in self.starting else "ALIVE",
            "Address": {"NodeID": self.starting.get(name, name)},
        }

    def handle(self, name: str) -> SimpleNamespace:
        forget = SimpleNamespace(remote=lambda method, number: self.forgotten.append((name, number)))
        return SimpleNamespace(name=name, _actor_id=SimpleNamespace(hex=lambda: name), call=forget)

    def choose(self, number: int, running: list[int]) -> str:
        return self.engines.choose(number, running).name


@pytest.fixture
def world(monkeypatch):
    return World(2, monkeypatch)


def test_the_one_with_the_fewest(world):
    assert [world.choose(n, list(range(n + 1))) for n in range(4)] == ["a", "b", "a", "b"]
    assert world.choose(4, [1, 2, 3, 4]) == "a"  # where trial 0 has ended
    assert world.forgotten == [("a", 0)]


def test_a_trial_that_comes_back_is_forgotten_where_it_was(world):
    assert world.choose(0, [0]) == "a"
    world.gone = {"a"}
    assert world.choose(0, [0]) == "b"
    assert world.forgotten == [("a", 0)]
    assert world.choose(0, [0]) == "b"
    assert world.forgotten == [("a", 0)]  # there it is to be started anew, which ends the attempt before


def test_fewer_share_each_than_did(world):
    assert [world.engines.ready(running) for running in (1, 2, 3)] == [True, True, True]
    for number in range(3):
        world.choose(number, [0, 1, 2])
    world.engines._slots = 8
    assert world.engines.fewer() == 1
    assert [world.engines.ready(running) for running in (1, 2, 3)] == [True, False, False]
    assert world.engines.fewer() is None


def test_one_that_has_ended_is_forgotten_once(world):
    assert [world.choose(n, [0, 1]) for n in range(2)] == ["a", "b"]
    for _ in range(2):
        world.engines.forget(0)
    world.engines.forget(7)
    assert world.forgotten == [("a", 0)]
    world.starting = {"b": "b"}  # it has none any more, and might be told after the trial came back
    world.engines.look()
    world.engines.forget(1)
    assert world.forgotten == [("a", 0)]


def test_who_was_alone_in_an_engine_since_it_was_handed_out(world):
    assert [world.choose(n, list(range(n + 1))) for n in range(3)] == ["a", "b", "a"]
    assert [world.engines.shared(n) for n in range(3)] == [True, False, True]
    for number in (0, 2):
        world.engines.put_back(number)
    assert [world.engines.shared(n) for n in range(3)] == [True, False, True]
    assert world.choose(2, [0, 1, 2]) == "a"
    assert [world.engines.shared(n) for n in range(3)] == [True, False, False]


@pytest.mark.parametrize("trouble", ["gone", "draining"])
def test_machines_that_go_get_none(world, trouble):
    assert [world.engines.ready(running) for running in (0, 3, 4)] == [True, True, False]
    setattr(world, trouble, {"a"})
    assert [world.choose(n, list(range(n + 1))) for n in range(2)] == ["b", "b"]
    assert [world.engines.ready(running) for running in (0, 1, 2)] == [True, True, False]
    assert world.notes == []
    setattr(world, trouble, {"a", "b"})
    assert [world.engines.ready(0) for _ in range(2)] == [False] * 2
    assert [note.partition(":")[0] for note in world.notes] == ["No machine is left that trials can share"]
    setattr(world, trouble, {"b"})
    assert world.engines.ready(0)


def test_one_that_does_not_come_is_the_last_choice(world, monkeypatch):
    """The cluster may have no room for it; while it may just be starting it gets its share."""
    world.starting = {"a": "driver"}
    assert [world.choose(n, list(range(n + 1))) for n in range(2)] == ["a", "b"]
    monkeypatch.setattr(engine, "COMING_SECONDS", 0.0)
    assert [world.choose(n, list(range(n + 1))) for n in range(3)] == ["b", "b", "a"]
    assert world.engines.ready(3)


def test_one_whose_machine_went_while_it_started(world):
    world.starting, world.gone = {"a": "a"}, {"a"}
    assert not world.engines.ready(2)
    world.starting = {"a": "driver"}  # there is nowhere to start it again
    assert not world.engines.ready(2)


def test_one_that_starts_again_is_waited_for(world):
    assert [world.choose(n, [0, 1]) for n in range(2)] == ["a", "b"]
    world.starting = {"a": "driver"}
    assert world.choose(2, [1, 2]) == "a"


@pytest.mark.parametrize("state", ["RESTARTING", "PENDING_CREATION"])
def test_one_that_has_no_room_for_long_is_no_room_for_trials(world, monkeypatch, state):
    world.other = state
    assert [world.choose(n, [0, 1]) for n in range(2)] == ["a", "b"]
    world.starting = {"a": "driver"}
    assert world.engines.ready(3)
    monkeypatch.setattr(engine, "START_SECONDS" if state == "RESTARTING" else "FIRST_SECONDS", 0.0)
    assert not world.engines.ready(2)
    assert world.choose(2, [1, 2]) == "b"
    world.starting = {}
    assert world.engines.ready(3)


def test_one_that_cannot_be_started_gets_none(world):
    world.dead = {"a"}
    assert [world.choose(n, list(range(n + 1))) for n in range(2)] == ["b", "b"]
    assert not world.engines.ready(2)
    world.dead = {"a", "b"}
    with pytest.raises(RuntimeError, match="no engine can be started"):
        world.engines.ready(0)


@pytest.mark.parametrize(("gone", "raised"), [(True, "EngineGone"), (False, "EngineLost")])
def test_a_call_to_one_that_has_died(monkeypatch, gone, raised):
    """Another is being started: the machine is blamed only when it is gone."""
    trial = object.__new__(engine.PackedTrial)
    vars(trial).update(_engine=None, _seen=0.0, node="there")
    monkeypatch.setattr(engine, "_state", lambda handle: ("RESTARTING", "there"))
    monkeypatch.setattr(engine, "node_is_gone", lambda name: gone)
    monkeypatch.setattr(engine, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([], asked))
    cancelled = []
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    with pytest.raises(engine.EngineLost) as found:
        trial._answer("asked", patient=False)
    assert found.type.__name__ == raised
    assert cancelled == ["asked"]


@pytest.mark.parametrize(
    ("state", "node", "limit"),
    [("ALIVE", "gone", None), ("RESTARTING", "here", "START_SECONDS"), ("PENDING_CREATION", "here", "FIRST_SECONDS")],
)
def test_a_trial_does_not_wait_for_ever(monkeypatch, state, node, limit):
    """And takes its call back, for a process that waits for one cannot end."""
    looks, cancelled = [], []
    handle = SimpleNamespace(call=SimpleNamespace(remote=lambda method, *_: method))
    monkeypatch.setattr(engine, "_state", lambda handle: (state, node))
    monkeypatch.setattr(engine, "node_is_gone", lambda name: name == "gone")
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: looks.append(timeout) or ([], asked))
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    if limit:
        monkeypatch.setattr(engine, limit, 0.0)
    with pytest.raises(engine.EngineGone):
        engine.PackedTrial(handle, 0, None, None, None, [])
    assert cancelled == ["start"]
    assert len(looks) == (1 if limit else 2)  # a packet may be lost
