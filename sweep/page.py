"""report.html: what a sweep found, in one file that needs no network and nothing beside it."""

import math
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import plotly.graph_objects as go
from optuna.trial import TrialState
from plotly.offline import get_plotlyjs

from sweep import figures, findings, report, tracking, verification
from sweep.early_stopping import rungs
from sweep.requests import enqueued
from sweep.spec import SweepSpec, dump, portable
from sweep.status import Status, rows_of
from sweep.study import MACHINES, PROGRAM, STATES, Entry, ranking
from sweep.tracking import Row, described, run_name
from sweep.validation import counted

CURVES = 12
"""Best trials that stand out among the curves, and whose training is shown."""
REASON = 300
"""Characters that are shown of why a trial ended."""
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Drawing:
    """A figure and what is said below it."""

    figure: go.Figure
    caption: str = ""
    wide: bool = True
    """It takes the whole width of the page, also of a large screen."""
    least: int = 0
    """Pixels of width that it needs; on a narrower screen it is scrolled."""

    @property
    def json(self) -> str:
        """What plotly.js draws, as it may stand in a <script>."""
        return str(self.figure.to_json()).replace("<", "\\u003c")


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and figures."""

    title: str
    text: Sequence[str]
    drawings: Sequence[Drawing] = ()


def write(status: Status) -> str:
    """Make the report of a sweep in its directory; returns where it is. Raises OSError when that cannot be written."""
    place, notes = status.place, []
    rows: dict[int, list[Row]] = {}
    for entry in ranking(status.entries)[:CURVES]:
        directory = place.paths.trial(entry.number)
        try:
            place.pull_log(directory / tracking.ROWS)
            rows[entry.number] = tracking.logged(directory)
        except (OSError, ValueError) as error:  # the others are shown all the same
            why = str(error).replace(f"{place.paths.root}/", "")
            notes.append(f"The rows of trial {entry.number:03d} cannot be read: {why}.")
    file = place.paths.report
    with TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as scratch:  # another may be made at the moment
        unfinished = Path(scratch) / file.name
        unfinished.write_text(render(status, rows, notes), encoding="utf-8")
        unfinished.rename(file)
    place.push(file)
    return f"{place.url}/{file.name}"


def render(status: Status, rows: Mapping[int, Sequence[Row]], notes: Sequence[str] = ()) -> str:
    """The page. `rows` are what the best trials logged, `notes` what is to be said of those.

    It is made to be passed on: it names no process, path or address, but for what the reason of a failure quotes.
    """
    spec, entries, elsewhere = status.spec, status.entries, portable(status.spec)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=spec.name,
        standing=_standing(status),
        verdict=list(_verdict(status)),
        sections=[*_what_mattered(status), *_learning(status, rows, notes), *_search(entries), *_cost(status)],
        table=_table(status),
        compared_by=status.ledger.criterion.explained,
        fixed={name: _value(one) for name, one in spec.space.plain().items() if name not in spec.space.searched},
        versions=status.ledger.noted("environment") or {},
        machines=status.ledger.noted(MACHINES) or [],
        inputs=status.ledger.noted("inputs") or {},
        enqueued=len(enqueued(status.ledger)),
        commands=list(_commands(status, f"{elsewhere.storage}/{elsewhere.name}")),
        portable=dump(elsewhere),
        plotlyjs=get_plotlyjs(),
    )


def _standing(status: Status) -> str:
    ends = Counter(_ended_as(entry, status) for entry in status.entries)
    each = ", ".join(f"{count} {end}" for end, count in ends.items())
    asked, seconds = status.trials, sum(entry.cost.seconds for entry in status.entries)
    took = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    running = ", while it runs" if status.driver else ""
    trials = f"{len(status.entries)} of {counted(asked, 'trial')}{f' ({each})' if each else ''}, {took} of training"
    return f"As of {now}{running}: {trials}.{f' {status.newer}.' if status.newer else ''}"


def _verdict(status: Status) -> Iterator[str]:
    """Winner, base, default, what verification and test say of it, and what to train with, a sentence each."""
    spec, entries = status.spec, status.entries
    searched, ranked = spec.space.searched, ranking(entries)
    winner = next(iter(ranked), None)
    if winner is None or winner.best is None:
        failed = sum(entry.state is TrialState.FAIL for entry in entries)
        if any(entry.unscored for entry in entries):
            yield from report.conclusion(status.ledger)
            return
        yield "No trial has a validation loss yet." if entries else "No trial has been started yet."
        if failed:
            yield f"{failed} of {counted(len(entries), 'trial')} failed; the table below says why."
        return
    evaluation, objective = winner.best
    criterion = winner.criterion
    loss = "" if criterion.is_loss else f" (its validation loss there is {winner.losses[evaluation]:.4f})"
    so_far = " so far" if any(entry.state is TrialState.RUNNING for entry in entries) else ""
    yield (
        f"Trial {winner.number:03d} ({described(winner.config, searched)}) is the best{so_far}: {criterion.name}"
        f" {criterion.text(objective)} after evaluation {evaluation} of {spec.budget.evaluations}{loss}."
    )
    if rows := rows_of(status.place):
        compared = min(rows["validation"], spec.completions or rows["validation"])
        yield f"Trials learn from {counted(rows['train'], 'row')} and are compared on {compared:,} others."
    if early := report.cut_short(winner):
        yield f"It did not use its whole budget{early}: {_reason(winner)}."
    if (base := report.base(entries)) is not None:
        yield f"The base model without training has {criterion.text(base)}."
    default = report.usual_default(entries)
    if default is None or default.best is None:
        yield f"The usual default ({report.USUAL_DEFAULT}) has no {criterion.short} in this sweep to compare with."
    elif default is winner:
        yield f"It is the usual default ({report.USUAL_DEFAULT}): the search found nothing better."
    else:
        gained = (
            f"the search gained {criterion.distance(default.best[1] - objective)}"
            if report.both_whole(winner, default)
            else "what the search gained is not known, for not both used their whole budget"
        )
        yield (
            f"The usual default ({report.USUAL_DEFAULT}; trial {default.number:03d}{report.cut_short(default)}) has"
            f" {criterion.text(default.best[1])}: {gained}."
        )
    yield from report.checks(status.ledger)
    yield from _cheaper(status)


def _cheaper(status: Status) -> Iterator[str]:
    """Whether to train with a cheaper configuration than the best one."""
    complete = findings.complete(status.entries)
    if len(complete) < 2:
        yield "Fewer than two trials have used their whole budget, so no cheaper one can be compared with it."
        return
    best, criterion = findings.best_objective(complete[0]), status.ledger.criterion
    fresh, verified = status.ledger.verification(), verification.result(status.ledger)
    noise = findings.noise(status.entries, fresh.entries() if fresh else ())
    yield noise.because
    if not criterion.is_loss:
        yield "Which one is cheaper is not told: how long a trial takes depends on how much it writes."
        return
    within = findings.MATTERS * abs(best) if noise.width is None else noise.width
    worse = [each.trial for each in verified.configurations if each.verdict == criterion.worse] if verified else []
    found = findings.cheaper(status.entries, within, worse)
    if found is None:
        aside = f", leaving aside what verification found {criterion.worse}," if worse else ""
        yield (
            f"No complete trial within {criterion.distance(within)} of the best complete one{aside} took a tenth less"
            " time for equal work."
        )
        return
    trial = f"trial {found.number:03d} ({described(found.config, status.spec.space.searched)})"
    above = f"{criterion.distance(findings.best_objective(found) - best)} above the best complete one"
    costs = f"1,000 tokens took {findings.pace(found):.3g} s instead of {findings.pace(complete[0]):.3g} s"
    if noise.from_seeds:
        yield f"Prefer {trial}: {above} is noise, and {costs}."
    else:
        yield (
            f"Consider {trial}: its {criterion.short} is {above}, and {costs}. Whether that is noise only other seeds"
            " can tell."
        )


def _what_mattered(status: Status) -> Iterator[Section]:
    """All trials at a common evaluation: importance, parallel coordinates, slices."""
    spec, entries = status.spec, status.entries
    evaluation = findings.common_evaluation(entries)
    compared = {
        e.number: (e.objectives[evaluation],) for e in entries if evaluation is not None and evaluation in e.objectives
    }
    ranked = sorted((e for e in entries if e.number in compared), key=lambda e: compared[e.number])
    fields = findings.axes(ranked, spec.space)
    title, criterion = "What mattered", status.ledger.criterion
    if evaluation is None or len(ranked) < 2 or not fields:
        yield Section(title, [f"There are not two trials with different configurations and a {criterion.name} yet."])
        return
    some = {entry.number: compared[entry.number] for entry in figures.drawn(ranked)}
    drawn = findings.derived(entries, some, fields)
    text = [
        f"Compared are {len(ranked)} trials by their {criterion.name} at evaluation {evaluation} of"
        f" {spec.budget.evaluations}, the newest that all of them have{_because_of(spec)}."
    ]
    if evaluation < spec.budget.evaluations:
        text.append("That is part of the budget: what mattered by then need not be what matters at the end.")
    if len(some) < len(ranked):
        text.append(f"Drawn are {len(some)} of them: the best third of these, the others at equal distances.")
    found = findings.importance(findings.derived(entries, compared, fields))
    drawings = [
        Drawing(
            figures.parallel_coordinates(drawn, criterion.name),
            "A line is a trial at the values that it was trained with, darker with a"
            f" {criterion.better} {criterion.short}.",
            least=figures.AXIS * (1 + len(fields)),
        )
    ]
    if found:
        text.append(_most_important(found))
        quarter = math.ceil(findings.BEST_SHARE * len(ranked))
        drawings.append(
            Drawing(
                figures.importances(drawn, found),
                f"Importance by PED-ANOVA: what sets the best quarter apart, {quarter} of {len(ranked)} trials. Bars"
                f" are medians, whiskers span the middle 80 % of {findings.RESAMPLES} resamples of the trials, in each"
                " of which all parameters together are 1: where whiskers overlap, the order is not known.",
            )
        )
    elif len(ranked) < findings.ENOUGH:
        text.append(
            f"{len(ranked)} trials are too few to say how important each parameter is; it takes {findings.ENOUGH}."
        )
    else:
        text.append(f"All of them have the same {criterion.short}, so no parameter can be said to have mattered.")
    drawings += [
        Drawing(figure, f"Trials by {name}, later ones darker.", wide=False)
        for name, figure in figures.slices(drawn, criterion.name).items()
    ]
    yield Section(title, text, drawings)


def _most_important(found: Mapping[str, tuple[float, float, float]]) -> str:
    """The parameter with the largest share, or that it is not known. `found` is that of `findings.importance`."""

    def share(name: str) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(*found[name])

    most, *others = found
    rival = max(others, key=lambda name: found[name][2], default=None)  # whose whisker reaches highest
    if rival is None or found[most][1] > found[rival][2]:
        return f"{most} mattered most, with a share of {share(most)} in what sets the best quarter apart."
    return (
        f"Which parameter mattered most is not known: {most} has a share of {share(most)} in what sets the best quarter"
        f" apart, {rival} of {share(rival)}, and these overlap."
    )


def _because_of(spec: SweepSpec) -> str:
    rule = spec.early_stopping
    if not rule:
        return ""
    stops = ", ".join(map(str, rungs(spec.budget.evaluations, rule.grace, rule.reduction)))
    return f" (ASHA may stop a trial after evaluation {stops})" if stops else ""


def _learning(status: Status, rows: Mapping[int, Sequence[Row]], notes: Sequence[str]) -> Iterator[Section]:
    """Curves of all trials, and of the best ones training beside validation."""
    spec, entries = status.spec, status.entries
    ranked = ranking(entries)
    if not ranked:
        return
    best = ranked[:CURVES]
    names = {entry.number: run_name(entry.number, entry.config, spec.space.searched) for entry in best}
    some = figures.drawn(ranked)
    study = findings.derived(entries, {entry.number: (0.0,) for entry in some}, {})
    few = f"Drawn are {len(some)} of {len(ranked)} trials. " if len(some) < len(ranked) else ""
    yield Section(
        "How they learned",
        [
            f"{few}The best {len(best)} stand out, the first {min(len(best), figures.NAMED)} with their names; point at"
            " any line for its own.",
            "A cross is where a trial was stopped; the ranking says why.",
        ],
        [Drawing(figures.validation_curves(study, some, names, spec.budget.evaluations))],
    )
    curves = {entry.number: findings.curve(entry, rows.get(entry.number, ())) for entry in best}
    curves = {number: curve for number, curve in curves.items() if len(curve.validation) > 1}
    if not curves:
        return
    turns = {number: findings.overfitted_from(curve) for number, curve in curves.items()}
    known = [number for number, curve in curves.items() if curve.tells]
    overfitted = [f"{number:03d} from evaluation {turn} on" for number, turn in turns.items() if turn is not None]
    if not known:
        text = "No training losses were recorded to tell overfitting by, as with tracking.mode: disabled."
    elif overfitted:
        text = f"{len(overfitted)} of {counted(len(known), 'trial')} overfitted: {', '.join(overfitted)}."
    else:
        text = f"None of {counted(len(known), 'trial')} overfitted."
    rule = (
        "A trial overfits from the evaluation on that has its lowest validation loss, when after it the validation loss"
        f" rose by more than {findings.MATTERS:.0%} and the training loss fell."
    )
    yield Section(
        "Training beside validation",
        [text, rule, *notes],
        [
            Drawing(
                figures.training_and_validation(curve, turns[number]),
                f"Trial {names[number]}. {_learned(curve, turns[number], spec)}",
                wide=False,
            )
            for number, curve in curves.items()
        ],
    )


def _learned(curve: findings.Curve, turn: int | None, spec: SweepSpec) -> str:
    """The verdict on one trial."""
    lowest, last = curve.turn, curve.last
    rise = curve.validation[last] / curve.validation[lowest] - 1
    if turn is not None:
        steps = f"step {curve.steps[turn]}" if turn in curve.steps else ""
        epochs = f"epoch {spec.budget.epochs * turn / spec.budget.evaluations:.2g}" if spec.budget.epochs else ""
        where = ", ".join(filter(None, (steps, epochs)))
        return (
            f"Overfits from evaluation {turn}{f' ({where})' if where else ''} on: the validation loss rose from"
            f" {curve.validation[turn]:.4f} to {curve.validation[last]:.4f} while the training loss fell from"
            f" {curve.training[turn]:.4f} to {curve.training[last]:.4f}."
        )
    if lowest == last:
        return "Not overfitted: the validation loss was lowest at the last evaluation."
    if rise <= findings.MATTERS:
        return f"Not overfitted: after evaluation {lowest} the validation loss rose by {rise:.1%} only."
    if not curve.tells:
        return (
            f"The validation loss rose by {rise:.1%} after evaluation {lowest}; whether it overfits is not known, for"
            " its training losses are missing."
        )
    return f"The validation loss rose by {rise:.1%} after evaluation {lowest}, and so did the training loss: unstable."


def _search(entries: Sequence[Entry]) -> Iterator[Section]:
    complete = findings.complete(entries)
    if complete:
        what = complete[0].criterion.short
        study = findings.derived(entries, {entry.number: (findings.best_objective(entry),) for entry in complete}, {})
        yield Section(
            "How the search went",
            ["Points are trials that used their whole budget; time is that of all trials, one after the other."],
            [
                Drawing(figures.best_by_trials(study, what), wide=False),
                Drawing(figures.best_by_hours(entries, what), wide=False),
            ],
        )


def _cost(status: Status) -> Iterator[Section]:
    complete = findings.complete(status.entries)
    costs: dict[str, Callable[[Entry], float]] = {
        "minutes of training": lambda entry: entry.cost.seconds / 60,
        "peak memory, GB": lambda entry: entry.cost.peak_memory / 1e9,
    }
    drawings = []
    for name, cost in costs.items():
        values = {entry.number: (cost(entry), findings.best_objective(entry)) for entry in complete if cost(entry) > 0}
        if values:
            what = complete[0].criterion.name
            figure = figures.best_by_cost(findings.derived(status.entries, values, {}), name, what)
            drawings.append(Drawing(figure, wide=False))
    text = (
        [
            "Of the trials that used their whole budget. Red is where no other one is both better and cheaper.",
            "Both as they were: time on a machine that may have had other work, steps that an interruption repeated"
            " counted again; memory of the process, with all trials that it held.",
        ]
        if drawings
        else ["No trial that used its whole budget has a validation loss, and a time or memory on record."]
    )
    yield Section("What it cost", [*report.bill(status.ledger, status.spec.cost.per_hour), *text], drawings)


def _table(status: Status) -> dict[str, Any]:
    """Headings, and the cells of each trial: ranked ones first."""
    entries, searched = status.entries, status.spec.space.searched
    evaluation = findings.common_evaluation(entries) or 1
    ranked = ranking(entries)
    criterion, prices = status.ledger.criterion, report.prices(status.ledger, status.spec.cost.per_hour)
    headings = ["", "trial", *searched, f"best {criterion.short}", "at evaluation", f"at {evaluation}"]
    headings += ["minutes", *(["cost"] if prices else []), "steps", "tokens", "peak GB", "ended as", "why", "accidents"]
    rows = []
    for place, entry in enumerate([*ranked, *(entry for entry in entries if entry.best is None)], start=1):
        number, objective = entry.best or (None, None)
        common = entry.objectives.get(evaluation)
        rows.append(
            [
                str(place) if entry.best else "-",
                f"{entry.number:03d}",
                *(_value(getattr(entry.config, name)) for name in searched),
                "-" if objective is None else criterion.text(objective),
                "-" if number is None else str(number),
                "-" if common is None else criterion.text(common),
                f"{entry.cost.seconds / 60:.1f}",
                *([report.money(prices[entry.number])] if prices else []),
                f"{entry.cost.steps:,}",
                f"{entry.cost.tokens:,}",
                f"{entry.cost.peak_memory / 1e9:.2f}" if entry.cost.peak_memory else "-",
                _ended_as(entry, status),
                _reason(entry) or ("trained to its end" if entry.state is TrialState.COMPLETE else ""),
                _accidents(entry),
            ]
        )
    return {"headings": headings, "rows": rows}


def _ended_as(entry: Entry, status: Status) -> str:
    unfinished = entry.state is TrialState.RUNNING and status.driver is None
    return "unfinished" if unfinished else STATES[entry.state]


def _accidents(entry: Entry) -> str:
    counts = {
        "micro-batch halved": entry.halvings,
        "process died": len(entry.deaths),
        "fell silent": entry.silences,
    }
    return ", ".join(f"{what} {count}x" for what, count in counts.items() if count)


def _reason(entry: Entry) -> str:
    return textwrap.shorten(entry.reason or "", REASON, placeholder=" …")


def _commands(status: Status, directory: str) -> Iterator[str]:
    """What repeats the sweep, in a `directory` of its own, and its winner."""
    versions, quoted = status.ledger.noted("environment") or {}, shlex.quote(directory)
    packages = [  # a local version, such as torch's +cpu, is in no index
        f"{name}=={version.partition('+')[0]}"
        for name, version in versions.items()
        if name not in (PROGRAM, "git commit")
    ]
    if versions:  # this program is in no index
        source = f"its source, version {versions[PROGRAM]}"
        yield f"python -m pip install {' '.join(packages)} -e PATH/TO/{PROGRAM}  # {source}"
    yield "python -m sweep run space.yaml"
    for winner in ranking(status.entries)[:1]:
        yield f"python -m sweep rerun {quoted} --trial {winner.number}  # the best configuration alone, once more"
    if status.spec.trainable != "toy":
        yield f"python -m sweep export {quoted}"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < value < 0.01 else f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
