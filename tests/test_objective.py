"""A value of the user's metric in place of the validation loss: wherever trials are compared, and after faults."""

import io
import json
import math
import re
import threading
from pathlib import Path

import pytest
from optuna.trial import TrialState
from rich.console import Console

from sweep import earlier, export, findings, page, report, scoring, status, tracking, verification, workspace
from sweep.criterion import LOSS, Criterion
from sweep.place import Place
from sweep.plan import show
from sweep.spec import SweepSpec, changes, load
from sweep.study import ranking
from sweep.trainable import Assignment, Failure, Lease, SlicedTrial
from tests import sweeps
from tests.ledgers import add_trial, memory_ledger, swept
from tests.test_tracking import trained
from trainables import checkpoint
from trainables.config import QLoRAConfig
from trainables.protocol import Budget, Cost, Evaluation, Job, Scored

OBJECTIVE = """
metric: tests.test_objective:METRIC
objective: {direction: DIRECTION, rows: 3}
"""


def closeness(prompts: list[str], references: list[str], completions: list[str]) -> float:
    """Highest at a validation loss of 1.2: the lowest loss does not win."""
    assert (len(prompts), references) == (3, ["1"] * 3)
    return 1 - abs(float(completions[0]) - 1.2)


def gain(prompts: list[str], references: list[str], completions: list[str]) -> dict[str, float]:
    return {"gain": -float(completions[0]), "twice": -2 * float(completions[0])}


@pytest.fixture
def searching(space: Path, tmp_path: Path):
    """Makes toy sweeps at their end, in memory."""

    def run(text: str = "", *overrides: str) -> status.Status:
        file = tmp_path / "objective.yaml"
        file.write_text(space.read_text() + text)
        root = tmp_path / f"sweep-{len(list(tmp_path.glob('sweep-*')))}"
        root.mkdir()
        return swept(load(file, overrides), Place(str(root)))

    return run


def asked(metric: str, direction: str) -> str:
    return OBJECTIVE.replace("METRIC", metric).replace("DIRECTION", direction)


def test_what_is_maximised_is_as_its_negative_minimised(searching):
    plain, found = searching(), searching(asked("gain", "maximize"), "objective.value=gain")
    for expected, entry in zip(plain.entries, found.entries, strict=True):
        assert (entry.config, entry.state, dict(entry.losses)) == (expected.config, expected.state, expected.losses)
        assert (entry.reason is None) == (expected.reason is None)
        if entry.state is TrialState.PRUNED:
            assert entry.reason.startswith(f"ASHA: {-entry.losses[entry.reported]:.5g} at evaluation ")
    assert {entry.state for entry in found.entries} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert [entry.number for entry in ranking(found.entries)] == [entry.number for entry in ranking(plain.entries)]


def test_the_best_value_wins_and_is_shown_everywhere(searching):
    found = searching(asked("closeness", "maximize"))
    entries, ledger = found.entries, found.ledger
    values = {e.number: max(1 - abs(loss - 1.2) for n, loss in e.losses.items() if n > 0) for e in entries}
    first, value = ranking(entries)[0], max(values.values())
    assert values[first.number] == value
    assert first.best[1] == pytest.approx(-value, abs=1e-8)  # less is better inside
    assert first.losses[first.best[0]] > min(first.losses.values())  # the lowest loss came later
    console = Console(file=io.StringIO(), width=160)
    report.show(console, ledger, ("r",), 1.0)
    status.show(console, found)
    told = console.file.getvalue()
    assert "Ranking by best closeness" in told
    assert "searched for          closeness, higher is better" in told
    assert f"winner                {value:.5g}  (trial {first.number:03d}" in told
    assert f"the best closeness so far is {value:.5g}" in told
    assert "loss" not in told
    as_json = status.as_json(found)
    assert as_json["objective"] == {"name": "closeness", "direction": "maximize"}
    assert as_json["best_value"] == pytest.approx(value, abs=1e-8)
    assert as_json["best_loss"] == first.losses[first.best[0]]
    assert as_json["base_value"] == pytest.approx(1 - abs(as_json["base_loss"] - 1.2), abs=1e-8)
    for trial in as_json["trials"]:
        assert trial["values"].keys() == trial["losses"].keys()
    text = re.sub(r"<[^>]+>", " ", page.render(found, {}).rpartition("</script>")[0])
    assert f"is the best: closeness {value:.5g} after evaluation" in text
    assert f"its validation loss there is {first.losses[first.best[0]]:.4f}" in text
    assert "by their closeness at evaluation" in text
    assert "darker with a higher closeness" in text
    assert "By closeness (higher is better)." in text


