"""Files that were torn or altered behind our back."""

import json
import shutil

import psutil
import pytest

from tests import nodes, sweeps
from tests.disks import flip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A sweep that was killed in its first trial, after three evaluations; its YAML file."""
    space = tmp_path_factory.mktemp("killed") / "toy.yaml"
    space.write_text(sweeps.TOY)
    process = sweeps.start(space, TOY_STEP_SECONDS="0.05")
    sweeps.wait_until(lambda: sweeps.reported(space) >= 4, process)
    trials = nodes.trial_processes(psutil.Process(process.pid).children(recursive=True))
    process.kill()
    process.wait()
    assert not psutil.wait_procs(trials, timeout=30)[1]  # they may write until they see that the driver is gone
    return space


@pytest.fixture
def killed(kept, tmp_path):
    """A copy of it."""
    shutil.copytree(kept.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / kept.name


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_a_byte_flipped_in_a_checkpoint(undisturbed, killed, file):
    """The damaged checkpoint is named, the one before it used, and the sweep ends as an undisturbed one does."""
    _, _, expected = undisturbed
    trial = killed.parent / "sweeps/toy/trials/000"
    before, damaged = sorted(trial.glob("step-*"))
    assert json.loads((before / "manifest.json").read_text())["step"] > 0
    flip(damaged / file)
    done = sweeps.run(killed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"checkpoint {damaged} is " in done.stdout
    assert f"{before.name}, the one before it, is used" in done.stdout
    assert sweeps.history(sweeps.entries(killed)) == sweeps.history(expected)


def test_the_winners_checkpoint_damaged(undisturbed, tmp_path):
    """What was exported stays; when that is gone, too, the next best is, and it is said."""
    shutil.copytree(undisturbed[0].parent, tmp_path / "copy")
    space = tmp_path / "copy" / undisturbed[0].name
    root = space.parent / "sweeps/toy"
    exported = (root / "best/sweep.json").read_text()
    facts = json.loads(exported)
    (root / f"trials/{facts['trial']:03d}/step-{facts['step']:06d}/state.json").write_text("junk")
    again = sweeps.run(space)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stderr == ""
    assert f"best/ is left as it is, of trial {facts['trial']:03d}" in again.stdout
    assert (root / "best/sweep.json").read_text() == exported
    shutil.rmtree(root / "best")
    again = sweeps.run(space)
    assert again.returncode == 0, again.stdout + again.stderr
    other = json.loads((root / "best/sweep.json").read_text())
    assert other["validation_loss"] > facts["validation_loss"]
    assert f"best/ is of trial {other['trial']:03d} ({other['validation_loss']:.4f}): the checkpoint of" in again.stdout


def test_the_ledgers_last_line_torn(undisturbed, killed):
    """Of a kill in the middle of an append: what it would have said happens once more."""
    _, _, expected = undisturbed
    ledger = killed.parent / "sweeps/toy/study.log"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    done = sweeps.run(killed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the last line is torn" in done.stdout + done.stderr
    assert sweeps.history(sweeps.entries(killed)) == sweeps.history(expected)


def test_the_ledger_damaged_elsewhere(killed):
    """By a digit alone. It stops with the line's number; neither the ledger nor a checkpoint is touched."""
    ledger = killed.parent / "sweeps/toy/study.log"
    lines = ledger.read_bytes().splitlines(keepends=True)
    (number, loss), *_ = ((n, line) for n, line in enumerate(lines, start=1) if b'"intermediate_value":' in line)
    digit = loss.index(b'"intermediate_value":') + 21
    lines[number - 1] = loss[:digit] + bytes([loss[digit] ^ 1]) + loss[digit + 1 :]
    ledger.write_bytes(b"".join(lines))
    before = {
        file: file.read_bytes() for file in killed.parent.rglob("*") if file.is_file() and "driver" not in file.name
    }
    refused = sweeps.run(killed)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert f"study.log:{number}: the ledger is damaged (its checksum does not fit)" in refused.stderr
    assert "Traceback" not in refused.stderr
    after = {
        file: file.read_bytes() for file in killed.parent.rglob("*") if file.is_file() and "driver" not in file.name
    }
    assert after == before
