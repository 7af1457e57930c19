"""`python -m sweep sync` against a server on loopback that fails in every way we could think of."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import psutil
import pytest
from typer.testing import CliRunner, Result

from sweep import sync, tracking
from sweep.cli import app
from sweep.tracking import Tracking
from tests.test_tracking import seen, trained, wandb_processes
from tests.wandb_files import records
from tests.wandb_server import KEY, WandbServer
from trainables.protocol import Evaluation, Slice

FIRST = (trained(1, 50, Evaluation(1, 50, 2.0)), trained(51, 100, Evaluation(2, 100, 1.0)))
SECOND = (trained(51, 100, Evaluation(2, 100, 1.0)), trained(101, 150, Evaluation(3, 150, 0.9)))
"""From the checkpoint at step 50."""
BOTH = (list(range(1, 151)), [50, 100, 150])


@pytest.fixture
def sweep(tmp_path: Path, server: WandbServer) -> Path:
    """A sweep that has no runs yet."""
    root = tmp_path / "sweeps" / "pricer"
    root.mkdir(parents=True)
    (root / "space.yaml").write_text("name: pricer\n")
    return root


def attempt(
    sweep: Path,
    run_id: str,
    *slices: Slice,
    state: tracking.State = "complete",
    mode: tracking.Mode = "offline",
    **summary: object,
) -> None:
    """One attempt of a run, which is over when this returns."""
    to = Tracking("project", None, "pricer", mode, str(sweep))
    while (sweep / "wandb").exists() and list((sweep / "wandb").glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-*")):
        time.sleep(0.05)  # fragments are named by the second
    run = tracking.start(to, run_id, f"run {run_id}", {"r": 16}, Path(to.directory, "trials", run_id))
    for happened in slices:
        tracking.log(run, happened)
    tracking.finish(run, state, {"stop_reason": None, **summary})
    tracking.close(60)


def two_attempts(sweep: Path) -> None:
    attempt(sweep, "id", *FIRST, state="preempted", best_step=100)
    attempt(sweep, "id", *SECOND, best_step=150)


def marks(sweep: Path) -> int:
    return len(list(sweep.glob("wandb/*/*.synced")))


def run(sweep: Path) -> Result:
    return CliRunner().invoke(app, ["sync", str(sweep)])


def run_in_vain(sweep: Path) -> Result:
    """As `run`, of a server that fails: it is not waited for as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync, "ASK_SECONDS", 4.0)
        patch.setattr(sync, "UPLOAD_SECONDS", 8.0)
        patch.setattr(sync, "SETTLE_SECONDS", 2.0)
        patch.setattr(tracking, "TEARDOWN_SECONDS", 1.0)
        failed = run(sweep)
    assert failed.exit_code == 1
    return failed


def found(sweep: Path) -> list[Path]:
    """All fragments, oldest first."""
    return sorted(sweep.glob("wandb/*/*.wandb"), key=lambda file: file.parent.name.removeprefix("offline-"))


def assert_complete(sweep: Path, server: WandbServer, run_id: str = "id") -> None:
    """The server has two attempts of a run, each row once, and how the second one ended; nothing is left to do."""
    served = server.runs[run_id]
    assert seen(served.rows) == BOTH
    assert [row["_step"] for row in served.rows] == list(range(len(served.rows)))
    assert (served.summary["state"], served.summary["best_step"], served.exit_code) == ("complete", 150, 0)
    asked = len(server.requests)
    again = run(sweep)
    assert (again.exit_code, again.stderr) == (0, "")
    assert len(server.requests) == asked


def complete(sweep: Path, runs: int, sent: int) -> str:
    """What is said when W&B has everything."""
    told = f"W&B has {runs} of {runs} runs of {sweep}, {sent} of them sent now."
    return f"{told}\nLay them out in W&B with: python -m sweep workspace {sweep}\n"


