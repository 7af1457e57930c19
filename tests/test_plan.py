"""What a sweep would do: counted where it can be counted, as the sweep itself then has it."""

import random
import re
import statistics
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import name2qmap
from torch.autograd.graph import saved_tensors_hooks
from transformers import Gemma2Config, GPT2Config
from typer.testing import CliRunner, Result

from sweep import cli, opening
from sweep import plan as plans
from sweep.early_stopping import loses, survivors
from sweep.spec import EarlyStopping, dump, load
from tests import sweeps
from tests.tiny import make_tiny_llama, make_tiny_opt
from trainables import data, memory, model
from trainables.config import DataConfig, QLoRAConfig
from trainables.packed import fused
from trainables.packed.adapter import Adapter
from trainables.packed.base import Base, Work
from trainables.protocol import Budget

SPEC = """
name: tiny
model: {inputs}/llama
data: {{train: {inputs}/train.jsonl, validation: {inputs}/validation.jsonl, max_length: 64}}
budget: {{epochs: 2, evaluations: 3}}
search: {{trials: 9, sampler: random}}
space:
  r: {{values: [4, 16]}}
  learning_rate: {{min: 1e-4, max: 1e-2, log: true}}
  quant_type: {{values: [nf4, fp4]}}
  compute_dtype: fp32
tracking: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {"llama": str(make_tiny_llama(directory / "llama")), "opt": str(make_tiny_opt(directory / "opt"))}


def seated(name: str, config: QLoRAConfig) -> tuple[Base, Adapter]:
    """A real base with a real adapter."""
    base = model.base(name, config.quant_type, config.compute_dtype, config.double_quant)
    layers = model.targets(base.layers, name, config.target_modules)
    adapter = Adapter(config, layers, model.device(), base.model.dtype)
    base.seat(adapter)
    return base, adapter


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("key", [("nf4", "bf16", True), ("fp4", "fp32", True), ("nf4", "fp32", False)])
def test_bytes_of_the_base(models, name, key):
    memory.base_bytes.cache_clear()
    told = memory.base_bytes(models[name], *key)
    assert not any(quantisation_map.is_meta for quantisation_map in name2qmap.values())  # it would be the process's
    held, in_16, _ = model.footprint(model.base(models[name], *key))
    assert told == held
    assert 2 * memory.shapes(models[name]).parameters == in_16


@pytest.mark.parametrize("target_modules", ["all-linear", ("q_proj", "v_proj")])
def test_bytes_of_adapter_and_optimizer(models, target_modules):
    config = QLoRAConfig(r=8, compute_dtype="fp32", target_modules=target_modules)
    base, adapter = seated(models["llama"], config)
    try:
        adapter.update(1.0, 1e-3)
        copies = next(iter(base._stacks.values())).copies
        moments = sum(m.nbytes for name, m in adapter.moments().items() if not name.endswith("step"))
        told = memory.estimate(models["llama"], config, rows=2, width=16, labels=4)
        assert told.adapter == adapter.weights.nbytes + copies.nbytes
        assert told.optimizer == adapter.gradient.nbytes + moments
    finally:
        base.dismiss(adapter)


@pytest.mark.parametrize(("name", "logits"), [("llama", 2**27), ("llama", 320), ("opt", 2**27), ("opt", 2 * 320)])
def test_bytes_of_activations(models, inputs, tmp_path, monkeypatch, name, logits):
    """What autograd keeps of a real forward pass, whether logits are taken at once or one or two labels at a time."""
    for module in (fused, memory):
        monkeypatch.setattr(module, "LOGITS", logits)
    config = QLoRAConfig(r=8, compute_dtype="fp32", dropout=0.0, batch_size=5)
    rows = DataConfig(train=f"{inputs}/train.jsonl", validation=0.2, max_length=64)
    train = data.load(data.prepare(rows, models[name], tmp_path).path).train
    count, width, labels = memory.largest_micro_batch(train, config)
    longest = sorted((train[i] for i in range(len(train))), key=lambda row: len(row[0]))[-count:]
    base, adapter = seated(models[name], config)
    work = Work(adapter, longest, None)
    assert (len(longest[-1][0]), work.labels) == (width, labels)
    saved: list[weakref.ref[torch.Tensor]] = []  # of which some go before the backward pass

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            graph = base.losses([work], pad=0)  # noqa: F841 - holds them
    finally:
        base.dismiss(adapter)
    kept = {tensor.untyped_storage()._cdata: tensor for each in saved if (tensor := each()) is not None}
    for weight in base.model.parameters():
        kept.pop(weight.untyped_storage()._cdata, None)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    told = memory.estimate(models[name], config, count, width, labels)
    assert told.activations == pytest.approx(found, rel=0.001)
    recomputed = memory.estimate(
        models[name], config.model_copy(update={"gradient_checkpointing": True}), count, width, labels
    )
    assert recomputed.activations < told.activations


def test_models_of_other_kinds(tmp_path):
    """Attention that is no kernel of torch's; linear layers that are called otherwise."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    gemma = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    gpt2 = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    for config, layers in ((gemma, 14), (gpt2, 8)):
        config.save_pretrained(tmp_path / config.model_type)
        model = str(tmp_path / config.model_type)
        assert len(memory.shapes(model).layers) == layers
        assert memory.estimate(model, QLoRAConfig(r=8), 2, 16, 10).activations > 0


