"""Checkpoints: whole or not at all, verified when read."""

import json
import multiprocessing
import resource
import time
from pathlib import Path

import pytest

from trainables import checkpoint
from trainables.checkpoint import Checkpoint
from trainables.protocol import Evaluation

FIRST = Evaluation(1, 10, 2.5, 300, 1.5)
SECOND = Evaluation(2, 20, 2.0, 300, 1.5)


def save(text: str, directory: Path) -> None:
    (directory / "weights").write_text(text)
    (directory / "part").mkdir()
    (directory / "part" / "moments").write_text(text * 2)


def write(trial: Path, step: int, *evaluations: Evaluation, text: str = "w") -> Checkpoint:
    return checkpoint.write(trial, step, evaluations, lambda directory: save(text, directory))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_written_is_read(tmp_path):
    written = write(tmp_path / "007", 20, FIRST, SECOND)
    assert written == Checkpoint(tmp_path / "007/step-000020", 20, (FIRST, SECOND))
    assert checkpoint.newest(tmp_path / "007") == checkpoint.read(written.path) == written
    assert names(tmp_path / "007") == ["step-000020"]
    manifest = json.loads((written.path / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["part/moments", "weights"]


@pytest.mark.parametrize(
    ("step", "evaluations", "loss"),
    [(20, (FIRST, SECOND), 2.0), (10, (FIRST,), 2.5), (15, (FIRST,), None), (0, (), None)],
)
def test_loss_is_that_of_these_weights_alone(tmp_path, step, evaluations, loss):
    assert write(tmp_path, step, *evaluations).loss == loss


def test_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "never") is None
    assert checkpoint.best(tmp_path / "never") is None
    assert checkpoint.last(tmp_path / "never") is None


def test_newest_goes_by_number(tmp_path):
    for step in (999_999, 1_000_000, 7):
        write(tmp_path, step)
    (tmp_path / "step-by-step").mkdir()
    assert checkpoint.newest(tmp_path).step == 1_000_000
    assert checkpoint.last(tmp_path).step == 1_000_000
    assert checkpoint.before(checkpoint.newest(tmp_path)).name == "step-999999"
    remove_manifest(tmp_path / "step-1000000")
    assert checkpoint.last(tmp_path) is None  # the one before it is not as far


def test_best_is_the_lowest_finite_loss(tmp_path):
    write(tmp_path, 0, Evaluation(0, 0, 0.1))  # the base has nothing to keep
    write(tmp_path, 10, FIRST)
    lowest = write(tmp_path, 20, FIRST, SECOND)
    write(tmp_path, 25, FIRST, SECOND)
    write(tmp_path, 30, FIRST, SECOND, Evaluation(3, 30, float("nan")))
    assert checkpoint.best(tmp_path) == lowest


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def tear_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-40])


def list_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[1, 2]")


def forget_files(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"files": None}))


def raise_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99, "evaluations": [{"unheard": 1}]}))


def alter_file(path: Path) -> None:
    (path / "weights").write_text("v")


def shorten_file(path: Path) -> None:
    (path / "part" / "moments").write_text("")


def remove_file(path: Path) -> None:
    (path / "weights").unlink()


def make_unreadable(path: Path) -> None:
    (path / "weights").unlink()
    (path / "weights").mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_manifest, "torn: manifest.json is missing"),
        (tear_manifest, "torn"),
        (list_manifest, "torn"),
        (forget_files, "torn"),
        (raise_format, "format 99, this version reads 2"),
        (alter_file, "weights was altered"),
        (shorten_file, "part/moments was altered"),
        (remove_file, "weights is missing"),
        (make_unreadable, "weights is missing or unreadable"),
    ],
)
def test_damage_is_seen_and_the_one_before_is_used(tmp_path, damage, words):
    before = write(tmp_path, 10, FIRST)
    damage(write(tmp_path, 20, FIRST, SECOND).path)
    with pytest.raises(ValueError, match=words):
        checkpoint.read(tmp_path / "step-000020")
    with pytest.warns(UserWarning, match=r"step-000020 .*; step-000010, the one before it, is used"):
        assert checkpoint.newest(tmp_path) == before


def test_equal_step_is_replaced(tmp_path):
    write(tmp_path, 10, text="before the evaluation")
    again = write(tmp_path, 10, FIRST, text="after it")
    assert checkpoint.newest(tmp_path) == again
    assert (again.path / "weights").read_text() == "after it"
    assert names(tmp_path) == ["step-000010"]


def test_disk_error_leaves_the_others(tmp_path):
    whole = write(tmp_path, 10, FIRST)

    def too_large(directory: Path) -> None:
        (directory / "weights").write_text("w" * 10_000)

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        for step in (10, 20):
            with pytest.raises(OSError, match="File too large"):
                checkpoint.write(tmp_path, step, (), too_large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert names(tmp_path) == ["step-000010"]
    assert checkpoint.read(whole.path) == whole


def test_prune_keeps_what_it_is_told(tmp_path, monkeypatch):
    for step in (10, 20, 30):
        write(tmp_path / "007", step)
    (tmp_path / "007/.step-000040.1234.new").mkdir()
    (tmp_path / "007/notes").write_text("not a checkpoint")
    monkeypatch.chdir(tmp_path)  # the same directory by another name
    checkpoint.prune(tmp_path / "007", {Path("007/step-000020")})
    assert names(tmp_path / "007") == ["notes", "step-000020"]
    assert checkpoint.newest(tmp_path / "007").step == 20


def write_without_end(trial: Path) -> None:
    for step in range(1, 1_000_000):
        for text in ("before the evaluation", "after it"):
            write(trial, step, text=text)
        checkpoint.prune(trial, {checkpoint.path_of(trial, step), checkpoint.path_of(trial, step - 1)})


def test_kill_at_any_moment_leaves_a_valid_one(tmp_path, recwarn):
    write(tmp_path, 0)
    before = 0
    for _ in range(8):
        writer = multiprocessing.get_context("fork").Process(target=write_without_end, args=(tmp_path,))
        writer.start()
        time.sleep(0.06)
        writer.kill()
        writer.join()
        found = checkpoint.newest(tmp_path)
        assert found is not None
        before = max(before, found.step)
    assert before > 0
    assert not [warning for warning in recwarn if "checkpoint" in str(warning.message)]
