"""The best adapter of a running sweep, as a Hub on loopback gets it."""

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from sweep import cli, export, runner
from sweep.place import Place
from sweep.study import Ledger
from tests.hub_server import serve
from tests.ledgers import add_trial, memory_ledger
from trainables import checkpoint
from trainables.protocol import Evaluation

TOKEN = "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"
REPO = "somebody/tiny"


@pytest.fixture
def hub(monkeypatch):
    with serve() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(export, "LOOK_SECONDS", 0.02)
        monkeypatch.setattr(export, "AGAIN_SECONDS", 0.1)
        yield hub


@dataclass
class Sweep:
    """One whose trials get on when a test says so."""

    root: Path
    ledger: Ledger = field(default_factory=memory_ledger)
    notes: list[str] = field(default_factory=list)

    def evaluated(self, number, evaluation, loss):
        """As it is in a sweep: the checkpoint first, then the driver gets to know."""

        def save(directory):
            (directory / "adapter_model.safetensors").write_text(f"weights of loss {loss}")
            (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(self.root)}))

        trial = Place.at(str(self.root)).paths.trial(number)
        checkpoint.write(trial, evaluation, (Evaluation(evaluation, evaluation, loss),), save)
        self.ledger.report(number, evaluation, loss)

    def pushing(self, hurried=False):
        """What `run` does around its trials."""
        tokenizer = self.root / "tokenizer"
        tokenizer.mkdir(exist_ok=True)
        (tokenizer / "tokenizer.json").write_text("{}")
        place, model = Place.at(str(self.root)), str(self.root / "llama")
        upload = export.Upload(REPO, self.ledger, place, model, tokenizer, self.notes.append)
        return export.pushing_best(upload, lambda: hurried)


@pytest.fixture
def sweep(tmp_path):
    found = Sweep(tmp_path / "tiny")
    found.root.mkdir()
    add_trial(found.ledger)
    add_trial(found.ledger)
    return found


def wait_for(condition):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 30, "waited in vain"
        time.sleep(0.01)


def losses(hub):
    """What was uploaded, oldest first."""
    return [json.loads(commit["sweep.json"])["validation_loss"] for commit in hub.repositories[REPO].commits]


def test_every_better_adapter_is_uploaded(hub, sweep, tmp_path):
    with sweep.pushing():
        sweep.evaluated(0, 1, 2.0)
        wait_for(lambda: REPO in hub.repositories and losses(hub) == [2.0])
        time.sleep(0.5)  # many looks, at which there is nothing new
        sweep.evaluated(1, 1, 3.0)
        sweep.evaluated(0, 2, 2.5)
        sweep.evaluated(1, 2, 1.5)
        wait_for(lambda: losses(hub)[-1] == 1.5)
        sweep.evaluated(1, 3, 1.0)  # the end finds it
    assert losses(hub) == [2.0, 1.5, 1.0]
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.files["adapter_model.safetensors"] == b"weights of loss 1.0"
    names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "sweep.json", "README.md"}
    assert repository.files.keys() == names
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == "PATH/TO/llama"
    for name, content in repository.files.items():
        assert str(tmp_path).encode() not in content, name
        assert TOKEN.encode() not in content, name
    assert set(sweep.notes) == {f"The best adapter so far is at {hub.url}/{REPO}, which is private"}


@pytest.mark.parametrize("model", ["/models/llama", "owner/llama"])
def test_no_directory_is_passed_off_as_a_model_of_the_hub(sweep, model):
    sweep.evaluated(0, 1, 2.0)
    sweep.ledger.note("inputs", {"model": "abcdef", "data.train": "123456"})
    card = export.model_card(sweep.ledger, sweep.ledger.entry(0), export.without_path(model), 1, "tiny")
    is_local = model == "/models/llama"
    assert card.data.base_model == (None if is_local else model)
    assert f"# QLoRA adapter for {'llama' if is_local else model}\n" in card.text
    assert f'from_pretrained(\n    "{"PATH/TO/llama" if is_local else model}", quant' in card.text
    assert ("Its base, llama, is a local model with the content hash abcdef." in card.text) == is_local


def test_what_is_found_out_later_is_uploaded_once(hub, sweep):
    """As when the winner has been scored: the card alone, and nothing when it is as it was."""
    with sweep.pushing():
        sweep.evaluated(0, 1, 2.0)
    scores = {"trial": 0, "step": 1, "split": "test", "rows": 200, "loss": 1.2345, "base_loss": 4.8, "metric": None}
    sweep.ledger.note("scores", [scores | {"values": None, "base_values": None, "trouble": None}])
    for _ in range(2):
        with sweep.pushing():
            pass
    assert set(sweep.notes) == {f"The best adapter so far is at {hub.url}/{REPO}, which is private"}
    first, later = hub.repositories[REPO].commits
    assert later.keys() == {"README.md"}
    told = b"loss                  1.2345  (base 4.8000)"
    assert told not in first["README.md"]
    assert told in later["README.md"]


def test_nothing_worse_is_uploaded_for_a_damaged_checkpoint(hub, sweep):
    sweep.evaluated(0, 1, 2.0)
    sweep.evaluated(1, 1, 1.5)
    (sweep.root / "trials/001/step-000001/adapter_model.safetensors").write_text("altered")
    with sweep.pushing():
        time.sleep(0.5)  # many looks
    assert REPO not in hub.repositories
    told = f"checkpoint.push_to: {REPO} is left as it is: the checkpoint of trial 001, which is the best (1.5000),"
    assert len(sweep.notes) == 1
    assert sweep.notes[0].startswith(f"{told} is damaged or gone. There is an intact one of trial 000 (2.0000); once")
    with sweep.pushing():
        sweep.evaluated(0, 2, 1.4)
    assert losses(hub) == [1.4]


