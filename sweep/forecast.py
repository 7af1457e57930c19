"""How long a sweep will take yet, from the seconds that its own evaluations took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.trial import TrialState

from sweep.early_stopping import survivors
from sweep.spec import EarlyStopping
from sweep.study import Entry


@dataclass(frozen=True)
class Forecast:
    """What is left to do."""

    share: float
    """Of all training that is expected of the sweep, what is done."""
    seconds: float | None
    """Wall clock until the last trial is expected to end; None as long as it is not known how long they take, or how
    many are trained at a time."""
    of_trial: Mapping[int, float]
    """Wall clock until a running trial has used its budget, if it is not stopped before; only where it is known."""


def forecast(
    entries: Sequence[Entry],
    trials: int,
    evaluations: int,
    rule: EarlyStopping | None,
    since: Mapping[int, float] | None = None,
) -> Forecast:
    """What is left of a sweep of so many trials, each of so many `evaluations`.

    A part of the budget, up to an evaluation, takes as long as those before it took this trial, or took all trials on
    average when it has none behind it. Of trials that are to come, and of the rest of those that run, early stopping is
    expected to leave what its ladder says (`survivors`). As many are trained at a time as are now. `since` has the
    seconds that trials have been training since their newest evaluation, where somebody knows them.
    """
    evaluations = max(evaluations, 1)  # without any, the budget is a single part
    timed = {entry.number: entry for entry in entries if entry.reported > 0 and entry.cost.elapsed > 0}
    parts = sum(entry.reported for entry in timed.values())
    mean = sum(entry.cost.elapsed for entry in timed.values()) / parts if parts else None
    ladder = survivors(max(trials, len(entries), 1), evaluations, rule)
    running = [entry for entry in entries if entry.state is TrialState.RUNNING]
    to_come = max(0, trials - len(entries))

    done = sum(max(entry.reported, 0) for entry in entries)
    left = to_come * sum(ladder) / ladder[0]
    of_trial, expected = {}, []
    for entry in running:
        begun = max(entry.reported, 0)
        parts_left = evaluations - begun
        share = sum(ladder[begun:]) / (ladder[begun] * parts_left) if parts_left else 1.0
        left += parts_left * share
        pace = entry.cost.elapsed / entry.reported if entry.number in timed else mean
        if pace is not None:
            whole = max(0.0, parts_left * pace - (since or {}).get(entry.number, 0.0))
            of_trial[entry.number] = whole
            expected.append(whole * share)
    seconds = None
    if not running and not to_come:
        seconds = 0.0
    elif running and mean is not None:
        work = sum(expected) + to_come * mean * sum(ladder) / ladder[0]
        seconds = max(*expected, work / len(running))
    return Forecast(done / (done + left) if done + left else 1.0, seconds, of_trial)


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3.5 h` or `2.1 d`; `-` for None."""
    if seconds is None:
        return "-"
    for unit, size, most in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} d"
