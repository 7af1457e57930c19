"""ASHA as a function of the ledger, against Ray's ASHAScheduler as the oracle."""

import random
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from sweep.criterion import Criterion
from sweep.early_stopping import loses, rungs, settle
from tests.ledgers import add_trial, memory_ledger


@pytest.mark.parametrize(
    ("evaluations", "grace", "reduction", "expected"),
    [
        (9, 1, 3, (1, 3)),
        (10, 1, 3, (1, 3, 9)),
        (9, 2, 2, (2, 4, 8)),
        (1, 1, 3, ()),
        (5, 5, 2, ()),
        (8, 1, 1.5, (1, 2, 3, 4, 6)),
    ],
)
def test_rungs(evaluations, grace, reduction, expected):
    assert rungs(evaluations, grace, reduction) == expected


@pytest.mark.parametrize(
    ("loss", "others", "reduction", "expected"),
    [
        (9.0, [], 3, False),  # the first to come is let through
        (1.0, [2.0], 3, False),
        (3.0, [2.0], 3, True),
        (1.5, [1.0, 2.0, 3.0, 4.0], 4, False),
        (1.8, [1.0, 2.0, 3.0, 4.0], 4, True),  # the cut-off is 1.75, interpolated
    ],
)
def test_cut_off(loss, others, reduction, expected):
    assert loses(loss, others, reduction) is expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("evaluations", "grace", "reduction"), [(9, 1, 3), (16, 2, 2), (10, 1, 4), (12, 1, 1.7)])
def test_same_decisions_as_ray(seed, evaluations, grace, reduction):
    """Twenty trials reporting in a random interleaving are stopped where Ray's scheduler stops them."""
    dice = random.Random(seed)
    ledger = memory_ledger()
    oracle = ASHAScheduler(
        time_attr="evaluation",
        metric="loss",
        mode="min",
        max_t=evaluations,
        grace_period=grace,
        reduction_factor=reduction,
    )
    curves = {}
    for _ in range(20):
        number = add_trial(ledger)
        floor = dice.random()
        curves[number] = [floor + 1 / (k + 1) + 0.1 * dice.random() for k in range(evaluations)]
    rays = {number: SimpleNamespace(trial_id=str(number)) for number in curves}
    for trial in rays.values():
        oracle.on_trial_add(None, trial)
    running, stopped = dict.fromkeys(curves, 0), set()
    while running:
        number = dice.choice(list(running))
        running[number] += 1
        evaluation = running[number]
        loss = curves[number][evaluation - 1]
        ledger.report(number, evaluation, loss)
        over = settle(ledger, number, evaluations, rungs(evaluations, grace, reduction), reduction)
        decision = oracle.on_trial_result(None, rays[number], {"evaluation": evaluation, "loss": loss})
        assert over == (decision == TrialScheduler.STOP)
        if over:
            del running[number]
            if ledger.entry(number).state is TrialState.PRUNED:
                stopped.add(number)
    assert 0 < len(stopped) < 20


def test_a_rung_is_decided_once():
    """What was let through stays so, whatever comes in later; what was not decided yet is decided on adoption."""
    ledger = memory_ledger()
    early, late = add_trial(ledger), add_trial(ledger)
    ledger.report(early, 1, 5.0)
    assert not settle(ledger, early, 9, (1, 3), 3)
    ledger.report(late, 1, 1.0)
    assert not settle(ledger, early, 9, (1, 3), 3)  # an adopted trial is not asked again at its rung
    undecided = add_trial(ledger)
    ledger.report(undecided, 1, 7.0)  # killed before the decision
    assert settle(ledger, undecided, 9, (1, 3), 3)
    assert ledger.entry(undecided).state is TrialState.PRUNED
    assert "7.0000 at evaluation 1" in ledger.entry(undecided).reason


def test_of_a_value_that_is_maximised_the_lower_ones_are_stopped():
    ledger = memory_ledger()
    ledger.compare_by(Criterion("share", maximized=True))
    high, low = add_trial(ledger), add_trial(ledger)
    for number, share, loss in ((high, 0.9, 2.0), (low, 0.5, 1.0)):
        ledger.report(number, 1, ledger.criterion.turned(share), loss)
    assert not settle(ledger, high, 9, (1, 3), 3)
    assert settle(ledger, low, 9, (1, 3), 3)
    assert ledger.entry(low).reason == "ASHA: 0.5 at evaluation 1 is not among the best 1/3 of 2"


def test_without_early_stopping_every_trial_completes():
    ledger = memory_ledger()
    for loss in (1.0, 2.0, 3.0):
        number = add_trial(ledger)
        for evaluation in (1, 2, 3):
            ledger.report(number, evaluation, loss)
            assert settle(ledger, number, 3, (), 1.0) == (evaluation == 3)
        assert ledger.entry(number).state is TrialState.COMPLETE
        assert ledger.entry(number).trial.value == loss
