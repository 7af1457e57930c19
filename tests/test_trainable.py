"""The process of a trial whose memory runs out, without Ray: a toy in the place of what an engine trains."""

from unittest.mock import Mock

import pytest

from sweep import tracking, trainable
from sweep.engine import PackedTrial
from sweep.place import Place
from sweep.trainable import NOTHING, Assignment, Lease, SlicedTrial
from trainables import checkpoint
from trainables.config import QLoRAConfig
from trainables.protocol import Budget, Cost, Job, NoRoomYet, Trial


@pytest.fixture
def process(tmp_path) -> SlicedTrial:
    """Of a trial that has taken a step since its last checkpoint, with a micro-batch of one row."""
    place = Place(str(tmp_path))
    place.paths.lock_holder.write_text("me")
    place.paths.spec.write_text("name: toy")
    tracked = tracking.Tracking("p", None, "toy", "disabled", str(place.paths.tracking))
    config, job = QLoRAConfig(batch_size=1), Job("", "", Budget(None, 60, 2))
    mine = Assignment(0, "toy", config, job, Lease(place, "me"), -1, Cost(), 1, tracked, "abcd", (), 5.0, engine=None)
    made = object.__new__(SlicedTrial)
    made.setup({"assignment": mine})
    made._trial = made._enter()
    made._trial.advance(0.0)
    return made


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(SlicedTrial, "_nodes", lambda self: {"here"})


def packed(trial: Trial, gives_way: bool) -> PackedTrial:
    """The same trial, as one of an engine."""
    made = object.__new__(PackedTrial)
    same = {name: getattr(trial, name) for name in ("step", "evaluations", "total_steps", "banner", "save", "close")}
    vars(made).update(same, give_way=lambda: gives_way)
    return made


def test_one_that_gave_way_waits_and_goes_on_from_there(process, monkeypatch):
    step = process._trial.step
    assert step > 0
    assert checkpoint.newest(process._directory) is None
    process._trial = packed(process._trial, gives_way=True)
    assert process._make_room("CUDA out of memory") is NOTHING
    assert process._notes == ["trial   0 does not fit into memory beside the others: it waits for room"]
    looks, newest = [], checkpoint.newest
    monkeypatch.setattr(trainable.checkpoint, "newest", lambda *given: looks.append(1) or newest(*given))

    def full(found):
        raise NoRoomYet("it does not fit beside the trials that are here")

    with monkeypatch.context() as context:
        context.setattr(process, "_start", full)
        for _ in range(3):
            with pytest.raises(NoRoomYet):
                process._advance()
    slice_ = process._advance()
    assert slice_.steps[0].step == step + 1
    assert len(looks) == 1  # checksums of gigabytes


@pytest.mark.usefixtures("no_ray")
def test_one_that_cannot_start_beside_others_says_once_that_it_waits(process, monkeypatch):
    process._trial, process._looked = None, False
    monkeypatch.setattr(trainable, "ROOM_SECONDS", 0.0)
    with monkeypatch.context() as context:
        context.setattr(process, "_start", Mock(side_effect=NoRoomYet("full")))
        told = [process.step()["notes"] for _ in range(3)]
    assert told == [["trial   0 does not fit into memory beside the others: it waits for room"], [], []]
    assert process.step()["slice"].steps


@pytest.mark.parametrize("in_engine", [True, False])
def test_one_that_does_not_fit_even_alone_has_failed(process, in_engine):
    if in_engine:
        process._trial = packed(process._trial, gives_way=False)
    failed = process._make_room("CUDA out of memory")
    assert failed.failure == "out of memory with a micro-batch of 1: CUDA out of memory"
    assert failed.done