def test_optuna_gets_values_with_their_direction_for_figures(searching):
    found = searching(asked("closeness", "maximize"))
    entry = ranking(found.entries)[0]
    study = findings.derived(found.entries, {entry.number: (7.0, entry.best[1])}, {})
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert study.trials[entry.number].values == [7.0, -entry.best[1]]


def test_verification_compares_values(searching):
    search = searching(asked("closeness", "maximize"), "search.trials=2", "early_stopping=false").ledger
    search.note("sweep_id", "abcd")
    ledger, wanted = verification.begin(search, top=2, seeds=3)
    assert ledger.criterion == Criterion("closeness", maximized=True)
    winner = wanted[0].model_copy(update={"seed": 0})
    for config in wanted:
        number = ledger.add(verification.propose(ledger.entries(), wanted)).number
        value = 0.5 if config.model_copy(update={"seed": 0}) == winner else 0.9
        ledger.report(number, 1, -value - config.seed / 1000, 1.0)
        ledger.complete(number)
    found = verification.result(search)
    assert [each.verdict for each in found.configurations] == ["winner", "higher"]
    assert found.configurations[1].mean == pytest.approx(0.902)
    assert found.configurations[1].interval[0] < 0.902 < found.configurations[1].interval[1]
    told = "\n".join(verification.lines(found, search.criterion))
    assert "Verification: best closeness over fresh seeds" in told
    assert "has a higher mean than the winner, beyond noise" in told


def test_a_revived_trial_keeps_values_and_losses():
    ledger = memory_ledger()
    ledger.compare_by(Criterion("share", maximized=True))
    number = add_trial(ledger)
    ledger.report(number, 0, -0.1, 5.0)
    ledger.report(number, 1, -0.3, 4.0)
    ledger.report(number, 1, -0.3, 4.0)
    ledger.stop(number, "by hand")
    entry = ledger.revive(number)
    assert (dict(entry.objectives), dict(entry.losses)) == ({0: -0.1, 1: -0.3}, {0: 5.0, 1: 4.0})
    assert entry.criterion.text(entry.best[1]) == "0.3"


def test_the_best_checkpoint_is_that_of_the_best_value(tmp_path):
    first, second = Evaluation(1, 10, 1.0, score=-0.3), Evaluation(2, 20, 2.0, score=-0.9)
    checkpoint.write(tmp_path, 10, (first,), lambda directory: None)
    checkpoint.write(tmp_path, 20, (first, second), lambda directory: None)
    found = checkpoint.best(tmp_path)
    assert (found.step, found.evaluation, found.loss) == (20, second, 2.0)


def test_what_is_in_best_gives_way_to_a_better_value_alone(tmp_path):
    ledger, place = memory_ledger(), Place(str(tmp_path))
    ledger.compare_by(Criterion("share", maximized=True))
    for share, loss in ((0.3, 1.0), (0.9, 2.0), (0.5, 0.5)):
        number = add_trial(ledger)
        ledger.report(number, 1, -share, loss)
        ledger.complete(number)
        done = Evaluation(1, 10, loss, score=-share)
        checkpoint.write(place.paths.trial(number), 10, (done,), lambda directory: None)
        export.export_best(ledger, place, "toy", None, pytest.fail)
    facts = export.exported(place)
    assert (facts["trial"], facts["objective"], facts["validation_loss"]) == (1, 0.9, 2.0)
    checkpoint.prune(place.paths.trial(1), set())
    told: list[str] = []
    export.export_best(ledger, place, "toy", None, told.append)
    assert export.exported(place)["trial"] == 1
    assert told == ["best/ is left as it is, of trial 001: its checkpoint is damaged or gone"]


