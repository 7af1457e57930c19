"""Trials that share a base: each computes what it computes alone, and what TRL computes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import get_peft_model_state_dict

from tests.test_qlora_sft import CONFIG, finish, losses, steps, train_with_trl
from tests.test_qlora_sft import tiny as tiny  # a fixture
from trainables import data, model, qlora_sft
from trainables.config import QLoRAConfig
from trainables.packed import layers
from trainables.packed.pack import Base, Slot, micro_batches
from trainables.protocol import Job

AT_ONCE = 256
"""Tokens of a micro-batch: a step of the packs below takes several."""


def config(**changed: object) -> QLoRAConfig:
    return CONFIG.model_copy(update={"dropout": 0.0, "learning_rate": 1e-3, **changed})


MIXED = {
    "ranks": [{"r": 4}, {"r": 16}, {"r": 7}],
    "alphas": [{"alpha": 1.0}, {"alpha": 64.0}],
    "batch sizes": [{"batch_size": 1}, {"batch_size": 8}, {"batch_size": 3}],
    "dropouts": [{"dropout": 0.1}, {"dropout": 0.0}, {"dropout": 0.5}],
    "rslora": [{"rslora": True}, {"rslora": False}],
    "layers": [{"target_modules": ("q_proj", "down_proj")}, {}, {"target_modules": ("v_proj",)}],
    "schedules": [{"schedule": "constant"}, {"schedule": "linear", "warmup_ratio": 0.5, "weight_decay": 0.1}],
    "clipping": [{"max_grad_norm": 0.01}, {"max_grad_norm": 100.0}],
    "seeds": [{"seed": 5}, {"seed": 6}, {"seed": 7}, {"seed": 8}],
}


class Pack:
    """Slots on the base of a job, trained to the same number of steps."""

    def __init__(self, job: Job, configs: Sequence[QLoRAConfig], count: int) -> None:
        tokens = data.load(Path(job.tokens))
        first = configs[0]
        self.rows = tokens.train
        base = model.base(job.model, first.quant_type, first.compute_dtype, first.double_quant)
        self.lending = Base(base, tokens.pad_token_id).lent()
        self.base = self.lending.__enter__()
        self.slots = [Slot(each, count, self.base) for each in configs]
        self.losses: list[list[float]] = [[] for _ in configs]
        self.norms: list[list[float]] = [[] for _ in configs]

    def train(self, count: int) -> "Pack":
        for _ in range(count):
            shares = self.base.train(self.slots, self.rows, AT_ONCE)
            for i, (slot, share) in enumerate(zip(self.slots, shares, strict=True)):
                self.losses[i].append(share.loss / share.labels)
                self.norms[i].append(slot.update())
        return self

    def gradients(self) -> list[torch.Tensor]:
        self.base.train(self.slots, self.rows, AT_ONCE)
        return [slot.weights.grad.clone() for slot in self.slots]


@pytest.fixture
def pack(tiny):
    """Makes packs whose bases are given back at the end."""
    made = []

    def make(configs: Sequence[QLoRAConfig], count: int = 8) -> Pack:
        while made:
            made.pop().lending.__exit__(None, None, None)
        made.append(Pack(tiny, configs, count))
        return made[-1]

    yield make
    made.pop().lending.__exit__(None, None, None)


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_a_slot_computes_what_it_computes_alone(pack, mixed):
    configs = [config(**changed) for changed in mixed]
    together = pack(configs).train(8)
    for i, each in enumerate(configs):
        alone = pack([each]).train(8)
        assert together.losses[i] == pytest.approx(alone.losses[0], abs=1e-5)
        assert together.norms[i] == pytest.approx(alone.norms[0], rel=1e-3)
        assert together.slots[i].step == 8


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_the_gradients_of_the_first_step(pack, mixed):
    """B is zero before the first step and would leave A without a gradient, so it is not."""
    configs = [config(**changed) for changed in mixed]

    def gradients(configs: Sequence[QLoRAConfig]) -> list[torch.Tensor]:
        made = pack(configs)
        for slot in made.slots:
            for name, weight in slot.named.items():
                if "lora_B" in name:
                    weight.fill_(0.01)
            slot.copy.copy_(slot.weights.detach())
        return made.gradients()

    together = gradients(configs)
    for i, each in enumerate(configs):
        [alone] = gradients([each])
        assert torch.linalg.vector_norm(together[i] - alone) <= 1e-5 * torch.linalg.vector_norm(alone)


@pytest.mark.parametrize(("compute_dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_a_pack_and_a_trial_of_its_own(tiny, pack, compute_dtype, tolerance):
    """From the same initial adapter, which is PEFT's to the last bit."""
    configs = [config(compute_dtype=compute_dtype, seed=seed, batch_size=4) for seed in (1, 2, 3)]
    job = Job(tiny.model, tiny.tokens, steps(50, 1))
    expected, initial = [], []
    for each in configs:
        trial = qlora_sft.start(each, job, None)
        initial.append({k: v.clone() for k, v in get_peft_model_state_dict(trial.adapted).items()})
        expected.append(losses(finish(trial)[0]))
        trial.close()
    made = pack(configs, 50)
    for slot, weights in zip(made.slots, initial, strict=True):
        assert {f"base_model.model.{name}": view for name, view in slot.named.items()}.keys() == weights.keys()
        assert all(torch.equal(view, weights[f"base_model.model.{name}"]) for name, view in slot.named.items())
    made.train(50)
    for ours, theirs in zip(made.losses, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)
        assert ours[-1] < ours[0] - 0.1