def test_rows_and_how_many_are_cut_off(models, inputs, tmp_path):
    rows = DataConfig(train=f"{inputs}/train.jsonl", validation=0.25, max_length=15)
    prepared = data.prepare(rows, models["llama"], tmp_path)
    lengths = np.diff(data.load(prepared.path).train.offsets)
    found = plans.splits(prepared)
    assert list(found) == ["train", "validation"]
    split = found["train"]
    assert (split.rows, split.tokens, split.median) == (len(lengths), sum(lengths), sorted(lengths)[23])
    assert np.mean(lengths <= split.most) >= 0.95 > np.mean(lengths < split.most)
    assert 0 < split.cut_off == prepared.cut_off["train"] < split.rows
    told, _, few = plans._data(prepared)
    assert few.startswith(f"losses on so few validation rows, {prepared.rows['validation']}, differ mostly by chance")
    assert f"{split.rows:,} rows, {split.tokens:,} tokens; a row has {split.median} (median), 95 % have at most" in told
    assert told.endswith(f"{split.cut_off} of them ({split.cut_off / split.rows:.1%}) cut off")


def test_room_and_what_does_not_fit():
    heaviest, process = 3_000_000_000, 600_000_000
    told = list(plans._room(heaviest, process, "a CPU", 9_400_000_000, 8_900_000_000))
    assert told[0] == "a CPU with 9.4 GB free: 2 of the heaviest trials fit, each in a"
    assert told[1].endswith("with its own base; it takes 0.6 GB besides what is below, the driver and Ray 0.5")
    told = list(plans._room(heaviest, process, "a GPU", heaviest, heaviest))
    assert told[0] == "a GPU with 3.0 GB free: 1 of the heaviest trials fit, each in a"
    assert told[1].endswith("takes 0.6 GB besides what is below")
    for room in (heaviest - 1, -100_000_000):
        (told,) = plans._room(heaviest, process, "a CPU", room + 500_000_000, room)
        assert "the heaviest trials do not fit" in told
    configs = [QLoRAConfig(r=r, batch_size=rows, alpha=r) for rows in (1, 2, 4) for r in (8, 16)]
    looked = []

    def fits(config: QLoRAConfig) -> bool:
        looked.append(config)
        return config.batch_size * config.r <= 16

    (told,) = plans._too_large(configs, fits, ["r", "batch_size"])
    assert told == "3 of 6 drawn from the space do not fit, the lightest of them r16 b2"
    assert len(looked) < len(configs)


def test_bytes_on_disk(inputs, tmp_path):
    (tmp_path / "rows.npy").write_bytes(bytes(2_000_000))
    space = tmp_path / "tiny.yaml"
    space.write_text(SPEC.format(inputs=inputs))
    spec = load(space, ["verify={top: 4}", "checkpoint.keep=2"])
    told = list(plans._disk(spec, 10_000_000, 8_000_000, tmp_path, 0))
    assert told[0] == "80 MB with a trial at a time, 30 more for each beside it:"  # (4 + 3) of 10, 8 and 2
    assert told[1].startswith("checkpoints of 10.0 at most, 4 of ended trials, up to 3")
    assert next(plans._disk(spec, 10_000_000, 8_000_000, tmp_path, 3_000_000)).startswith("83 MB")
    # Of 9 trials 4.3 reach the second evaluation of 3; 12 whole ones follow.
    offline = load(space, ["verify={top: 4}", "tracking.mode=offline"])
    assert plans._tracked(offline, 16) == int(
        (9 + 12) * plans.TRACKED_RUN + (sum(survivors(9, 3, spec.early_stopping)) / 3 + 12) * 16 * plans.TRACKED_STEP
    )
    assert plans._tracked(spec, 16) == 0
    same, other = (1_000_000, 8), (2_500_000, 16)
    assert list(plans._adapters(same, same)) == ["1.00 M parameters with r 8: 4.0 MB"]
    assert list(plans._adapters(same, other))[1] == "2.50 M parameters with r 16: 10.0 MB"


