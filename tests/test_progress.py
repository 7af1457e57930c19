"""What a user sees while a sweep runs."""

import io
import re

import pytest
from rich.console import Console
from rich.live_render import LiveRender

from sweep import verification
from sweep.progress import Progress, overview, to_verify
from sweep.spec import Verify
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
    assert "\n1 running, 1 stopped" in plain(shown)
    assert "winner                0.5000" in plain(shown)
    assert "memory of the largest process 2.0 GB" in plain(shown)
    assert "GPU" not in shown
    assert "started" not in shown  # the table stands for the lines


def test_the_loss_of_the_base_is_no_loss_of_the_trial():
    ledger, screen = memory_ledger(), Console(file=io.StringIO(), width=120)
    for evaluation, shown in ((0, False), (1, True)):
        ledger.report(0 if evaluation else add_trial(ledger), evaluation, 3.0372)
        screen.print(overview(screen, ledger.entries(), ("r",), 9, {}, {}))
        assert ("3.0372" in screen.file.getvalue()) == shown


SEARCHED = ("r", "quant_type", "compute_dtype", "learning_rate", "warmup_ratio", "alpha")
"""As in search_spaces/pricer.yaml."""


def seen(progress: Progress) -> list[str]:
    """What the terminal shows of the live table: rich cuts off what is too high for it."""
    with progress.console.capture() as shown:
        progress.console.print(LiveRender(progress.table()))
    return plain(shown.get()).splitlines()


def crowded(width: int, height: int, ended: int, running: int) -> list[str]:
    """The live table of so many trials, of which the first, the usual default, has the highest loss."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, markup=False)
    progress, ledger = Progress(console, SEARCHED, trials=24, evaluations=3), memory_ledger()
    for number in range(ended + running):
        progress.started(ledger.entry(add_trial(ledger, learning_rate=2e-4 + number * 1e-6, warmup_ratio=0.123)))
        ledger.report(number, 0, 5.0)
        ledger.report(number, 1, 2.0 - number / 100)
        ledger.spend(number, Cost(elapsed=60.0))
        progress.advanced(ledger.entry(number), Slice((), Evaluation(1, 4, 2.0), None, False, 2 * 10**9))
        if number < ended:
            ledger.complete(number)
            progress.ended(ledger.entry(number))
    return seen(progress)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 24), (40, 24), (80, 16)])
def test_what_runs_and_the_verdict_are_seen_on_any_terminal(width, height):
    lines = crowded(width, height, ended=12, running=4)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    told = ["━━ 33%", "base model            5.0000", "usual default         2.0000", "winner                1.8500"]
    for part in told:
        assert part in shown
    rows = [int(found[1]) for line in lines if (found := re.match(r" +(\d{3})  r16 nf4", line))]
    assert rows[:4] == [15, 14, 13, 12]  # those that run
    assert rows[4:] == list(range(11, 15 - len(rows), -1))  # the best of the others, a line each
    assert lines[-1] == f"and {16 - len(rows)} ended trials more"


def test_a_wide_and_high_terminal_leaves_nothing_out():
    lines = crowded(160, 50, ended=16, running=4)
    assert sum("r16 nf4 bf16 lr2" in line and "wu0.123 a32" in line for line in lines) == 20
    assert "more" not in lines[-1]
    assert "tokens/s" in "\n".join(lines)


def test_more_running_trials_than_lines():
    lines = crowded(80, 24, ended=2, running=40)
    assert len(lines) == 24
    assert re.fullmatch(r"and \d+ running trials and 2 ended trials more", lines[-1])


def test_how_many_trials_are_to_verify():
    """As many as `verification.begin` makes of what can be ranked."""
    ledger, verify = memory_ledger(), Verify(top=3, seeds=2)
    assert (to_verify(None, [], 8), to_verify(verify, [], 8), to_verify(verify, [], 2)) == (0, 6, 4)
    for number, (r, loss) in enumerate([(4, 1.5), (4, 1.6), (8, 1.7), (16, None)]):  # of the first two the seeds differ
        add_trial(ledger, r=r)
        if loss is None:
            ledger.fail(number, "diverged")
        else:
            ledger.report(number, 1, loss)
            ledger.complete(number)
    assert to_verify(verify, ledger.entries(), 4) == len(verification.begin(ledger, top=3, seeds=2)[1]) == 4
    assert to_verify(verify, ledger.entries(), 9) == 6


def test_the_verification_counts_before_it_begins_and_while_it_runs():
    """Parts of 10 s: a search of two trials of two parts, one at a time, then two configurations with two seeds."""
    console = Console(file=io.StringIO(), width=120)
    progress = Progress(console, ("r",), trials=2, evaluations=2, verify=Verify(top=2, seeds=2))
    ledger = memory_ledger()

    def train(number: int, evaluations: int) -> None:
        progress.started(ledger.entry(number))
        for evaluation in range(1, evaluations + 1):
            ledger.report(number, evaluation, 2.0)
        ledger.spend(number, Cost(elapsed=10.0 * evaluations))
        if evaluations == 2:
            ledger.complete(number)
        progress.ended(ledger.entry(number))  # or as far as it has come

    train(add_trial(ledger, r=16), 2)
    train(add_trial(ledger, r=8), 0)
    assert "17%, 1 of 2 trials done in 0 s, time left 2 min" in seen(progress)[0]  # 2 + 4 x 2 parts
    train(1, 2)
    ledger = memory_ledger()
    progress.verifying(4)
    train(add_trial(ledger, r=16), 2)
    train(add_trial(ledger, r=8), 1)
    lines = seen(progress)
    assert "58%, 1 of 4 trials of the verification done in 0 s, time left 50 s" in lines[0]
    assert lines[1] == "1 running, 1 complete"
    assert lines[2].startswith("usual default         2.0000  (trial 000)")  # of the search
    assert "s1 r8 " in "\n".join(lines)
