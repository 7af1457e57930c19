"""What a user sees while a sweep runs."""

import io
import re

import pytest
from rich.console import Console

from sweep.progress import Progress
from tests.ledgers import add_trial, memory_ledger
from trainables.protocol import Cost, Evaluation, Slice, Step


def watch(terminal: bool, width: int = 80, load: float | None = None) -> str:
    """Everything that a small sweep prints."""
    out = io.StringIO()
    ledger = memory_ledger()
    console = Console(file=out, force_terminal=terminal, width=width, markup=False)
    with Progress(console, ("r", "learning_rate"), trials=3, evaluations=2) as progress:
        first, second = add_trial(ledger, r=8), add_trial(ledger, r=32, learning_rate=1e-3)
        for number in (first, second):
            progress.started(ledger.entry(number))
            ledger.report(number, 1, 1.5 - number)
            ledger.spend(number, Cost(elapsed=600.0))
            steps = (Step(4, 2.0, 1e-4, 1.0, tokens=300, seconds=2.0),)
            progress.note("base 1 M parameters [in 4 bits]")
            progress.advanced(
                ledger.entry(number), Slice(steps, Evaluation(1, 4, 1.5 - number), None, False, 2 * 10**9, load)
            )
        ledger.stop(first, "ASHA [poor]")
        progress.ended(ledger.entry(first))
        if terminal:
            console.print(progress.table())
    return out.getvalue()


def test_lines_where_there_is_no_terminal():
    lines = watch(terminal=False).splitlines()
    assert "trial   0 started: r8 lr2.0e-04" in lines[0]
    assert lines[1] == "base 1 M parameters [in 4 bits]"
    assert "trial   0 step 4, evaluation 1/2: validation loss 1.5000, 150 tokens/s" in lines[2]
    assert lines[-1].endswith("trial   0 stopped, best 1.5000 (ASHA [poor])")  # no minute is over
    assert sum("in 4 bits" in line for line in lines) == 1


def test_a_line_on_the_whole_sweep_now_and_then(monkeypatch):
    monkeypatch.setattr("sweep.progress.SUMMARY_SECONDS", 0.0)
    last = watch(terminal=False).splitlines()[-1]
    assert "1 of 3 trials are done, the best loss so far is 0.5000 (trial 001), about 30 min left" in last


def test_a_sign_of_life_where_nothing_is_evaluated(monkeypatch):
    monkeypatch.setattr("sweep.progress.SUMMARY_SECONDS", 0.0)
    out, ledger = io.StringIO(), memory_ledger()
    with Progress(Console(file=out, width=120), (), trials=1, evaluations=0) as progress:
        entry = ledger.entry(add_trial(ledger))
        progress.started(entry)
        progress.advanced(entry, Slice((Step(4, 2.0, 1e-4, 1.0, tokens=300, seconds=2.0),), None, None, False, 0))
    assert "trial   0 step 4: training loss 2.0000" in out.getvalue()


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", shown)


def test_a_gpu():
    assert "GPU memory of the largest process 2.0 GB, GPUs compute 93% of the time" in plain(watch(True, load=0.93))


@pytest.mark.parametrize("width", [80, 160])
def test_live_table(width):
    shown = watch(terminal=True, width=width)
    assert "1 of 3 trials done" in shown
    (row,) = {line for line in shown.splitlines() if "001" in line and "running" in line}
    for cell in ("r32 lr1.0e-03", "1/2", "0.5000", "150", "10 min"):
        assert cell in row
    assert "━ 40%, 1 of 3 trials done in 0 s, time left 30 min" in plain(shown)  # 1 + 2 evaluations of 10 min
    assert "winner                0.5000" in plain(shown)
    assert "memory of the largest process 2.0 GB" in plain(shown)
    assert "GPU" not in shown
    assert "started" not in shown  # the table stands for the lines
