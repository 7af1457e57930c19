"""How many trials share a device, given what a step was measured to take."""

from dataclasses import asdict, replace

import pytest

from sweep import packing
from sweep.spec import load
from tests import sweeps
from tests.ledgers import memory_ledger
from trainables.packed.slots import MOST, Measured, slots

GB = 10**9


def measured(fixed: float, each: float, room: int = 80 * GB, base: int = GB, of_trial: int = GB) -> Measured:
    return Measured(fixed, each, room, base, of_trial)


@pytest.mark.parametrize(
    ("step", "bases", "most", "expected"),
    [
        (measured(0.7, 0.32), 1, 100, 9),  # one row a step on two cores
        (measured(0.7, 2.6), 1, 100, 1),  # eight rows: 1.12 times as fast for two
        (measured(1.0, 1.0), 1, 100, 4),  # 1.6 of 2
        (measured(1.0, 1.0), 2, 100, 8),  # four in each base
        (measured(1.0, 1.0), 2, 5, 5),
        (measured(1.0, 1.0), 4, 7, 1),  # one in each base
        (measured(0.11, 0.0005), 1, 100, MOST),
        (measured(0.11, 0.0005), 1, 3, 3),
        (measured(0.11, 0.0005), 1, 1, 1),
        (measured(0.11, 0.0005, room=5 * GB), 1, 100, 5),
        (measured(0.11, 0.0005, room=5 * GB), 2, 100, 4),  # the second base takes the place of a trial
        (measured(0.11, 0.0005, room=-GB), 1, 100, 1),
        (measured(0.11, 0.0005, of_trial=0), 1, 100, MOST),
        (measured(0.0, 1.0), 1, 100, 1),
        (replace(measured(1.0, 0.1), at_once=3), 1, 100, 3),  # else 16
        (replace(measured(1.0, 0.1), at_once=3), 2, 100, 6),
        (replace(measured(1.0, 0.1), at_once=1), 1, 100, 1),
    ],
)
def test_slots(step, bases, most, expected):
    assert slots(step, bases, most) == expected


def test_gain():
    """Eight steps, one after the other, against one of eight."""
    step = measured(0.7, 0.3)
    assert step.gain(1) == 1
    assert step.gain(8) == pytest.approx(8 * (0.7 + 0.3) / (0.7 + 8 * 0.3))
    in_two = replace(step, at_once=4)
    assert in_two.gain(4) == step.gain(4)
    assert in_two.gain(8) == pytest.approx(step.gain(4))


@pytest.mark.parametrize(
    ("gpus", "places", "trials", "slots", "expected"),
    [
        (1, 4, 3, 8, 3),
        (1, 4, 20, 8, 4),
        (2, 2, 1, 8, 1),
        (0.25, 4, 4, 4, 1),  # parts of one GPU: each would have a base of its own
        (0, 2, 6, 4, 2),
        (0, 16, 16, 16, 1),
        (0, 2, 12, 1, 2),
        (0, 2, 12, 4, 2),
    ],
)
def test_processes(gpus, places, trials, slots, expected):
    assert packing.processes(gpus, places, trials, slots) == expected


@pytest.fixture
def tiny_space(inputs, tmp_path):
    file = tmp_path / "tiny.yaml"
    rows = f"{{train: {inputs}/train.jsonl, validation: {inputs}/validation.jsonl}}"
    file.write_text(sweeps.TOY.replace("trainable: toy", f"model: {inputs}/llama\ndata: {rows}"))
    return file


@pytest.mark.parametrize(
    ("settings", "left", "fixed", "launched"),
    [
        (["packing.slots=3"], 8, None, 3),
        (["packing.slots=3"], 0, None, None),  # nothing is left to do
        (["packing.slots=1"], 8, None, None),
        (["packing=auto", "search.trials=12", "space.quant_type=nf4", "resources={}"], 12, None, MOST),  # to measure
        (["packing=auto", "search.trials=12", "space.quant_type=nf4", "resources={}"], 12, 1.0, MOST),
        (
            ["packing=auto", "search.trials=12", "space.quant_type=nf4", "resources={}"],
            12,
            0.0,
            None,
        ),  # it does not pay
        (["packing=auto", "search.trials=3", "resources={}"], 3, None, None),  # too few
    ],
)
def test_an_engine_is_started_ahead_where_trials_may_share_it(tiny_space, monkeypatch, settings, left, fixed, launched):
    started = []
    monkeypatch.setattr(packing, "launch", lambda cpus, gpus, slots: started.append(slots))
    monkeypatch.setattr(packing.ray, "cluster_resources", dict)
    spec, ledger = load(tiny_space, settings), memory_ledger()
    if fixed is not None:
        ledger.note("packing", {"on": packing._device(spec), "measured": asdict(measured(fixed, 0.1))})
    packing.ahead(spec, ledger, left, [1])
    assert started == ([] if launched is None else [launched])


@pytest.mark.parametrize(
    ("settings", "left", "chosen", "of_use"),
    [
        (["packing.slots=2"], 8, 2, True),
        (["packing.slots=2"], 0, 2, False),
        (["packing.slots=1"], 8, 1, False),
        (["packing=auto", "search.trials=12"], 1, 1, False),
    ],
)
def test_an_engine_that_was_started_ahead_for_nothing_ends(tiny_space, monkeypatch, settings, left, chosen, of_use):
    """As when what was left of an earlier run was stopped by hand meanwhile: its device is needed by others."""
    ended = []
    monkeypatch.setattr(packing.ray, "kill", ended.append)
    found = packing.slots(load(tiny_space, settings), None, memory_ledger(), left, [1], "engine", lambda: False, print)
    assert found == (chosen, "engine" if of_use else None)
    assert ended == ([] if of_use else ["engine"])
