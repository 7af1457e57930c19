"""The end of a run: the ranking on the terminal."""

from collections.abc import Sequence

from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from sweep import scoring, verification
from sweep.criterion import LOSS
from sweep.study import STATES, Entry, Ledger, ranking
from sweep.tracking import described
from sweep.validation import counted

SIDE_BY_SIDE = "side_by_side"
"""Note in the ledger: how many processes shared a machine in the newest run."""

UNSCORED = "the validation rows were trained on, too, so there is no validation loss"
"""Of a trial without one."""
USUAL_DEFAULT = "r 16, alpha 32, learning rate 2e-4"
"""`usual_default` in words."""


def usual_default(entries: Sequence[Entry]) -> Entry | None:
    """The trial of what people use, which a sweep should beat."""
    return next((e for e in entries if (e.config.r, e.config.alpha, e.config.learning_rate) == (16, 32.0, 2e-4)), None)


def base(entries: Sequence[Entry]) -> float | None:
    """Objective of the quantised base before any training, as the first trial measured it."""
    return next((e.objectives[0] for e in entries if 0 in e.objectives), None)


def prices(ledger: Ledger, per_hour: float | None) -> dict[int, float]:
    """What each trial of the search, or of the verification, whose `ledger` it is, has cost: the hours of its steps and
    evaluations, as one of those side by side on a machine, at its price for an hour. Nothing without a price."""
    per_second = (per_hour or 0.0) / 3600 / _side_by_side(ledger)
    return {e.number: e.cost.seconds * per_second for e in ledger.entries()} if per_hour else {}


def spent(ledger: Ledger, per_hour: float | None) -> float | None:
    """What all trials have cost so far, those of the verification included; None without a price."""
    parts = [ledger, *filter(None, [ledger.verification()])]
    return sum(sum(prices(part, per_hour).values()) for part in parts) if per_hour else None


def bill(ledger: Ledger, per_hour: float | None) -> list[str]:
    """The same in words, a line; none without a price."""
    total = spent(ledger, per_hour)
    if per_hour is None or total is None:
        return []
    at_a_time = f"as if all had run {_side_by_side(ledger)} at a time; starting and waiting not counted"
    hours = f"{money(total / per_hour)} h of a machine at {per_hour:g} an hour"
    return [f"cost so far           {money(total)}  ({hours}, {at_a_time})"]


def _side_by_side(ledger: Ledger) -> int:
    return ledger.noted(SIDE_BY_SIDE) or 1


