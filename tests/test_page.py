"""report.html, and what it says of a sweep."""

import io
import math
import re
import shutil
import subprocess
import sys
from html import unescape

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from typer.testing import CliRunner

from sweep import cli, figures, findings, page, report, tracking, verification
from sweep.findings import Curve
from sweep.place import Place
from sweep.progress import Console
from sweep.requests import BY_HAND
from sweep.runner import Outcome
from sweep.spec import load
from sweep.status import Status
from sweep.study import ranking
from tests import browser, sweeps
from tests.ledgers import add_trial, memory_ledger, swept
from trainables.config import DataConfig
from trainables.protocol import Cost


@pytest.fixture
def toy(space):
    return load(space, ["search.sampler=random", "search.trials=24"])


@pytest.fixture
def status(toy, tmp_path):
    """A toy sweep of 24 trials at its end."""
    return swept(toy, Place.at(str(tmp_path / "sweeps/toy")))


def ended(ledger, *losses: float, cost: Cost | None = None, stop: bool = False, **config) -> int:
    """A trial with these validation losses at evaluations 1, 2, …"""
    number = add_trial(ledger, **config)
    for evaluation, loss in enumerate(losses, start=1):
        ledger.report(number, evaluation, loss)
    ledger.spend(number, cost or Cost(seconds=60, steps=10, tokens=1000, peak_memory=10**9))
    if stop:
        ledger.stop(number, "ASHA: poor")
    else:
        ledger.complete(number)
    return number


def shown(spec, ledger, tmp_path) -> str:
    """The page of a sweep that nobody runs, without plotly.js."""
    html = page.render(Status(Place.at(str(tmp_path)), spec, ledger, ledger.entries(), None), {})
    return html.replace(page.get_plotlyjs(), "")


def test_all_trials_are_compared_at_the_newest_evaluation_that_all_have():
    ledger = memory_ledger()
    assert findings.common_evaluation(ledger.entries()) is None
    running = add_trial(ledger)
    ledger.report(running, 0, 5.0)
    assert findings.common_evaluation(ledger.entries()) is None  # the base's is no evaluation of a trial
    ledger.report(running, 1, 3.0)
    ended(ledger, 3.0, 2.0, 1.0)
    assert findings.common_evaluation(ledger.entries()) == 3
    ended(ledger, 3.0, 2.5, stop=True)
    ledger.fail(add_trial(ledger), "diverged")
    assert findings.common_evaluation(ledger.entries()) == 2


def test_the_derived_study_has_effective_values_and_the_ledgers_numbers(status):
    entries = status.entries
    assert {entry.state for entry in entries} == {TrialState.COMPLETE, TrialState.PRUNED}
    shown = findings.axes(entries, status.spec.space)
    assert shown["r"] == CategoricalDistribution([4, 8, 16, 32])
    assert shown["alpha"] == CategoricalDistribution([4, 8, 16, 32, 64])  # not the factor 1 or 2
    assert shown["quant_type"] == CategoricalDistribution(["fp4", "nf4"])
    rates = [entry.config.learning_rate for entry in entries]
    assert shown["learning_rate"] == FloatDistribution(min(rates), max(rates), log=True)

    compared = {entry.number: (entry.losses[1],) for entry in entries if entry.number % 2}
    study = findings.derived(entries, compared, shown)
    for entry, trial in zip(entries, study.trials, strict=True):
        assert trial.number == entry.number
        if entry.number % 2:
            assert trial.state is TrialState.COMPLETE  # also of those that were stopped
            assert trial.value == entry.losses[1]
            assert trial.params == {name: getattr(entry.config, name) for name in shown}
        else:
            assert trial.state is TrialState.FAIL


def test_a_field_that_is_the_same_in_all_trials_is_not_shown(status):
    same = [entry for entry in status.entries if entry.config.quant_type == "nf4"]
    assert "quant_type" not in findings.axes(same, status.spec.space)


