"""The saved view in W&B, as a server on loopback gets it."""

import json

import pytest
from typer.testing import CliRunner

from sweep import sync, tracking
from sweep.cli import app
from sweep.study import open_journal
from sweep.tracking import Tracking
from tests import sweeps
from tests.test_tracking import trained
from tests.wandb_server import KEY, ServedRun, WandbServer
from trainables.config import QLoRAConfig
from trainables.protocol import Evaluation

VIEW = "nw-0a1b2c3d-v"


@pytest.fixture
def sweep(tmp_path):
    """A sweep that has no runs yet."""
    root = tmp_path / "sweeps" / "pricer"
    root.mkdir(parents=True)
    text = sweeps.TOY.replace("name: toy", "name: pricer")
    (root / "space.yaml").write_text(text.replace("mode: disabled", "project: team, mode: online"))
    open_journal(root / "study.log", "pricer").note("sweep_id", "0a1b2c3d")
    return root


def record(sweep, mode):
    """A run of it, with all that the project gets of a trial."""
    to = Tracking("team", None, "pricer", mode, str(sweep))
    config = tracking.run_config(0, QLoRAConfig(), "llama", "pricer")
    run = tracking.start(to, "0a1b2c3d-000", "000", config, sweep / "trials/000")
    tracking.log(run, trained(1, 2, Evaluation(1, 2, 2.5)))
    facts = {"best_eval_loss": 2.5, "best_step": 2, "first_rung_eval_loss": 2.5, "budget_share": 1.0}
    tracking.finish(run, "stopped", facts | {"stop_reason": "rung 1"})
    tracking.close(60)


def workspace(sweep):
    return CliRunner().invoke(app, ["workspace", str(sweep)])


def test_it_is_laid_out_over_what_the_runs_log(sweep, server):
    record(sweep, "online")
    made = workspace(sweep)
    assert made.exit_code == 0, made.output
    assert (made.stdout, made.stderr) == (f"{server.url}/someone/team?nw=0a1b2c3d\n", "")
    sent = server.views[VIEW]
    named = {"entityName": "someone", "projectName": "team", "displayName": "Sweep pricer", "type": "project-view"}
    assert sent.items() >= named.items()

    section = json.loads(sent["spec"])["section"]
    panels = [panel for each in section["panelBankConfig"]["sections"] for panel in each["panels"]]
    coordinates, importance, *lines = [panel["config"] for panel in panels]
    assert [panel["viewType"] for panel in panels] == [
        "Parallel Coordinates Plot",
        "Parameter Importance",
        *6 * ["Run History Line Plot"],
    ]
    axes = {axis["accessor"]: axis.get("log") for axis in coordinates["columns"]}
    assert axes == {
        "config:r.value": False,
        "config:alpha.value": False,
        "config:learning_rate.value": True,
        "config:quant_type.value": False,
        "summary:best_eval_loss": None,
    }
    assert list(axes)[-1] == "summary:best_eval_loss"  # W&B colours the lines by the last one
    assert importance["targetKey"] == "best_eval_loss"
    curves, machine = lines[:3], lines[3:]
    assert [curve["metrics"] for curve in curves] == [["eval/loss"], ["train/loss"], ["train/learning_rate"]]
    assert {curve["xAxis"] for curve in curves} == {"train/global_step"}
    assert ["smoothingWeight" in curve for curve in curves] == [False, True, False]
    first = ["system/gpu.0.gpu", "system/gpu.0.powerWatts", "system/gpu.0.memoryAllocatedBytes"]
    assert [panel["metrics"][0] for panel in machine] == first
    assert {panel["xAxis"] for panel in machine} == {"_runtime"}

    [runs] = section["runSets"]
    columns = runs["runFeed"]["columnOrder"]
    assert columns[:4] == [
        "run:displayName",
        "summary:best_eval_loss",
        "summary:first_rung_eval_loss",
        "summary:state",
    ]
    assert {column for column in columns if column.startswith("config:")} == set(axes) - {"summary:best_eval_loss"}
    [only] = runs["filters"]["filters"]
    assert (only["key"], only["op"], only["value"]) == ({"section": "run", "name": "group"}, "=", "pricer")
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "best_eval_loss"}, "ascending": True}]

    run = server.runs["0a1b2c3d-000"]
    logged = {name for row in run.rows for name in row}
    assert {name for curve in curves for name in [curve["xAxis"], *curve["metrics"]]} <= logged
    assert {
        column.removeprefix("summary:") for column in columns if column.startswith("summary:")
    } <= run.summary.keys()
    assert {axis.removeprefix("config:").removesuffix(".value") for axis in list(axes)[:-1]} <= run.config.keys()
    assert run.fields["groupName"] == "pricer"