def money(amount: float) -> str:
    """Two digits, or all before the point and two behind it."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def show(
    console: Console, ledger: Ledger, searched: Sequence[str], seconds: float, per_hour: float | None = None
) -> None:
    """Print ranking, base, default, winner and time, and what all that cost when the price of a machine is given."""
    entries, priced = ledger.entries(), prices(ledger, per_hour)
    ranked = ranking(entries)
    criterion = ledger.criterion
    table = Table(title=f"Ranking by best {criterion.name}", title_justify="left")
    headings = ["", "trial", "configuration", f"best {criterion.short}", "evaluation", "ended as", "minutes"]
    for heading in [*headings, "cost"] if priced else headings:
        table.add_column(
            heading,
            justify="left" if heading in ("configuration", "ended as") else "right",
            no_wrap=heading != "configuration",
        )
    unscored = [e for e in entries if e.best is None]
    for place, entry in enumerate([*ranked, *unscored], start=1):
        evaluation, objective = entry.best or (None, None)
        table.add_row(
            str(place) if objective is not None else "-",
            f"{entry.number:03d}",
            described(entry.config, searched),
            "-" if objective is None else criterion.text(objective),
            "-" if evaluation is None else str(evaluation),
            "unfinished" if entry.state is TrialState.RUNNING else STATES[entry.state],
            f"{entry.cost.seconds / 60:.1f}",
            *([money(priced[entry.number])] if priced else []),
        )
    console.print(table)
    for line in [*failures(entries), *conclusion(ledger), *scoring.trouble(ledger), *bill(ledger, per_hour)]:
        console.print(line, highlight=False, soft_wrap=True)
    took = f"this run took {seconds / 60:.1f} minutes"  # the trials may be of earlier ones
    ended = sum(entry.state.is_finished() for entry in entries)
    trials = counted(len(entries), "trial")
    console.print(f"{trials if ended == len(entries) else f'{ended} of {trials} ended'}; {took}", highlight=False)


def failures(entries: Sequence[Entry]) -> list[str]:
    """Why trials failed, a line each."""
    return [f"trial {entry.number:03d} failed: {entry.reason}" for entry in entries if entry.state is TrialState.FAIL]


def conclusion(ledger: Ledger) -> list[str]:
    """All that was found out about the winner, a line each: search, verification, test."""
    return [*verdict(ledger.entries()), *checks(ledger)]


def checks(ledger: Ledger) -> list[str]:
    """What was found out about the winner once the search had chosen it, a line each."""
    return [*verification.lines(verification.result(ledger), ledger.criterion), *scoring.lines(ledger)]


def verdict(entries: Sequence[Entry]) -> list[str]:
    """Base, usual default and winner, a line each. A gain is claimed between whole runs alone."""
    ranked = ranking(entries)
    start, default = base(entries), usual_default(entries)
    criterion = entries[0].criterion if entries else LOSS
    lines = [f"trial {entry.number:03d}: {UNSCORED}" for entry in entries if entry.unscored]
    lines += [] if criterion.is_loss or not ranked else [f"searched for          {criterion}"]
    if start is not None:
        lines.append(f"base model            {criterion.text(start)}")
    if default is not None and default.best is not None:
        value = criterion.text(default.best[1])
        lines.append(f"usual default         {value}  (trial {default.number:03d}{cut_short(default)})")
    if ranked:
        winner = ranked[0]
        assert winner.best is not None
        gain = ""
        if winner is default:
            gain = ", the default itself"
        elif default is not None and default.best is not None and both_whole(winner, default):
            side = "above" if criterion.maximized else "below"
            gain = f", {criterion.distance(default.best[1] - winner.best[1])} {side} the default"
        value = criterion.text(winner.best[1])
        lines.append(f"winner                {value}  (trial {winner.number:03d}{cut_short(winner)}{gain})")
    return lines


def both_whole(one: Entry, other: Entry) -> bool:
    """Whether both trials used their whole budget, so that their losses may be compared."""
    return one.state is other.state is TrialState.COMPLETE


def cut_short(entry: Entry) -> str:
    """How a trial ended early, such as `, stopped after evaluation 1`; empty for one that did not."""
    if entry.state not in (TrialState.PRUNED, TrialState.FAIL):
        return ""
    return f", {STATES[entry.state]} after evaluation {entry.reported}"


def standing(entries: Sequence[Entry], trials: int, verifications_left: int = 0) -> str:
    """How far a sweep of so many trials has come, in half a sentence."""
    done = sum(entry.state is not TrialState.RUNNING for entry in entries)
    ranked = ranking(entries)
    best = ""
    if ranked:
        assert ranked[0].best is not None
        criterion = ranked[0].criterion
        value = criterion.text(ranked[0].best[1])
        best = f", the best {criterion.short} so far is {value} (trial {ranked[0].number:03d})"
    left = f", {counted(verifications_left, 'run')} of the verification left" if verifications_left else ""
    return f"{done} of {counted(trials, 'trial')} {'is' if trials == 1 else 'are'} done{best}{left}"


def any_finished(entries: Sequence[Entry]) -> bool:
    """Whether a trial trained to its end or until early stopping gave it up."""
    return any(entry.state in (TrialState.COMPLETE, TrialState.PRUNED) for entry in entries)