def test_importance_finds_what_decides_and_says_how_sure_it_is(status):
    def by_r(entries):
        study = findings.derived(
            entries,
            {entry.number: (math.log2(entry.config.r),) for entry in entries},
            findings.axes(entries, status.spec.space),
        )
        return findings.importance(study)

    found = by_r(status.entries)
    assert next(iter(found)) == "r"
    for median, low, high in found.values():
        assert 0 <= low < median < high <= 1
    assert by_r(status.entries[: findings.ENOUGH - 1]) == {}
    assert found == by_r(status.entries)
    alike = findings.axes(status.entries, status.spec.space)
    assert findings.importance(findings.derived(status.entries, dict.fromkeys(range(24), (1.0,)), alike)) == {}


def test_what_mattered_most_is_said_only_where_whiskers_are_apart():
    told = page._most_important({"r": (0.8, 0.7, 0.9), "alpha": (0.1, 0.0, 0.2), "dropout": (0.0, 0.0, 0.3)})
    assert told == "r mattered most, with a share of 0.80 (0.70 to 0.90) in what sets the best quarter apart."
    told = page._most_important({"r": (0.6, 0.3, 0.9), "alpha": (0.1, 0.0, 0.2), "dropout": (0.0, 0.0, 0.3)})
    assert told.startswith("Which parameter mattered most is not known: r has a share of 0.60 (0.30 to 0.90)")
    assert "dropout of 0.00 (0.00 to 0.30)" in told


def test_noise_comes_from_seeds_where_there_are_some():
    ledger = memory_ledger()
    for loss in (1.00, 1.02):
        ended(ledger, 2.0, loss, r=8)
    ended(ledger, 2.0, 0.5, r=16)
    noise = findings.noise(ledger.entries())
    assert noise.width == pytest.approx(12.706 * math.sqrt(2) * 0.01 * math.sqrt(2), rel=1e-4)  # of two, 0.02 apart
    assert "2 trials of 1 configurations differ in their seed alone" in noise.because
    assert noise.from_seeds
    fresh = memory_ledger()
    for loss in (1.00, 1.01, 1.02):
        ended(fresh, 2.0, loss, r=16)
    verified = findings.noise(ledger.entries(), fresh.entries())
    assert verified.width == pytest.approx(4.303 * math.sqrt(2) * 0.01, rel=1e-4)  # those of the verification alone


@pytest.mark.parametrize(
    ("losses", "noise"),
    [
        ((2.0, 1.010, 1.002), 0.008),
        ((2.0, 1.000, 1.004), 0.004),  # the best one has two beside it
        ((2.0, 1.5, 1.1), None),  # still falling: that is no noise
        ((1.0,), None),
    ],
)
def test_noise_without_seeds_is_a_yardstick_or_unknown(losses, noise):
    ledger = memory_ledger()
    ended(ledger, *losses, r=8)
    ended(ledger, *(loss + 1 for loss in losses), r=16)
    found = findings.noise(ledger.entries())
    assert found.width == (noise if noise is None else pytest.approx(noise))
    assert not found.from_seeds
    assert found.because.startswith("How much the seed alone changes a loss is not known")


@pytest.mark.parametrize(
    ("loss", "cost", "batch_size", "preferred"),
    [
        (1.009, Cost(50, 10, 1000), 8, True),
        (1.009, Cost(100, 20, 2000), 8, True),  # every step was done twice
        (1.009, Cost(95, 10, 1000), 8, False),
        (1.009, Cost(50, 10, 500, peak_memory=1), 8, False),
        (1.009, Cost(50, 10, 1000), 16, False),  # other work
        (1.009, Cost(50), 8, False),  # nothing is known
        (1.011, Cost(50, 10, 1000), 8, False),  # not within noise
    ],
)
def test_a_cheaper_trial_within_noise_is_preferred(loss, cost, batch_size, preferred):
    ledger = memory_ledger()
    ended(ledger, 2.0, 1.0, cost=Cost(100, 10, 1000, peak_memory=100))
    other = ended(ledger, 2.0, loss, cost=cost, batch_size=batch_size)
    ended(ledger, 1.005, stop=True, cost=Cost(1, 10, 1000, peak_memory=1))  # never had the whole budget
    found = findings.cheaper(ledger.entries(), within=0.01)
    assert (found and found.number) == (other if preferred else None)
    assert findings.cheaper(ledger.entries(), within=0.01, worse=[other]) is None


