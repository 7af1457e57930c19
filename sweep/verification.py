"""Is the winner real? The best configurations of a search, trained again over fresh seeds.

These runs are in the ledger apart from the search (`Ledger.verification`): nothing that proposes, stops or ranks reads
them.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Literal

from optuna.trial import TrialState

from sweep.criterion import LOSS, Criterion
from sweep.place import Place
from sweep.study import Entry, Ledger, Proposal, SpaceExhausted, ranking
from sweep.validation import counted
from trainables.config import QLoRAConfig

CONFIDENCE = 0.95
"""Of the interval that holds a mean, and of all comparisons with the winner together."""


@dataclass(frozen=True)
class Verified:
    """A configuration over fresh seeds."""

    trial: int
    """That of the search with this configuration."""
    values: tuple[float, ...]
    """Best validation loss, or value of the objective, of each run that used its whole budget, by seed."""
    failed: int
    """Runs that ended without."""
    mean: float | None
    """Of the values; None when there are none."""
    interval: tuple[float, float] | None
    """Where their mean would be over all seeds, with 95 % confidence: Student's t-interval, which takes values to be
    normally distributed over seeds (Student 1908, Biometrika 6:1-25). None for fewer than two values."""
    p: float | None
    """Probability of means that differ at least as much from the winner's when there is no difference: Welch's t-test
    (Welch 1947, Biometrika 34:28-35), as Colas et al. 2019 (arXiv:1904.06979) advise for runs over seeds. None for the
    winner itself, before all runs have ended, and where one of either failed."""
    verdict: Literal["winner", "tied", "lower", "higher"] | None
    """`winner` of the search; or, by `p`, `tied` within noise with it, `lower` or `higher`. All comparisons together
    call configurations different that are not in at most 5 % of verifications (Bonferroni's correction)."""


@dataclass(frozen=True)
class Verification:
    """The best configurations of a search over fresh seeds."""

    configurations: tuple[Verified, ...]
    """Best of the search first."""
    left: int
    """Runs that have not ended."""


def begin(search: Ledger, top: int, seeds: int) -> tuple[Ledger, list[QLoRAConfig]]:
    """The verification's ledger, and what it is to have: the best `top` configurations of the search that differ in
    more than their seed, each with the next `seeds` seeds after its own that the search has not tried; seed by seed, so
    that one that ends early has compared them all."""
    ledger = search.begin_verification()
    tried = {entry.config for entry in search.entries()}
    best: dict[QLoRAConfig, QLoRAConfig] = {}
    for entry in ranking(search.entries()):
        best.setdefault(_with_seed(entry.config, 0), entry.config)

    def fresh(config: QLoRAConfig) -> Iterator[QLoRAConfig]:
        with_seeds = (_with_seed(config, config.seed + more) for more in count(1))
        return islice((each for each in with_seeds if each not in tried), seeds)

    by_seed = zip(*(fresh(config) for config in islice(best.values(), top)), strict=True)
    wanted = list(chain.from_iterable(by_seed))
    ledger.note("trials", len({entry.config for entry in ledger.entries()} | set(wanted)))
    return ledger, wanted


def propose(entries: Sequence[Entry], wanted: Sequence[QLoRAConfig]) -> Proposal:
    """The first of the configurations that no entry has; raises `SpaceExhausted` when there is none."""
    known = {entry.config for entry in entries}
    for config in wanted:
        if config not in known:
            return Proposal(config, {}, {})
    raise SpaceExhausted("all configurations have been verified")


def result(search: Ledger) -> Verification | None:
    """What the verification of a search has found; None when it has not begun."""
    ledger = search.verification()
    if ledger is None or (trials := ledger.noted("trials")) is None:
        return None
    runs: dict[QLoRAConfig, list[Entry]] = {}
    for entry in ledger.entries():
        runs.setdefault(_with_seed(entry.config, 0), []).append(entry)
    ranked = ranking(search.entries())
    # Of those that differ in their seed alone, the best stands for all.
    found = [(entry, runs.pop(key)) for entry in ranked if (key := _with_seed(entry.config, 0)) in runs]
    left = trials - sum(entry.state.is_finished() for entry in ledger.entries())
    winner = found[0][1] if found and found[0][0] is ranked[0] and not left else []
    others = sum(entry is not ranked[0] for entry, _ in found)
    return Verification(
        tuple(_verified(entry, mine, winner, others, wins=entry is ranked[0]) for entry, mine in found), left
    )


def lines(found: Verification | None, criterion: Criterion = LOSS) -> list[str]:
    """The same in words."""
    if found is None:
        return []
    told = [f"Verification: best {criterion.name} over fresh seeds, mean ({CONFIDENCE:.0%} t-interval)"]
    text = criterion.distance
    words = {"winner": "the winner of the search", "tied": "tied within noise", None: "not compared"}
    for each in found.configurations:
        mean = "-" if each.mean is None else text(each.mean)
        interval = f" ({text(each.interval[0])} to {text(each.interval[1])})" if each.interval else ""
        runs = counted(len(each.values), "run")
        failed = f" and {each.failed} that failed" if each.failed else ""
        verdict = words.get(each.verdict, f"{each.verdict} than the winner beyond noise")
        p = "" if each.p is None else ", p < 0.001" if each.p < 0.001 else f", p = {each.p:.3f}"
        told.append(f"trial {each.trial:03d}             {mean}{interval}, {runs}{failed}: {verdict}{p}")
    if found.left:
        told.append(f"{found.left} of its runs are not done; nothing is compared before")
    if any(each.p is not None for each in found.configurations):
        others = sum(each.verdict != "winner" for each in found.configurations)
        together = f" ({1 - CONFIDENCE:.2g} for {others} comparisons together)" if others > 1 else ""
        told.append(
            f"Tied within noise where p of Welch's t-test against the winner is at least {_level(others):.3g}{together}"
        )
    if better := _better(found, criterion):
        told.append(
            f"Trial {better.trial:03d} has a {criterion.better} mean than the winner, beyond noise."
            " best/ stays what the search chose"
        )
    return told


def advice(found: Verification | None, criterion: Criterion, place: Place) -> list[str]:
    """The command that takes home what is better than the winner, if so. Not for others to read: it names a place."""
    better = _better(found, criterion)
    if better is None:
        return []
    return [f"Take trial {better.trial:03d} home with: {place.command('export', '--trial', str(better.trial))}"]


def _better(found: Verification | None, criterion: Criterion) -> Verified | None:
    """The best configuration, of those that are better than the winner beyond noise."""
    better = [each for each in found.configurations if each.verdict == criterion.better] if found else []
    return min(better, key=lambda each: criterion.turned(each.mean or 0.0), default=None)


def _with_seed(config: QLoRAConfig, seed: int) -> QLoRAConfig:
    return config.model_copy(update={"seed": seed % 2**31})


def _values(runs: Sequence[Entry]) -> tuple[float, ...]:
    """Of whole runs, by seed."""
    whole = sorted((run for run in runs if run.state is TrialState.COMPLETE), key=lambda run: run.config.seed)
    return tuple(run.criterion.turned(run.best[1]) for run in whole if run.best)


def _verified(entry: Entry, runs: Sequence[Entry], winner: Sequence[Entry], others: int, *, wins: bool) -> Verified:
    values, to_beat = _values(runs), _values(winner)
    complete = len(values) == len(runs) and len(to_beat) == len(winner)
    p = _p(values, to_beat) if complete and not wins and min(len(values), len(to_beat)) > 1 else None
    verdict: Literal["winner", "tied", "lower", "higher"] | None = "winner" if wins else None
    if p is not None:
        below = statistics.mean(values) < statistics.mean(to_beat)
        verdict = "tied" if p >= _level(others) else "lower" if below else "higher"
    return Verified(
        trial=entry.number,
        values=values,
        failed=sum(run.state is TrialState.FAIL for run in runs),
        mean=statistics.mean(values) if values else None,
        interval=_interval(values),
        p=p,
        verdict=verdict,
    )


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    from scipy import stats

    half = stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, df=len(values) - 1)
    mean = statistics.mean(values)
    return float(mean - half), float(mean + half)


def _p(values: Sequence[float], others: Sequence[float]) -> float:
    if statistics.pvariance(values) == statistics.pvariance(others) == 0:  # the test divides by it
        return float(values[0] == others[0])
    from scipy import stats

    samples = [each for of in (values, others) for each in (statistics.mean(of), statistics.stdev(of), len(of))]
    return float(stats.ttest_ind_from_stats(*samples, equal_var=False).pvalue)


def _level(comparisons: int) -> float:
    """Of p, below which one of so many comparisons says that there is a difference."""
    return (1 - CONFIDENCE) / comparisons
