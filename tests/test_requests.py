"""What is asked of a sweep from another terminal."""

import json
import re
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

from sweep import cli, findings, run_ends, runner
from sweep import spec as specs
from sweep.early_stopping import settle
from sweep.place import Place
from sweep.preemption import Drain
from sweep.requests import BY_HAND, Requests, enqueued, not_tried, waiting
from sweep.search import LedgerSearcher
from sweep.study import drawn, open_journal, propose, ranking
from tests import sweeps
from tests.ledgers import memory_ledger
from tests.wandb_files import final, history, records
from trainables import checkpoint, toy
from trainables.config import QLoRAConfig
from trainables.protocol import Budget, Cost, Evaluation, Job

RULE = {"evaluations": 9, "rungs": (1, 3), "reduction": 3}


@pytest.fixture
def sweep(space):
    """The directory of a toy sweep that is not running: 000 is complete, 001 was stopped, 002 has no end."""
    spec = specs.load(space)
    directory = space.parent / "sweeps/toy"
    directory.mkdir(parents=True)
    (directory / "space.yaml").write_text(specs.dump(spec))
    ledger = open_journal(directory / "study.log", "toy")
    ledger.note("command", "python -m sweep run toy.yaml")
    for losses in ([2.0] * 9, [3.0], [1.9]):
        number = ask(ledger, spec).number
        for evaluation, loss in enumerate(losses, start=1):
            ledger.report(number, evaluation, loss)
            ledger.spend(number, Cost(seconds=float(evaluation), steps=evaluation))
            settle(ledger, number, **RULE)
    return directory


def ask(ledger, spec):
    first = [*enqueued(ledger), spec.space.params_of({})]
    return ledger.add(propose(ledger.entries(), spec.space, "tpe", 5, first))


def driver(sweep, ledger, put_back=None):
    told = SimpleNamespace(note=lambda line: None, ended=lambda entry: None)
    spec = specs.load(sweep / "space.yaml")
    place = Place(str(sweep))
    ours = Requests(ledger, place, spec.space, 9, since=2, holds=lambda: True, drain=Drain(), listener=told)
    ours.put_back = put_back or ours.put_back
    ours.begin()
    return ours


def verb(*words):
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    return done.exit_code, done.output


def reopened(sweep):
    return open_journal(sweep / "study.log", "toy")


def test_the_next_run_honours_what_was_asked_for_meanwhile(sweep):
    """And the ledger has it as it was asked for, once."""
    assert verb("revive", sweep, "--trial", 1)[0] == 0
    code, told = verb("stop", sweep, "--trial", 2)
    assert (code, told) == (0, "The next run honours it: python -m sweep run toy.yaml\n")
    assert verb("enqueue", sweep, "r=8", "alpha=16", "learning_rate=5e-4")[0] == 0
    code, told = verb("stop", sweep, "--trial", 2)
    assert (code, "asked for already" in told) == (2, True)
    assert "Asked for, and not done yet: enqueue r=8 alpha=16 learning_rate=0.0005" in verb("status", sweep)[1]
    before = reopened(sweep).entry(1)
    ledger = reopened(sweep)
    driver(sweep, ledger)
    assert waiting(Place(str(sweep))) == []
    assert (
        "this configuration is enqueued already" in verb("enqueue", sweep, "r=8", "alpha=16", "learning_rate=5e-4")[1]
    )
    entries = reopened(sweep).entries()
    assert [entry.number for entry in entries] == [0, 1, 2]
    assert [entry.state for entry in entries] == [TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED]
    assert entries[2].reason == BY_HAND
    assert (entries[1].config, entries[1].losses, entries[1].cost) == (before.config, before.losses, before.cost)
    assert entries[1].reason is None
    spec = specs.load(sweep / "space.yaml")
    assert ask(ledger, spec).config == QLoRAConfig(r=8, alpha=16, learning_rate=5e-4)
    assert ask(ledger, spec).config not in {entry.config for entry in entries}


def test_while_the_winner_is_verified_a_pause_alone_is_acted_on(sweep, monkeypatch):
    ledger = reopened(sweep)
    ours = driver(sweep, ledger)
    ours.end_search()
    for words in (("revive", sweep, "--trial", 1), ("enqueue", sweep, "r=8", "alpha=16")):
        assert verb(*words)[0] == 0
    place = Place(str(sweep))
    place.put(place.paths.request("9-pause"), json.dumps({"name": "9-pause", "verb": "pause"}))
    raised = []
    monkeypatch.setattr("signal.raise_signal", raised.append)
    ours.look(())
    assert [request.verb for request in waiting(place)] == ["revive", "enqueue"]
    assert ledger.entry(1).state is TrialState.PRUNED
    assert len(raised) == 1


def test_enqueued_come_first_and_the_rest_is_what_the_ledger_says(space):
    """A sweep that is cut in two by a new process proposes the same."""
    spec = specs.load(space)

    def drive(ledger, trials):
        for _ in range(trials):
            entry = ask(ledger, spec)
            ledger.report(entry.number, 1, entry.config.r / 100)
            ledger.stop(entry.number, "poor")
        return [entry.config for entry in ledger.entries()]

    wanted = [spec.space.params_of({"r": r, "alpha": r}) for r in (4, 32)]
    answers = [{"name": str(n), "params": params} for n, params in enumerate([*wanted, None])]
    whole = memory_ledger()
    whole.note("requests", answers)
    configs = drive(whole, 9)
    assert configs[:3] == [*(drawn(params, spec.space).config for params in wanted), QLoRAConfig()]
    path = space.parent / "study.log"
    open_journal(path, "t").note("requests", answers)
    drive(open_journal(path, "t"), 1)
    drive(open_journal(path, "t"), 5)
    assert not_tried(open_journal(path, "t"), spec.space, 6) == []
    assert drive(open_journal(path, "t"), 3) == configs


def test_what_is_enqueued_and_not_tried_is_told(space):
    spec, ledger = specs.load(space), memory_ledger()
    params = [spec.space.params_of({"r": r, "alpha": r}) for r in (4, 32)]
    ledger.note("requests", [{"name": str(n), "params": each} for n, each in enumerate(params)])
    first, second = not_tried(ledger, spec.space, 1)
    assert first == "Enqueued, and not tried yet: r4 nf4 lr2.0e-04 a4"
    assert second == "Enqueued, and not tried yet: r32 nf4 lr2.0e-04 a32; it needs search.trials=2"
    ask(ledger, spec)
    assert not_tried(ledger, spec.space, 2) == [second.partition(";")[0]]


def test_a_revived_trial_counts_once_and_passes_its_rungs(sweep):
    ledger = reopened(sweep)
    spec = specs.load(sweep / "space.yaml")
    ledger.revive(1)
    assert len(ledger) == 3
    assert ledger.objectives_at(1, without=0) == [3.0, 1.9]
    assert ledger.objectives_at(1, without=1) == [2.0, 1.9]
    assert not settle(ledger, 1, **RULE)  # where it was stopped
    ledger.report(1, 2, 2.9)
    ledger.report(1, 3, 2.8)
    assert settle(ledger, 1, **RULE)  # the next rung
    assert "2.8000 at evaluation 3" in ledger.entry(1).reason
    ledger.revive(1)
    ledger.report(1, 9, 1.0)
    assert settle(ledger, 1, **RULE)
    assert [entry.number for entry in ranking(ledger.entries())] == [1, 2, 0]
    assert ledger.entry(1).trial.value == 1.0
    added = ask(ledger, spec)
    ledger.report(added.number, 1, 9.0)
    assert added.number == 3  # without a gap, though Optuna has two trials more
    assert ask(ledger, spec).number == 4
    assert [entry.number for entry in reopened(sweep).entries()] == [0, 1, 2, 3, 4]
    assert reopened(sweep).entry(added.number).losses == {1: 9.0}
    for_figures = findings.derived(ledger.entries(), {1: (1.0,), added.number: (9.0,)}, {})
    assert {trial.number: trial.value for trial in for_figures.trials if trial.values} == {1: 1.0, added.number: 9.0}


def test_new_checkpoints_of_a_revived_trial_are_tidied_away_when_it_has_ended(sweep):
    ledger, place, emptied = reopened(sweep), Place(str(sweep)), set()

    def left() -> list[str]:
        checkpoint.write(place.paths.trial(1), 7, (Evaluation(1, 7, 3.0),), lambda directory: None)
        runner.tidy(ledger, place, 1, emptied)
        return [path.name for path in place.paths.trial(1).glob("*")]

    assert left() == []  # trial 0 is better
    ledger.revive(1)
    assert left() == ["step-000007"]
    ledger.stop(1, BY_HAND)
    assert left() == []


@pytest.mark.parametrize("words", [("revive", "--trial", 1), ("stop", "--trial", 2), ("enqueue", "r=8", "alpha=8")])
@pytest.mark.parametrize("at", ["note", "delete"])
def test_a_kill_while_it_is_acted_on(sweep, words, at, monkeypatch):
    """Before or after the answer was written: the next driver finds it done, and says so."""
    verb(words[0], sweep, *words[1:])

    def killed(*what):
        raise KeyboardInterrupt

    ledger = reopened(sweep)
    with monkeypatch.context() as patched:
        if at == "note":
            patched.setattr(ledger, "note", killed)
        else:
            patched.setattr(Place, "delete", lambda place, path: killed() if path.suffix == ".json" else None)
        with pytest.raises(KeyboardInterrupt):
            driver(sweep, ledger)
    again = reopened(sweep)
    driver(sweep, again)
    once = [(entry.number, entry.state, entry.reason) for entry in again.entries()]
    (answer,) = again.noted("requests")
    assert len(enqueued(again)) == (words[0] == "enqueue")
    assert waiting(Place(str(sweep))) == []
    assert len(again.entries()) == 3
    raw = again._study.get_trials()
    assert len(raw) == 3 + (words[0] == "revive")
    driver(sweep, again)
    assert once == [(entry.number, entry.state, entry.reason) for entry in again.entries()]
    assert answer["verb"] == words[0]


def test_a_trial_with_a_process_ends_with_its_next_slice(sweep):
    verb("stop", sweep, "--trial", 2)
    (request,) = (sweep / "requests").glob("*.json")
    kept = request.read_text()
    request.unlink()
    ledger = reopened(sweep)
    ours = driver(sweep, ledger)
    request.write_text(kept)
    ours.look({2})
    assert ours.to_stop == {2}
    assert request.exists()  # for the next driver, if this one is killed
    ledger.report(2, 2, 1.8)
    ledger.stop(2, BY_HAND)  # as the scheduler does
    ours.look({2})
    assert ours.to_stop == set()
    assert not request.exists()
    assert ledger.noted("requests")[-1]["outcome"] == "trial 2 is stopped (stopped by hand)"


@pytest.mark.parametrize("process", ["ends", "is lost"])
def test_nothing_is_left_of_a_stop_that_was_carried_out(sweep, process):
    """Else it would end another trial of this number: one that is revived, or that verifies the winner."""
    ledger, ended = reopened(sweep), []
    ours = driver(sweep, ledger)
    ours.ended = ended.append
    assert verb("stop", sweep, "--trial", 2)[0] == 0
    ours.look({2})
    assert ours.to_stop == {2}
    if process == "ends":
        ledger.stop(2, BY_HAND)
        ours.end_search()
    else:
        ours.look(())
    assert ended == ([2] if process == "is lost" else [])
    assert ours.to_stop == set()
    assert waiting(Place(str(sweep))) == []
    assert ledger.noted("requests")[-1]["outcome"] == "trial 2 is stopped (stopped by hand)"


def test_a_revived_trial_is_handed_out_and_its_wandb_run_gets_another_end(sweep):
    ledger, back = reopened(sweep), []
    ours = driver(sweep, ledger, back.append)
    mark = sweep / "trials/001/rows.recorded"
    mark.parent.mkdir(parents=True)
    mark.write_text("offline")
    verb("revive", sweep, "--trial", 1)
    ours.look(())
    assert back == [1]
    assert not mark.exists()


def test_a_trial_is_revived_once_its_last_process_has_written_its_wandb_run(sweep, monkeypatch):
    """Else both would write the same rows. A process that was killed is not waited for."""
    ledger, back = reopened(sweep), []
    ours = driver(sweep, ledger, back.append)
    rows = sweep / "trials/001/rows.jsonl"
    rows.parent.mkdir(parents=True)
    rows.touch()
    verb("revive", sweep, "--trial", 1)
    ours.look(())
    assert (back, ledger.entry(1).state) == ([], TrialState.PRUNED)
    (sweep / "trials/001/rows.recorded").write_text("offline")
    ours.look(())
    assert back == [1]
    assert not (sweep / "trials/001/rows.recorded").exists()
    ledger.stop(1, BY_HAND)
    verb("revive", sweep, "--trial", 1)
    ours.look(())
    assert back == [1]
    monkeypatch.setattr("sweep.requests.CLOSING_SECONDS", 0.0)
    ours.look(())
    assert back == [1, 1]