@pytest.mark.parametrize(
    ("validation", "training", "turn"),
    [
        ({1: 2.0, 2: 1.5, 3: 1.6, 4: 1.8}, {1: 2.0, 2: 1.4, 3: 1.0, 4: 0.7}, 2),
        ({1: 2.0, 2: 1.5, 3: 1.4}, {1: 2.0, 2: 1.4, 3: 1.0}, None),  # falls to its end
        ({1: 2.0, 2: 1.5, 3: 1.505}, {1: 2.0, 2: 1.4, 3: 1.0}, None),  # by less than matters
        ({1: 2.0, 2: 1.5, 3: 1.8}, {1: 2.0, 2: 1.4, 3: 1.7}, None),  # training rises, too
        ({1: 2.0, 2: 1.5, 3: 1.8}, {}, None),  # unknown
        ({1: 2.0, 2: 1.5, 3: 1.8}, {1: 2.0, 2: 1.4}, None),  # unknown
        ({}, {}, None),
    ],
)
def test_overfitting_begins_where_validation_turns_while_training_falls(validation, training, turn):
    assert findings.overfitted_from(Curve(validation, {}, training, ())) == turn


def test_training_losses_are_taken_between_evaluations_and_once():
    ledger = memory_ledger()
    number = ended(ledger, 2.0, 1.5)
    steps = [(1, 4.0), (2, 2.0), (2, 2.0), (3, 1.0), (4, math.nan), (5, 3.0)]
    rows = [{tracking.STEP: step, "train/loss": loss} for step, loss in steps]
    rows += [{tracking.STEP: step, tracking.EVALUATION: n, "eval/loss": 1.0} for n, step in ((0, 0), (1, 2), (2, 5))]
    curve = findings.curve(ledger.entry(number), rows)
    assert curve.training == {1: 3.0, 2: 2.0}
    assert curve.steps == {0: 0, 1: 2, 2: 5}
    assert curve.points == [(1, 4.0), (2, 2.0), (3, 1.0), (5, 3.0)]


def test_overfitting_is_told_with_its_place(toy, tmp_path):
    ledger = memory_ledger()
    number = ended(ledger, 2.0, 1.5, 1.7)
    rows = [{tracking.STEP: step, "train/loss": 3.0 - step / 10} for step in range(1, 31)]
    rows += [{tracking.STEP: 10 * n, tracking.EVALUATION: n, "eval/loss": 1.0} for n in (1, 2, 3)]
    status = Status(Place.at(str(tmp_path)), toy, ledger, ledger.entries(), None)
    html = page.render(status, {number: rows})
    assert "1 of 1 trial overfitted: 000 from evaluation 2 on." in html
    assert "Overfits from evaluation 2 (step 20) on: the validation loss rose from 1.5000 to 1.7000" in html
    assert "No training losses were recorded" in page.render(status, {})
    assert "unstable" in page.render(status, {number: [*rows, {tracking.STEP: 29, "train/loss": 99.0}]})
    html = page.render(status, {number: [row for row in rows if row[tracking.STEP] <= 20]})  # the last ones are missing
    assert "whether it overfits is not known, for its training losses are missing" in html
    assert "No training losses were recorded to tell" in html


def test_a_sweep_without_a_trial(toy, tmp_path):
    html = shown(toy, memory_ledger(), tmp_path)
    assert "No trial has been started yet." in html
    assert 'class="plot"' not in html


def test_a_sweep_of_failed_trials(toy, tmp_path):
    ledger = memory_ledger()
    ledger.fail(add_trial(ledger), "diverged </script><b>at</b> step 3")
    html = shown(toy, ledger, tmp_path)
    assert "1 of 1 trial failed; the table below says why." in html
    assert "diverged &lt;/script&gt;&lt;b&gt;at&lt;/b&gt; step 3" in html


