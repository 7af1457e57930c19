"""How long a sweep will take yet, by hand."""

import pytest

from sweep.early_stopping import survivors
from sweep.forecast import duration, forecast
from sweep.spec import EarlyStopping
from tests.ledgers import add_trial, memory_ledger
from trainables.protocol import Cost

RULE = EarlyStopping(grace=1, reduction=3)


def begun(ledger, evaluations: int, seconds: float) -> int:
    """A running trial that came so far in so many seconds."""
    number = add_trial(ledger)
    for evaluation in range(1, evaluations + 1):
        ledger.report(number, evaluation, 2.0)
    ledger.spend(number, Cost(elapsed=seconds))
    return number


def test_nothing_is_said_that_is_not_known():
    ledger = memory_ledger()
    assert forecast([], 4, 4, None).seconds is None
    number = begun(ledger, 0, 7.0)
    ledger.report(number, 0, 5.0)  # the base
    ahead = forecast(ledger.entries(), 4, 4, None)
    assert (ahead.share, ahead.seconds, ahead.of_trial) == (0.0, None, {})
    ledger.fail(begun(ledger, 2, 9.0), "diverged")
    ledger.fail(number, "diverged")
    assert forecast(ledger.entries(), 4, 4, None).seconds is None  # how many go on at a time?
    ahead = forecast(ledger.entries(), 2, 4, None)
    assert (ahead.share, ahead.seconds) == (1.0, 0.0)


def test_from_what_evaluations_took():
    ledger = memory_ledger()
    ledger.complete(begun(ledger, 4, 40.0))
    slow, new = begun(ledger, 2, 40.0), begun(ledger, 0, 0.0)
    ahead = forecast(ledger.entries(), 4, 4, None, {slow: 15.0})
    mean = 80 / 6
    assert ahead.of_trial == {slow: pytest.approx(2 * 20 - 15), new: pytest.approx(4 * mean)}
    assert ahead.seconds == pytest.approx((2 * 20 - 15 + 4 * mean + 4 * mean) / 2)  # two at a time, one to come
    assert ahead.share == 6 / 16
    alone = forecast(ledger.entries(), 3, 4, None)
    assert alone.seconds == pytest.approx(max(2 * 20, 4 * mean))
    assert forecast(ledger.entries(), 3, 4, None, {slow: 99.0}).of_trial[slow] == 0.0


def test_without_evaluations_only_the_end_is_known():
    ledger = memory_ledger()
    number = begun(ledger, 0, 7.0)
    ahead = forecast(ledger.entries(), 1, 0, None)
    assert (ahead.share, ahead.seconds, ahead.of_trial) == (0.0, None, {})
    ledger.complete(number)
    assert forecast(ledger.entries(), 1, 0, None).seconds == 0.0


def test_early_stopping_ends_most():
    """Of 27 trials 10.6 go on after the first of nine evaluations, and 4.9 after the third."""
    ledger = memory_ledger()
    number = begun(ledger, 1, 10.0)
    ahead = forecast(ledger.entries(), 27, 9, RULE)
    assert ahead.of_trial == {number: 80.0}  # if nothing stops it
    ladder = survivors(27, 9, RULE)
    assert [round(each, 1) for each in ladder] == [27, 10.6, 10.6, *[4.9] * 6]
    rest = 10 * sum(ladder[1:]) / ladder[1]
    assert ahead.seconds == pytest.approx(rest + 26 * 10 * sum(ladder) / 27)
    assert forecast(ledger.entries(), 1, 9, None).seconds == 80.0


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (7000, "1.9 h"), (2e5, "2.3 d")],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown
