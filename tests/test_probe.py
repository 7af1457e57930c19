"""What a sweep takes, in hours and money: before it is started, and when it has ended."""

import io
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
from rich.console import Console

from sweep import page, probe, report, verification
from sweep.place import Place
from sweep.probe import Probed, sweep_seconds, told
from sweep.spec import load
from sweep.status import Status, as_json, show
from tests.ledgers import add_trial, memory_ledger
from trainables.config import QLoRAConfig
from trainables.protocol import Cost, Job, OutOfMemory, Timed

TIMED = Timed("a CPU", devices=0, start=10.0, step=2.0, evaluation=5.0)


def test_seconds_of_a_sweep():
    """15 parts of 5 steps, 15 evaluations and that of the base."""
    assert sweep_seconds(TIMED, 15, 3, [9, 3, 3], places=1, gain=1.0) == 10 + 15 * 5 * 2 + 16 * 5
    assert sweep_seconds(TIMED, 15, 3, [9, 3, 3], places=2, gain=1.0) == 10 + (150 + 80) / 2
    assert sweep_seconds(TIMED, 15, 3, [9, 3, 3], places=2, gain=3.0) == 10 + (50 + 80) / 2  # of training alone
    assert sweep_seconds(TIMED, 15, 0, [1], places=1, gain=1.0) == 10 + 15 * 2  # without evaluations there is no base


def test_what_is_told(space):
    spec = load(space, ["cost.per_hour=36", "budget={steps: 15, evaluations: 3}"])
    configs = {"lightest": QLoRAConfig(r=4), "heaviest": QLoRAConfig(r=32)}
    timed = {"lightest": TIMED, "heaviest": Timed("a CPU", 0, start=10.0, step=20.0, evaluation=5.0)}
    halvings = {"lightest": 0, "heaviest": 1}
    probed = Probed(timed, halvings, imports=4.0, at_a_time=4, places=2, slots=2, gain=1.5)
    lines = told(probed, spec, configs, [9, 3, 3], rows=480)
    assert lines["probe"] == [
        "a CPU, one trial alone; a process starts in 14 s",
        "lightest: 2.000 s a step, 5.00 s an evaluation; 15 steps and 3 evaluations take 0.8 min",
        "heaviest: 20.000 s a step, 5.00 s an evaluation; 15 steps and 3 evaluations take 5.2 min,"
        " in micro-batches of 4 rows, which fit",
    ]
    low, high = 14 + (100 + 80) / 2, 14 + (1000 + 80) / 2
    together = "4 trials at a time, 2 in a process, 1.5 times as fast as one after the other"
    assert lines["hours"] == [f"{report.money(low / 3600)} to {report.money(high / 3600)} on this machine, {together}"]
    assert not any("scoring" in line for line in lines["assumed"])
    assert lines["cost"] == [f"{low / 100:.2f} to {high / 100:.2f}, at 36 an hour"]
    assert "cost" not in told(probed, load(space), configs, [9, 3, 3], rows=480)

    # Four whole trials more, of 15 steps and 3 evaluations.
    verified = load(space, ["verify={top: 2, seeds: 2}", "budget={steps: 15, evaluations: 3}", "cost.per_hour=36"])
    more = told(probed, verified, configs, [9, 3, 3], rows=480)
    small, large = 4 * (15 * 2 / 1.5 + 3 * 5) / 2, 4 * (15 * 20 / 1.5 + 3 * 5) / 2
    hours = [report.money(seconds / 3600) for seconds in (low + small, high + large, small, large)]
    of_which = f"{hours[2]} to {hours[3]} of them verification"
    assert more["hours"] == [f"{hours[0]} to {hours[1]} on this machine, {together}; {of_which}"]
    assert more["cost"] == [f"{(low + small) / 100:.2f} to {(high + large) / 100:.2f}, at 36 an hour"]


@pytest.mark.parametrize(
    ("error", "why", "tried"),
    [
        (OutOfMemory("CUDA out of memory"), "not even with a micro-batch of 1: CUDA out of memory", [8, 4, 2, 1]),
        (MemoryError("no room for the model"), "no room for the model", [8]),
        (BrokenProcessPool(), "the process that timed it died, mostly for want of memory", [8]),
    ],
)
def test_what_does_not_fit_is_named(space, error, why, tried):
    rows = []

    def submit(call, module, function, config, job, *how):
        rows.append(config.micro_batch(job.halvings))
        answer = Future()
        answer.set_exception(error)
        return answer

    config, job = QLoRAConfig(r=32, batch_size=8), Job("model", "tokens", load(space).budget.per_trial)
    with pytest.raises(ValueError, match="the heaviest configuration, r32 ") as caught:
        probe._timed(SimpleNamespace(submit=submit), load(space), "heaviest", config, job)
    assert f"does not fit on this machine ({why}). Set gradient_checkpointing: true or" in str(caught.value)
    assert rows == tried


def test_an_error_that_is_kept_keeps_no_tensors(monkeypatch):
    """Those of its frames and of what it came from would take the room of the next attempt."""

    def fail(*arguments):
        raise OutOfMemory("CUDA out of memory") from RuntimeError("with tensors in its frames")

    monkeypatch.setattr("trainables.toy.start", fail)
    with pytest.raises(OutOfMemory, match="CUDA") as caught:
        probe._call("trainables.toy", "start")
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_one_trial_is_no_trials():
    assert (report.counted(1, "trial"), report.counted(0, "trial")) == ("1 trial", "0 trials")
    assert report.standing([], 1) == "0 of 1 trial is done"


@pytest.mark.parametrize(("amount", "shown"), [(0.004216, "0.0042"), (0.5, "0.5"), (1234.567, "1,234.57")])
def test_money(amount, shown):
    assert report.money(amount) == shown


def test_what_trials_cost(space, tmp_path):
    """In the ranking, in `status`, for programs, and in report.html; those of the verification, too."""
    ledger = memory_ledger()
    ledger.note("sweep_id", "abcd")
    for seconds in (3600.0, 900.0):
        number = add_trial(ledger)
        ledger.report(number, 1, 2.0)
        ledger.spend(number, Cost(seconds=seconds))
        ledger.complete(number)
    ledger.note(report.SIDE_BY_SIDE, 2)
    screen = io.StringIO()
    report.show(Console(file=screen, width=120), ledger, ["seed"], 60.0, 8.0)
    how = "0.62 h of a machine at 8 an hour, as if all had run 2 at a time; starting and waiting not counted"
    assert f"cost so far           5.00  ({how})\n" in screen.getvalue()
    rows = [line.split("│")[-2].strip() for line in screen.getvalue().splitlines() if line.startswith("│")]
    assert rows == ["4.00", "1.00"]
    screen = io.StringIO()
    report.show(Console(file=screen, width=120), ledger, ["seed"], 60.0)
    assert "cost" not in screen.getvalue()

    free, priced = (
        Status(Place.at(str(tmp_path)), load(space, options), ledger, ledger.entries(), None)
        for options in ([], ["cost.per_hour=8"])
    )
    fresh, wanted = verification.begin(ledger, top=1, seeds=2)
    number = fresh.add(verification.propose([], wanted)).number
    fresh.spend(number, Cost(seconds=900.0))  # alone on the machine
    plain = as_json(priced)
    assert (plain["cost"], [trial["cost"] for trial in plain["trials"]]) == (7.0, [4.0, 1.0])
    assert (as_json(free)["cost"], as_json(free)["trials"][0]["cost"]) == (None, None)
    html, unpriced = (page.render(each, {}).replace(page.get_plotlyjs(), "") for each in (priced, free))
    assert "cost so far           7.00  (0.88 h of a machine at 8 an hour" in html
    assert "<th>minutes</th><th>cost</th>" in html
    assert "<td>60.0</td><td>4.00</td>" in html
    assert "cost so far" not in unpriced
    assert "<th>cost</th>" not in unpriced
    screen = io.StringIO()
    show(Console(file=screen, width=120), priced)
    assert "cost so far           7.00" in screen.getvalue()
    screen = io.StringIO()
    show(Console(file=screen, width=120), free)
    assert "cost so far" not in screen.getvalue()