def test_made_again_it_is_the_same_and_left_as_people_arranged_it(sweep, server):
    server.runs["of another trial"] = ServedRun(fields={"project": "team"})
    assert workspace(sweep).exit_code == 0
    server.views[VIEW]["spec"] = "arranged"
    again = workspace(sweep)
    assert (again.exit_code, again.stderr) == (0, "")
    url = f"{server.url}/someone/team?nw=0a1b2c3d"
    assert again.stdout == f"{url} is there already; delete the view in W&B to have it made anew\n"
    assert {name: view["spec"] for name, view in server.views.items()} == {VIEW: "arranged"}


def test_what_was_kept_offline_is_uploaded_first(sweep, server):
    record(sweep, "offline")
    refused = workspace(sweep)
    assert refused.exit_code == 2
    command = f"python -m sweep sync {sweep}"
    assert refused.stderr == f"W&B has none of its runs (1) yet; upload them first: {command}\n"
    assert server.requests == []
    assert CliRunner().invoke(app, command.split()[3:]).exit_code == 0
    assert workspace(sweep).exit_code == 0
    assert list(server.views) == [VIEW]


def test_what_was_not_tracked(sweep, server):
    spec = sweep / "space.yaml"
    spec.write_text(spec.read_text().replace("online", "disabled"))
    refused = workspace(sweep)
    assert (refused.exit_code, server.requests) == (2, [])
    assert refused.stderr.startswith(f"W&B has nothing of {sweep}: its tracking.mode is disabled; with --set tracking")
    record(sweep, "online")  # before it was
    assert workspace(sweep).exit_code == 0


@pytest.mark.parametrize(
    ("key", "fault", "code", "told"),
    [
        ("", None, 2, "there is no key for W&B at"),
        ("short", None, 2, "cannot be used"),
        (KEY, 401, 2, "does not accept the key"),
        (KEY, 403, 1, "refuses to answer"),
        (KEY, 500, 1, "does not answer; the same command goes on when it does"),
        (KEY, "hang", 1, "does not answer; the same command goes on when it does"),
        (KEY, None, 2, "W&B has no project team yet"),
    ],
)
def test_w_and_b_that_does_not_take_it(sweep, server, monkeypatch, key, fault, code, told):
    monkeypatch.setenv("WANDB_API_KEY", key)
    server.fault = fault
    if fault in (500, "hang"):  # wandb itself asks for a minute
        monkeypatch.setattr(sync, "ASK_SECONDS", 2.0)
    refused = workspace(sweep)
    assert refused.exit_code == code
    assert told in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert KEY not in refused.stderr


def test_a_view_that_is_not_saved(sweep, server, monkeypatch):
    server.runs["of a trial"] = ServedRun(fields={"project": "team"})
    answer = WandbServer.graphql
    monkeypatch.setattr(
        WandbServer,
        "graphql",
        lambda self, operation, variables: {} if operation == "UpsertView2" else answer(self, operation, variables),
    )
    failed = workspace(sweep)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("W&B did not save the view (")
    assert failed.stderr.count("\n") == 1


def test_no_sweep(tmp_path):
    refused = workspace(tmp_path)
    assert refused.exit_code == 2
    assert "holds no sweep; name the directory of one" in refused.stderr