@pytest.mark.parametrize(
    ("trials", "reduction"), [(1, 3.0), (2, 3.0), (6, 3.0), (12, 3.0), (27, 3.0), (9, 2.0), (12, 4.0)]
)
def test_who_reaches_which_evaluation(trials, reduction):
    """As many as ASHA lets through of objectives that are drawn evenly, on average."""
    numbers = random.Random(0)
    through = []
    for _ in range(1000):
        drawn = [numbers.random() for _ in range(trials)]
        through.append(sum(not loses(drawn[k], drawn[:k], reduction) for k in range(trials)))
    rule = EarlyStopping(grace=1, reduction=reduction)
    assert survivors(trials, 2, rule) == [trials, pytest.approx(statistics.mean(through), abs=0.15)]


def test_steps_of_more_rows_than_there_are():
    configs = [QLoRAConfig(batch_size=size) for size in (8, 400)]
    usual, whole = plans._steps(Budget(None, 6, 2), configs, 270)
    assert usual == "6 of 8 rows are 0.18 epochs; validation after 3, 6"
    assert whole == "6 of all 270 rows (batch_size 400 is more) are 6.00 epochs; validation after 3, 6"


@pytest.mark.parametrize(
    ("evaluations", "grace", "ratios", "warned"),
    [(9, 1, (0.0, 0.1), True), (9, 2, (0.0, 0.1), False), (3, 1, (0.0, 0.1), False), (9, 1, (0.0, 0.0), False)],
)
def test_early_stopping_before_anything_is_learned(evaluations, grace, ratios, warned):
    """9 steps, of which the first has a learning rate of 0 with any warm-up."""
    configs = [QLoRAConfig(warmup_ratio=ratio) for ratio in ratios]
    rule = EarlyStopping(grace=grace)
    said = list(plans._too_early(Budget(3, None, evaluations), rule, configs, 24))
    assert [line.startswith("early stopping looks after step 1 for the first time") for line in said] == [True] * warned
    assert list(plans._too_early(Budget(3, None, evaluations), None, configs, 24)) == []


def test_more_cores_than_there_are():
    assert list(plans._too_many(2, 2)) == []
    assert list(plans._too_many(64, 2)) == ["trials ask for 64 cores, and this machine has 2: `run` would refuse here"]


def test_who_reaches_later_evaluations():
    assert survivors(12, 3, None) == [12, 12, 12]
    assert survivors(27, 9, EarlyStopping(grace=1, reduction=3)) == [
        pytest.approx(each, abs=0.01) for each in (27, 10.63, 10.63, *[4.87] * 6)
    ]