def test_two_attempts_and_another_run(sweep: Path, server: WandbServer) -> None:
    two_attempts(sweep)
    attempt(sweep, "other", trained(1, 5), state="failed")
    found(sweep)[1].with_suffix(".wandb.syncstate").write_text('{"starting_step":0,"starting_runtime":0}')  # by hand
    done = run(sweep)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == complete(sweep, runs=2, sent=2)
    assert marks(sweep) == 3
    served = server.runs["id"]
    assert served.fields["displayName"] == "run id"
    assert served.config["r"] == {"value": 16}
    measured = [record for file in found(sweep) for record in records(file).get("stats", []) if "-id/" in str(file)]
    assert len(served.files.get("wandb-events.jsonl", [])) == len(measured)
    assert (server.runs["other"].summary["state"], server.runs["other"].exit_code) == ("failed", 1)
    assert_complete(sweep, server)
    assert wandb_processes() == []


@pytest.mark.parametrize(
    ("rows", "fault"),  # within an attempt, after one, after all but the summary
    [(0, "hang"), (40, "hang"), (102, 500), (120, 500), (153, 500)],
)
def test_interrupted_and_repeated(sweep: Path, server: WandbServer, rows: int, fault: int | str) -> None:
    two_attempts(sweep)
    server.dies = (rows, fault)
    cut_off = run_in_vain(sweep)
    assert cut_off.stderr == (
        f"run id (id): W&B at {server.url} does not answer; the same command goes on when it does\n"
    )
    assert cut_off.stdout == f"W&B has 0 of 1 runs of {sweep}, 0 of them sent now.\n"
    assert len(server.runs["id"].rows) == rows
    assert "best_step" not in server.runs["id"].summary or server.runs["id"].summary["best_step"] == 100
    assert wandb_processes() == []
    server.dies = server.fault = None
    done = run(sweep)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == complete(sweep, runs=1, sent=1)
    assert_complete(sweep, server)


def test_interrupted_again_and_again(sweep: Path, server: WandbServer) -> None:
    two_attempts(sweep)
    for rows in (30, 110):
        server.dies = (rows, 500)
        run_in_vain(sweep)
        server.fault = None
        assert len(server.runs["id"].rows) == rows
    server.dies = None
    assert run(sweep).exit_code == 0
    assert_complete(sweep, server)


@pytest.mark.parametrize("stage", ["wandb sync", "missing rows"])
def test_kill_9_half_way(sweep: Path, server: WandbServer, stage: str) -> None:
    two_attempts(sweep)
    if stage == "missing rows":
        server.dies = (20, 500)
        run_in_vain(sweep)
        server.fault = None
    server.dies = (40, "hang")
    process = subprocess.Popen([sys.executable, "-m", "sweep", "sync", str(sweep)])
    while server.fault is None:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len([child for child in children if "wandb-core" in child.name()]) >= 1
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(sweep / "driver.lock", timeout=0).acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=3)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    server.dies = server.fault = None
    assert len(server.runs["id"].rows) == 40
    assert run(sweep).exit_code == 0
    assert_complete(sweep, server)


@pytest.mark.parametrize("fault", [429, 500, "hang", 403])
def test_a_server_that_fails(sweep: Path, server: WandbServer, fault: int | str) -> None:
    for run_id in ("one", "two"):
        attempt(sweep, run_id, trained(1, 5))
    server.fault = fault
    began = time.monotonic()
    failed = run_in_vain(sweep)
    assert time.monotonic() - began < 8
    told = "refuses to answer" if fault == 403 else "does not answer; the same command goes on"
    (line,) = failed.stderr.splitlines()
    assert line.startswith("run one (one), run two (two): W&B at ")
    assert told in line
    assert marks(sweep) == 0
    assert len(server.requests) == {"hang": 1, 403: 2}.get(fault, len(server.requests))
    server.fault = None
    assert run(sweep).exit_code == 0
    assert all(seen(server.runs[run_id].rows) == ([1, 2, 3, 4, 5], []) for run_id in ("one", "two"))


