"""ASHA (Li et al. 2018, arXiv:1810.05934) as a function of the ledger."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from sweep.spec import EarlyStopping
from sweep.study import Ledger


def rungs(evaluations: int, grace: int, reduction: float) -> tuple[int, ...]:
    """Evaluations after which a trial may be stopped: grace x reduction^k, rounded up, the last evaluation excluded."""
    found: list[int] = []
    while (rung := ceil(grace * reduction ** len(found) - 1e-9)) < evaluations:
        found.append(rung)
    return tuple(found)


def survivors(trials: int, evaluations: int, rule: EarlyStopping | None) -> list[float]:
    """Trials that are expected to reach evaluation 1, 2, …, when they come to each rung of ASHA in random order.

    A budget without evaluations is a single part.
    """
    stops = rungs(evaluations, rule.grace, rule.reduction) if rule else ()
    expected, left = [], float(trials)
    for evaluation in range(1, max(evaluations, 1) + 1):
        expected.append(left)
        if rule and evaluation in stops:
            left = _let_through(left, rule.reduction)
    return expected


def _let_through(trials: float, reduction: float) -> float:
    """How many of the trials that come to a rung `loses` lets go on, on average.

    The first does. The k-th is compared with k - 1, below whose quantile it is with a probability of (1 + (k - 2) /
    reduction) / k if objectives are spread evenly there: of n that is 1 + (n - 1) / reduction + (1 - 2 / reduction)
    (1/2 + … + 1/n), more than the 1/reduction of them that a rung keeps that waits for all.
    """
    if trials <= 1:
        return trials
    whole = int(trials)
    fractions = sum(1 / k for k in range(2, whole + 1)) + (trials - whole) / (whole + 1)
    return 1 + (trials - 1) / reduction + (1 - 2 / reduction) * fractions


def loses(objective: float, others: Sequence[float], reduction: float) -> bool:
    """Whether a trial with this objective at a rung is outside the best 1/reduction of those that came there before it.

    `others` are their objectives; the first to come is let through. The cut-off is the 1/reduction quantile, linearly
    interpolated, as in Ray's ASHAScheduler.
    """
    return bool(others) and objective > float(np.percentile(others, 100 / reduction))


def settle(ledger: Ledger, number: int, evaluations: int, rungs: Sequence[int], reduction: float) -> bool:
    """Decide on what the trial reported last and write the decision; True when the trial is over.

    `rungs` is empty when early stopping is off. A rung is decided once: what was let through stays so.
    """
    entry = ledger.entry(number)
    rung = entry.reported
    if rung >= evaluations:
        ledger.complete(number)
        return True
    if rung in rungs and rung > entry.promoted:
        others = ledger.objectives_at(rung, without=number)
        if loses(entry.objectives[rung], others, reduction):
            best = f"the best 1/{reduction:g} of {len(others) + 1}"
            mine = entry.criterion.text(entry.objectives[rung])
            ledger.stop(number, f"ASHA: {mine} at evaluation {rung} is not among {best}")
            return True
        ledger.promote(number, rung)
    return False