def test_a_revived_trial_gets_another_end_in_wandb(sweep, monkeypatch):
    """Also when this driver had written its first one, for a process that was killed."""
    ledger, place, ending, ends = reopened(sweep), Place(str(sweep)), set(), []
    (sweep / "trials/001").mkdir(parents=True)
    (sweep / "trials/001/rows.jsonl").touch()
    tracked = run_ends.tracking.resolve("toy", None, "toy", "offline", sweep)
    monkeypatch.setattr(run_ends.tracking, "start", lambda *run: None)
    monkeypatch.setattr(run_ends.tracking, "finish", lambda run, state, facts: ends.append(facts["stop_reason"]))
    for reason in (ledger.entry(1).reason, BY_HAND):
        for _ in range(2):
            run_ends.end_runs(ledger, place, tracked, ("r",), "", 9, 1, ending)
        assert ends[-1] == reason
        ledger.revive(1)
        ledger.stop(1, BY_HAND)
    assert len(ends) == 2


def test_a_trial_that_has_used_its_budget_is_complete_whatever_was_asked(sweep):
    """Its driver was killed before it wrote that down."""
    ledger = reopened(sweep)
    assert verb("stop", sweep, "--trial", 2)[0] == 0
    for evaluation in range(2, 10):
        ledger.report(2, evaluation, 1.8)
    assert (
        "trial 2 has used its whole budget; a trial can be stopped until it ends"
        in verb("stop", sweep, "--trial", 2)[1]
    )
    driver(sweep, ledger)
    assert ledger.entry(2).state is TrialState.RUNNING
    assert ledger.noted("requests")[-1]["outcome"] == "trial 2 has used its whole budget"
    searcher = LedgerSearcher(
        ledger,
        trials=3,
        concurrency=1,
        propose=lambda entries: None,
        settle=lambda number: settle(ledger, number, **RULE),
        assign=lambda entry: entry.number,
        drain=Drain(),
        started=lambda entry: None,
    )
    assert ledger.entry(2).state is TrialState.COMPLETE
    assert searcher.suggest("0") == LedgerSearcher.FINISHED


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stop", "--trial", 7), "there is no trial 7; it has 0, 1, 2; a trial can be stopped until it ends"),
        (("stop", "--trial", 0), "trial 0 is complete; a trial can be stopped until it ends"),
        (
            ("revive", "--trial", 2),
            "trial 2 is running, or goes on with the next run; a trial can be revived that was stopped",
        ),
        (("revive", "--trial", 0), "trial 0 is complete; a trial can be revived that was stopped"),
        (("enqueue", "r=5"), "r: received 5, should be 4, 8, 16 or 32"),
        (("enqueue", "rank=8"), "rank: unknown key; did you mean r?"),
        (("enqueue", "r=8", "alpha=16", "dropout=0.5"), "the space has no dropout"),
        (("enqueue", "r"), "r: received nothing, should be a whole number"),
        (("enqueue", "r=8", "r=4"), "r=4: r is given twice"),
        (("enqueue", "r=16"), "trial 0 has this configuration and is complete"),
        (("pause",), "is not running; a sweep can be paused while it runs. What goes on with it: python -m sweep run"),
    ],
)
def test_refused(sweep, words, message):
    code, told = verb(words[0], sweep, *words[1:])
    assert code == 2
    assert message in told
    assert not (sweep / "requests").exists()