def plan(space: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sweep", "plan", str(space), *options],
        cwd=space.parent,
        env=sweeps.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_plan_starts_nothing_and_says_what_the_sweep_then_does(inputs, tmp_path):
    space = tmp_path / "tiny.yaml"
    space.write_text(SPEC.format(inputs=inputs))
    told = plan(space, "--probe", "--set", "cost.per_hour=2")
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    assert re.search(r"probe +a CPU, one trial alone; a process starts in \d+ s", told.stdout)
    seconds = re.findall(
        r"(?:light|heavi)est: ([\d.]+) s a step, ([\d.]+) s an evaluation; 16 steps and 3", told.stdout
    )
    assert len(seconds) == 2
    assert all(float(step) > 0 for step, _ in seconds)
    assert re.search(r"hours +0\.\d+ to 0\.\d+ on this machine, \d+ trials at a time\ncost +", told.stdout)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.yaml"]
    assert "train: 64 rows" in told.stdout
    assert "16 of 8 rows are 2.00 epochs; validation after 5, 11, 16" in told.stdout
    assert "9, proposed by random" in told.stdout
    assert "expected to reach evaluations 1 to 3: 9, 4, 4 (ASHA; 65% of all training)" in told.stdout
    assert re.search(r"base +0\.\d M parameters: \d\.\d MB in 16 bits, \d\.\d in 32", told.stdout)
    assert re.search(r"^ +\d\.\d MB in nf4 with the rest in fp32$", told.stdout, re.MULTILINE)
    assert told.stdout.endswith(f"Run it with: python -m sweep run {space} --set cost.per_hour=2\n")
    assert "lightest" in told.stdout
    assert "heaviest" in told.stdout
    planned = [line.split(maxsplit=1)[1].strip() for line in told.stdout.splitlines() if line.startswith(" 00")]
    done = sweeps.run(space, "--set", "packing.slots=1", "--set", "budget.steps=3")
    assert done.returncode == 0, done.stdout + done.stderr
    tried = [line.split("started: ")[1] for line in done.stdout.splitlines() if "started: " in line]
    assert sorted(tried) == sorted(planned)


def test_layers_that_the_model_does_not_have(inputs, tmp_path):
    space = tmp_path / "tiny.yaml"
    space.write_text(SPEC.format(inputs=inputs))
    told = plan(space, "--set", "space.target_modules=[q_porj]")
    assert told.returncode == 2
    assert "'q_porj' ends the name of no linear layer" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_toy_has_neither_data_nor_memory(space):
    told = plan(space)
    assert told.returncode == 0, told.stderr
    assert "8, proposed by tpe" in told.stdout
    assert "memory" not in told.stdout
    told = plan(space, "--probe")
    assert told.returncode == 2
    assert "--probe: the steps of a toy take no time; leave it out" in told.stderr


def planned(space: Path, *overrides: str) -> Result:
    """In this process."""
    options = [word for override in overrides for word in ("--set", override)]
    return CliRunner().invoke(cli.app, ["plan", str(space), *options])


@pytest.mark.parametrize(
    ("of_a_toy", "overrides", "told"),
    [
        (False, ["budget.steps=90"], "holds a sweep with another spec:\n  budget."),
        (False, ["tracking.mode=online"], "tracking.mode is online, but there is no key"),
        (False, ["checkpoint.push_to=me/x"], "there is no token for the Hub"),
        (True, ["metric=nowhere:f", "objective.direction=minimize"], "metric: nowhere:f cannot be imported"),
    ],
)
def test_what_run_refuses_plan_refuses_in_the_same_words(
    inputs, tmp_path, monkeypatch, capsys, of_a_toy, overrides, told
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(opening, "get_token", lambda: None)
    space = tmp_path / "space.yaml"
    space.write_text(sweeps.TOY if of_a_toy else SPEC.format(inputs=inputs))
    recorded = tmp_path / load(space).directory
    recorded.mkdir(parents=True)
    (recorded / "space.yaml").write_text(dump(load(space)))
    refused = planned(space, *overrides)
    assert cli._outcome(load(space, overrides), "local") == refused.exit_code == 2
    assert refused.stderr == capsys.readouterr().err
    assert told in refused.stderr
    assert refused.stdout == ""


def test_a_value_that_the_metric_does_not_give(inputs, tmp_path, monkeypatch):
    """As `run` says it."""
    monkeypatch.chdir(tmp_path)
    space = tmp_path / "tiny.yaml"
    space.write_text(SPEC.format(inputs=inputs))
    asked = ["metric=search_spaces.pricing:errors", "objective={value: share, direction: maximize, rows: 6}"]
    refused = planned(space, *asked)
    assert refused.exit_code == 2
    assert refused.stderr.endswith(
        "errors: gave mean absolute error, $ or share within 20 %, and nothing called share (see objective.value); it"
        " was asked about validation rows with other rows' answers\n"
    )


def test_trials_that_get_no_gpu_are_planned_for_the_cpu(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda on: "an H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda on: (80 * 10**9, 80 * 10**9))
    space = tmp_path / "tiny.yaml"
    space.write_text(SPEC.format(inputs=inputs))
    assert re.search(r"memory +a CPU with .*\n.*the driver and Ray 0.5\n", planned(space).stdout)
    assert re.search(r"memory +an H100 with 80.5 GB free", planned(space, "resources.gpus=0.5").stdout)


def test_a_sweep_that_is_there_already(space, monkeypatch):
    monkeypatch.chdir(space.parent)
    assert "is this sweep already" not in planned(space).stdout
    recorded = space.parent / "sweeps/toy"
    recorded.mkdir(parents=True)
    (recorded / "space.yaml").write_text(dump(load(space)))
    told = planned(space)
    assert "there    sweeps/toy is this sweep already, and `run` goes on with it" in told.stdout
    assert "python -m sweep status" in told.stdout
