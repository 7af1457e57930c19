"""How many trials should go together, from what a step of theirs was measured to take (`packed.measure`).

A pass of n trials through the base takes F + c n seconds: F does not depend on how many share it, c is what each brings
along. So n of them together are n (F + c) / (F + c n) times as fast as one after the other, 1 + F / c times at most, as
long as they go in one pass.
"""

from dataclasses import dataclass

SHARE = 0.8
"""Of the highest gain: beyond, more trials bring little, and each is chosen knowing less of the others."""
LEAST_GAIN = 1.15
"""Below, trials have processes of their own, which need not wait for each other."""
MOST = 16
"""Trials together, at most."""


@dataclass(frozen=True)
class Measured:
    """What a step costs on a device, with the rows of the sweep."""

    fixed: float
    """Seconds of a step that do not depend on the number of trials, F."""
    each: float
    """Seconds that each trial adds, c."""
    room: int
    """Bytes that trials may use beside one base."""
    base: int
    """Bytes of a base."""
    of_trial: int
    """Bytes that a trial adds with the longest rows: adapter, optimiser and activations."""
    at_once: int = MOST
    """Trials that go through the base in one pass, at most."""

    def gain(self, together: int) -> float:
        """How many times as fast as one after the other so many are."""
        passes = -(-together // self.at_once)
        return together * (self.fixed + self.each) / (self.fixed * passes + self.each * together)


def slots(measured: Measured, bases: int, most: int) -> int:
    """How many trials should share a device, `most` at the most, when they are spread over so many bases.

    Trials of one base go together, so each base should have the number that brings `SHARE` of the highest gain. 1 when
    sharing does not pay.
    """
    highest = 1 + measured.fixed / measured.each
    wanted = next((n for n in range(1, MOST) if measured.gain(n) >= SHARE * highest), MOST)
    wanted = min(wanted, measured.at_once)  # those of a second pass share nothing with the first
    fit = (measured.room - (bases - 1) * measured.base) // max(1, measured.of_trial)
    chosen = max(1, min(wanted * bases, most, fit, MOST))
    return chosen if measured.gain(chosen // bases or 1) >= LEAST_GAIN else 1
