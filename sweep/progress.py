"""The terminal while a sweep runs: a calm live table, or one line per event when the output is not a terminal."""

import math
import os
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from optuna.trial import TrialState
from rich import box, console
from rich.cells import cell_len
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweep.forecast import Forecast, duration, forecast
from sweep.report import standing, verdict
from sweep.spec import EarlyStopping, Verify
from sweep.study import STATES, Entry
from sweep.tracking import described
from sweep.validation import counted
from trainables.protocol import Slice


class Console(console.Console):
    """One that falls silent when nobody reads it any more, as after Ctrl-C in `… | tee log`; rich would exit."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def terminal() -> Console:
    """Standard output; a log file, which has no width of its own, gets 120 columns."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # rich takes 80
    return Console(markup=False, emoji=False, width=width)  # paths and error messages hold brackets


BARS = "▁▂▃▄▅▆▇█"
ENDED_SHOWN = 12
"""Rows of ended trials, the best of them, where no height says how many."""
UNFINISHED = "unfinished"
"""A trial that runs by the ledger, and does not."""
CONFIGURATION = "configuration"
LEAST_WIDTH = 20
"""Of the column of configurations, as long as there are others to be left out."""
SUMMARY_SECONDS = 60.0
"""At least so long apart are lines on the whole sweep, where there is no table."""


@dataclass
class _Row:
    """What the newest slices of a trial said."""

    step: int = 0
    tokens_per_second: float = 0.0
    peak_memory: int = 0
    gpu_load: float | None = None
    since: float | None = None
    """time.monotonic() of its newest evaluation, or else its first slice."""


