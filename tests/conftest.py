"""The toy sweep that most tests of the framework run, disturb, and compare with; and wandb in this process."""

import os
import tempfile

import pytest

from sweep import sync, tracking
from tests import sweeps, wandb_server
from tests.tiny import make_tiny_llama, make_tiny_rows

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several workers that wait for each other take minutes
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers, and the sweeps that they start, inherit it
    caches = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["XDG_CACHE_HOME"] = caches.name


def pytest_collection_modifyitems(items):
    """Files of long tests first, so that no worker is left with them when the others are done."""
    long = "packing kills object_store run tiny_sweep sync signals damage qlora_sft plan secrets init packed"
    long += " verification requests nodes earlier api status tracking"
    place = {f"test_{name}.py": number for number, name in enumerate(long.split())}
    items.sort(key=lambda item: place.get(item.path.name, len(long)))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A directory with a tiny model, llama/, and its train.jsonl and validation.jsonl."""
    directory = tmp_path_factory.mktemp("inputs")
    make_tiny_llama(directory / "llama")
    make_tiny_rows(directory, train=64, validation=24)
    return directory


@pytest.fixture
def space(tmp_path):
    """The YAML file of a toy sweep, in a directory of its own."""
    file = tmp_path / "toy.yaml"
    file.write_text(sweeps.TOY)
    return file


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The toy sweep, run once from beginning to end: its YAML file, the finished process, the ledger's entries."""
    file = tmp_path_factory.mktemp("undisturbed") / "toy.yaml"
    file.write_text(sweeps.TOY)
    done = sweeps.run(file)
    assert done.returncode == 0, done.stdout + done.stderr
    return file, done, sweeps.entries(file)


@pytest.fixture
def fresh_wandb(monkeypatch, tmp_path):
    """wandb as in a process just started on a machine without a key, and with nobody to talk to."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tracking, "INIT_SECONDS", 60.0)  # its own process starts late on a busy machine
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 60.0)
    monkeypatch.setattr(sync, "ASK_SECONDS", 60.0)
    monkeypatch.setattr(tracking, "_offline_until", 0.0)
    tracking.close(60)  # it keeps the settings of whoever asked it first
    tracking.notes()
    yield
    tracking.close(60)
    tracking.notes()


@pytest.fixture
def server(monkeypatch, fresh_wandb):
    """A W&B that wandb in this process and its children talks to, with a key."""
    with wandb_server.serve() as served:
        monkeypatch.setenv("WANDB_BASE_URL", served.url)
        monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
        yield served
        tracking.close(60)
