"""How many trials share a device, given what a step was measured to take."""

import pytest

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
    ],
)
def test_slots(step, bases, most, expected):
    assert slots(step, bases, most) == expected


def test_gain():
    """Eight steps, one after the other, against one of eight."""
    step = measured(0.7, 0.3)
    assert step.gain(1) == 1
    assert step.gain(8) == pytest.approx(8 * (0.7 + 0.3) / (0.7 + 8 * 0.3))
