"""Killed, silent, out of memory, refused by the disk: nothing is lost, and nothing is blamed on a configuration."""

import os
from pathlib import Path

import psutil
from optuna.trial import TrialState

from sweep.place import Place
from sweep.tracking import Tracking
from sweep.trainable import Assignment, Lease, SlicedTrial
from tests import nodes, sweeps
from tests.disks import fill, small_disk
from trainables.config import QLoRAConfig
from trainables.protocol import Budget, Cost, Job


def test_killed_and_run_again(undisturbed, space):
    """SIGKILL in the middle: the same command ends where an undisturbed sweep does, to the last bit."""
    _, _, expected = undisturbed
    unfinished = []
    for progress in (3, 11):  # evaluations in the ledger at the moment of the kill
        process = sweeps.start(space, TOY_STEP_SECONDS="0.02")
        sweeps.wait_until(lambda seen=progress: sweeps.reported(space) >= seen, process)
        process.kill()
        process.wait()
        unfinished.append([e.number for e in sweeps.entries(space) if e.state is TrialState.RUNNING])
    assert unfinished[0] == [0]  # the second kill may come between two trials
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.history(sweeps.entries(space)) == sweeps.history(expected)


def test_a_lost_process_is_no_fault_of_the_configuration(undisturbed, space):
    """Every process dies once in the middle of its first trial: the trials go on from their checkpoints."""
    _, _, expected = undisturbed
    done = sweeps.run(space, TOY_FAULT="exit:10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost its process" in done.stdout
    assert sweeps.history(sweeps.entries(space)) == sweeps.history(expected)


def test_processes_that_die_in_a_row_end_the_sweep_in_a_resumable_state(undisturbed, space):
    """Every second death at the same place is taken for the machine's memory: the trial gets a smaller micro-batch."""
    _, _, expected = undisturbed
    broken = sweeps.run(space, TOY_FAULT="exit:1")
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "5 trials in a row broke down" in broken.stdout
    assert "trial   0 lost its process 2 times at the same place: it goes on with a micro-batch of 4" in broken.stdout
    (entry,) = sweeps.entries(space)
    assert (entry.state, entry.deaths, entry.halvings) == (TrialState.RUNNING, (0,) * 5, 2)
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.history(sweeps.entries(space)) == sweeps.history(expected)


def test_ray_ends_on_this_machine(undisturbed, space):
    """Nobody brings it back: the driver does not wait for it, and the sweep goes on when it is run again."""
    _, _, expected = undisturbed
    process = sweeps.start(space, TOY_STEP_SECONDS="0.2")
    sweeps.wait_until(lambda: sweeps.reported(space) >= 2, process)
    (raylet,) = nodes.called(processes(process), "^[^ ]*/raylet ")
    raylet.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "Ray has ended on this machine" in output
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.history(sweeps.entries(space)) == sweeps.history(expected)


def processes(process):
    """All that a running sweep has started."""
    return psutil.Process(process.pid).children(recursive=True)


def test_orphans_end_by_themselves_and_write_nothing(space):
    """SIGKILL to the driver alone: what it had started is gone within seconds.

    But for two agents of Ray's, which know nothing of the sweep and look for their dead server for a minute.
    """
    process = sweeps.start(space, TOY_STEP_SECONDS="0.2")
    sweeps.wait_until(lambda: sweeps.reported(space) >= 2, process)
    sweeps.wait_until(lambda: len(nodes.trial_processes(processes(process))) > 0, process, seconds=20)
    orphans = nodes.called(processes(process), r"^(?!ray::\w+Agent)")
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(orphans, timeout=30)
    assert not alive, [orphan.cmdline() for orphan in alive]


def test_work_that_the_driver_never_heard_of_is_counted(tmp_path):
    """A process is killed after its checkpoint and before its result: the next one knows what that cost."""
    place = Place(str(tmp_path))
    place.paths.lock_holder.write_text("me")
    place.paths.spec.write_text("name: toy")
    tracked = Tracking("p", None, "toy", "disabled", str(place.paths.tracking))
    job = Job("", "", Budget(None, 60, 9))
    mine = Assignment(0, "toy", QLoRAConfig(), job, Lease(place, "me"), -1, Cost(), 1, tracked, "abcd", (), 5.0, None)

    def started() -> SlicedTrial:
        trial = object.__new__(SlicedTrial)  # without Ray
        trial.setup({"assignment": mine})
        return trial

    first = started()
    assert first._advance().evaluation.step == 7  # with a checkpoint
    second = started()
    assert second._advance().evaluation.step == 7  # told again, at no cost
    assert second._cost == first._cost
    assert second._cost.steps == 7
    second._advance()
    assert second._cost.steps == 13


def test_a_killed_trial_goes_on(undisturbed, space):
    """SIGKILL to the process of a trial, in the middle of it."""
    _, _, expected = undisturbed
    process = sweeps.start(space, TOY_STEP_SECONDS="0.05")
    sweeps.wait_until(lambda: sweeps.reported(space) >= 3, process)
    (victim,) = nodes.trial_processes(processes(process))
    victim.kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "lost its process" in output
    entries = sweeps.entries(space)
    assert sweeps.history(entries) == sweeps.history(expected)
    assert sum(len(entry.deaths) for entry in entries) == 1
    repeated = sum(entry.cost.steps for entry in entries) - sum(entry.cost.steps for entry in expected)
    assert 0 <= repeated <= 7  # steps between two evaluations


def test_a_process_that_was_replaced_ends_and_writes_nothing(undisturbed, space):
    """The driver gave its trial to another one, as when a broken network hid it: the attempt's mark is not its own."""
    _, _, expected = undisturbed
    process = sweeps.start(space, "--set", "search.trials=1", TOY_STEP_SECONDS="0.2")
    sweeps.wait_until(lambda: sweeps.reported(space) >= 2, process)
    (space.parent / "sweeps/toy/trials/000/attempt.txt").write_text("another attempt")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "trial   0 lost its process" in output
    entries = sweeps.entries(space)
    assert sweeps.history(entries) == sweeps.history(expected[:1])
    assert len(entries[0].deaths) == 1


def test_a_silent_trial_is_killed_and_put_back_once(undisturbed, space):
    _, _, expected = undisturbed
    done = sweeps.run(space, "--set", "trial_timeout=4", "--set", "search.trials=1", TOY_FAULT="hang:10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was killed: nothing was heard of it for 4 s" in done.stdout
    entries = sweeps.entries(space)
    assert [entry.silences for entry in entries] == [1]
    assert sweeps.history(entries) == sweeps.history(expected[:1])


def test_a_trial_that_falls_silent_again_has_failed(space):
    done = sweeps.run(space, "--set", "trial_timeout=3", "--set", "search.trials=1", TOY_FAULT="hang:1")
    assert done.returncode == 1, done.stdout + done.stderr
    (entry,) = sweeps.entries(space)
    assert (entry.state, entry.reason) == (TrialState.FAIL, "nothing was heard of it for 3 s, twice")


def test_out_of_memory_halves_the_micro_batch(undisturbed, space):
    """Trials of eight rows on a device with room for two: the first finds out, the others begin with what fits."""
    _, _, expected = undisturbed
    done = sweeps.run(space, TOY_ROWS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = sweeps.entries(space)
    assert sweeps.history(entries) == sweeps.history(expected)
    assert {entry.halvings for entry in entries} == {2}
    told = [line.split()[1] for line in done.stdout.splitlines() if "ran out of memory" in line]
    assert told[:2] == ["0", "0"]
    assert "trial   0 ran out of memory: it goes on with a micro-batch of 2" in done.stdout
    assert not {entry.number for entry in entries[1:] if entry.config.r >= 16} & set(map(int, told))


def test_a_configuration_that_never_fits_has_failed(space):
    done = sweeps.run(space, "--set", "search.trials=1", TOY_ROWS="0")
    assert done.returncode == 1, done.stdout + done.stderr
    (entry,) = sweeps.entries(space)
    assert entry.state is TrialState.FAIL
    assert entry.reason.startswith("out of memory with a micro-batch of 1")


def test_a_full_disk_ends_the_sweep_and_says_what_to_free(undisturbed, tmp_path):
    """Where the sweep directory is, with ledger, checkpoints and W&B's files."""
    _, _, expected = undisturbed
    with small_disk(tmp_path / "disk", size=4) as disk:
        space = disk / "toy.yaml"
        space.write_text(sweeps.TOY)
        process = sweeps.start(space, "--set", "tracking.mode=offline", TOY_STEP_SECONDS="0.05")
        sweeps.wait_until(lambda: sweeps.reported(space) >= 3, process)
        filler = fill(disk)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1, output
        assert "No space left on device" in output
        assert f"free space on the disk of {disk}/sweeps/toy (it holds trials" in output
        assert "Traceback" not in output
        filler.unlink()
        done = sweeps.run(space)
        assert done.returncode == 0, done.stdout + done.stderr
        assert sweeps.history(sweeps.entries(space)) == sweeps.history(expected)


def test_a_full_disk_for_temporary_files(undisturbed, space):
    _, _, expected = undisturbed
    with small_disk(Path(f"/tmp/q{os.getpid()}"), size=60) as disk:  # a name that is short enough for Ray's sockets
        elsewhere = {"TMPDIR": str(disk), "RAY_TMPDIR": str(disk)}
        process = sweeps.start(space, TOY_STEP_SECONDS="0.3", **elsewhere)
        sweeps.wait_until(lambda: sweeps.reported(space) >= 3, process)
        fill(disk)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1, output
        assert f"free space for temporary files, on the disk of {disk}" in output
        assert "Traceback" not in output
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.history(sweeps.entries(space)) == sweeps.history(expected)
