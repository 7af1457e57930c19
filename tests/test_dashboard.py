"""optuna-dashboard on the ledger of a sweep: it sees what is written meanwhile, and writes nothing."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import optuna
import pytest
from typer.testing import CliRunner

from sweep import dashboard
from sweep.cli import app
from sweep.status import look
from sweep.study import Ledger, Proposal, open_journal
from tests import sweeps
from tests.ledgers import add_trial
from trainables.config import QLoRAConfig

optuna_dashboard = pytest.importorskip("optuna_dashboard")


@pytest.fixture
def sweep(tmp_path):
    """A sweep of two trials, in a journal."""
    (tmp_path / "space.yaml").write_text(sweeps.TOY)
    fill(open_journal(tmp_path / "study.log", "toy"))
    return tmp_path


def fill(ledger):
    for r, loss in ((8, 2.0), (16, 1.5)):
        searched = {"r": optuna.distributions.IntDistribution(4, 32)}
        number = ledger.add(Proposal(QLoRAConfig(r=r), {"r": r}, searched)).number
        ledger.report(number, 1, loss)
        ledger.complete(number)


@contextmanager
def served(sweep, ledger=None):
    """Its address."""
    server = dashboard.server(look(str(sweep), ledger), ledger, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{dashboard.HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def get(url):
    with urlopen(url, timeout=10) as answer:
        return answer.read()


def test_it_shows_what_a_driver_writes_meanwhile(sweep):
    with served(sweep) as url:
        assert b"<html" in get(f"{url}/dashboard")
        [study] = json.loads(get(f"{url}/api/studies"))["study_summaries"]
        assert study["study_name"] == "toy"
        trials = f"{url}/api/studies/{study['study_id']}?after=0"
        assert [trial["values"] for trial in json.loads(get(trials))["trials"]] == [[2.0], [1.5]]
        add_trial(open_journal(sweep / "study.log", "toy"))
        began = time.monotonic()
        while len(json.loads(get(trials))["trials"]) < 3:  # it keeps what it read for two seconds
            assert time.monotonic() - began < 30
            time.sleep(0.2)


@pytest.mark.parametrize("database", [False, True])
def test_nothing_that_it_is_asked_for_writes(sweep, tmp_path, database):
    url = None
    file = sweep / "study.log"
    if database:
        file = tmp_path / "ledger.db"
        url = f"sqlite:///{file}"
        fill(Ledger.at_url(url, "toy"))
    before = file.read_bytes()
    study_id = "1" if database else "0"
    routes = optuna_dashboard.wsgi(optuna.storages.InMemoryStorage()).routes
    with served(sweep, url) as address:
        for route in routes:
            path = route.rule.replace("<study_id:int>", study_id).replace("<plot_type>", "contour")
            path = re.sub(r"<[^>]*>", "1", path)
            request = Request(address + path, method=route.method, data=None if route.method == "GET" else b"{}")
            try:
                status = urlopen(request, timeout=30).status
            except HTTPError as error:
                status = error.code
            assert status < 500, path
            assert (status == 403) == (route.method != "GET"), f"{route.method} {path}"
    assert {route.method for route in routes} == {"GET", "POST", "PUT", "DELETE"}
    assert file.read_bytes() == before
    assert not list(sweep.glob("*.lock"))


def test_as_a_command(sweep):
    command = [sys.executable, "-m", "sweep", "dashboard", str(sweep), "--port", "0"]

    def heed_ctrl_c() -> None:  # which what a shell starts in the background does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment, pipe = sweeps.environment(), subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, text=True, preexec_fn=heed_ctrl_c) as process:
        try:
            line = process.stdout.readline()
            assert line.endswith(f" shows {sweep}. Ctrl-C ends it.\n")
            assert b"toy" in get(f"{line.split()[0]}/api/studies")
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


def test_what_cannot_be_served(sweep, tmp_path, monkeypatch):
    def refused(*words):
        told = CliRunner().invoke(app, ["dashboard", *words])
        assert told.exit_code == 2, told.output
        return told.stderr

    assert "does not exist; name the directory of one" in refused(str(tmp_path / "nowhere"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert refused(str(sweep), "--port", port) == f"--port {port}: Address already in use; name another one\n"
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    assert "get it with: python -m pip install optuna-dashboard" in refused(str(sweep))