def test_training_goes_on_while_one_is_uploaded_and_the_last_one_is_next(hub, sweep):
    hub.commits.clear()
    with sweep.pushing():
        sweep.evaluated(0, 1, 2.0)
        wait_for(lambda: any("/commit/" in request for request in hub.requests))
        for evaluation, loss in ((2, 1.9), (3, 1.8), (4, 1.7)):
            sweep.evaluated(0, evaluation, loss)
        hub.commits.set()
    assert losses(hub) == [2.0, 1.7]


def test_a_hub_that_refuses_ends_nothing(hub, sweep):
    hub.fault = 403
    with sweep.pushing():
        sweep.evaluated(0, 1, 2.0)
        wait_for(lambda: hub.requests.count("POST /api/repos/create") >= 3)  # it is asked again
        hub.fault = None
    assert losses(hub) == [2.0]
    trouble, done = sweep.notes
    assert trouble.startswith(f"checkpoint.push_to: {REPO} lacks the best adapter (HfHubHTTPError: 403 Forbidden")
    assert trouble.endswith(f"upload it with: python -m sweep export {sweep.root} --push-to {REPO}")
    assert done.startswith("The best adapter so far is at ")
    assert TOKEN not in trouble


@pytest.mark.parametrize("hurried", [True, False])
def test_the_end_does_not_wait_for_ever(hub, sweep, monkeypatch, hurried):
    monkeypatch.setattr(export, "LAST_SECONDS", 0.1)
    hub.commits.clear()
    with sweep.pushing(hurried):
        sweep.evaluated(0, 1, 2.0)
        wait_for(lambda: any("/commit/" in request for request in hub.requests))
    assert losses(hub) == []
    told = ["checkpoint.push_to: not done after 0.1 s"]
    assert [note.partition(";")[0] for note in sweep.notes] == ([] if hurried else told)
    hub.commits.set()


def test_of_a_trial_on_all_rows_nothing_intact_is_tidied_away(tmp_path):
    ledger, place, told = memory_ledger(), Place.at(str(tmp_path)), []
    number = add_trial(ledger)
    ledger.complete(number)
    trial = place.paths.trial(number)
    for step in (1, 2):
        checkpoint.write(trial, step, (), lambda directory: (directory / "adapter_model.safetensors").write_text("w"))
    (trial / "step-000002/manifest.json").write_text("torn")
    runner.tidy(ledger, place, 1, set())
    assert checkpoint.newest(trial, told.append).step == 1
    assert export.export_best(ledger, place, "llama", None, told.append) is None
    assert told[-1] == ("trial 000 lacks its last checkpoint, which is damaged or gone: nothing goes into best/")


def test_of_a_trial_that_was_stopped_before_an_evaluation_the_last_checkpoint_stays(tmp_path):
    """It may be revived. That of one that failed goes."""
    ledger, place = memory_ledger(), Place.at(str(tmp_path))
    stopped, failed = add_trial(ledger), add_trial(ledger)
    for number in (stopped, failed):
        for step in (1, 2):
            checkpoint.write(place.paths.trial(number), step, (), lambda directory: (directory / "w").write_text("w"))
    ledger.stop(stopped, "stopped by hand")
    ledger.fail(failed, "training loss is nan")
    runner.tidy(ledger, place, 1, set())
    assert [path.name for path in place.paths.trial(stopped).glob("step-*")] == ["step-000002"]
    assert list(place.paths.trial(failed).glob("step-*")) == []
    with pytest.raises(export.NotKept):
        export.chosen(place, ledger.entries(), None)  # there is none of an evaluation


def test_where_all_failed_nothing_is_kept_and_that_is_said(sweep):
    for number in range(2):
        sweep.ledger.fail(number, "training loss is nan at step 1")
    place = Place.at(str(sweep.root))
    why = f"failed before an evaluation; why is told by: {re.escape(place.command('status'))}$"
    with pytest.raises(export.NotKept, match=rf"all trials \(2\) {why}"):
        export.chosen(place, sweep.ledger.entries(), None)
    with pytest.raises(export.NotKept, match=f"trial 1 {why}"):
        export.chosen(place, sweep.ledger.entries(), 1)
    add_trial(sweep.ledger)
    with pytest.raises(export.NotKept, match=r"no trial has an intact checkpoint of an evaluation.* here none$"):
        export.chosen(place, sweep.ledger.entries(), None)
    sweep.ledger.report(add_trial(sweep.ledger), 1, 1.5)  # its checkpoint is gone
    for asked in (None, 3):
        with pytest.raises(export.NotKept, match=r"none; train it again: python -m sweep rerun \S+ --trial 3$"):
            export.chosen(place, sweep.ledger.entries(), asked)


def test_a_name_that_the_hub_does_not_allow_is_found_first(tmp_path):
    for name in ("a b", "me/x--y", "me/x/y"):
        told = CliRunner().invoke(cli.app, ["export", str(tmp_path / "nowhere"), "--push-to", name])
        assert told.exit_code == 2
        assert told.stderr == f"--push-to {name}: should be a repository of the Hub, such as you/pricer\n"
