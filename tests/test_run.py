"""`python -m sweep run` on the toy trainable: the whole of the framework through real Ray and Optuna."""

import json
import shutil
import subprocess
from io import StringIO
from itertools import pairwise

import pytest
from optuna.trial import TrialState
from rich.console import Console

from sweep.status import look, show
from sweep.study import Ledger
from tests import sweeps
from tests.wandb_files import final, history, records
from trainables import checkpoint


def test_a_whole_sweep(undisturbed):
    _, done, entries = undisturbed
    assert len(entries) == 8
    assert {entry.state for entry in entries} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert len({entry.config for entry in entries}) == 8
    assert (entries[0].config.r, entries[0].config.alpha, entries[0].config.learning_rate) == (16, 32, 2e-4)
    assert 0 in entries[0].losses
    for entry in entries:
        evaluations = [k for k in entry.losses if k > 0]
        assert evaluations == list(range(1, len(evaluations) + 1))
        assert (entry.state is TrialState.COMPLETE) == (len(evaluations) == 9)
        assert entry.cost.steps == round(60 * len(evaluations) / 9)
    assert done.stderr == ""
    assert "Ranking by best validation loss" in done.stdout
    assert "base model" in done.stdout
    assert "usual default" in done.stdout


def test_best_is_the_best_checkpoint(undisturbed):
    space, done, entries = undisturbed
    winner = min((e for e in entries if e.best), key=lambda e: e.best[1])
    best = json.loads((space.parent / "sweeps/toy/best/sweep.json").read_text())
    assert best["trial"] == winner.number
    assert best["validation_loss"] == winner.best[1]
    assert best["config"] == winner.config.model_dump(mode="json")
    assert f"winner                {winner.best[1]:.4f}" in done.stdout
    kept = [p for p in (space.parent / "sweeps/toy/trials").glob("*/step-*")]
    assert len(kept) == 3  # checkpoint.keep
    found = checkpoint.newest(space.parent / f"sweeps/toy/trials/{winner.number:03d}")
    assert found.loss == winner.best[1]


def test_running_again_changes_nothing_and_more_trials_extend(undisturbed, space):
    file, _, entries = undisturbed
    shutil.copytree(file.parent / "sweeps", space.parent / "sweeps")
    again = sweeps.run(space)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing is left to do: 8 trials done, 8 asked for." in again.stdout
    assert sweeps.history(sweeps.entries(space)) == sweeps.history(entries)
    more = sweeps.run(space, "--set", "search.trials=9")
    assert more.returncode == 0, more.stdout + more.stderr
    extended = sweeps.entries(space)
    assert len(extended) == 9
    assert sweeps.history(extended[:8]) == sweeps.history(entries)


def test_another_spec_in_the_same_directory_is_refused(undisturbed):
    space, _, _ = undisturbed
    refused = sweeps.run(space, "--set", "budget.steps=90", "--set", "search.seed=6")
    assert refused.returncode == 2
    assert "budget.steps" in refused.stderr
    assert "search.seed" in refused.stderr
    assert "another `name`" in refused.stderr
    assert f"(they are in {space.parent}/sweeps/toy/space.yaml)" in refused.stderr


def test_a_sweep_beside_the_file_is_told_where_another_one_would_begin(undisturbed, tmp_path):
    space, _, _ = undisturbed
    told = subprocess.run(
        sweeps.command(space, "--address", "127.0.0.1:9"),
        cwd=tmp_path,
        env=sweeps.environment(),
        capture_output=True,
        text=True,
    )
    assert told.stdout.startswith(
        f"{space.parent}/sweeps/toy is a sweep of this name; this one begins anew in sweeps/toy"
    )
    assert told.returncode == 2


