"""A packed sweep is disturbed as any other, and ends as it would have: one engine, many trials."""

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from sweep import tracking
from sweep.study import open_journal, ranking
from tests import nodes, sweeps
from tests.disks import fill, flip, small_disk
from tests.wandb_files import history
from trainables.packed.slots import Measured, slots

SPEC = """
name: tiny
model: {inputs}/llama
data: {{train: {inputs}/train.jsonl, validation: {inputs}/validation.jsonl, max_length: 64}}
budget: {{steps: 120, evaluations: 3}}
search: {{trials: 4, seed: 1, sampler: random}}
early_stopping: false
space:
  r: {{values: [4, 16]}}
  learning_rate: {{min: 1e-4, max: 1e-2, log: true}}
  quant_type: {{values: [nf4, fp4]}}
  compute_dtype: fp32
  dropout: 0.1
tracking: {{mode: offline}}
packing: {{slots: 3}}
"""


@pytest.fixture
def space(inputs, tmp_path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(SPEC.format(inputs=inputs))
    return file


@pytest.fixture(scope="module")
def serial(inputs, tmp_path_factory):
    """The same trials, one at a time in processes of their own."""
    file = tmp_path_factory.mktemp("serial") / "tiny.yaml"
    file.write_text(SPEC.format(inputs=inputs))
    done = sweeps.run(file, "--set", "packing.slots=1", "--set", "resources.concurrency=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return sweeps.entries(file, "tiny")


def assert_same_outcome(space: Path, serial) -> None:
    entries = sweeps.entries(space, "tiny")
    assert [entry.config for entry in entries] == [entry.config for entry in serial]
    for ours, theirs in zip(entries, serial, strict=True):
        assert (ours.state, ours.reason, ours.halvings) == (TrialState.COMPLETE, None, 0)
        evaluations = [k for k in theirs.losses if k > 0]  # the base is scored by another trial, perhaps
        assert [ours.losses[k] for k in evaluations] == pytest.approx([theirs.losses[k] for k in evaluations], abs=1e-4)
    assert [entry.number for entry in ranking(entries)] == [entry.number for entry in ranking(serial)]


def attempts(space: Path) -> set[str]:
    """Marks of the attempts at trials that have trained."""
    trials = space.parent / "sweeps/tiny/trials"
    return {(rows.parent / "attempt.txt").read_text() for rows in trials.glob("*/rows.jsonl")}


def engines(process) -> list[psutil.Process]:
    return nodes.called(children(process), "EngineProcess")


def maps(process: psutil.Process) -> str:
    """What is in its memory; a process of a packed trial, of which there are many, is small."""
    return Path(f"/proc/{process.pid}/maps").read_text()


def children(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_packed_sweep_is_a_serial_one(space, serial):
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert_same_outcome(space, serial)
    for entry in sweeps.entries(space, "tiny"):
        (fragment,) = space.parent.glob(f"sweeps/tiny/wandb/*run-*/run-*-{entry.number:03d}.wandb")
        steps = [row["train/global_step"] for row in history(fragment) if "train/loss" in row]
        assert steps == list(range(1, 121))
    assert (space.parent / "sweeps/tiny/best/adapter_model.safetensors").exists()


@pytest.mark.timeout(600)  # three starts of an engine
def test_told_to_end_and_then_killed(space, serial):
    """SIGTERM to all, later SIGKILL to the driver; nothing is trained twice after the first. After the other a
    checkpoint is damaged, too."""
    process = sweeps.start(space)
    sweeps.wait_until(lambda: sweeps.reported(space, "tiny") >= 2, process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert time.monotonic() - began < 30

    process = sweeps.start(space)
    sweeps.wait_until(lambda: sweeps.reported(space, "tiny") >= 7, process)
    orphans = engines(process)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(orphans, timeout=30)[1]
    for trial in (space.parent / "sweeps/tiny/trials").iterdir():
        steps = [row[tracking.STEP] for row in tracking.logged(trial) if "train/loss" in row]
        assert steps == list(range(1, len(steps) + 1))

    unfinished = [entry.number for entry in sweeps.entries(space, "tiny") if entry.state is TrialState.RUNNING]
    trials = [space.parent / f"sweeps/tiny/trials/{number:03d}" for number in unfinished]
    damaged = next(max(trial.glob("step-*")) for trial in trials if any(trial.glob("step-*")))
    flip(damaged / "adapter_model.safetensors")
    again = sweeps.run(space)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"checkpoint {damaged} is " in again.stdout
    assert_same_outcome(space, serial)


def test_processes_are_killed(space, serial):
    """That of the engine, with all its trials, and later that of a trial."""
    process = sweeps.start(space, "--set", "packing.slots=4")
    sweeps.wait_until(lambda: sweeps.reported(space, "tiny") >= 1, process)
    before = attempts(space)
    assert "libtorch" in maps(engines(process)[0])
    assert not any("libtorch" in maps(each) for each in nodes.trial_processes(children(process)))
    engines(process)[0].kill()
    sweeps.wait_until(lambda: len(attempts(space)) == 4 and not attempts(space) & before, process)
    nodes.trial_processes(children(process))[0].kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert len(before) <= output.count("lost its engine") <= 4, output
    assert output.count("lost its process") == 1, output
    assert_same_outcome(space, serial)
    assert sum(len(entry.deaths) for entry in sweeps.entries(space, "tiny")) == 1


@pytest.mark.timeout(600)
def test_an_engine_falls_silent(space):
    """It is killed; none of its trials, which have all told something, is blamed."""
    process = sweeps.start(space, "--set", "trial_timeout=30", "--set", "budget.steps=400")
    sweeps.wait_until(lambda: len(attempts(space)) == 4, process)
    engines(process)[0].suspend()
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert output.count("lost its engine, of which nothing was heard for 30 s") >= 2, output
    entries = sweeps.entries(space, "tiny")
    assert [entry.state for entry in entries] == [TrialState.COMPLETE] * 4
    assert not any(entry.silences or entry.deaths for entry in entries)


def test_the_end_of_an_engine_counts_once(space):
    """More trials than accidents in a row that end a sweep."""
    settings = ("packing.slots=6", "search.trials=6", "budget.steps=6000")
    process = sweeps.start(space, *(word for setting in settings for word in ("--set", setting)))
    try:
        sweeps.wait_until(lambda: len(attempts(space)) == 6, process)
        before = attempts(space)
        (first,) = engines(process)
        first.kill()
        sweeps.wait_until(lambda: not attempts(space) & before, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert output.count("lost its engine") == 6, output


@pytest.mark.timeout(600)
@pytest.mark.parametrize("while_it_starts", [True, False])
def test_a_machine_of_two_is_lost(space, serial, while_it_starts):
    """Each has an engine; the trials of the one that is killed go on in the other."""
    with nodes.cluster() as cluster:
        first, second = cluster.start(cpus=1), cluster.start(cpus=1)
        process = sweeps.start(space, "--set", "packing.slots=2", "--address", cluster.address)
        sweeps.wait_until(lambda: engines(first) and engines(second), process)
        if not while_it_starts:
            sweeps.wait_until(lambda: sweeps.reported(space, "tiny") >= 2, process)
        nodes.kill(first)
        output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert while_it_starts or "lost its" in output
    assert_same_outcome(space, serial)
    assert not any(entry.deaths for entry in sweeps.entries(space, "tiny"))


def test_a_machine_is_taken_away(space):
    """With notice: its trials write a checkpoint and go on in the other's engine; nothing is trained twice."""
    with nodes.cluster() as cluster:
        first, _ = cluster.start(cpus=1), cluster.start(cpus=1)
        settings = ("--set", "packing.slots=2", "--set", "budget.steps=1500")
        process = sweeps.start(space, *settings, "--address", cluster.address)
        sweeps.wait_until(lambda: sweeps.reported(space, "tiny") >= 3, process)
        first.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    assert 1 <= output.count("leaves a machine that is taken away") <= 4, output
    entries = sweeps.entries(space, "tiny")
    assert [entry.state for entry in entries] == [TrialState.COMPLETE] * 4
    assert [entry.cost.steps for entry in entries] == [1500] * 4
    assert not any(entry.deaths for entry in entries)


def test_a_full_disk(space, serial, tmp_path):
    with small_disk(tmp_path / "disk", size=16) as disk:
        shutil.copy(space, disk)
        on_disk = disk / space.name
        process = sweeps.start(on_disk)
        sweeps.wait_until(lambda: sweeps.reported(on_disk, "tiny") >= 2, process)
        filler = fill(disk)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1, output
        assert "No space left on device" in output
        assert "Traceback" not in output
        filler.unlink()
        done = sweeps.run(on_disk)
        assert done.returncode == 0, done.stdout + done.stderr
        assert_same_outcome(on_disk, serial)


def test_machines_that_do_not_share_files_are_refused(space):
    settings = ("storage=s3://bucket/sweeps", "ledger=sqlite:///ledger.db")
    words = [word for setting in settings for word in ("--set", setting)]
    refused = sweeps.run(space, *words, "--address", "127.0.0.1:9")
    assert refused.returncode == 2
    assert "packing.slots: received 3" in refused.stderr


def test_how_many_share_is_measured_once(space):
    settings = ("packing=auto", "resources.cpus=2", "search.trials=9", "budget.steps=6", "space.quant_type=nf4")
    words = [word for setting in settings for word in ("--set", setting)]
    done = sweeps.run(space, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Measuring how many trials should share a device" in done.stdout
    ledger = open_journal(space.parent / "sweeps/tiny/study.log", "tiny")
    noted = ledger.noted("packing")
    found = slots(Measured(**noted["measured"]), bases=1, most=9)  # nothing is learned from earlier trials
    assert f"Packing: {found} trials share a device" in done.stdout or (found == 1 and "of its own" in done.stdout)
    ledger.note("packing", noted | {"measured": noted["measured"] | {"fixed": 1.0, "each": 0.1}})
    again = sweeps.run(space, *words, "--set", "search.trials=12")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Measuring" not in again.stdout
    assert "Packing: 3 trials share a device, 2.5 times as fast as one after the other" in again.stdout
    assert [entry.state for entry in sweeps.entries(space, "tiny")] == [TrialState.COMPLETE] * 12


def test_told_to_end_while_measuring(space):
    process = sweeps.start(space, "--set", "packing=auto", "--set", "search.trials=12")
    assert process.stdout is not None
    assert any("Measuring" in line for line in process.stdout)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert time.monotonic() - began < 10
    assert "Preempted by SIGTERM: 0 of 12 trials are done." in output
    assert not sweeps.entries(space, "tiny")