def test_a_pack_and_trl(tiny, pack, tmp_path):
    configs = [config(seed=seed, batch_size=4, accumulation=2, learning_rate=5e-3) for seed in (1, 2)]
    made = pack(configs, 50)
    initial = [{f"base_model.model.{n}": view.clone() for n, view in slot.named.items()} for slot in made.slots]
    made.train(50)
    pack([configs[0]])  # gives the base back
    theirs = train_with_trl(configs[1], tiny, initial[1], 50, tmp_path)
    assert made.losses[1] == pytest.approx([logged["loss"] for logged in theirs], abs=1e-4)


@pytest.mark.parametrize("other", [{"seed": 99}, {"learning_rate": 0.5}, {"alpha": 1e4, "rslora": True}])
def test_what_another_slot_does_changes_no_bit(pack, other):
    """Rows of the other slot are of the same lengths, so that the shapes are unchanged."""
    mine = config(seed=1, batch_size=40)  # all rows, in either order
    expected = pack([mine, config(seed=2, batch_size=40)]).train(6)
    disturbed = pack([mine, config(**{"seed": 2, "batch_size": 40, **other})]).train(6)
    assert disturbed.losses[0] == expected.losses[0]
    assert torch.equal(disturbed.slots[0].weights, expected.slots[0].weights)
    assert disturbed.losses[1] != expected.losses[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_slot(pack, value):
    configs = [config(seed=seed, batch_size=40) for seed in (1, 2, 3)]  # all rows: shapes are the same in each step
    expected = pack(configs).train(3)
    poisoned = pack(configs)
    poisoned.slots[1].copy[5] = value
    before = poisoned.slots[1].weights.detach().clone()
    poisoned.train(3)
    assert not np.isfinite(poisoned.losses[1][0])
    assert poisoned.slots[1].step == 0
    assert torch.equal(poisoned.slots[1].weights, before)
    for i in (0, 2):
        assert poisoned.losses[i] == expected.losses[i]
        assert torch.equal(poisoned.slots[i].weights, expected.slots[i].weights)


def test_a_slot_that_waits_is_not_touched(pack):
    made = pack([config(seed=1), config(seed=2)])
    waiting = made.slots[1].weights.detach().clone()
    made.base.train(made.slots[:1], made.rows, AT_ONCE)
    made.slots[0].update()
    assert torch.equal(made.slots[1].weights, waiting)
    assert not made.slots[1].weights.grad.any()


def test_each_layer_is_dequantised_once_a_pass(pack, monkeypatch):
    dequantised = []
    monkeypatch.setattr(
        layers, "dequantize_4bit", lambda *packed: dequantised.append(packed) or dequantize_4bit(*packed)
    )
    made = pack([config(seed=seed, batch_size=2) for seed in range(8)])
    made.base.train(made.slots, made.rows, 10**6)
    # 14 layers forward and backward; that the first three, whose input is the embeddings, need no gradient of
    # their input spares them the second time
    assert len(dequantised) == 14 + 11
    dequantised.clear()
    made.base.score(made.slots, [made.rows[0], made.rows[1]])
    assert len(dequantised) == 14


def test_validation_loss_of_many_slots(tiny, pack):
    configs = [config(seed=seed, dropout=0.5, batch_size=4) for seed in (1, 2)]
    validation = data.load(Path(tiny.tokens)).validation
    rows = [validation[i] for i in range(len(validation))]
    together = pack(configs).train(4)
    shares = together.base.score(together.slots, rows)
    for i, each in enumerate(configs):
        alone = pack([each]).train(4)
        [share] = alone.base.score(alone.slots, rows)
        assert share.labels == shares[i].labels
        assert shares[i].loss / shares[i].labels == pytest.approx(share.loss / share.labels, abs=1e-5)


def test_the_base_is_given_back(tiny, pack):
    before = model.base(tiny.model, "nf4", "fp32", True)
    modules = dict(before.named_modules())
    made = pack([config()])
    assert dict(before.named_modules()) != modules
    made.train(1)
    made.lending.__exit__(None, None, None)
    assert dict(before.named_modules()) == modules
    made.lending = made.base.lent()
    made.lending.__enter__()


def test_micro_batches_waste_little():
    rows = [(0, 10), (0, 64), (1, 12), (1, 60), (2, 11), (2, 200)]
    batches = micro_batches(rows, 128)
    assert sorted(place for batch in batches for place in batch) == list(range(6))
    assert batches == [[0, 2, 4], [1, 3], [5]]  # by length, then by slot