def test_a_sweep_with_one_finished_trial(toy, tmp_path):
    ledger = memory_ledger()
    ended(ledger, 2.0, 1.5)
    html = shown(toy, ledger, tmp_path)
    assert "Trial 000 (r16 nf4 lr2.0e-04 a32) is the best: validation loss 1.5000 after evaluation 2 of 9." in html
    assert "It is the usual default" in html
    assert "Fewer than two trials have used their whole budget" in html
    assert "There are not two trials with different configurations" in html
    assert 'class="plot"' in html  # its curve is shown all the same


def test_few_trials_and_one_that_is_unfinished(toy, tmp_path):
    ledger = memory_ledger()
    ended(ledger, 2.0, 1.50, r=8, cost=Cost(60, 10, 10_000))
    ended(ledger, 2.0, 1.49, r=32, cost=Cost(120, 10, 10_000))
    ended(ledger, 1.9, 1.495, r=16, cost=Cost(120, 10, 10_000), learning_rate=1e-4)
    ledger.report(add_trial(ledger, r=4), 1, 2.5)
    html = shown(toy, ledger, tmp_path)
    assert "is the best so far" in html
    assert "3 trials are too few to say how important each parameter is; it takes 10." in html
    assert "loss was still falling at the last, by 0.5100." in html
    above = "its loss is 0.0100 above the best complete one, and 1,000 tokens took 6 s instead of 12 s."
    assert (
        f"Consider trial 000 (r8 nf4 lr2.0e-04 a32): {above} Whether that is noise only other seeds can tell." in html
    )
    assert "<td>unfinished</td>" in html


@pytest.mark.parametrize("worse", [False, True])
def test_what_verification_found_is_heeded(toy, tmp_path, worse):
    ledger = memory_ledger()
    ledger.note("sweep_id", "abcd")
    ended(ledger, 2.0, 1.50, 1.490, r=32, seed=7, cost=Cost(120, 10, 10_000))
    ended(ledger, 2.0, 1.51, 1.495, r=8, seed=7, cost=Cost(60, 10, 10_000))
    html = shown(toy, ledger, tmp_path)
    assert "Consider trial 001 (r8 nf4 lr2.0e-04 a32): " in html  # the yardstick is no noise
    assert "Verification" not in html
    runs, wanted = verification.begin(ledger, top=2, seeds=3)
    for config, luck in zip(wanted, (0.01, -0.01, 0.02, 0.01, -0.01, 0.0), strict=True):
        number = runs.add(verification.propose(runs.entries(), wanted)).number
        runs.report(number, 1, 1.5 + luck + (worse and config.r == 8))
        runs.complete(number)
    html = shown(toy, ledger, tmp_path)
    assert "Verification: best validation loss over fresh seeds" in html
    assert "6 trials of 2 configurations differ in their seed alone" in html
    assert ("higher than the winner beyond noise" in html) == worse
    preferred = "Prefer trial 001 (r8 nf4 lr2.0e-04 a32): 0.0050 above the best complete one is noise, and 1,000 tokens"
    assert (preferred in html) == (not worse)
    assert ("leaving aside what verification found higher, took a tenth less time for equal work." in html) == worse


@pytest.mark.parametrize("fails", [False, True])
def test_no_gain_is_claimed_of_what_is_no_whole_run(toy, tmp_path, fails):
    ledger = memory_ledger()
    ended(ledger, 2.0, stop=not fails)  # the usual default
    number = add_trial(ledger, r=8)
    ledger.report(number, 1, 1.5)
    if fails:
        ledger.fail(number, "training loss is nan " + 100 * "and so on ")
    else:
        ledger.complete(number)
    html = shown(toy, ledger, tmp_path)
    unknown = "what the search gained is not known, for not both used their whole budget."
    early = "" if fails else ", stopped after evaluation 1"
    assert f"; trial 000{early}) has 2.0000: {unknown}" in html
    assert ("It did not use its whole budget, failed after evaluation 1: training loss is nan and" in html) == fails
    assert 300 < len(max(re.findall("<td.*?</td>", html), key=len)) < 350 or not fails
    default, winner = report.verdict(ledger.entries())
    assert default.endswith(f"(trial 000{early})")
    assert winner.endswith("(trial 001, failed after evaluation 1)" if fails else "(trial 001)")