def test_wandb_gets_the_value_beside_the_loss():
    share = Criterion("share", maximized=True)
    rows = list(tracking._rows(trained(1, 1, Evaluation(1, 1, 2.0, score=-0.25)), share))
    assert rows[-1] == {"train/global_step": 1, "eval/evaluation": 1, "eval/loss": 2.0, "eval/share": 0.25}
    objectives, losses = {0: -0.1, 1: -0.2, 2: -0.4, 3: -0.3}, {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}
    assert tracking.summary(objectives, losses, {1: 5, 2: 10, 3: 15}, 1, 0.75, share) == {
        "best_eval_loss": 2.0,
        "best_share": 0.4,
        "best_step": 10,
        "first_rung_eval_loss": 3.0,
        "first_rung_share": 0.2,
        "budget_share": 0.75,
    }
    assert tracking.summary({0: 4.0}, {0: 4.0}, {}, 1, 0.0, LOSS) == {
        "best_eval_loss": None,
        "best_step": None,
        "first_rung_eval_loss": None,
        "budget_share": 0.0,
    }


def test_the_view_in_wandb_is_of_the_value(space):
    view = workspace._layout("p", "e", "g", load(space).space, Criterion("share", maximized=True))
    assert (view.runset_settings.order[0].item.name, view.runset_settings.order[0].ascending) == ("best_share", False)
    assert view.runset_settings.pinned_columns[1:3] == ["summary:best_share", "summary:best_eval_loss"]
    mattered, curves = view.sections[0].panels, view.sections[1].panels
    assert mattered[0].columns[-1].metric.name == mattered[1].with_respect_to == "best_share"
    assert [curve.y for curve in curves[:2]] == [["eval/share"], ["eval/loss"]]


@pytest.mark.parametrize(
    ("metric", "value", "message"),
    [
        ("gain", "gain", None),
        ("gain", "loss", "tests.test_objective:gain: gave gain or twice, and nothing called loss"),
        ("fails", "fails", "tests.test_objective:fails: raised KeyError: 'a key'"),
        ("nothing", "nothing", "tests.test_objective:nothing: gave nan, should be a finite number"),
        ("nowhere", "x", "tests.test_objective:nowhere cannot be imported (AttributeError"),
    ],
)
def test_a_metric_gives_the_value_or_says_why_not(metric, value, message):
    scored = Scored(1, None, ("a",), ("1",), ("2.5",))
    name = f"tests.test_objective:{metric}"
    if message is None:
        assert scoring.objective_of(name, value, scored, 60.0) == -2.5
        return
    with pytest.raises(scoring.MetricFault) as caught:
        scoring.objective_of(name, value, scored, 60.0)
    assert str(caught.value).startswith("metric tests.test_objective:")
    assert message in str(caught.value)


def fails(*texts):
    raise KeyError("a key")


def nothing(*texts):
    return math.nan


def test_a_metric_that_does_not_come_to_an_end_is_left():
    scored = Scored(1, None, ("a",), ("1",), ("2.5",))
    with pytest.raises(scoring.MetricFault, match=r"hangs: has not come to an end after 0.1 s, half of trial_timeout"):
        scoring.objective_of("tests.test_objective:hangs", "hangs", scored, 0.1)
    OVER.set()


OVER = threading.Event()


def hangs(*texts):
    OVER.wait(60)