@pytest.mark.parametrize("rows", [0, 40])
def test_a_server_that_refuses_the_rows(
    sweep: Path, server: WandbServer, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb itself takes it for success, says so with `.synced`, and would go on with the second attempt."""
    two_attempts(sweep)
    plain: list[Path] = []
    upload = sync._wandb_sync
    monkeypatch.setattr(sync, "_wandb_sync", lambda paths, files: plain.extend(files) or upload(paths, files))
    if rows:
        server.dies = (rows, 500)
        run_in_vain(sweep)
        server.dies = server.fault = None
    server.stream_fault = 403
    failed = run_in_vain(sweep)
    assert failed.stderr.startswith("run id (id): W&B did not take all of ")
    assert failed.stderr.count("\n") == 1
    assert marks(sweep) == 0
    assert plain == found(sweep)[:1]
    server.stream_fault = None
    assert run(sweep).exit_code == 0
    assert_complete(sweep, server)


def test_a_later_attempt_does_not_overtake(sweep: Path, server: WandbServer) -> None:
    two_attempts(sweep)
    attempt(sweep, "other", trained(1, 5))
    first = found(sweep)[0]
    whole = first.read_bytes()
    first.write_bytes(b"damaged")
    failed = run(sweep)
    assert failed.exit_code == 1
    assert failed.stderr.startswith(f"id: {first} cannot be read (Error: transactionlog: bad header")
    assert failed.stderr.endswith(f"; move {first.parent} away to upload the rest of the run\n")
    assert failed.stdout == f"W&B has 1 of 2 runs of {sweep}, 1 of them sent now.\n"
    assert "id" not in server.runs
    first.write_bytes(whole)
    assert run(sweep).exit_code == 0
    assert_complete(sweep, server)


@pytest.mark.parametrize("rows", [None, 20])
def test_a_fragment_torn_by_a_kill(sweep: Path, server: WandbServer, rows: int | None) -> None:
    """wandb's own summary of it is ahead of the rows that can be read."""
    attempt(sweep, "id", *FIRST)
    [first] = found(sweep)
    first.write_bytes(first.read_bytes()[:-6000])
    steps, _ = seen(tracking.rows_in(tracking.records(first)))
    assert 50 < steps[-1] < 100
    attempt(sweep, "id", *SECOND, best_step=150)
    if rows:
        server.dies = (rows, 500)
        run_in_vain(sweep)
        server.dies = server.fault = None
    assert run(sweep).exit_code == 0
    assert marks(sweep) == 2
    assert_complete(sweep, server)


def test_a_killed_attempt_is_the_newest(sweep: Path, server: WandbServer) -> None:
    attempt(sweep, "id", *FIRST)
    [first] = found(sweep)
    first.write_bytes(first.read_bytes()[:-6000])
    steps, evaluations = seen(tracking.rows_in(tracking.records(first)))
    server.dies = (20, 500)
    run_in_vain(sweep)
    server.dies = server.fault = None
    assert run(sweep).exit_code == 0
    assert seen(server.runs["id"].rows) == (steps, evaluations)
    assert (server.runs["id"].summary["state"], server.runs["id"].exit_code) == ("preempted", 1)


def test_an_attempt_that_was_killed_at_once(sweep: Path, server: WandbServer) -> None:
    attempt(sweep, "id")
    [first] = found(sweep)
    first.write_bytes(b"")
    assert run(sweep).exit_code == 0
    assert server.requests == []
    two_attempts(sweep)
    assert run(sweep).exit_code == 0
    assert_complete(sweep, server)


@pytest.mark.parametrize("rows", [0, 40, 102])
def test_an_online_attempt_that_was_cut_off(sweep: Path, server: WandbServer, rows: int) -> None:
    attempt(sweep, "id", *FIRST, mode="online", state="preempted", best_step=100)
    attempt(sweep, "id", *SECOND, mode="online", best_step=150)
    assert tracking.notes() == []
    served = server.runs["id"]
    served.files["wandb-history.jsonl"] = served.files["wandb-history.jsonl"][:rows]
    served.summary = {"state": "preempted", "best_step": 100}
    served.exit_code = None
    served.uploads.clear()
    before = [file.read_bytes() for file in found(sweep)]
    assert run(sweep).exit_code == 0
    assert [file.read_bytes() for file in found(sweep)] == before
    assert "wandb-metadata.json" not in served.uploads  # which would describe the machine that uploads
    assert marks(sweep) == 2
    assert_complete(sweep, server)


def test_an_online_run_that_lacks_its_end_alone(sweep: Path, server: WandbServer) -> None:
    attempt(sweep, "id", *FIRST, mode="online", state="preempted", best_step=100)
    attempt(sweep, "id", *SECOND, mode="online", best_step=150)
    served = server.runs["id"]
    served.summary, served.exit_code = {"state": "preempted", "best_step": 100}, None
    done = run(sweep)
    assert done.stdout == complete(sweep, runs=1, sent=1)
    assert_complete(sweep, server)


def test_an_online_run_that_is_complete(sweep: Path, server: WandbServer) -> None:
    attempt(sweep, "id", *FIRST, mode="online", state="preempted", best_step=100)
    attempt(sweep, "id", *SECOND, mode="online", best_step=150)
    asked = len(server.requests)
    done = run(sweep)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == complete(sweep, runs=1, sent=0)
    assert server.requests[asked:] == ["POST /graphql"]
    assert_complete(sweep, server)


def test_an_offline_attempt_whose_rows_an_online_one_has_sent(sweep: Path, server: WandbServer) -> None:
    attempt(sweep, "id", *FIRST, state="preempted", best_step=100)
    attempt(sweep, "id", *SECOND, mode="online", best_step=150)
    assert run(sweep).exit_code == 0
    assert_complete(sweep, server)


def test_a_fragment_that_repeats_rows_of_another(sweep: Path, server: WandbServer, tmp_path: Path) -> None:
    attempt(sweep, "id", *FIRST, state="preempted", best_step=100)
    [first] = found(sweep)
    shutil.move(first.parent, tmp_path / "elsewhere")  # as when the second attempt cannot see it yet
    attempt(sweep, "id", *SECOND, best_step=150)
    shutil.move(tmp_path / "elsewhere", first.parent)
    assert run(sweep).exit_code == 0
    assert_complete(sweep, server)


def test_a_fragment_that_grew_after_its_upload(sweep: Path, server: WandbServer) -> None:
    attempt(sweep, "id", *FIRST, state="preempted", best_step=100)
    assert run(sweep).exit_code == 0
    assert tracking.kept_offline(str(sweep)) == 0
    [fragment] = found(sweep)
    os.utime(fragment)  # as when it is written to
    assert tracking.kept_offline(str(sweep)) == 1
    assert run(sweep).exit_code == 0
    assert tracking.kept_offline(str(sweep)) == 0


def test_an_attempt_that_went_on_at_another_machine(sweep: Path, server: WandbServer, tmp_path: Path) -> None:
    """Which has all rows from the start. In whatever order the two are uploaded, the run has ended as it did there."""
    attempt(sweep, "id", *FIRST, state="preempted", best_step=100)
    attempt(sweep, "same", *FIRST, state="preempted", best_step=100)
    there = tmp_path / "there" / "pricer"
    shutil.copytree(sweep, there, ignore=shutil.ignore_patterns("wandb", "*.lock"))
    attempt(there, "id", *SECOND, best_step=150)
    attempt(there, "same", state="stopped", best_step=90)  # nothing was left to do
    for copy in (there, sweep, there):
        assert run(copy).exit_code == 0
        assert seen(server.runs["same"].rows) == (list(range(1, 101)), [50, 100])
        assert (server.runs["same"].summary["state"], server.runs["same"].summary["best_step"]) == ("stopped", 90)
        assert_complete(copy, server)


def test_an_online_attempt_goes_on_after_half_an_upload(sweep: Path, server: WandbServer) -> None:
    attempt(sweep, "id", *FIRST, state="preempted", best_step=100)
    server.dies = (40, 500)
    run_in_vain(sweep)
    server.dies = server.fault = None
    attempt(sweep, "id", *SECOND, mode="online", best_step=150)
    assert run(sweep).exit_code == 0
    assert_complete(sweep, server)


def test_rows_that_w_and_b_does_not_take_any_more(sweep: Path, server: WandbServer) -> None:
    two_attempts(sweep)
    later = found(sweep)[1].parent
    shutil.copytree(later, sweep / "by-hand" / later.name)
    subprocess.run([sys.executable, "-m", "wandb", "sync", sweep / "by-hand" / later.name], cwd=sweep, check=True)
    assert len(server.runs["id"].rows) == 51
    failed = run(sweep)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("run id (id): W&B has 51 of its first 153 rows, and takes none in between")
    assert len(server.runs["id"].rows) == 51
    assert marks(sweep) == 0


def test_a_sweep_that_runs_is_left_alone(sweep: Path, server: WandbServer) -> None:
    attempt(sweep, "id", *FIRST)
    (sweep / "driver.txt").write_text("process 7 on host since today")
    with filelock.FileLock(sweep / "driver.lock"):
        refused = run(sweep)
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"{sweep} is in use by process 7 on host since today: what is being written cannot be uploaded; "
        "wait until it has ended\n"
    )
    assert server.requests == []
    assert run(sweep).exit_code == 0


