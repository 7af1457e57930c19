"""W&B, read back from wandb's own files with its own reader, and from a server on loopback."""

import json
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sweep import tracking
from sweep.tracking import Tracking
from tests.wandb_files import final, history, records
from tests.wandb_server import KEY, WandbServer
from trainables.config import QLoRAConfig
from trainables.protocol import Evaluation, Slice, Step

pytestmark = pytest.mark.usefixtures("fresh_wandb")


@pytest.fixture
def offline(tmp_path: Path) -> Tracking:
    return Tracking("project", None, "pricer", "offline", str(tmp_path / "sweep"))


@pytest.fixture
def online(tmp_path: Path, server: WandbServer) -> Tracking:
    return Tracking("project", None, "pricer", "online", str(tmp_path / "sweep"))


def trained(first: int, last: int, evaluation: Evaluation | None = None) -> Slice:
    steps = tuple(
        Step(n, loss=1 / n, learning_rate=2e-4, grad_norm=0.5, tokens=300, seconds=2.0) for n in range(first, last + 1)
    )
    return Slice(steps, evaluation, failure=None, done=False, peak_memory=0)


def record(
    to: Tracking, run_id: str, *slices: Slice, state: tracking.State = "complete", **summary: object
) -> tracking.Run:
    """One attempt of a run, from start to finish; returns at once."""
    run = tracking.start(to, run_id, f"run {run_id}", {"r": 16}, trial(to, run_id))
    for happened in slices:
        tracking.log(run, happened)
    tracking.finish(run, state, summary)
    return run


def trial(to: Tracking, run_id: str) -> Path:
    """The directory of the trial that the run records."""
    return Path(to.directory, "trials", run_id)


