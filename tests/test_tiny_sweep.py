"""A sweep of real QLoRA trials (tiny random Llama, real bitsandbytes, PEFT, Ray, W&B files), also when it is killed."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch
from optuna.trial import TrialState
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sweep import NoSweep, NotKept, look, opening, report, rerun_spec, runner, scoring, take_home
from sweep.spec import dump, load
from sweep.study import ranking
from tests import hub_server, nodes, sweeps
from tests.ledgers import add_trial, memory_ledger
from tests.wandb_files import final, history, records
from trainables import data

SPEC = """
name: tiny
model: llama
data: {train: train.jsonl, validation: validation.jsonl, max_length: 64}
budget: {steps: 24, evaluations: 4}
search: {trials: 4, seed: 1}
early_stopping: {grace: 1, reduction: 2}
space:
  r: {values: [4, 16]}
  alpha: {times: r, values: [2, 8]}
  learning_rate: {min: 1e-4, max: 1e-2, log: true}
  compute_dtype: {values: [bf16, fp32]}
  quant_type: {values: [nf4, fp4]}
  dropout: 0.1
tracking: {mode: offline}
resources: {concurrency: 1}
"""


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    space = write(tmp_path_factory.mktemp("undisturbed"), inputs)
    done = sweeps.run(space, *scored_on(inputs, "search_spaces.pricing:errors"))
    assert done.returncode == 0, done.stdout + done.stderr
    return space, done, sweeps.entries(space, "tiny")


def scored_on(inputs: Path, metric: str) -> list[str]:
    """The validation rows as test rows, too: the winner's loss on them is known."""
    return ["--set", f"data.test={inputs}/validation.jsonl", "--set", f"metric={metric}"]


def write(directory: Path, inputs: Path) -> Path:
    space = directory / "tiny.yaml"
    text = SPEC.replace("model: llama", f"model: {inputs}/llama")
    space.write_text(text.replace("train: ", f"train: {inputs}/").replace("validation: ", f"validation: {inputs}/"))
    return space


def test_trains_and_says_what(undisturbed):
    space, done, entries = undisturbed
    assert done.stderr == ""
    told = (space.parent / "sweeps/tiny/report.html").read_text()
    assert "Trials learn from 64 rows and are compared on 24 others." in told
    assert len({file.stat().st_mode for file in (space.parent / "sweeps/tiny/best").iterdir()}) == 1
    assert "in 4 bits" in done.stdout
    assert "adapter r=16 on 14 layers" in done.stdout
    assert {entry.state for entry in entries} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert ranking(entries)[0].best[1] < entries[0].losses[0]  # better than the base
    for entry in entries:
        assert entry.cost.tokens > 0
        assert entry.cost.peak_memory > 1e8


def test_the_winner_and_the_base_are_scored(undisturbed):
    space, done, entries = undisturbed
    winner, ledger = ranking(entries)[0], sweeps.ledger(space, "tiny")
    found = scoring.scores(ledger)
    assert (found.trial, found.split, found.rows, found.trouble) == (winner.number, "test", 24, None)
    assert found.loss == pytest.approx(winner.best[1], abs=1e-6)
    assert found.base_loss == pytest.approx(entries[0].losses[0], abs=0.05)  # maybe of another quantisation
    for values in (found.values, found.base_values):
        assert values.keys() == {"mean absolute error, $", "share within 20 %"}
    told = "\n".join(report.conclusion(ledger))
    assert re.search(rf"^loss +{found.loss:.4f}  \(base {found.base_loss:.4f}\)$", told, re.MULTILINE)
    assert told in done.stdout
    assert told in (space.parent / "sweeps/tiny/best/README.md").read_text()


