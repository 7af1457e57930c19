"""A first YAML file, which runs as it is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sweep.init import _fitting
from tests import sweeps
from trainables import memory
from trainables.config import QLoRAConfig


def init(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sweep", "init", *words],
        cwd=directory,
        env=sweeps.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_is_written_runs(inputs, tmp_path):
    shutil.copy(inputs / "train.jsonl", tmp_path / "2024.jsonl")
    told = init(tmp_path, str(inputs / "llama"), "2024.jsonl")
    assert told.returncode == 0, told.stderr
    assert "python -m sweep plan space.yaml" in told.stdout
    text = (tmp_path / "space.yaml").read_text()
    assert text.startswith("# python -m sweep plan space.yaml ")
    assert "64 rows, the longest has" in text
    assert "validation: 0.2 # of the rows" in text
    assert "gradient_checkpointing: false" in text
    assert "budget: {epochs: 3, evaluations: 4} # 21 steps" in text
    again = init(tmp_path, str(inputs / "llama"), "2024.jsonl")
    assert again.returncode == 2
    another = f"python -m sweep init {inputs}/llama 2024.jsonl space-2.yaml"
    assert again.stderr == f"space.yaml is there already; name another file: {another}\n"
    assert (tmp_path / "space.yaml").read_text() == text
    quick = ("--set", "budget.steps=9", "--set", "search.trials=1", "--set", "packing.slots=1")
    done = sweeps.run(tmp_path / "space.yaml", *quick)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial 000" in done.stdout
    assert (tmp_path / "sweeps/2024/best/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(("nowhere/model", "train.jsonl"), "model nowhere/model"), (("{inputs}/llama", "none.jsonl"), "none.jsonl")],
)
def test_what_cannot_be_used(inputs, tmp_path, words, message):
    told = init(tmp_path, *(word.format(inputs=inputs) for word in words))
    assert told.returncode == 2
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_fits_is_chosen(inputs):
    model, config = str(inputs / "llama"), QLoRAConfig(r=16, batch_size=8)
    whole = memory.estimate(model, config, 8, 64, 80).total
    cut = memory.estimate(model, config.model_copy(update={"accumulation": 8}), 1, 64, 10).total
    assert _fitting(memory, model, config, 64, 10.0, whole) == config
    half = _fitting(memory, model, config, 64, 10.0, whole - 1)
    assert (half.accumulation, half.gradient_checkpointing) == (2, False)
    least = _fitting(memory, model, config, 64, 10.0, cut - 1)
    assert least.gradient_checkpointing
    assert _fitting(memory, model, config, 64, 10.0, 0).accumulation == 8  # nothing fits: the most sparing