@dataclass
class Progress:
    """Listens to a sweep (see `scheduler.Listener`) and shows it on `console`, from `with` to its end."""

    console: Console
    searched: Sequence[str]
    trials: int
    """`search.trials`."""
    evaluations: int
    """`budget.evaluations`."""
    rule: EarlyStopping | None = None
    verify: Verify | None = None
    _search: Sequence[Entry] | None = None
    """The search's trials, once those of its verification are shown."""
    _verifications: int = 0
    """How many these are."""
    _entries: dict[int, Entry] = field(default_factory=dict)
    _rows: dict[int, _Row] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _live: Live | None = None
    _told: set[str] = field(default_factory=set)
    _summed_up: float = field(default_factory=time.monotonic)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def note(self, line: str) -> None:
        """Say this once."""
        if line not in self._told:
            self._told.add(line)
            self.console.print(line, highlight=False, soft_wrap=True)

    @property
    def _asked(self) -> int:
        """How many trials there are to be of those that are shown."""
        return self.trials if self._search is None else self._verifications

    def resumed(self, entries: Sequence[Entry]) -> None:
        self._entries = {entry.number: entry for entry in entries}
        done = sum(entry.state is not TrialState.RUNNING for entry in entries)
        unfinished = len(entries) - done
        goes_on = "The sweep goes on" if unfinished or done < self._asked else "Nothing is left to do"
        begun = f"{unfinished} unfinished, " if unfinished else ""
        self.note(f"{goes_on}: {counted(done, 'trial')} done, {begun}{self._asked} asked for.")

    def verifying(self, trials: int) -> None:
        self._search, self._verifications = list(self._entries.values()), trials
        self._entries, self._rows, self.searched = {}, {}, seeded(self.searched)
        self.note(verification_heading(trials))

    def started(self, entry: Entry) -> None:
        again = " again" if entry.cost.steps or entry.losses else ""
        self._entries[entry.number] = entry
        self._rows[entry.number] = _Row()
        self._say(f"trial {entry.number:3d} started{again}: {described(entry.config, self.searched)}")

    def advanced(self, entry: Entry, slice_: Slice) -> None:
        self._entries[entry.number] = entry
        row = self._rows[entry.number]
        row.peak_memory, row.gpu_load = max(row.peak_memory, slice_.peak_memory), slice_.gpu_load
        if row.since is None or slice_.evaluation is not None:
            row.since = time.monotonic()
        if slice_.steps:
            seconds = sum(step.seconds for step in slice_.steps)
            row.step = slice_.steps[-1].step
            row.tokens_per_second = sum(step.tokens for step in slice_.steps) / seconds if seconds else 0.0
        if slice_.evaluation is not None:
            done = slice_.evaluation
            what = "base model" if done.evaluation == 0 else f"evaluation {done.evaluation}/{self.evaluations}"
            speed = f", {row.tokens_per_second:,.0f} tokens/s" if row.tokens_per_second else ""
            score = "" if done.score is None else f", {entry.criterion.name} {entry.criterion.text(done.score)}"
            told = f"validation loss {done.loss:.4f}{score}{speed}"
            self._say(f"trial {entry.number:3d} step {done.step}, {what}: {told}")
        elif slice_.steps and not self.evaluations and time.monotonic() - self._summed_up > SUMMARY_SECONDS:
            self._summed_up = time.monotonic()  # no evaluation would say that it lives
            self._say(f"trial {entry.number:3d} step {row.step}: training loss {slice_.steps[-1].loss:.4f}")

    def ended(self, entry: Entry) -> None:
        self._entries[entry.number] = entry
        self._rows.pop(entry.number, None)
        best = f", best {entry.criterion.text(entry.best[1])}" if entry.best else ""
        why = f" ({entry.reason})" if entry.reason else ""
        self._say(f"trial {entry.number:3d} {STATES[entry.state]}{best}{why}")
        if time.monotonic() - self._summed_up > SUMMARY_SECONDS:
            self._summed_up = time.monotonic()
            entries = list(self._entries.values())
            seconds = self._outlook(entries).whole.seconds
            self._say(f"{standing(entries, self._asked)}{f', about {duration(seconds)} left' if seconds else ''}")

    def _say(self, line: str) -> None:
        if not self._live:
            self.console.print(f"{time.monotonic() - self._began:7.1f} s  {line}", highlight=False, soft_wrap=True)

    def _outlook(self, entries: Sequence[Entry], since: Mapping[int, float] | None = None) -> "Outlook":
        """`entries` are those that are shown."""
        if self._search is None:
            to_come = to_verify(self.verify, entries, self.trials)
            return outlook(entries, self.trials, self.evaluations, self.rule, [], to_come, since)
        return outlook(self._search, self.trials, self.evaluations, self.rule, entries, self._asked, since)

    def table(self) -> Group:
        """How far the sweep is, the best so far and the load of the machine, above as many trials as the terminal is
        high: should it be too low for all that, the last of them are cut off."""
        now, entries = time.monotonic(), sorted(list(self._entries.values()), key=lambda entry: entry.number)
        done = sum(entry.state is not TrialState.RUNNING for entry in entries)
        rows = dict(self._rows)  # which the driver's thread goes on changing
        since = {number: now - row.since for number, row in rows.items() if row.since is not None}
        ahead = self._outlook(entries, since)
        of_what = "" if self._search is None else " of the verification"
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=1.0, completed=ahead.whole.share, width=20),
            f"{ahead.whole.share:.0%}, {done} of {counted(self._asked, 'trial')}{of_what} done in"
            f" {duration(now - self._began)}, time left {duration(ahead.whole.seconds)}",
        )
        speeds = {number: row.tokens_per_second for number, row in rows.items()}
        loads = [row.gpu_load for row in rows.values() if row.gpu_load is not None]
        memory = max((row.peak_memory for row in rows.values()), default=0)
        load = machine(memory, sum(loads) / len(loads) if loads else None)
        told = verdict(entries if self._search is None else self._search)
        lines = [one_line(line) for line in [tally(entries), *told, *load]]
        left = ahead.whole.of_trial if self._search is None else ahead.of_verification

        def frame(most: int) -> Group:
            trials = overview(self.console, entries, self.searched, self.evaluations, speeds, left, most=most)
            return Group(head, *lines, trials)

        room = self.console.height - len(self.console.render_lines(frame(0)))
        return frame(max(1, room))


