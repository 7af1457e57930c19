"""Told to end: trials write checkpoints, the exit code is 75, and the same command goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests import sweeps
from tests.wandb_files import final, records
from trainables import checkpoint


def first_trial(space):
    return space.parent / "sweeps/toy/trials/000"


def wait_for_the_first_step(space, process):
    """Until a long step has begun: after the loss of the base."""
    sweeps.wait_until(lambda: sweeps.reported(space) == 1, process)
    time.sleep(2)


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
)
def test_preempted_and_run_again(undisturbed, space, number, whole_group):
    """A signal to the driver, or to all its processes: each running trial writes a checkpoint at its next step."""
    _, _, expected = undisturbed
    process = sweeps.start(space, TOY_STEP_SECONDS="2")  # 14 seconds to the first evaluation
    sweeps.wait_until(lambda: sweeps.reported(space) == 1, process)  # the base's
    time.sleep(6)
    began = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert time.monotonic() - began < 30
    assert f"Preempted by {signal.Signals(number).name}: 0 of 8 trials are done." in output
    assert "The same command goes on: python -m sweep run" in output
    found = checkpoint.newest(first_trial(space))
    assert found is not None
    assert 0 < found.step < 7  # before the first evaluation
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    after = sweeps.entries(space)
    assert sweeps.history(after) == sweeps.history(expected)
    assert after[0].cost.steps == expected[0].cost.steps  # nothing was trained twice


def test_a_second_signal_ends_at_once(undisturbed, space):
    _, _, expected = undisturbed
    process = sweeps.start(space, TOY_STEP_SECONDS="20")
    wait_for_the_first_step(space, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # it waits for the step
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 3
    assert process.returncode == 75, output
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.history(sweeps.entries(space)) == sweeps.history(expected)


def test_the_grace_period_ends_by_force(space):
    process = sweeps.start(space, "--set", "preemption.grace=2", TOY_STEP_SECONDS="60")
    wait_for_the_first_step(space, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert 1.5 < time.monotonic() - began < 5
    assert process.returncode == 75, output
    assert "The same command goes on" in output
    assert [entry.state for entry in sweeps.entries(space)] == [TrialState.RUNNING]


def test_several_trials_are_saved(space):
    """And their W&B runs are marked preempted."""
    several = ("--set", "resources={cpus: 0.5, concurrency: 3}", "--set", "early_stopping=false")
    several += ("--set", "tracking.mode=offline")
    process = sweeps.start(space, *several, TOY_STEP_SECONDS="0.6")
    trials = space.parent / "sweeps/toy/trials"
    sweeps.wait_until(lambda: len({found.parent for found in trials.glob("*/step-*")}) == 3, process)  # evaluated once
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    running = [entry for entry in sweeps.entries(space) if entry.state is TrialState.RUNNING]
    assert len(running) == 3
    for entry in running:
        found = checkpoint.newest(trials / f"{entry.number:03d}")
        assert found is not None
        assert found.step >= entry.cost.steps > 0
        (fragment,) = (space.parent / "sweeps/toy/wandb").glob(f"*run-*/run-*-{entry.number:03d}.wandb")
        assert "preempting" in records(fragment)
        assert final(records(fragment))["state"] == "preempted"


def test_a_reader_that_goes_away_ends_nothing(space):
    """As in `… | tee log`, where Ctrl-C ends tee first: the sweep goes on unseen, and drains as ever."""
    with (space.parent / "errors").open("w") as errors:
        process = subprocess.Popen(
            sweeps.command(space),
            cwd=space.parent,
            env=sweeps.environment(TOY_STEP_SECONDS="0.5"),
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    process.stdout.readline()
    process.stdout.close()
    sweeps.wait_until(lambda: sweeps.reported(space) >= 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75
    assert "The same command goes on: python -m sweep run" in (space.parent / "errors").read_text()
    assert checkpoint.newest(first_trial(space)) is not None


def test_the_end_by_force_needs_no_reader(space):
    process = sweeps.start(space, "--set", "preemption.grace=2", TOY_STEP_SECONDS="60")
    wait_for_the_first_step(space, process)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 75


def test_a_signal_before_anything_has_begun(space):
    process = sweeps.start(space)

    def is_handled() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1)

    sweeps.wait_until(is_handled, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert not (space.parent / "sweeps/toy/space.yaml").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_sweep_starts(space, number):
    """Before the first trial there is nothing to save; the exit code says that the command is to be run again."""
    process = sweeps.start(space)
    sweeps.wait_until((space.parent / "sweeps/toy/driver.txt").exists, process)  # Ray is about to be started
    time.sleep(0.5)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output