def test_the_page_says_nothing_of_the_machine(toy, tmp_path):
    rows, model = tmp_path / "rows.jsonl", tmp_path / "a model"
    elsewhere = {
        "model": str(model),
        "data": DataConfig(train=str(rows), validation="owner/rows"),
        "storage": str(tmp_path / "sweeps"),
        "ledger": "postgresql://me:***@database.example/ledger",
        "checkpoint": toy.checkpoint.model_copy(update={"push_to": "me/pricer"}),
    }
    spec = toy.model_copy(update=elsewhere)
    ledger = memory_ledger()
    ledger.note("environment", {"qlora-sweep": "0.1.0", "torch": "2.13.0+cpu", "git commit": "abcdef"})
    ended(ledger, 2.0)
    driven = Status(Place.at(str(tmp_path / "sweeps/toy")), spec, ledger, ledger.entries(), "process 13770 on my-host")
    html = page.render(driven, {}).replace(page.get_plotlyjs(), "")
    for private in (str(tmp_path), "13770", "my-host", "database.example", "***", "push_to"):
        assert private not in html
    assert ", while it runs: 1 of 24 trials" in html
    for command in (
        "python -m pip install torch==2.13.0 -e PATH/TO/qlora-sweep  # its source, version 0.1.0\n",
        "python -m sweep rerun sweeps/toy --trial 0  #",
    ):
        assert command in html
    assert "sweep export" not in html  # a toy has nothing to take home
    assert "git checkout" not in html
    assert "<td>abcdef</td>" in html
    pasted = tmp_path / "space.yaml"
    pasted.write_text(unescape(re.search("<pre>(name: .*?)</pre>", html, re.DOTALL)[1]))
    rows.touch()
    model.mkdir()
    assert load(pasted, inputs=False) == spec.model_copy(
        update={"storage": "sweeps", "ledger": None, "checkpoint": toy.checkpoint}
    )


def test_what_is_drawn_is_bounded(toy, tmp_path):
    ledger = memory_ledger()
    for number in range(page.figures.DRAWN + 50):
        ended(ledger, 2.0 + number, r=4 + number % 8, stop=number > 0)
    html = shown(toy, ledger, tmp_path)
    assert f"Drawn are {page.figures.DRAWN} of {page.figures.DRAWN + 50} trials." in html
    assert html.count("<tr>") > page.figures.DRAWN + 50  # the table has all


def test_figures_say_what_they_show_without_being_pointed_at(status):
    """On paper, and on a phone, where axes that do not fit are scrolled."""
    entries = ranking(status.entries)
    study = findings.derived(
        entries, {each.number: (each.losses[1],) for each in entries}, findings.axes(entries, status.spec.space)
    )
    axis = figures.parallel_coordinates(study, "validation loss").layout.xaxis
    assert {"validation<br>loss", "learning_<br>rate", "r"} <= set(axis.ticktext)
    assert axis.tickangle == 0
    assert f"min-width: {5 * figures.AXIS}px" in page.render(status, {})  # four parameters and the loss
    shares = findings.importance(study)
    (bars,) = figures.importances(study, shares).data
    assert dict(zip(bars.y, bars.x, strict=True)) == {name: median for name, (median, _, _) in shares.items()}
    names = {entry.number: f"trial {entry.number}" for entry in entries[:7]}
    curves = figures.validation_curves(study, entries, names, 9).data
    legend = {curve.legendrank: curve.name for curve in curves if curve.showlegend and curve.name != "stopped"}
    assert [legend[place] for place in sorted(legend)] == list(names.values())[: figures.NAMED]
    assert len({curve.line.color for curve in curves if curve.name in names.values()}) == len(names)


