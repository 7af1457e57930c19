"""Two real Ray nodes: one is taken away, with notice or without, and its trial goes on at the other."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests import nodes, sweeps

FOUR_TRIALS = (
    *("--set", "resources={cpus: 1, concurrency: 2}"),
    *("--set", "early_stopping=false"),
    *("--set", "search.trials=4"),
    *("--set", "budget={steps: 24, evaluations: 3}"),
)


@pytest.fixture
def cluster():
    with nodes.cluster(TOY_STEP_SECONDS="0.25") as found:
        yield found


def disturbed(space: Path, address: str, disturb: Callable[[], None]) -> str:
    """A sweep of four trials that is disturbed when two of them have been evaluated once; returns what it prints."""
    process = sweeps.start(space, *FOUR_TRIALS, "--address", address)
    trials = space.parent / "sweeps/toy/trials"
    sweeps.wait_until(lambda: len({found.parent for found in trials.glob("*/step-*")}) == 2, process)
    disturb()
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def test_a_node_that_is_taken_away_with_notice(cluster, space):
    """SIGTERM to `ray start --block` drains the node: its trial writes a checkpoint and goes on at the other."""
    first, _ = cluster.start(cpus=1), cluster.start(cpus=1)
    output = disturbed(space, cluster.address, lambda: first.send_signal(signal.SIGTERM))
    assert output.count("leaves a machine that is taken away") == 1, output
    entries = sweeps.entries(space)
    assert [entry.state for entry in entries] == [TrialState.COMPLETE] * 4
    assert [entry.cost.steps for entry in entries] == [24] * 4  # nothing was trained twice
    assert not any(entry.deaths for entry in entries)
    first.wait(timeout=40)


def test_a_node_that_is_killed(cluster, space):
    first, _ = cluster.start(cpus=1), cluster.start(cpus=1)
    output = disturbed(space, cluster.address, lambda: nodes.kill(first))
    assert output.count("lost its machine") == 1, output
    entries = sweeps.entries(space)
    assert [entry.state for entry in entries] == [TrialState.COMPLETE] * 4
    assert all(24 <= entry.cost.steps < 24 + 8 for entry in entries)  # what came after the last checkpoint
