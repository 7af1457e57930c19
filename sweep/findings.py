"""What a sweep found, in numbers: functions of the ledger's entries, and of the rows that a trial logged."""

import math
import random
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from sweep.space import Dimension, Range, Space
from sweep.study import Entry, ranking
from sweep.tracking import EVALUATION, STEP, Row

MATTERS = 0.01
"""Share of a loss. A change of one trial's loss that is smaller is not told from chance, and no verdict rests on it."""
CHEAPER = 0.1
"""Share of time or memory. What two equal trials on a busy machine differ by is less."""
LISTED = 8
"""So many values of a number are shown one by one, more on an axis."""
ENOUGH = 10
"""Trials that say something about the importance of a parameter."""
RESAMPLES = 20
"""Draws from the trials over which the importance is taken."""
BEST_SHARE = 0.25
"""What sets this share of the trials, the best, apart from all is what matters. Optuna's tenth is one trial of ten."""


def best_loss(entry: Entry) -> float:
    """Of a trial that has a validation loss."""
    assert entry.best is not None
    return entry.best[1]


def common_evaluation(entries: Sequence[Entry]) -> int | None:
    """The newest evaluation that all trials have which are complete or were stopped: all can be compared there.

    With early stopping that is mostly its first rung. Until a trial has ended, those count that run; None before the
    first validation loss.
    """
    scored = [entry for entry in entries if entry.best]
    ended = [entry for entry in scored if entry.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    return min((entry.reported for entry in ended or scored), default=None)


def axes(entries: Sequence[Entry], space: Space) -> dict[str, BaseDistribution]:
    """How to show each field that is searched and differs between the entries, by the values that it had in effect.

    Names and short lists of numbers are categories; other numbers are on an axis, logarithmic where the space is.
    """
    found: dict[str, BaseDistribution] = {}
    for name in space.searched:
        values = [_plain(getattr(entry.config, name)) for entry in entries]
        if len(set(values)) > 1:
            found[name] = _axis(space.dimensions[name], values)
    return found


def derived(
    entries: Sequence[Entry], values: Mapping[int, Sequence[float]], shown: Mapping[str, BaseDistribution]
) -> optuna.Study:
    """A study in memory in which each trial that has `values` is COMPLETE with them, for Optuna's figures.

    Those read COMPLETE trials alone, and most trials of a sweep are stopped: this study says what they are compared by.
    Parameters are the fields `shown`, as they were in effect. Trials without `values`, and numbers that no trial has,
    are there as FAIL, so that all keep their numbers.
    """
    objectives = max((len(one) for one in values.values()), default=1)
    study = optuna.create_study(directions=["minimize"] * objectives)
    by_number = {entry.number: entry for entry in entries}
    for number in range(max(by_number, default=-1) + 1):
        if number not in values:
            study.add_trial(optuna.create_trial(state=TrialState.FAIL))
            continue
        entry = by_number[number]
        study.add_trial(
            optuna.create_trial(
                values=list(values[number]),
                params={name: _plain(getattr(entry.config, name)) for name in shown},
                distributions=dict(shown),
                intermediate_values={each: loss for each, loss in entry.losses.items() if each > 0},
            )
        )
    return study


def importance(study: optuna.Study) -> dict[str, tuple[float, float, float]]:
    """Importance of each parameter of a derived study: mean, 10th and 90th percentile over resamples of its trials.

    PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255): how much the best quarter of the trials differ from all of them
    in this parameter; together they are 1. The evaluator draws nothing at random, so its spread comes from the
    bootstrap over trials (Efron 1979). Most important first; empty when there are fewer than `ENOUGH` trials.
    """
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(trials) < ENOUGH:
        return {}
    draw = random.Random(0)
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(RESAMPLES):
        resample = optuna.create_study()
        resample.add_trials(draw.choices(trials, k=len(trials)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters that had one value in a resample
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
            for name, share in optuna.importance.get_param_importances(resample, evaluator=evaluator).items():
                shares[name].append(share)
    spread = {name: statistics.quantiles(found, n=10) for name, found in shares.items()}
    means = {name: statistics.fmean(found) for name, found in shares.items()}
    return {name: (means[name], spread[name][0], spread[name][-1]) for name in sorted(means, key=lambda n: -means[n])}


@dataclass(frozen=True)
class Noise:
    """How far the validation losses of two trials may be apart by chance."""

    loss: float | None
    """Nats per token; None when it is not known."""
    because: str
    """How it is known, or why it is not, as a sentence."""


def noise(entries: Sequence[Entry]) -> Noise:
    """From trials that differ in their seed alone, where there are some: 1.96 x sqrt(2) standard deviations, which 95 %
    of the differences of two such trials stay below. Else the smaller of the changes of the winner's loss between its
    best evaluation and those beside it, unless it was still falling by more than `MATTERS` at the end.
    """
    complete = [entry for entry in ranking(entries) if entry.state is TrialState.COMPLETE]
    by_seed: defaultdict[str, list[float]] = defaultdict(list)
    for entry in complete:
        by_seed[entry.config.model_copy(update={"seed": 0}).model_dump_json()].append(best_loss(entry))
    repeated = [losses for losses in by_seed.values() if len(losses) > 1]
    if repeated:
        squares = sum((loss - statistics.fmean(losses)) ** 2 for losses in repeated for loss in losses)
        runs = sum(map(len, repeated))
        deviation = math.sqrt(squares / (runs - len(repeated)))
        return Noise(
            1.96 * math.sqrt(2) * deviation,
            f"{runs} trials of {len(repeated)} configurations differ in their seed alone; the standard deviation of"
            f" their losses is {deviation:.4f}.",
        )
    unknown = "How much the seed alone changes a loss is not known: no configuration was trained with two."
    if not complete or complete[0].best is None:
        return Noise(None, unknown)
    number, best = complete[0].best
    losses = complete[0].losses
    beside = {other: abs(losses[other] - best) for other in (number - 1, number + 1) if other > 0 and other in losses}
    if not beside:
        return Noise(None, f"{unknown} The winner has a single evaluation, which does not tell either.")
    other = min(beside, key=lambda one: beside[one])
    if number + 1 not in losses and beside[other] > MATTERS * best:
        return Noise(
            None,
            f"{unknown} Nor do its evaluations tell: the winner's loss was still falling at the last, by"
            f" {beside[other]:.4f}.",
        )
    return Noise(
        beside[other],
        f"{unknown} Taken for it is what the winner's loss changed by between its evaluations {min(number, other)} and"
        f" {max(number, other)}: {beside[other]:.4f}.",
    )


def cheaper(entries: Sequence[Entry], within: float) -> Entry | None:
    """The quickest of the complete trials that are no more than `within` above the best one, and cost less.

    One costs less when it took a tenth less time or memory than the best one, and not a tenth more of the other.
    """
    complete = [entry for entry in ranking(entries) if entry.state is TrialState.COMPLETE]
    if not complete:
        return None
    winner = complete[0]

    def costs_less(entry: Entry) -> bool:
        pairs = [(entry.cost.seconds, winner.cost.seconds), (entry.cost.peak_memory, winner.cost.peak_memory)]
        return any(mine < (1 - CHEAPER) * its for mine, its in pairs) and all(
            mine <= (1 + CHEAPER) * its for mine, its in pairs
        )

    found = [entry for entry in complete[1:] if best_loss(entry) - best_loss(winner) <= within and costs_less(entry)]
    return min(found, key=lambda entry: (entry.cost.seconds, entry.cost.peak_memory), default=None)


@dataclass(frozen=True)
class Curve:
    """Training beside validation of one trial."""

    validation: Mapping[int, float]
    """Validation loss by evaluation, 1 for the first."""
    steps: Mapping[int, int]
    """Optimiser steps done before each evaluation, where a row says it."""
    training: Mapping[int, float]
    """Mean training loss of the steps since the evaluation before, by evaluation; empty without rows."""
    points: Sequence[tuple[int, float]]
    """Step and training loss."""


def curve(entry: Entry, rows: Iterable[Row]) -> Curve:
    """The losses of a trial from the ledger and its rows (`sweep.tracking.logged`); a row that is there twice counts
    once."""
    points: dict[int, float] = {}
    steps: dict[int, int] = {}
    for row in rows:
        if EVALUATION in row:
            steps[row[EVALUATION]] = row[STEP]
        elif math.isfinite(row["train/loss"]):
            points[row[STEP]] = row["train/loss"]
    validation = {number: loss for number, loss in sorted(entry.losses.items()) if number > 0}
    training = {}
    for before, number in pairwise([0, *validation]):
        since = [loss for step, loss in points.items() if steps.get(before, 0) < step <= steps.get(number, -1)]
        if since:
            training[number] = statistics.fmean(since)
    return Curve(validation, steps, training, sorted(points.items()))


def overfitted_from(curve: Curve) -> int | None:
    """The evaluation after which a trial learned its training rows by heart: that with the lowest validation loss, when
    by the last one the validation loss has risen by more than `MATTERS` and the training loss has fallen. None when it
    did not, or when nothing is known of its training."""
    if not curve.validation:
        return None
    turn, last = min(curve.validation, key=lambda number: curve.validation[number]), max(curve.validation)
    rose = curve.validation[last] > (1 + MATTERS) * curve.validation[turn]
    known = turn in curve.training and last in curve.training
    return turn if rose and known and curve.training[last] < curve.training[turn] else None


def _axis(dimension: Dimension, values: Sequence[Any]) -> BaseDistribution:
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    is_range = isinstance(dimension.source, Range)
    if not is_number or (len(set(values)) <= LISTED and not is_range):
        return CategoricalDistribution(sorted(set(values)))
    low, high = float(min(values)), float(max(values))
    log = dimension.times is not None or (isinstance(dimension.source, Range) and dimension.source.log)
    return FloatDistribution(low, high, log=log and low > 0)


def _plain(value: Any) -> Any:
    """What Optuna takes for a value."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return ",".join(value) if isinstance(value, tuple) else value