def test_hours_end_a_sweep_that_can_go_on(space):
    done = sweeps.run(space, "--set", "budget.hours=0.003", TOY_STEP_SECONDS="0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "budget.hours 0.003 is used up" in done.stdout
    assert any(entry.state is TrialState.RUNNING for entry in sweeps.entries(space))
    done = sweeps.run(space)  # without the limit: it may change
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The sweep goes on" in done.stdout
    assert all(entry.state.is_finished() for entry in sweeps.entries(space))


def test_an_exception_fails_its_trial_alone_and_is_told(space):
    done = sweeps.run(space, "--set", "search.trials=2", "--set", "tracking.mode=offline", TOY_FAULT="raise:3")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    assert "2 W&B runs are kept offline; upload them with: python -m sweep sync sweeps/toy\n" in done.stdout
    assert "Then lay them out in W&B with: python -m sweep workspace sweeps/toy\n" in done.stdout
    assert "Take the winner home" not in done.stdout  # there is nothing
    reason = "ValueError: TOY_FAULT at step 3, [in brackets]"
    assert reason in done.stdout
    for entry in sweeps.entries(space):
        assert (entry.state, entry.reason) == (TrialState.FAIL, reason)
        (fragment,) = space.parent.glob(f"sweeps/toy/wandb/*run-*/run-*-{entry.number:03d}.wandb")
        assert final(records(fragment))["state"] == "failed"


def test_a_kill_between_a_trials_end_and_its_recording_leaves_no_run_without_its_end(space):
    """As if the process had died before wandb got anything: the next driver records the run from the trial's rows."""
    settings = ("--set", "search.trials=1", "--set", "tracking.mode=offline")
    done = sweeps.run(space, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = sweeps.entries(space)
    fragments = sorted(space.parent.glob("sweeps/toy/wandb/*run-*/run-*.wandb"))
    before = max((history(fragment) for fragment in fragments), key=len)
    expected = final(records(fragments[-1]))
    for fragment in fragments:  # two, where the trial took long and the driver recorded its end
        shutil.rmtree(fragment.parent)
    (space.parent / "sweeps/toy/trials/000/rows.recorded").unlink()
    again = sweeps.run(space, *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    (fragment,) = space.parent.glob("sweeps/toy/wandb/*run-*/run-*.wandb")
    ours = [name for name in before[0] if name[0] != "_"] + ["eval/loss", "train/loss"]
    assert [[row.get(name) for name in ours] for row in history(fragment)] == [
        [row.get(name) for name in ours] for row in before
    ]
    told = final(records(fragment))
    for name in ("best_eval_loss", "best_step", "first_rung_eval_loss", "budget_share", "state"):
        assert told[name] == expected[name], name
    assert (told["state"], told["best_eval_loss"]) == ("complete", entry.best[1])


def test_second_driver_is_refused(space):
    process = sweeps.start(space, TOY_STEP_SECONDS="0.2")
    try:
        sweeps.wait_until((space.parent / "sweeps/toy/study.log").exists, process)
        refused = sweeps.run(space)
        assert refused.returncode == 2
        assert f"is in use by process {process.pid} on" in refused.stderr
    finally:
        process.kill()
        process.wait()


def test_exhausted_space_ends_the_sweep(space):
    text = sweeps.TOY.replace("r: {values: [4, 8, 16, 32]}", "r: {values: [8, 16]}")
    text = text.replace("learning_rate: {min: 2e-5, max: 2e-3, log: true}", "learning_rate: 2e-4")
    text = text.replace("quant_type: {values: [nf4, fp4]}", "quant_type: nf4")
    space.write_text(text)
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 4 configurations of the space have been tried" in done.stdout
    assert len(sweeps.entries(space)) == 4
    status = look(str(space.parent / "sweeps/toy"))
    assert status.is_done
    show(console := Console(file=StringIO(), width=160), status)
    assert "4 of 4 trials are done" in console.file.getvalue()
    assert "all 4 configurations of the space have been tried" in console.file.getvalue()
    assert "It goes on with" not in console.file.getvalue()


def test_diverged_trials_fail_and_a_sweep_of_nothing_else_exits_with_1(space):
    done = sweeps.run(space, "--set", "space.learning_rate={min: 0.1, max: 0.5}", "--set", "search.trials=2")
    assert done.returncode == 1, done.stdout + done.stderr
    for entry in sweeps.entries(space):
        assert entry.state is TrialState.FAIL
        assert entry.reason == "training loss is nan at step 1"
    again = "python -m sweep rerun sweeps/toy --trial 0"
    assert done.stdout.endswith(f"No trial finished; train one of them again with: {again}\n")


def test_trials_side_by_side(space):
    done = sweeps.run(space, "--set", "resources={cpus: 0.1, concurrency: 3}", TOY_STEP_SECONDS="0.01")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = sweeps.entries(space)
    assert [entry.number for entry in entries] == list(range(8))
    assert all(entry.state.is_finished() for entry in entries)
    starts = sorted((e.trial.datetime_start, e.trial.datetime_complete) for e in entries)
    assert any(later[0] < earlier[1] for earlier, later in pairwise(starts))
    told = [line for line in done.stdout.splitlines() if " started: " in line or " validation loss " in line]
    assert all(" started: " in line for line in told[:3])  # none waits until the process of another one is there


def test_a_gpu_asked_for_and_none_present(space):
    refused = sweeps.run(space, "--set", "resources={gpus: 1, cpus: 500}")
    assert refused.returncode == 2
    assert "resources.gpus: a trial asks for 1, this machine has 0" in refused.stderr
    assert "resources.cpus: a trial asks for 500, this machine has" in refused.stderr
    assert not (space.parent / "sweeps/toy").exists()


def test_ray_that_does_not_start_in_time(space):
    failed = sweeps.run(space, RAY_gcs_server_port_wait_time_s="0")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "Ray did not start on this machine: Timed out" in failed.stdout
    assert "The same command goes on" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr
    done = sweeps.run(space, "--set", "search.trials=1")
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_address_where_nothing_listens(space):
    refused = sweeps.run(space, "--address", "127.0.0.1:9")
    assert refused.returncode == 2
    assert "--address 127.0.0.1:9: nothing answers there" in refused.stderr
    assert not (space.parent / "sweeps/toy").exists()


@pytest.mark.parametrize("url", ["sqlite:////nowhere/x.db", "foo://bar", "mysql://me:secret@host/db"])
def test_a_ledger_that_cannot_be_opened(space, url):
    refused = sweeps.run(space, "--set", f"ledger={url}")
    assert refused.returncode == 2
    assert "ledger: " in refused.stderr
    assert "cannot be opened" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "secret" not in refused.stdout + refused.stderr
    assert not (space.parent / "sweeps/toy").exists()


def test_a_malformed_ledger_url_is_not_repeated(space):
    """It may hold a password."""
    refused = sweeps.run(space, "--set", "ledger=me:secret@host")
    assert refused.returncode == 2
    assert (
        "--set ledger=…: ledger: received what may hold a password, should be the URL of a database" in refused.stderr
    )
    assert "secret" not in refused.stdout + refused.stderr


def test_a_ledger_in_a_database(undisturbed, space):
    """That of any database does; its password is not written down; the directory alone is no sweep."""
    _, _, expected = undisturbed
    url = f"sqlite:///{space.parent}/ledger.db"
    done = sweeps.run(space, "--set", f"ledger={url}", "--set", "search.trials=2")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = Ledger.at_url(url, "toy").entries()
    assert sweeps.history(entries) == sweeps.history(expected[:2])
    database = space.parent / "ledger.db"
    database.rename(space.parent / "away")
    database.mkdir()  # it cannot be reached: no fault of the input
    failed = sweeps.run(space, "--set", f"ledger={url}", "--set", "search.trials=2")
    assert failed.returncode == 1
    assert "The same command goes on" in failed.stdout
    database.rmdir()
    (space.parent / "away").rename(database)
    refused = sweeps.run(space, "--set", "search.trials=2")  # without the URL
    assert refused.returncode == 2
    assert "toy holds a sweep, but its ledger" in refused.stderr
    assert not (space.parent / "sweeps/toy/study.log").exists()
    Ledger.at_url(url, "toy").note("environment", {"qlora-sweep": "99.1"})
    refused = sweeps.run(space, "--set", f"ledger={url}", "--set", "search.trials=2")
    assert refused.returncode == 2
    assert "qlora-sweep 99.1 began this sweep" in refused.stderr
    (space.parent / "ledger.db").unlink()
    refused = sweeps.run(space, "--set", f"ledger={url}", "--set", "search.trials=2")
    assert refused.returncode == 2
    assert "knows nothing of it" in refused.stderr


def test_storage_that_is_no_directory(space):
    (space.parent / "sweeps").write_text("a file")
    refused = sweeps.run(space)
    assert refused.returncode == 2
    assert "storage: cannot write to" in refused.stderr