def test_a_cross_says_who_stopped_a_trial(toy, tmp_path):
    ledger = memory_ledger()
    ended(ledger, 2.0, 1.5)
    ended(ledger, 3.0, stop=True)
    by_hand = add_trial(ledger)
    ledger.report(by_hand, 1, 2.5)
    ledger.stop(by_hand, BY_HAND)
    entries = ledger.entries()
    study = findings.derived(entries, {entry.number: (0.0,) for entry in entries}, {})
    (crosses,) = figures.validation_curves(study, entries, {}, 9).select_traces({"mode": "markers"})
    assert list(crosses.text) == ["001, ASHA: poor", "002, stopped by hand"]
    assert "early stopping ended" not in shown(toy, ledger, tmp_path)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium; with Debian: apt-get install chromium")
def test_every_figure_is_drawn_in_a_browser(status):
    page.write(status)
    report = status.place.paths.report
    assert report.stat().st_size < 15e6
    html, console = browser.dom(report)
    assert console == []
    assert re.search(r'<html[^>]* data-drawn="\d+"', html)
    _, *drawn = html.split('<div class="plot js-plotly-plot')
    assert len(drawn) == report.read_text().count('<div class="plot"')
    assert len(drawn) > 2 + 4 + 1 + 4  # what mattered, slices, curves, search and cost, besides training
    for figure in drawn:
        assert re.search('class="(point|js-line)"', figure), figure[:3000]
    assert "src=" not in html.replace(page.get_plotlyjs(), "")  # nothing is fetched


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium; with Debian: apt-get install chromium")
def test_the_browser_tells_of_errors(tmp_path):
    """Else the test above could not fail."""
    page = tmp_path / "broken.html"
    page.write_text("<script>throw new Error('broken on purpose')</script>")
    _, console = browser.dom(page)
    assert any("broken on purpose" in line for line in console)


def test_the_verb_and_the_end_of_a_run(undisturbed, tmp_path):
    space, done, _ = undisturbed
    directory = space.parent / "sweeps/toy"
    assert f"What it found is in {directory}/report.html" in done.stdout
    at_the_end = (directory / "report.html").read_text()
    asked = subprocess.run(
        [sys.executable, "-m", "sweep", "report", str(directory)],
        cwd=space.parent,
        env=sweeps.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stderr == ""
    assert asked.stdout == f"{directory}/report.html is written; open it in a browser.\n"

    def lasting(html: str) -> str:
        return re.sub("As of .* UTC", "", html)

    assert lasting((directory / "report.html").read_text()) == lasting(at_the_end)


def test_a_directory_without_a_sweep_and_one_that_cannot_be_written_to(undisturbed, tmp_path):
    told = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert told.exit_code == 2
    assert "holds no sweep; name the directory of one" in told.stderr
    sweep = tmp_path / "toy"
    shutil.copytree(undisturbed[0].parent / "sweeps/toy", sweep)
    (sweep / "report.html").unlink()
    (sweep / "report.html").mkdir()
    told = CliRunner().invoke(cli.app, ["report", str(sweep)])
    assert told.exit_code == 1
    assert "report.html cannot be written: " in told.stderr


def test_a_sweep_does_not_fail_for_its_report(status):
    """A directory stands where the file should be written."""
    status.place.paths.report.mkdir()
    console = Console(file=io.StringIO(), markup=False, width=500)
    outcome = Outcome(status.ledger, status.place, None, None, None, None, 0, 1.0)
    cli._report_at_the_end(outcome, status.spec, console)
    told = console.file.getvalue()
    assert told.startswith("No report was made (IsADirectoryError: ")
    assert told.endswith(f"once that is mended: python -m sweep report {status.place.url}\n")
    assert not list(status.place.paths.root.glob(".report*"))  # nothing half done is left
