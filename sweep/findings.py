"""What a sweep found, in numbers: functions of the ledger's entries, and of the rows that a trial logged."""

import math
import random
import statistics
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from sweep.criterion import LOSS
from sweep.space import Dimension, Range, Space
from sweep.study import Entry, ranking
from sweep.tracking import EVALUATION, STEP, Row

MATTERS = 0.01
"""Share of a loss. A change of one trial's loss that is smaller is not told from chance, and no verdict rests on it."""
CHEAPER = 0.1
"""Share of the time of a token. A smaller difference is no reason to take another trial. A larger one may still be that
of a machine that was busy for a while: two trials of the demo that differ in nothing that costs time are 31 % apart."""
LISTED = 8
"""So many values of a number are shown one by one, more on an axis."""
ENOUGH = 10
"""Trials that say something about the importance of a parameter."""
RESAMPLES = 20
"""Draws from the trials over which the importance is taken."""
BEST_SHARE = 0.25
"""What sets this share of the trials, the best, apart from all is what matters. Optuna's tenth is one trial of ten."""


def best_objective(entry: Entry) -> float:
    """Of a trial that has an evaluation: what it is compared by."""
    assert entry.best is not None
    return entry.best[1]


def complete(entries: Sequence[Entry]) -> list[Entry]:
    """Trials that used their whole budget, best first."""
    return [entry for entry in ranking(entries) if entry.state is TrialState.COMPLETE]


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

    The last value of each is an objective; in the study it is as people know it, with its direction.

    Those read COMPLETE trials alone, and most trials of a sweep are stopped: this study says what they are compared by.
    Parameters are the fields `shown`, as they were in effect. Trials without `values`, and numbers that no trial has,
    are there as FAIL, so that all keep their numbers.
    """
    objectives = max((len(one) for one in values.values()), default=1)
    criterion = entries[0].criterion if entries else LOSS
    last = StudyDirection.MAXIMIZE if criterion.maximized else StudyDirection.MINIMIZE
    study = optuna.create_study(directions=[StudyDirection.MINIMIZE] * (objectives - 1) + [last])
    by_number = {entry.number: entry for entry in entries}
    for number in range(max(by_number, default=-1) + 1):
        if number not in values:
            study.add_trial(optuna.create_trial(state=TrialState.FAIL))
            continue
        entry = by_number[number]
        study.add_trial(
            optuna.create_trial(
                values=[*values[number][:-1], criterion.turned(values[number][-1])],
                params={name: _plain(getattr(entry.config, name)) for name in shown},
                distributions=dict(shown),
                intermediate_values={n: criterion.turned(each) for n, each in entry.objectives.items() if n > 0},
            )
        )
    return study


def importance(study: optuna.Study) -> dict[str, tuple[float, float, float]]:
    """Importance of each parameter of a derived study: median, 10th and 90th percentile over resamples of its trials.

    PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255): how much the best quarter of the trials differ from all of them
    in this parameter; in each resample together they are 1. The evaluator draws nothing at random, so its spread comes
    from the bootstrap over trials (Efron 1979). Most important first; empty when there are fewer than `ENOUGH` trials,
    or all have the same loss, of which Optuna would make equal shares. It advises 5 trials among the best; a quarter of
    `ENOUGH` is fewer, which the spread shows.
    """
    trials = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(trials) < ENOUGH or len({trial.value for trial in trials}) == 1:
        return {}
    draw = random.Random(0)
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(RESAMPLES):
        resample = optuna.create_study(direction=study.direction)
        resample.add_trials(draw.choices(trials, k=len(trials)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters that had one value in a resample
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
            for name, share in optuna.importance.get_param_importances(resample, evaluator=evaluator).items():
                shares[name].append(share)
    deciles = {name: statistics.quantiles(found, n=10) for name, found in shares.items()}
    spread = {name: (each[4], each[0], each[-1]) for name, each in deciles.items()}
    return dict(sorted(spread.items(), key=lambda item: -item[1][0]))


@dataclass(frozen=True)
class Noise:
    """How far the objectives of two trials may be apart by chance."""

    width: float | None
    """In nats per token, or in units of the value that is searched for; None when it is not known."""
    because: str
    """How it is known, or why it is not, as a sentence."""
    from_seeds: bool = False
    """Whether it is measured. Else it is a yardstick."""


def noise(entries: Sequence[Entry], fresh: Sequence[Entry] = ()) -> Noise:
    """From trials that differ in their seed alone, of the verification's (`fresh`) or else of the search's, where there
    are some: what 95 % of the differences of two such trials stay below, when losses are normally distributed over
    seeds: sqrt(2) standard deviations, times the quantile of Student's t (1908, Biometrika 6:1-25) for the trials that
    the deviation comes from. Only whole runs count, so with early stopping those of the search are the luckier ones,
    and lie closer together than all would.

    Else the smaller of the changes of the winner's loss between its best evaluation and those beside it, unless it was
    still falling by more than `MATTERS` at the end.
    """
    criterion = entries[0].criterion if entries else LOSS
    repeated = _repeated(fresh) or _repeated(entries)
    if repeated:
        from scipy import stats

        squares = sum((each - statistics.fmean(runs)) ** 2 for runs in repeated for each in runs)
        count = sum(map(len, repeated))
        freedom = count - len(repeated)
        deviation = math.sqrt(squares / freedom)
        return Noise(
            float(stats.t.ppf(0.975, freedom)) * math.sqrt(2) * deviation,
            f"{count} trials of {len(repeated)} configurations differ in their seed alone; the standard deviation of"
            f" {'their losses' if criterion.is_loss else criterion.name} is {criterion.distance(deviation)}.",
            from_seeds=True,
        )
    what = "a loss" if criterion.is_loss else criterion.name
    unknown = f"How much the seed alone changes {what} is not known: no configuration was trained with two."
    whole = complete(entries)
    if not whole or whole[0].best is None:
        return Noise(None, unknown)
    number, best = whole[0].best
    objectives = whole[0].objectives
    neighbours = [other for other in (number - 1, number + 1) if other > 0 and other in objectives]
    beside = {other: abs(objectives[other] - best) for other in neighbours}
    if not beside:
        return Noise(None, f"{unknown} The winner has a single evaluation, which does not tell either.")
    other = min(beside, key=lambda one: beside[one])
    if number + 1 not in objectives and beside[other] > MATTERS * abs(best):
        return Noise(
            None,
            f"{unknown} Nor do its evaluations tell: the winner's {criterion.short} was still"
            f" {'rising' if criterion.maximized else 'falling'} at the last, by {criterion.distance(beside[other])}.",
        )
    return Noise(
        beside[other],
        f"{unknown} Taken for it is what the winner's {criterion.short} changed by between its evaluations"
        f" {min(number, other)} and {max(number, other)}: {criterion.distance(beside[other])}.",
    )


def pace(entry: Entry) -> float:
    """Seconds that 1,000 tokens took in training and validation; not a number when none are on record.

    Unlike the seconds of a trial, and those of a step, it does not grow with steps that an interruption repeated, nor
    for the trial that also scored the base.
    """
    return 1000 * entry.cost.seconds / entry.cost.tokens if entry.cost.tokens else math.nan


def cheaper(entries: Sequence[Entry], within: float, worse: Collection[int] = ()) -> Entry | None:
    """The quickest of the complete trials that are no more than `within` above the best one, and took a tenth less time
    for the same work.

    That is compared by token, and between trials of the same batch size, for others may have another number of tokens.
    Memory is not: the peak of a process has all trials that it held in it, and the ledger does not tell how many these
    were. `worse` are trials that do not count, for it is known that they are no better.
    """
    whole = complete(entries)
    found = [
        entry
        for entry in whole[1:]
        if entry.number not in worse
        and best_objective(entry) - best_objective(whole[0]) <= within
        and entry.config.batch_size == whole[0].config.batch_size
        and pace(entry) < (1 - CHEAPER) * pace(whole[0])
    ]
    return min(found, key=pace, default=None)


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

    @property
    def turn(self) -> int:
        """The evaluation with the lowest validation loss."""
        return min(self.validation, key=lambda number: self.validation[number])

    @property
    def last(self) -> int:
        """The newest evaluation."""
        return max(self.validation)

    @property
    def tells(self) -> bool:
        """Whether the training losses are known that tell whether it overfitted."""
        return self.turn in self.training and self.last in self.training


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
    if not curve.validation or not curve.tells:
        return None
    turn, last = curve.turn, curve.last
    rose = curve.validation[last] > (1 + MATTERS) * curve.validation[turn]
    return turn if rose and curve.training[last] < curve.training[turn] else None


def _repeated(entries: Sequence[Entry]) -> list[list[float]]:
    """Best objectives of complete trials that differ in their seed alone, a list for each configuration."""
    by_seed: defaultdict[str, list[float]] = defaultdict(list)
    for entry in complete(entries):
        by_seed[entry.config.model_copy(update={"seed": 0}).model_dump_json()].append(best_objective(entry))
    return [objectives for objectives in by_seed.values() if len(objectives) > 1]


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
