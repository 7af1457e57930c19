"""Keys stay where they are, and names stay where they belong."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests import hub_server, sweeps
from tests.tiny import make_tiny_llama, make_tiny_rows
from tests.wandb_server import KEY, serve

KEYS = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "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",
    "AWS_SECRET_ACCESS_KEY": "planted/planted+plantedplantedplanted1234",
    "AWS_SESSION_TOKEN": "plantedsessionplantedsession",
}
SPEC = """
name: secret
model: llama
data: {train: train.jsonl, validation: validation.jsonl, max_length: 64}
budget: {steps: 6, evaluations: 2}
search: {trials: 2}
space: {r: {values: [4, 8]}}
tracking: {mode: online}
checkpoint: {push_to: somebody/secret}
"""


@pytest.fixture
def scratch():
    """A directory for temporary files, with a name short enough for Ray's sockets."""
    directory = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def test_no_key_in_any_file(tmp_path, scratch):
    """Neither in the sweep (study, YAML, checkpoints, card, W&B's files), nor in Ray's, wandb's and temporary ones.

    Nor in what others get to see: the view in W&B, which the end of an online sweep makes, and the best adapter, which
    the Hub has by then, and which names no directory of this machine either.
    """
    make_tiny_llama(tmp_path / "llama")
    make_tiny_rows(tmp_path, train=32, validation=8)
    space = tmp_path / "space.yaml"
    space.write_text(SPEC)
    home = tmp_path / "home"
    home.mkdir()
    elsewhere = {"HOME": str(home), "TMPDIR": str(scratch), "RAY_TMPDIR": str(scratch)}
    with serve() as server, hub_server.serve() as hub:
        there = {"WANDB_BASE_URL": server.url, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        done = sweeps.run(space, **KEYS, **elsewhere, **there)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(server.runs) == 2
    [view] = server.views.values()
    assert f"The runs are laid out at {server.url}/someone/secret?nw={view['name'][3:-2]}\n" in done.stdout
    assert f"The best adapter so far is at {hub.url}/somebody/secret, which is private\n" in done.stdout
    pushed = hub.repositories["somebody/secret"].files
    best = tmp_path / "sweeps/secret/best"
    assert pushed["adapter_model.safetensors"] == (best / "adapter_model.safetensors").read_bytes()
    assert pushed.keys() == {file.name for file in best.iterdir()}
    assert not [name for name, content in pushed.items() if str(tmp_path).encode() in content]
    files = [path for root in (tmp_path, scratch) for path in root.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"study.log", "adapter_model.safetensors", "manifest.json", "README.md", "raylet.out"}
    assert any(name.endswith(".wandb") for name in names)
    for name, key in KEYS.items():
        assert key not in done.stdout + done.stderr, name
        assert not [path for path in files if key.encode() in path.read_bytes()], name
        assert key not in str(view) + str(pushed), name


def test_a_sweep_directory_that_leads_elsewhere_is_refused(space):
    elsewhere = space.parent / "elsewhere"
    elsewhere.mkdir()
    (space.parent / "sweeps").mkdir()
    (space.parent / "sweeps/toy").symlink_to(elsewhere)
    refused = sweeps.run(space)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert f"is a link to {elsewhere}; name the directory above that as `storage`" in refused.stderr
    assert not list(elsewhere.iterdir())


def test_storage_itself_may_be_a_link(space):
    elsewhere = space.parent / "elsewhere"
    elsewhere.mkdir()
    (space.parent / "sweeps").symlink_to(elsewhere)
    done = sweeps.run(space, "--set", "search.trials=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (elsewhere / "toy/study.log").exists()