def fragments(to: Tracking, run_id: str) -> list[Path]:
    return sorted(Path(to.directory).glob(f"wandb/*run-*/run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime)


def seen(rows: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Steps trained and steps evaluated at, in the order recorded."""
    return (
        [row["train/global_step"] for row in rows if "train/loss" in row],
        [row["train/global_step"] for row in rows if "eval/loss" in row],
    )


def wandb_processes(pid: int | None = None) -> list[psutil.Process]:
    """wandb's own processes that a process (this one) started and that live."""
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if child.status() != psutil.STATUS_ZOMBIE and "wandb-core" in child.name():
                found.append(child)
    return found


def test_a_run_holds_what_happened(offline: Tracking, capfd: pytest.CaptureFixture[str]) -> None:
    config = QLoRAConfig(r=8, target_modules=("q_proj", "v_proj"))
    facts = tracking.run_config(7, config, "m", "pricer")
    run = tracking.start(offline, "id7", "007 r8", facts, trial(offline, "id7"))
    tracking.log(run, Slice((), Evaluation(0, 0, 3.5), None, False, 0))
    tracking.log(run, trained(1, 2))
    tracking.log(run, trained(3, 4, Evaluation(1, 4, 2.5)))
    while not (fragments(offline, "id7") and "stats" in records(fragments(offline, "id7")[0])):
        time.sleep(0.1)  # a run may be over before the machine is measured for the first time
    tracking.finish(run, "stopped", {"best_eval_loss": 2.5, "best_step": 4, "stop_reason": "rung 1"})
    tracking.close(60)

    found = records(fragments(offline, "id7")[0])
    [opened] = found["run"]
    assert (opened["run_id"], opened["display_name"], opened["run_group"], opened["project"]) == (
        "id7",
        "007 r8",
        "pricer",
        "project",
    )
    written = opened["config"]["update"]
    assert written["r"] == 8
    assert written["learning_rate"] == 2e-4
    assert written["quant_type"] == "nf4"
    assert written["trial"] == 7
    assert not [name for name, value in written.items() if isinstance(value, dict) and name != "_wandb"]
    rows = [row["item"] for row in found["history"]]
    assert seen(rows) == ([1, 2, 3, 4], [0, 4])
    assert {name: value for name, value in rows[2].items() if name[0] != "_"} == {
        "train/global_step": 2,
        "train/loss": 0.5,
        "train/learning_rate": 2e-4,
        "train/grad_norm": 0.5,
        "train/tokens_per_second": 150.0,
    }
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == [3.5, 2.5]
    against = {metric["glob_name"]: metric["step_metric"] for metric in found["metric"] if "glob_name" in metric}
    assert against == {"train/*": "train/global_step", "eval/*": "train/global_step"}
    summary = final(found)
    assert (summary["best_eval_loss"], summary["best_step"], summary["state"]) == (2.5, 4, "stopped")
    assert summary["stop_reason"] == "rung 1"
    assert any(name.startswith("proc.memory") for sample in found["stats"] for name in json.dumps(sample).split('"'))
    assert not found.keys() & {"output", "output_raw", "files"}
    assert "git" not in json.dumps(found["environment"])
    assert capfd.readouterr() == ("", "")
    assert tracking.notes() == []


@pytest.mark.parametrize(
    ("state", "exit_code", "preempting"),
    [("complete", 0, False), ("stopped", 0, False), ("failed", 1, False), ("preempted", 1, True)],
)
def test_states(offline: Tracking, state: tracking.State, exit_code: int, preempting: bool) -> None:
    record(offline, "id", trained(1, 1), state=state)
    tracking.close(60)
    found = records(fragments(offline, "id")[0])
    assert found["exit"] == [{"exit_code": exit_code}]
    assert ("preempting" in found) == preempting
    assert final(found)["state"] == state


def test_half_a_row_of_a_killed_process_is_left_out(offline: Tracking) -> None:
    rows = trial(offline, "id") / tracking.ROWS
    rows.parent.mkdir(parents=True)
    rows.write_text('{"train/global_step": 1, "train/loss": 2.0}\n{"train/global_st')
    record(offline, "id", trained(2, 3))
    tracking.close(60)
    assert seen(history(fragments(offline, "id")[0])) == ([1, 2, 3], [])
    assert [row["train/global_step"] for row in tracking.logged(rows.parent)] == [1, 2, 3]
    assert (rows.parent / tracking.RECORDED).read_text() == "offline"


def test_runs_of_one_process_do_not_mix(offline: Tracking) -> None:
    runs = [record(offline, f"id{n}", trained(n, n + 2)) for n in (1, 2, 3)]
    tracking.close(60)
    assert not any(run.thread.is_alive() for run in runs)
    assert wandb_processes() == []  # all that it held is written
    assert [seen(history(fragments(offline, f"id{n}")[0]))[0] for n in (1, 2, 3)] == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    off = Tracking("project", None, "pricer", "disabled", str(tmp_path / "sweep"))
    record(off, "id", trained(1, 3))
    tracking.close(60)
    assert not Path(off.directory).exists()


def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unusable = Tracking("project", None, "pricer", "offline", str(tmp_path / "file" / "sweep"))
    run = tracking.start(unusable, "id", "name", {}, tmp_path / "trial")
    tracking.log(run, trained(1, 3))
    tracking.finish(run, "complete", {})
    tracking.close(60)
    assert len(tracking.logged(tmp_path / "trial")) == 3
    assert not (tmp_path / "trial" / tracking.RECORDED).exists()
    assert tracking.notes() == [
        f"W&B: cannot write to {tmp_path}/file/sweep (Not a directory); trials are not recorded"
    ]


def test_offline_contacts_nobody(offline: Tracking, server: WandbServer) -> None:
    for run_id in ("id1", "id2", "id3"):
        record(offline, run_id, trained(1, 100))
    while not fragments(offline, "id3"):
        time.sleep(0.02)
    assert ["--no-observability" in process.cmdline() for process in wandb_processes()] == [True]
    tracking.close(60)
    assert len(history(fragments(offline, "id3")[0])) == 100
    assert server.requests == []


def test_attempts_add_up_offline_and_when_synced(offline: Tracking, server: WandbServer) -> None:
    evaluations = [Evaluation(n, 4 * n, 3.0 - n) for n in range(4)]
    before = [Slice((), evaluations[0], None, False, 0), trained(1, 4, evaluations[1]), trained(5, 8, evaluations[2])]
    record(offline, "id", *before, trained(9, 10), state="preempted")
    tracking.close(60)
    again = [trained(5, 8, evaluations[2]), trained(9, 12, evaluations[3])]  # from the checkpoint at step 4
    record(offline, "id", *again, best_eval_loss=0.0)
    tracking.close(60)

    first, second = (seen(history(fragment)) for fragment in fragments(offline, "id"))
    assert first == (list(range(1, 11)), [0, 4, 8])
    assert second == ([11, 12], [12])

    sync = [sys.executable, "-m", "wandb", "sync", "--yes", f"{offline.directory}/wandb"]
    subprocess.run(sync, check=True, capture_output=True, cwd=offline.directory)
    run = server.runs["id"]
    assert seen(run.rows) == (list(range(1, 13)), [0, 4, 8, 12])
    assert [row["_step"] for row in run.rows] == list(range(16))
    assert run.summary["state"] == "complete"


LOGS_UNTIL_KILLED = """
import os, sys, time
from itertools import count
from pathlib import Path
from sweep import tracking
from trainables.protocol import Slice, Step
to = tracking.Tracking("project", None, "pricer", sys.argv[1], sys.argv[2])
run = tracking.start(to, "id", "name", {}, Path(sys.argv[2], "trials", "id"))
for n in count(1):
    tracking.log(run, Slice((Step(n, 1.0, 0.1, 1.0, 10, 0.1),), None, None, False, 0))
    print(n, time.time(), flush=True)
    time.sleep(0.1)  # few rows, so that no buffer fills
"""


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_kill_9_loses_no_more_than_the_last_moment(offline: Tracking, server: WandbServer, mode: tracking.Mode) -> None:
    trial = subprocess.Popen(
        [sys.executable, "-c", LOGS_UNTIL_KILLED, mode, offline.directory], stdout=subprocess.PIPE, text=True
    )
    assert trial.stdout is not None
    times = {}
    since_opened = 0
    for line in trial.stdout:
        step, when = line.split()
        times[int(step)] = float(when)
        since_opened += bool(fragments(offline, "id"))
        if since_opened == 30:  # three seconds
            break
    killed = time.time()
    for process in wandb_processes(trial.pid):  # first, so that it cannot tidy up
        process.kill()
    trial.kill()
    trial.communicate()

    [fragment] = fragments(offline, "id")
    kept, _ = seen(history(fragment))
    assert kept == list(range(1, len(kept) + 1))
    assert set(kept) >= {step for step, when in times.items() if when < killed - 1.5}

    last = max(times)  # logged, and told
    record(offline, "id", trained(last - 2, last + 5))  # goes on from a checkpoint
    tracking.close(60)
    steps = seen(history(fragments(offline, "id")[-1]))[0]
    assert steps == list(range(len(kept) + 1, last + 6))  # what wandb had not got yet is there


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_death_of_the_wandb_process_loses_nothing(tmp_path: Path, server: WandbServer, mode: tracking.Mode) -> None:
    to = Tracking("project", None, "pricer", mode, str(tmp_path / "sweep"))
    run = tracking.start(to, "id", "name", {}, trial(to, "id"))
    tracking.log(run, trained(1, 10))
    while not (fragments(to, "id") and len(history(fragments(to, "id")[0])) == 10):
        time.sleep(0.1)
    tracking.log(run, trained(11, 20))
    for process in wandb_processes():
        process.kill()
    tracking.log(run, trained(21, 30))
    tracking.finish(run, "complete", {})
    tracking.close(60)
    steps = [step for fragment in fragments(to, "id") for step in seen(history(fragment))[0]]
    assert steps == list(range(1, 31))
    [note] = tracking.notes()
    assert "sweep sync" in note
    record(to, "next", trained(1, 3))
    tracking.close(60)
    assert len(history(fragments(to, "next")[0])) == 3


def test_a_wandb_process_that_does_not_end_is_killed(offline: Tracking) -> None:
    record(offline, "id", trained(1, 3)).thread.join()
    (fragment,) = fragments(offline, "id")
    while len(history(fragment)) < 3:
        time.sleep(0.1)
    (process,) = wandb_processes()
    process.suspend()
    tracking.close()
    assert not process.is_running()
    assert len(history(fragment)) == 3
    record(offline, "next", trained(1, 3))
    tracking.close(60)
    assert len(history(fragments(offline, "next")[0])) == 3
    assert tracking.notes() == []


def test_it_is_told_when_rows_may_be_missing_and_only_then(offline: Tracking) -> None:
    run = tracking.start(offline, "id", "name", {}, trial(offline, "id"))
    tracking.close(0.1)
    [note] = tracking.notes()
    assert "it was not done after 0.1 s" in note
    tracking.finish(run, "complete", {})
    tracking.close(60)
    record(offline, "next", trained(1, 3)).thread.join()
    (process,) = wandb_processes()
    process.suspend()
    tracking.close(0.1)  # all is recorded, and wandb's own process does not end yet
    assert tracking.notes() == []


@pytest.mark.parametrize("fault", ["hang", 401, 429, 500])
def test_a_server_that_fails_holds_nothing_up(
    online: Tracking, server: WandbServer, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "INIT_SECONDS", 3.0)
    server.fault = fault
    runs = [record(online, f"id{n}", *(trained(step, step) for step in range(1, 101)), best_step=100) for n in (1, 2)]
    assert all(
        run.thread.is_alive() for run in runs
    )  # they were started, logged to and finished, and nothing was opened
    tracking.close()
    for run_id in ("id1", "id2"):
        found = records(fragments(online, run_id)[-1])
        assert fragments(online, run_id)[-1].parent.name.startswith("offline-")
        assert len(found["history"]) == 100
        assert final(found)["best_step"] == 100
    [note] = tracking.notes()
    assert online.directory in note
    assert "sweep sync" in note
    assert "id1" not in note


@pytest.mark.parametrize("fault", ["hang", 500])
def test_a_server_that_fails_later(
    online: Tracking, server: WandbServer, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    run = tracking.start(online, "id", "name", {}, trial(online, "id"))
    while "id" not in server.runs:
        time.sleep(0.02)
    server.fault = fault
    tracking.log(run, trained(1, 10, Evaluation(1, 10, 2.0)))
    tracking.finish(run, "preempted", {})
    assert run.thread.is_alive()
    tracking.close()
    assert not run.thread.is_alive()
    assert seen(history(fragments(online, "id")[0])) == (list(range(1, 11)), [10])
    [note] = tracking.notes()
    assert "cut off" in note
    assert server.runs["id"].rows == []

    server.fault = None
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 60.0)
    monkeypatch.setattr(tracking, "_offline_until", 0.0)  # a minute later
    record(online, "id", trained(6, 10, Evaluation(1, 10, 2.0)), trained(11, 15))
    tracking.close()
    assert seen(server.runs["id"].rows) == (list(range(1, 16)), [10])


def test_online_runs_and_their_resumption(
    online: Tracking, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    record(online, "id", trained(1, 10, Evaluation(1, 10, 2.0)), state="preempted", best_step=10)
    tracking.close(60)
    run = server.runs["id"]
    assert run.fields["displayName"] == "run id"
    assert run.fields["groupName"] == "pricer"
    assert run.config["r"] == {"value": 16}
    assert seen(run.rows) == (list(range(1, 11)), [10])
    assert (run.summary["best_step"], run.summary["state"]) == (10, "preempted")
    assert run.exit_code == 1

    again = [trained(6, 10, Evaluation(1, 10, 2.0)), trained(11, 15, Evaluation(2, 15, 1.0))]
    record(online, "id", *again, best_step=15)
    tracking.close(60)
    assert seen(run.rows) == (list(range(1, 16)), [10, 15])
    assert [row["_step"] for row in run.rows] == list(range(17))
    assert (run.summary["best_step"], run.summary["state"], run.exit_code) == (15, "complete", 0)
    assert capfd.readouterr() == ("", "")
    assert tracking.notes() == []


@pytest.mark.parametrize("summary", [{}, {"train/global_step": 2}, {"train/global_step": 4}, {"train/global_step": 5}])
def test_rows_that_were_not_uploaded_any_more_are_sent_by_the_next_attempt(
    online: Tracking, server: WandbServer, summary: dict[str, int]
) -> None:
    """Whatever the server's summary says, which is not always as far as its rows are."""
    diverged = Evaluation(1, 10, float("nan"))
    record(online, "id", trained(1, 10, diverged), state="preempted")
    tracking.close(60)
    run = server.runs["id"]
    run.files["wandb-history.jsonl"] = run.files["wandb-history.jsonl"][:4]  # as if the machine had died
    run.summary = summary
    record(online, "id", trained(9, 12))
    tracking.close(60)
    assert seen(run.rows) == (list(range(1, 13)), [10])
    assert [str(row["eval/loss"]) for row in run.rows if "eval/loss" in row] == ["nan"]


@pytest.mark.parametrize(("served", "kept"), [(4, 10), (10, 6)])
def test_an_online_run_goes_on_at_another_machine(
    online: Tracking, server: WandbServer, tmp_path: Path, served: int, kept: int
) -> None:
    """Which has the rows of the trial as far as they were sent there; the server has fewer or more of them."""
    record(online, "id", trained(1, 10), state="preempted")
    tracking.close(60)
    run = server.runs["id"]
    run.files["wandb-history.jsonl"] = run.files["wandb-history.jsonl"][:served]  # as if the machine had died
    run.summary = {"train/global_step": served, "_step": served - 1}
    there = replace(online, directory=str(tmp_path / "there"))
    trial(there, "id").mkdir(parents=True)
    rows = (trial(online, "id") / tracking.ROWS).read_text().splitlines(keepends=True)
    (trial(there, "id") / tracking.ROWS).write_text("".join(rows[:kept]))
    asked = len(server.requests)
    attempt = tracking.start(there, "id", "run id", {}, trial(there, "id"))
    while len(server.requests) == asked:  # it looks at the rows before it asks what the server has
        time.sleep(0.01)
    tracking.log(attempt, trained(kept - 1, 12))
    tracking.finish(attempt, "complete", {})
    tracking.close(60)
    assert seen(run.rows) == (list(range(1, 13)), [])


def test_no_key_in_any_file_or_output(
    online: Tracking, server: WandbServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    resolved = tracking.resolve("project", None, "pricer", "auto", Path(online.directory))
    record(resolved, "good", trained(1, 3))
    tracking.close(60)
    server.fault = 401
    record(resolved, "bad", trained(1, 3))
    tracking.close(60)
    assert server.runs["good"].rows
    files = [path for path in Path(online.directory).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    said = "".join([*capfd.readouterr(), caplog.text, *tracking.notes(), repr(resolved)])
    assert "401" in said
    assert KEY not in said


@pytest.mark.parametrize(
    ("wanted", "settings", "netrc", "expected"),
    [
        ("auto", {}, False, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, False, "online"),
        ("auto", {}, True, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, False, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, False, "disabled"),
        ("online", {"WANDB_API_KEY": KEY}, False, "online"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, False, "online"),
        ("offline", {"WANDB_API_KEY": KEY}, False, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, False, "disabled"),
        ("online", {}, False, "there is no key for http://127.0.0.1:9; run `wandb login`"),
        ("online", {"WANDB_API_KEY": "short"}, False, "cannot be used"),
        ("auto", {"WANDB_API_KEY": "short"}, False, "cannot be used"),
    ],
)
def test_mode_is_settled_before_anything_starts(
    wanted: Any, settings: dict[str, str], netrc: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1:9\n  login user\n  password {KEY}\n")
    if expected in ("online", "offline", "disabled"):
        found = tracking.resolve("project", None, "pricer", wanted, tmp_path / "sweep")
        assert found == Tracking("project", None, "pricer", expected, str(tmp_path / "sweep"))  # type: ignore[arg-type]
    else:
        with pytest.raises(ValueError, match=expected) as error:
            tracking.resolve("project", None, "pricer", wanted, tmp_path / "sweep")
        assert settings.get("WANDB_API_KEY", "short") not in str(error.value)
    assert wandb_processes() == []


@pytest.mark.parametrize(
    ("config", "searched", "name"),
    [
        ({}, ["r", "alpha", "learning_rate", "quant_type", "compute_dtype"], "007 r16 a32 lr2.0e-04 nf4 bf16"),
        ({"warmup_ratio": 0.07312, "weight_decay": 1e-4}, ["warmup_ratio", "weight_decay"], "007 wu0.073 wd1.0e-04"),
        ({"alpha": 0.5, "rslora": True}, ["alpha", "rslora", "double_quant"], "007 a0.5 rslora double_quant"),
        ({"double_quant": False, "weight_decay": 0.0}, ["double_quant", "weight_decay"], "007 no-double_quant wd0"),
        ({"target_modules": ("q_proj", "v_proj")}, ["target_modules", "schedule"], "007 q_proj+v_proj cosine"),
        ({}, [], "007 r16 a32 lr2.0e-04 nf4 bf16"),
    ],
)
def test_run_names(config: dict[str, Any], searched: list[str], name: str) -> None:
    assert tracking.run_name(7, QLoRAConfig(**config), searched) == name


def test_every_hyperparameter_has_a_short_form() -> None:
    name = tracking.run_name(7, QLoRAConfig(), QLoRAConfig.model_fields)
    assert max(Counter(name.split()).values()) == 1


def test_importing_it_imports_neither_wandb_nor_torch() -> None:
    script = "import sys, sweep.tracking; assert not {'wandb', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)
