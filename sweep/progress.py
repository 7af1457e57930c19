"""The terminal while a sweep runs: a calm live table, or one line per event when the output is not a terminal."""

import math
import os
import sys
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from optuna.trial import TrialState
from rich import box, console
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from sweep.forecast import duration, forecast
from sweep.report import standing, verdict
from sweep.spec import EarlyStopping
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
"""Rows of ended trials in the live table: the best of them."""
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
    _entries: dict[int, Entry] = field(default_factory=dict)
    _rows: dict[int, _Row] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _live: Live | None = None
    _told: set[str] = field(default_factory=set)
    _verifies: bool = False
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

    def resumed(self, entries: Sequence[Entry]) -> None:
        self._entries = {entry.number: entry for entry in entries}
        done = sum(entry.state is not TrialState.RUNNING for entry in entries)
        unfinished = len(entries) - done
        goes_on = "The sweep goes on" if unfinished or done < self.trials else "Nothing is left to do"
        begun = f"{unfinished} unfinished, " if unfinished else ""
        self.note(f"{goes_on}: {counted(done, 'trial')} done, {begun}{self.trials} asked for.")

    def verifying(self, trials: int) -> None:
        self.trials, self.rule, self.searched = trials, None, (*self.searched, "seed")
        self._entries, self._rows, self._verifies = {}, {}, True
        self.note(f"Verification: {trials} trials, numbered anew, of the best configurations with other seeds")

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
            seconds = forecast(entries, self.trials, self.evaluations, self.rule).seconds
            self._say(f"{standing(entries, self.trials)}{f', about {duration(seconds)} left' if seconds else ''}")

    def _say(self, line: str) -> None:
        if not self._live:
            self.console.print(f"{time.monotonic() - self._began:7.1f} s  {line}", highlight=False, soft_wrap=True)

    def table(self) -> Group:
        """How far the sweep is, above the trials; the best so far and the load of the machine below."""
        now, entries = time.monotonic(), sorted(list(self._entries.values()), key=lambda entry: entry.number)
        done = sum(entry.state is not TrialState.RUNNING for entry in entries)
        rows = dict(self._rows)  # which the driver's thread goes on changing
        since = {number: now - row.since for number, row in rows.items() if row.since is not None}
        ahead = forecast(entries, self.trials, self.evaluations, self.rule, since)
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=1.0, completed=ahead.share, width=20),
            f"{ahead.share:.0%}, {done} of {counted(self.trials, 'trial')} done in {duration(now - self._began)},"
            f" time left {duration(ahead.seconds)}",
        )
        speeds = {number: row.tokens_per_second for number, row in rows.items()}
        loads = [row.gpu_load for row in rows.values() if row.gpu_load is not None]
        memory = max((row.peak_memory for row in rows.values()), default=0)
        return Group(
            head,
            overview(entries, self.searched, self.evaluations, speeds, ahead.of_trial),
            *([] if self._verifies else verdict(entries)),
            *machine(memory, sum(loads) / len(loads) if loads else None),
        )


def overview(
    entries: Sequence[Entry],
    searched: Sequence[str],
    evaluations: int,
    speeds: Mapping[int, float],
    seconds_left: Mapping[int, float],
    *,
    alive: bool = True,
) -> Table:
    """A row for each running trial, below the best of those that have ended.

    `speeds` are tokens per second by trial; where there is none, that of all the trial's time is shown. `seconds_left`
    are those of running trials, if nothing stops them. `alive`: what runs by the ledger does run.
    """
    ranked = sorted(entries, key=lambda entry: entry.best[1] if entry.best else math.inf)
    running = [entry for entry in ranked if entry.state is TrialState.RUNNING]
    ended = [entry for entry in ranked if entry.state is not TrialState.RUNNING]
    curves = {e.number: [e.criterion.turned(o) for n, o in sorted(e.objectives.items()) if n > 0] for e in entries}
    scale = sorted(value for curve in curves.values() for value in curve)
    values = "losses" if all(entry.criterion.is_loss for entry in entries) else "values"
    table = Table(title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("trial", "configuration", "state", "eval.", values, "newest", "best", "tokens/s", "left"):
        left = heading in ("configuration", "state", values)
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "configuration")
    for entry in [*ended[:ENDED_SHOWN], *running]:
        runs = entry.state is TrialState.RUNNING
        newest = entry.objectives.get(entry.reported)
        speed = speeds.get(entry.number) or (entry.cost.tokens / entry.cost.seconds if entry.cost.seconds else 0.0)
        table.add_row(
            f"{entry.number:03d}",
            described(entry.config, searched),
            "unfinished" if runs and not alive else STATES[entry.state],
            f"{max(entry.reported, 0)}/{evaluations}",
            sparkline(curves[entry.number], scale),
            "" if newest is None else entry.criterion.text(newest),
            "" if entry.best is None else entry.criterion.text(entry.best[1]),
            f"{speed:,.0f}" if speed else "",
            duration(seconds_left.get(entry.number)) if runs else "",
            style="bold" if runs and alive else None,
        )
    if (left_out := len(ended) - ENDED_SHOWN) > 0:
        table.caption = f"left out: {counted(left_out, 'ended trial')} with {ended[0].criterion.worse} {values}"
    return table


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