def test_the_process_of_a_trial_judges_saves_and_tells_again(tmp_path):
    place = Place(str(tmp_path))
    place.paths.lock_holder.write_text("me")
    place.paths.spec.write_text("name: toy")
    tracked = tracking.Tracking("p", None, "toy", "disabled", str(place.paths.tracking))
    job = Job("", "", Budget(None, 60, 9), completions=3)
    share = Criterion("closeness", maximized=True)

    def started(metric: str) -> SlicedTrial:
        trial = object.__new__(SlicedTrial)  # without Ray
        lease = Lease(place, "me")
        name = f"tests.test_objective:{metric}"
        mine = Assignment(
            0, "toy", QLoRAConfig(), job, lease, -1, Cost(), 1, tracked, "abcd", (), 5.0, None, share, name
        )
        trial.setup({"assignment": mine})
        return trial

    trial = started("closeness")
    slice_ = trial._advance()
    assert slice_.written is None  # the driver has no need of it
    assert slice_.evaluation.objective == pytest.approx(abs(slice_.evaluation.loss - 1.2) - 1, abs=1e-8)
    assert checkpoint.newest(trial._directory).evaluations == (slice_.evaluation,)
    again = started("fails")
    assert again._advance().evaluation == slice_.evaluation  # the metric is not asked
    with pytest.raises(scoring.MetricFault) as caught:
        again._advance()
    failure = Failure.of(caught.value)
    assert failure.metric
    assert failure.reason == "metric tests.test_objective:fails: raised KeyError: 'a key'"
    assert checkpoint.newest(trial._directory).evaluations == (slice_.evaluation,)


def test_the_objective_stays_while_a_sweep_is_under_way(space):
    plain = space.read_text()

    def spec(text: str, *overrides: str) -> SweepSpec:
        space.write_text(plain + text)
        return load(space, overrides)

    recorded = spec(asked("gain", "maximize"), "objective.value=gain")
    assert recorded.criterion == Criterion("gain", maximized=True)
    assert spec(asked("gain", "minimize")).criterion == Criterion("gain")
    assert spec("").criterion == LOSS
    others = [["objective.value=twice"], ["objective.rows=4"], ["objective.direction=minimize"], ["metric=other:f"]]
    for overrides in others:
        changed = changes(recorded, spec(asked("gain", "maximize"), "objective.value=gain", *overrides))
        assert [line.partition(":")[0] for line in changed] == [overrides[0].partition("=")[0]]
    assert changes(recorded, spec(""))
    assert earlier._differences(recorded, spec("")) == [
        'metric: there "tests.test_objective:gain", here nothing',
        'objective: there {"value": "gain", "direction": "maximize", "rows": 3}, here nothing',
    ]


def test_plan_says_how_much_is_written(space):
    space.write_text(space.read_text() + asked("closeness", "maximize") + "verify: {top: 2, seeds: 2}\n")
    console = Console(file=io.StringIO(), width=160)
    overrides = ["early_stopping=false", "search.trials=2", "objective.rows=10", f"storage={space.parent}"]
    show(load(space, overrides), console)
    told = console.file.getvalue()
    assert "compared by closeness, higher is better" in told
    assert "10 answers are written at each evaluation, the base's, too, about 550 in all" in told  # (1 + 2·9 + 4·9)·10


MINE = """
def closeness(prompts, references, completions):
    if float(completions[0]) < float(open("limit.txt").read()):
        raise KeyError("a key")
    return 1 - abs(float(completions[0]) - 1.2)
"""


def test_a_metric_that_fails_ends_the_sweep_which_goes_on_once_it_is_mended(space, searching):
    """Over both runs it finds what an undisturbed search in memory does."""
    expected = searching(asked("closeness", "maximize"))
    objective = asked("closeness", "maximize").replace("tests.test_objective", "mine")
    space.write_text(space.read_text() + objective)
    (space.parent / "mine.py").write_text(MINE)
    limit = space.parent / "limit.txt"  # found from the working directory
    limit.write_text("1.1")
    broken = sweeps.run(space)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert (
        "metric mine:closeness: raised KeyError: 'a key'. Mend it; no trial is blamed. The same command"
        in broken.stdout
    )
    before = sweeps.entries(space)
    assert [entry.state for entry in before] == [TrialState.RUNNING]
    assert before[0].reported > 1  # some of it is kept
    limit.write_text("0")
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial   0 goes on from step" in done.stdout
    found = sweeps.entries(space)
    assert sweeps.history(found) == sweeps.history(expected.entries)
    assert [dict(entry.objectives) for entry in found] == [dict(entry.objectives) for entry in expected.entries]
    facts = json.loads((space.parent / "sweeps/toy/best/sweep.json").read_text())
    winner = ranking(found)[0]
    assert (facts["trial"], facts["objective"]) == (winner.number, -winner.best[1])