def test_a_metric_that_fails_costs_nothing_else(undisturbed, inputs):
    space, _, entries = undisturbed
    refused = sweeps.run(space, *scored_on(inputs, "mine:fails"))
    assert refused.returncode == 2
    assert "metric: mine:fails cannot be imported (ModuleNotFoundError: No module named 'mine')" in refused.stderr
    before = scoring.scores(sweeps.ledger(space, "tiny"))
    (space.parent / "mine.py").write_text("def fails(*texts):\n    raise KeyError('a key')\n")
    done = sweeps.run(space, *scored_on(inputs, "mine:fails"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "metric mine:fails: raised KeyError: 'a key'; mend it and run the sweep again" in done.stdout
    assert "The best adapter is in" in done.stdout
    assert "Take the winner home with: python -m sweep export sweeps/tiny\n" in done.stdout
    after = scoring.scores(sweeps.ledger(space, "tiny"))
    assert (after.loss, after.base_loss, after.values) == (before.loss, before.base_loss, None)
    assert sweeps.history(sweeps.entries(space, "tiny")) == sweeps.history(entries)


def test_killed_and_run_again(undisturbed, inputs, tmp_path):
    _, _, expected = undisturbed
    space = write(tmp_path, inputs)
    process = sweeps.start(space)
    sweeps.wait_until(lambda: sweeps.reported(space, "tiny") >= 3, process)
    process.kill()
    process.wait()
    assert any(entry.state is TrialState.RUNNING for entry in sweeps.entries(space, "tiny"))
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.history(sweeps.entries(space, "tiny")) == sweeps.history(expected)
    for number in range(4):  # over both attempts, no step is missing or doubled in W&B
        steps = [row["train/global_step"] for row in wandb_rows(space, number) if "train/loss" in row]
        assert steps == list(range(1, len(steps) + 1))


def test_a_process_that_dies_before_the_first_trial(inputs, tmp_path):
    """The one that looks whether the layers are the model's."""
    space = write(tmp_path, inputs)
    process = sweeps.start(space, "--set", "space.target_modules=[q_proj]")

    def checking() -> list[psutil.Process]:
        return nodes.called(psutil.Process(process.pid).children(recursive=True), "^ray::check")

    for _ in range(3):  # the first two are replaced
        sweeps.wait_until(lambda: len(checking()) > 0, process)
        found = checking()[0]
        found.kill()
        found.wait()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert f"{inputs}/llama: the processes that were to look at it before the trials died" in output
    assert "The same command goes on" in output
    assert "Traceback" not in output


def test_best_loads_with_plain_peft_and_gives_the_recorded_loss(undisturbed):
    space, _, _ = undisturbed
    best = space.parent / "sweeps/tiny/best"
    facts = json.loads((best / "sweep.json").read_text())
    scored = subprocess.run(
        [sys.executable, "-m", "benchmarks.plain_peft", str(best.parent)],
        cwd=Path(__file__).parent.parent,
        env=sweeps.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    losses = re.findall(r"recorded ([\d.]+)  plain PEFT ([\d.]+)", scored.stdout)
    assert float(losses[0][0]) == pytest.approx(facts["validation_loss"], abs=1e-6)
    assert len(losses) >= 3
    for recorded, plain in losses:
        assert float(plain) == pytest.approx(float(recorded), abs=1e-3)
    assert (best / "tokenizer.json").is_file()
    card = (best / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"| learning_rate | {facts['config']['learning_rate']} |" in card
    assert re.search(r"^\| data.train, hash of its content \| [0-9a-f]{64} \|$", card, re.MULTILINE)
    assert re.search(r"^\| machine \| \d+ CPU cores? \|$", card, re.MULTILINE)
    asked = YAML(typ="safe").load(card.split("```yaml\n")[1].split("```")[0])
    assert (asked["data"]["train"], asked["budget"]["steps"], asked["search"]["trials"]) == ("train.jsonl", 24, 4)
    assert str(space.parent) not in card
    assert not list(best.glob("training_state*"))
    code = card.split("```python\n")[1].split("```")[0]
    said = subprocess.run([sys.executable, "-c", code], cwd=best.parent, env=sweeps.environment(), capture_output=True)
    assert said.returncode == 0, said.stderr.decode()
    assert said.stdout.startswith("…".encode())


def fragments(space: Path, number: int) -> list[Path]:
    """W&B's files of all attempts of a trial, oldest first."""
    found = space.parent.glob(f"sweeps/tiny/wandb/*run-*/run-*-{number:03d}.wandb")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def wandb_rows(space: Path, number: int) -> list[dict[str, Any]]:
    return [row for fragment in fragments(space, number) for row in history(fragment)]


def test_every_trial_is_a_run_of_the_project(undisturbed):
    space, _, entries = undisturbed
    for entry in entries:
        (fragment,) = fragments(space, entry.number)
        found = records(fragment)
        run = found["run"][0]
        assert run["project"] == "tiny"
        assert run["run_group"] == "tiny"
        assert run["display_name"].startswith(f"{entry.number:03d} r{entry.config.r} ")
        rows = wandb_rows(space, entry.number)
        losses = {row["eval/evaluation"]: row["eval/loss"] for row in rows if "eval/loss" in row}
        assert losses == dict(entry.losses)
        train = [row for row in rows if "train/loss" in row]
        assert [row["train/global_step"] for row in train] == list(range(1, entry.cost.steps + 1))
        assert train[0].keys() >= {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"}
        summary = final(found)
        assert summary["state"] == {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped"}[entry.state]
        assert summary["best_eval_loss"] == entry.best[1]
        assert summary["first_rung_eval_loss"] == entry.losses[1]
        assert summary["budget_share"] == entry.cost.steps / 24
        assert summary.get("stop_reason") == entry.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_length: 64", "max_length: 3"), "max_length"),
        (("train.jsonl", "broken.jsonl"), "broken.jsonl"),
        (("/llama", "/unfinished"), "config.json is missing"),
        (("space:", "space:\n  target_modules: [q_proj, v_porj]"), "'v_porj' ends the name of no linear layer"),
        (
            ("space:", "packing: {slots: 2}\nspace:\n  target_modules: [q_porj]"),
            "'q_porj' ends the name of no linear layer",
        ),
    ],
)
def test_bad_data_or_model_is_refused_and_the_mended_sweep_starts(inputs, tmp_path, change, message):
    """Exit code 2, nothing started, and nothing left behind that the mended spec would stumble over."""
    (inputs / "broken.jsonl").write_text('{"prompt": "1 +", "completion": " 2"}\n{"prompt": "1 + ')
    (inputs / "unfinished").mkdir(exist_ok=True)
    space = write(tmp_path, inputs)
    good = space.read_text()
    space.write_text(good.replace(*change))
    refused = sweeps.run(space)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (space.parent / "sweeps/tiny/space.yaml").exists()
    if "max_length" in message:
        space.write_text(good)
        mended = sweeps.run(space, "--set", "search.trials=1", "--set", "budget.steps=4")
        assert mended.returncode == 0, mended.stdout + mended.stderr


def test_without_a_token_for_the_hub_nothing_starts(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "get_token", lambda: None)
    spec = load(write(tmp_path, inputs), ["checkpoint.push_to=somebody/tiny", f"storage={tmp_path}"])
    with pytest.raises(runner.Refused, match="there is no token for the Hub; run `hf auth login`"):
        runner.run(spec, address="local", listener=Mock(), again="")
    assert not (tmp_path / "tiny").exists()


def test_changed_files_are_named_and_refused(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "inputs")
    space = write(tmp_path, tmp_path / "inputs")
    short = ("--set", "search.trials=1", "--set", "budget.steps=4")
    done = sweeps.run(space, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, weights = tmp_path / "inputs/train.jsonl", tmp_path / "inputs/llama/model.safetensors"
    for file, key in ((rows, "data.train"), (weights, "model")):
        before = file.read_bytes()
        file.write_bytes(before.replace(b' ="', b' =="', 1) if file == rows else before[:-4] + b"\0\0\1\1")
        assert file.read_bytes() != before
        refused = sweeps.run(space, *short)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert f"{key}: the content is not that which " in refused.stderr
        file.write_bytes(before)
    again = sweeps.run(space, *short)
    assert again.returncode == 0, again.stdout + again.stderr


def export(space: Path, directory: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sweep", "export", str(space.parent / "sweeps/tiny"), *options],
        cwd=directory,
        env=sweeps.environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def hub():
    with hub_server.serve() as hub:
        yield hub


def on_hub(url: str) -> dict[str, str]:
    """Variables of a process that has a token for the Hub there."""
    return {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_TOKEN": "hf_none"}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def test_adapters_are_taken_home(undisturbed, hub, tmp_path):
    """The best one, and any other that is kept; a Hub that is out of reach is told of at the end."""
    space, _, entries = undisturbed
    winner, second = ranking(entries)[:2]
    away = on_hub("http://127.0.0.1:9")
    told = export(space, tmp_path, "--push-to", "somebody/tiny", **away)
    assert told.returncode == 1
    assert "--push-to somebody/tiny: " in told.stderr
    assert told.stderr.endswith(f"it with: hf upload somebody/tiny tiny-{winner.number:03d} --private\n")
    assert "Traceback" not in told.stderr
    assert f"tiny-{winner.number:03d} has trial {winner.number}" in told.stdout
    best, home = space.parent / "sweeps/tiny/best", tmp_path / f"tiny-{winner.number:03d}"
    files = {file.name for file in best.iterdir()}
    assert {file.name for file in home.iterdir()} == files
    for name in files - {"README.md", "sweep.json", "adapter_config.json"}:  # which name directories of this machine
        assert (home / name).read_bytes() == (best / name).read_bytes()
    assert f'"tiny-{winner.number:03d}"' in (home / "README.md").read_text()
    for name in files:
        assert str(Path(load(space).model).parent).encode() not in (home / name).read_bytes(), name
    assert json.loads((home / "sweep.json").read_text())["model"] == "PATH/TO/llama"

    told = export(space, tmp_path, "--trial", str(second.number), "--push-to", "somebody/tiny", **on_hub(hub.url))
    assert told.returncode == 0, told.stderr
    assert told.stdout.endswith(f"Uploaded to {hub.url}/somebody/tiny, which is private\n")
    assert hub.repositories["somebody/tiny"].files == contents(tmp_path / f"tiny-{second.number:03d}")
    facts = json.loads((tmp_path / f"tiny-{second.number:03d}/sweep.json").read_text())
    assert facts["validation_loss"] == second.best[1]
    assert "Number 2 of 4 trials" in (tmp_path / f"tiny-{second.number:03d}/README.md").read_text()


def test_tokens_that_are_gone_are_made_again_of_the_same_rows(undisturbed, tmp_path, monkeypatch):
    space, _, _ = undisturbed
    sweep = tmp_path / "sweep"
    shutil.copytree(space.parent / "sweeps/tiny", sweep, ignore=shutil.ignore_patterns("tokens"))
    monkeypatch.chdir(tmp_path)
    found = look(str(sweep))
    home = take_home(found)
    assert (home.directory / "tokenizer.json").read_bytes() == (sweep / "best/tokenizer.json").read_bytes()
    assert contents(sweep / "tokens") == contents(space.parent / "sweeps/tiny/tokens")
    shutil.rmtree(sweep / "tokens")
    shutil.rmtree(home.directory)
    rows = found.spec.data.model_copy(update={"train": found.spec.data.validation})
    with pytest.raises(NotKept, match="its tokens are gone, and model or data are not what they were; restore those"):
        take_home(replace(found, spec=found.spec.model_copy(update={"data": rows})))


def test_a_merged_model_is_taken_home(undisturbed, hub, tmp_path):
    """It needs transformers alone, its weights are the base's and the adapter's term, and its loss is what was told."""
    space, _, entries = undisturbed
    winner = ranking(entries)[0]
    told = export(space, tmp_path, "--merge", "--push-to", "somebody/merged", **on_hub(hub.url))
    assert told.returncode == 0, told.stderr
    home = tmp_path / f"tiny-{winner.number:03d}-merged"
    pushed = hub.repositories["somebody/merged"].files
    assert pushed == contents(home)
    assert not [name for name, content in pushed.items() if str(Path(load(space).model).parent).encode() in content]
    facts = json.loads((home / "sweep.json").read_text())
    assert f"{winner.best[1]:.4f} with the base in 4 bits, {facts['validation_loss_merged']:.4f} merged" in told.stdout

    merged = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(load(space).model, dtype=torch.float32)
    adapter = load_file(space.parent / "sweeps/tiny/best/adapter_model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
    expected = base.get_submodule(layer).weight + winner.config.alpha / winner.config.r * b @ a
    assert torch.allclose(merged.get_submodule(layer).weight, expected, rtol=2**-7, atol=1e-3)

    rows = data.load(next((space.parent / "sweeps/tiny/tokens").iterdir())).validation
    total, labels = 0.0, 0
    for i in range(len(rows)):
        ids, supervised = (torch.from_numpy(array.copy()) for array in rows[i])
        with torch.no_grad():
            logits = merged(input_ids=ids[None].long()).logits[0, :-1]
        total += float(cross_entropy(logits[supervised[1:]], ids[1:][supervised[1:]].long(), reduction="sum"))
        labels += int(supervised[1:].sum())
    assert total / labels == pytest.approx(facts["validation_loss_merged"], abs=0.02)  # computed in bf16


def test_trained_on_all_rows(undisturbed, hub, tmp_path):
    """For as many passes as the best checkpoint had made, without a validation loss, and taken home as it ended.

    The Hub has it, and in the end the card that tells of the test rows.
    """
    space, _, entries = undisturbed
    winner = ranking(entries)[0]
    directory = space.parent / "sweeps/tiny"
    asked = [sys.executable, "-m", "sweep", "rerun", str(directory), "--trial", str(winner.number), "--all-data"]
    asked += ["--set", "checkpoint.push_to=somebody/all", "--set", "metric=search_spaces.pricing:errors"]
    away = sweeps.environment(**on_hub(hub.url))
    done = subprocess.run(asked, cwd=tmp_path, env=away, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    name, steps = f"tiny-all-{winner.number:03d}", round(winner.best[0] * 6 * 88 / 64)
    told = "the validation rows were trained on, too, so there is no validation loss"
    assert (
        f"All 88 rows of training and validation are trained on, for {steps} steps: no validation loss" in done.stdout
    )
    assert f"\ntrial 000: {told}\n" in done.stdout
    assert "evaluation 1" not in done.stdout

    [entry] = sweeps.entries(space, name)
    assert (entry.state, dict(entry.losses), entry.cost.steps) == (TrialState.COMPLETE, {}, steps)
    assert entry.config == winner.config
    sweep = directory.with_name(name)
    facts = json.loads((sweep / f"trials/000/step-{steps:06d}/state.json").read_text())
    assert (facts["step"], facts["total_steps"], facts["training_rows"]) == (steps, steps, 88)
    adapter = (sweep / f"trials/000/step-{steps:06d}/adapter_model.safetensors").read_bytes()
    assert (sweep / "best/adapter_model.safetensors").read_bytes() == adapter
    assert json.loads((sweep / "best/sweep.json").read_text())["validation_loss"] is None
    found = scoring.scores(sweeps.ledger(space, name))  # those of the validation, which this sweep has as test rows
    assert (found.trial, found.step, found.split) == (0, steps, "test")
    card = (sweep / "best/README.md").read_text()
    assert f"as it was after its last optimiser step, {steps}." in card
    assert card.count(told) == 1
    assert f"loss                   {found.loss:.4f}  (base" in card
    first, later = hub.repositories["somebody/all"].commits
    assert first["adapter_model.safetensors"] == adapter
    assert later.keys() == {"README.md"}
    for card, scored in ((first["README.md"], False), (later["README.md"], True)):
        assert told.encode() in card
        assert (f"loss                   {found.loss:.4f}".encode() in card) == scored
    [fragment] = (sweep / "wandb").glob("*run-*/run-*.wandb")
    assert [row["train/global_step"] for row in history(fragment)] == list(range(1, steps + 1))
    assert final(records(fragment))["budget_share"] == 1.0

    sent = [sys.executable, "-m", "sweep", "export", str(sweep)]
    home = subprocess.run(sent, cwd=tmp_path, env=sweeps.environment(), capture_output=True, text=True, timeout=120)
    assert f"{name}-000 has trial 0 as it was after step {steps}: {told}" in home.stdout, home.stderr
    assert (tmp_path / f"{name}-000/adapter_model.safetensors").read_bytes() == adapter
    assert told in (sweep / "report.html").read_text()


def test_what_answers_are_worth_is_searched_for(inputs, tmp_path):
    """A name that the metric does not give is refused, before there is a sweep."""
    space = write(tmp_path, inputs)
    metric = "metric: search_spaces.pricing:errors\nobjective: {value: share, direction: maximize, rows: 6}\n"
    space.write_text(space.read_text() + metric)
    quick = ["--set", "search.trials=2", "--set", "budget={steps: 9, evaluations: 3}"]
    done = sweeps.run(space, *quick)
    assert done.returncode == 2, done.stdout + done.stderr
    told = " ".join(done.stderr.split())
    assert (
        "errors: gave mean absolute error, $ or share within 20 %, and nothing called share (see objective.value);"
        " it was asked about validation rows with other rows' answers"
    ) in told
    directory = space.parent / "sweeps/tiny"
    assert not (directory / "space.yaml").exists()

    done = sweeps.run(
        space, *quick, "--set", "objective.value=mean absolute error, $", "--set", "objective.direction=minimize"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    entries = sweeps.entries(space, "tiny")
    winner = ranking(entries)[0]
    assert all(0 <= each < 10 for entry in entries for each in entry.objectives.values())  # answers are 1 to 9
    facts = json.loads((directory / "best/sweep.json").read_text())
    assert (facts["trial"], facts["objective"]) == (winner.number, winner.best[1])
    card = (directory / "best/README.md").read_text()
    assert "The best of 2 trials by mean absolute error, $ (lower is better)" in card
    (fragment,) = directory.glob(f"wandb/*run-*/run-*-{winner.number:03d}.wandb")
    assert final(records(fragment))["best_mean_absolute_error"] == winner.best[1]


def test_all_rows_are_trained_on_without_the_objective(undisturbed, tmp_path):
    found = look(str(undisturbed[0].parent / "sweeps/tiny"))
    recorded = YAML(typ="safe").load(found.place.paths.spec)
    recorded["data"].pop("test")
    recorded |= {"metric": "search_spaces.pricing:errors", "objective": {"direction": "minimize"}}
    place = replace(found.place, url=str(tmp_path))
    place.paths.spec.write_text(json.dumps(recorded))
    found = replace(found, place=place, spec=load(place.paths.spec))
    spec = rerun_spec(found, 0, ["budget.steps=6"], all_data=True)
    assert (spec.objective, spec.completions, spec.metric) == (None, 0, None)
    with_test = ["budget.steps=6", f"data.test={recorded['data']['validation']}"]
    assert rerun_spec(found, 0, with_test, all_data=True).metric == recorded["metric"]


def test_how_long_all_rows_are_trained_on(undisturbed):
    space, _, entries = undisturbed
    found = look(str(space.parent / "sweeps/tiny"))
    asked = rerun_spec(found, 0, ["budget.epochs=2"], all_data=True)
    assert (asked.budget.epochs, asked.budget.steps, asked.budget.evaluations) == (2.0, None, 0)
    in_epochs = found.spec.budget.model_copy(update={"steps": None, "epochs": 3.0})
    spec = rerun_spec(replace(found, spec=found.spec.model_copy(update={"budget": in_epochs})), 0, all_data=True)
    assert spec.budget.epochs == 3.0 * entries[0].best[0] / 4
    begun = space.parent / "sweeps/tiny-all-000"
    begun.mkdir()
    (begun / "space.yaml").write_text(dump(spec))
    assert rerun_spec(found, 0, all_data=True).budget == spec.budget  # it goes on as it began
    shutil.rmtree(begun)
    with pytest.raises(NoSweep, match="--all-data leaves no rows for evaluations"):
        rerun_spec(found, 0, ["budget.evaluations=2"], all_data=True)
    elsewhere = replace(found, place=replace(found.place, url="/nowhere/tiny"))
    with pytest.raises(NoSweep, match=r"the tokens of /nowhere/tiny are not on this machine; say how long: --set"):
        rerun_spec(elsewhere, 0, all_data=True)
    added = memory_ledger()
    add_trial(added)
    with pytest.raises(NoSweep, match="trial 0 has no validation loss that says how long to train"):
        rerun_spec(replace(found, entries=added.entries()), 0, all_data=True)


def test_what_cannot_be_taken_home(undisturbed, tmp_path):
    space, _, entries = undisturbed
    told = export(space, tmp_path, "--trial", "99")
    assert told.returncode == 2
    assert "there is no trial 99" in told.stderr
    last = ranking(entries)[-1]
    told = export(space, tmp_path, "--trial", str(last.number))  # `checkpoint.keep` is 3
    assert told.returncode == 2
    assert f"trial {last.number} no longer has an intact checkpoint of an evaluation" in told.stderr
    assert told.stderr.endswith(
        f"train it again: python -m sweep rerun {space.parent}/sweeps/tiny --trial {last.number}\n"
    )
    (tmp_path / f"tiny-{ranking(entries)[0].number:03d}").symlink_to("somewhere")
    told = export(space, tmp_path)
    assert told.returncode == 2
    assert "is there already; move it away" in told.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"tiny-{ranking(entries)[0].number:03d}"]