@dataclass(frozen=True)
class Outlook:
    """What is left of a sweep with its verification."""

    whole: Forecast
    """Of both; `of_trial` has trials of the search."""
    of_verification: Mapping[int, float]
    """As `of_trial`, of its trials."""


def outlook(
    search: Sequence[Entry],
    trials: int,
    evaluations: int,
    rule: EarlyStopping | None,
    verifying: Sequence[Entry],
    verifications: int,
    since: Mapping[int, float] | None = None,
) -> Outlook:
    """What is left of a search of so many `trials` and of its verification by so many, of which none is stopped early;
    the others are as for `forecast`.

    Until the verification has evaluations of its own, its parts of the budget take as long as those of the search did,
    and as many trials are trained at a time.
    """
    runs, running = ([e for e in part if e.state is TrialState.RUNNING] for part in (search, verifying))
    if running and not runs:
        trials = len(search)  # fewer than were asked for, when the space was exhausted
    first = forecast(search, trials, evaluations, rule, since)
    then = forecast(verifying, verifications, evaluations, None, since)
    before, done = (sum(max(entry.reported, 0) for entry in part) for part in (search, verifying))
    left = (verifications - len(verifying) + len(running)) * max(evaluations, 1)
    left -= sum(max(entry.reported, 0) for entry in running)
    seconds = then.seconds if left else 0.0
    timed = [entry for entry in search if entry.reported > 0 and entry.cost.elapsed > 0]
    at_a_time = min(len(running or runs), verifications)
    if seconds is None and timed and at_a_time:
        pace = sum(entry.cost.elapsed for entry in timed) / sum(entry.reported for entry in timed)
        seconds = left * pace / at_a_time
    share = (before + done) / (before / first.share + done + left) if before and verifications else first.share
    total = None if first.seconds is None or seconds is None else first.seconds + seconds
    return Outlook(Forecast(share, total, first.of_trial), then.of_trial)


def to_verify(verify: Verify | None, search: Sequence[Entry], trials: int) -> int:
    """Trials that are to verify a search of so many `trials`, as far as it is known yet."""
    if verify is None:
        return 0
    fit = {e.config.model_copy(update={"seed": 0}) for e in search if e.best or e.state is TrialState.RUNNING}
    return verify.seeds * min(verify.top, len(fit) + max(0, trials - len(search)))


def seeded(searched: Sequence[str]) -> tuple[str, ...]:
    """What tells the trials of a verification apart: their seed, which the search may have had, too."""
    return tuple(dict.fromkeys(["seed", *searched]))


def verification_heading(trials: int) -> str:
    """Above the trials of a verification."""
    return f"Verification: {trials} trials, numbered anew, of the best configurations with other seeds"