@pytest.mark.parametrize(
    ("key", "told"), [("", "there is no key for W&B at"), ("short", "cannot be used"), (KEY, "does not accept the key")]
)
def test_no_usable_key(sweep: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, key: str, told: str) -> None:
    attempt(sweep, "id", *FIRST)
    monkeypatch.setenv("WANDB_API_KEY", key)
    server.fault = 401
    refused = run(sweep)
    assert refused.exit_code == 2
    assert told in refused.stderr
    assert refused.stderr.endswith("run `wandb login` or set WANDB_API_KEY\n")
    assert KEY not in refused.stderr
    assert marks(sweep) == 0


def test_wrong_directories(sweep: Path, server: WandbServer, tmp_path: Path) -> None:
    for wrong in (tmp_path / "nowhere", tmp_path, sweep / "space.yaml"):
        refused = run(wrong)
        assert refused.exit_code == 2
        what = "holds no sweep" if wrong.exists() else "does not exist"
        assert refused.stderr.startswith(f"{wrong} {what}; name the directory of one")
    nothing = run(sweep)
    assert (nothing.exit_code, nothing.stderr) == (0, "")
    assert nothing.stdout == (
        f"{sweep} has no W&B runs on this machine: no trial has begun, or tracking.mode is disabled; with --set"
        " tracking.mode=auto the trials to come are tracked.\n"
    )
    assert server.requests == []


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_revived_trial(sweep: Path, server: WandbServer, mode: tracking.Mode) -> None:
    """Its run had an end, which W&B has already, and gets another one."""
    attempt(sweep, "id", *FIRST, state="stopped", mode=mode, stop_reason="stopped by hand", best_step=100)
    assert run(sweep).exit_code == 0
    assert (server.runs["id"].summary["state"], server.runs["id"].exit_code) == ("stopped", 0)
    attempt(sweep, "id", *SECOND, mode=mode, best_step=150)
    done = run(sweep)
    assert (done.exit_code, done.stderr) == (0, "")
    assert_complete(sweep, server)
    assert "stop_reason" not in server.runs["id"].summary
