"""A sweep of real QLoRA trials (tiny random Llama, real bitsandbytes, PEFT, Ray, W&B files), also when it is killed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.trial import TrialState

from sweep.study import ranking
from tests import sweeps
from tests.wandb_files import final, history, records

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
    done = sweeps.run(space)
    assert done.returncode == 0, done.stdout + done.stderr
    return space, done, sweeps.entries(space, "tiny")


def write(directory: Path, inputs: Path) -> Path:
    space = directory / "tiny.yaml"
    text = SPEC.replace("model: llama", f"model: {inputs}/llama")
    space.write_text(text.replace("train: ", f"train: {inputs}/").replace("validation: ", f"validation: {inputs}/"))
    return space


def test_trains_and_says_what(undisturbed):
    _, done, entries = undisturbed
    assert done.stderr == ""
    assert "in 4 bits" in done.stdout
    assert "adapter r=16 on 14 layers" in done.stdout
    assert {entry.state for entry in entries} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert ranking(entries)[0].best[1] < entries[0].losses[0]  # better than the base
    for entry in entries:
        assert entry.cost.tokens > 0
        assert entry.cost.peak_memory > 1e8


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
        return [p for p in psutil.Process(process.pid).children(recursive=True) if "check" in p.name()]

    for _ in range(3):  # the first two are replaced
        sweeps.wait_until(lambda: len(checking()) > 0, process)
        found = checking()[0]
        found.kill()
        found.wait()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert f"{inputs}/llama: three processes that were to look at it before the trials died" in output
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