def test_what_to_know(sweep):
    told = verb("revive", sweep, "--trial", 1)[1]
    assert "Its checkpoints were tidied away (checkpoint.keep: 3), so it begins anew" in told
    (sweep / "requests").rename(sweep / "answered")
    checkpoint.write(sweep / "trials/001", 3, (), lambda directory: None)
    told = verb("revive", sweep, "--trial", 1)[1]
    assert told.endswith("\nIt goes on from its checkpoint after step 3.\n")
    for alpha in (8, 16):
        assert "search.trials" not in verb("enqueue", sweep, "r=8", f"alpha={alpha}", "learning_rate=1e-4")[1]
    for r in (4, 8, 16):
        told = verb("enqueue", sweep, f"r={r}", f"alpha={r}", "learning_rate=1e-3")[1]
    assert "search.trials" not in told
    assert "With what is not named as the space or the documented defaults have it: r16 nf4 lr1.0e-03 a16" in told
    told = verb("enqueue", sweep, "r=32", "alpha=32", "learning_rate=1e-3")[1]
    assert "All of search.trials, 8, are taken; more are asked for by python -m sweep run toy.yaml" in told
    assert "The next run honours it: python -m sweep run toy.yaml --set search.trials=9" in told


def test_what_is_no_request_and_a_pause_that_came_too_late(sweep):
    """The first is left alone, the second does not end the next run."""
    (sweep / "requests").mkdir()
    (sweep / "requests/mine.json").write_text("{}")
    (sweep / "requests/theirs.json").write_bytes(b"\xff")
    (sweep / "requests/directory").mkdir()
    late = {"name": "1", "verb": "pause", "trial": None, "config": None}
    (sweep / "requests/1.json").write_text(json.dumps(late))
    ledger = reopened(sweep)
    ours = driver(sweep, ledger)
    ours.look(())
    assert not ours._drain()
    assert {file.name for file in (sweep / "requests").iterdir()} == {"mine.json", "theirs.json", "directory"}
    assert ledger.noted("requests")[-1]["outcome"] == "no driver was there any more"


def test_a_sweep_that_runs(space):
    """Stopped, enqueued, revived and paused from another terminal; then the next run ends it.

    The revived trial ends as if nothing had happened, and W&B has each of its steps once.
    """
    directory = space.parent / "sweeps/toy"
    options = ("--set", "tracking.mode=offline", "--set", "search.trials=3", "--set", "early_stopping=false")
    process = sweeps.start(space, *options, TOY_STEP_SECONDS="0.2")
    sweeps.wait_until(lambda: sweeps.reported(space) >= 3, process)  # the base, and two of trial 0
    code, told = verb("stop", directory, "--trial", 0)
    assert (code, told) == (0, "Trial 0 is stopped (stopped by hand).\n")
    code, told = verb("enqueue", directory, "r=8", "alpha=8", "learning_rate=1e-3")
    assert (code, told.splitlines()[0]) == (0, "The configuration is enqueued.")
    code, told = verb("revive", directory, "--trial", 0)
    assert re.fullmatch(r"Trial 0 is revived\.\nIt goes on from its checkpoint after step \d+\.\n", told)
    assert code == 0
    sweeps.wait_until(lambda: sweeps.entries(space)[0].state is TrialState.RUNNING, process)
    losses = len(sweeps.entries(space)[0].losses)
    sweeps.wait_until(lambda: len(sweeps.entries(space)[0].losses) > losses, process)
    code, told = verb("pause", directory)
    assert code == 0
    assert told.startswith("Trials write checkpoints and end.\nThe same command goes on: python -m sweep run ")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Preempted by `pause`" in output
    assert sweeps.entries(space)[0].state is TrialState.RUNNING
    done = sweeps.run(space, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = sweeps.entries(space)
    assert [entry.state for entry in entries] == [TrialState.COMPLETE] * 3
    undisturbed = toy.start(QLoRAConfig(), Job("", "", Budget(None, 60, 9), score_base=True), None)
    while not undisturbed.advance(60.0).done:
        pass
    assert entries[0].losses == {each.evaluation: each.loss for each in undisturbed.evaluations}
    assert entries[0].cost.steps >= 60
    assert QLoRAConfig(r=8, alpha=8, learning_rate=1e-3) in [entry.config for entry in entries[1:]]
    fragments = sorted(directory.glob("wandb/*run-*/run-*-000.wandb"))
    steps = [row["train/global_step"] for fragment in fragments for row in history(fragment) if "train/loss" in row]
    assert steps == list(range(1, 61))
    assert final(records(fragments[0]))["state"] == "stopped"
    assert final(records(fragments[-1]))["state"] == "complete"