def one_line(text: str) -> Text:
    """Cut short where there is no room for it."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def overview(
    screen: console.Console,
    entries: Sequence[Entry],
    searched: Sequence[str],
    evaluations: int,
    speeds: Mapping[int, float],
    seconds_left: Mapping[int, float],
    *,
    alive: bool = True,
    most: int | None = None,
) -> Group:
    """A line for each running trial, then for those that have ended, best first.

    `speeds` are tokens per second by trial; where there is none, that of all the trial's time is shown. `seconds_left`
    are those of running trials, if nothing stops them. `alive`: what runs by the ledger does run. There are at most
    `most` trials, or else `ENDED_SHOWN` that have ended, and as many columns as the screen is wide enough for.
    """
    ranked = sorted(entries, key=lambda entry: entry.best[1] if entry.best else math.inf)
    running = [entry for entry in ranked if entry.state is TrialState.RUNNING]
    ended = [entry for entry in ranked if entry.state is not TrialState.RUNNING]
    shown = [*running, *ended][: len(running) + ENDED_SHOWN if most is None else most]
    curves = {e.number: [e.criterion.turned(o) for n, o in sorted(e.objectives.items()) if n > 0] for e in entries}
    scale = sorted(value for curve in curves.values() for value in curve)
    values = "losses" if all(entry.criterion.is_loss for entry in entries) else "values"

    def cells(entry: Entry) -> dict[str, str]:
        runs = entry.state is TrialState.RUNNING
        newest = entry.objectives[entry.reported] if entry.reported > 0 else None  # that of 0 is the base's
        speed = speeds.get(entry.number) or (entry.cost.tokens / entry.cost.seconds if entry.cost.seconds else 0.0)
        return {
            "trial": f"{entry.number:03d}",
            CONFIGURATION: described(entry.config, searched),
            "state": _state(entry, alive),
            "eval.": f"{max(entry.reported, 0)}/{evaluations}",
            values: sparkline(curves[entry.number], scale),
            "newest": "" if newest is None else entry.criterion.text(newest),
            "best": "" if entry.best is None else entry.criterion.text(entry.best[1]),
            "tokens/s": f"{speed:,.0f}" if speed else "",
            "left": duration(seconds_left.get(entry.number)) if runs else "",
        }

    rows = [cells(entry) for entry in shown]

    def drawn(headings: Sequence[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for heading in headings:
            side: Literal["left", "right"] = "left" if heading in (CONFIGURATION, "state", values) else "right"
            table.add_column(one_line(heading), justify=side, no_wrap=heading != CONFIGURATION)  # that gives way
        for entry, row in zip(shown, rows, strict=True):
            runs = alive and entry.state is TrialState.RUNNING
            table.add_row(*(one_line(row[heading]) for heading in headings), style="bold" if runs else None)
        return table

    headings = ["trial", CONFIGURATION, "state", "eval.", values, "newest", "best", "tokens/s", "left"]
    longest = max(cell_len(text) for text in [CONFIGURATION, *(row[CONFIGURATION] for row in rows)])
    room = screen.width + max(0, longest - LEAST_WIDTH)
    for spare in ("tokens/s", "newest", values, "state", "left"):  # the least needed first
        if screen.measure(drawn(headings), options=screen.options.update(width=10 * room)).maximum > room:
            headings.remove(spare)
    left_out = {"running trial": max(0, len(running) - len(shown))}
    left_out["ended trial"] = len(entries) - len(shown) - left_out["running trial"]
    more = " and ".join(counted(number, what) for what, number in left_out.items() if number)
    return Group(drawn(headings), *([one_line(f"and {more} more")] if more else []))


def tally(entries: Sequence[Entry], *, alive: bool = True) -> str:
    """How many trials are in which state, such as `2 running, 3 complete, 4 stopped, 1 failed`."""
    states = Counter(_state(entry, alive) for entry in entries)
    return ", ".join(f"{states[state]} {state}" for state in (UNFINISHED, *STATES.values()) if states[state])


def _state(entry: Entry, alive: bool) -> str:
    return STATES[entry.state] if alive or entry.state is not TrialState.RUNNING else UNFINISHED


def machine(memory: int, gpu_load: float | None) -> list[str]:
    """A line on the load of the machine, if anything is known of it: bytes of the largest process, and share of the
    time in which GPUs compute."""
    on_gpu = gpu_load is not None
    busy = f", GPUs compute {gpu_load:.0%} of the time" if on_gpu else ""
    return (
        [f"{'GPU memory' if on_gpu else 'memory'} of the largest process {memory / 1e9:.1f} GB{busy}"] if memory else []
    )


def sparkline(losses: Sequence[float], scale: Sequence[float]) -> str:
    """A bar for each loss: as high as the share of `scale`, which is sorted, that lies below. A diverged trial leaves
    the differences between good ones to be seen."""
    return "".join(BARS[len(BARS) * bisect_left(scale, loss) // len(scale)] for loss in losses)
