"""Trials that share a base: each computes what it computes alone, and what PEFT and TRL compute."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from tests.test_qlora_sft import CONFIG, curve, finish, job_on, losses, steps, stock_base, train_with_trl
from tests.test_qlora_sft import tiny as tiny  # a fixture
from tests.tiny import make_tiny_opt, make_tiny_rows
from trainables import checkpoint, model, qlora_sft
from trainables.config import QLoRAConfig
from trainables.packed import base as bases
from trainables.packed import layers
from trainables.protocol import Job, OutOfMemory, Step
from trainables.qlora_sft import QLoRATrial, turn


def config(**changed: object) -> QLoRAConfig:
    return CONFIG.model_copy(update={"dropout": 0.0, "learning_rate": 1e-3, **changed})


MIXED = {
    "alike": [{"seed": 5}, {"seed": 6}, {"seed": 7}, {"seed": 8}],
    "ranks": [{"r": 4}, {"r": 16}, {"r": 7}, {"r": 4, "seed": 9}],
    "alphas": [{"alpha": 1.0}, {"alpha": 64.0}],
    "batch sizes": [{"batch_size": 1}, {"batch_size": 8}, {"batch_size": 3}, {"batch_size": 8}],
    "accumulation": [{"batch_size": 8, "accumulation": 4}, {"batch_size": 8}, {"batch_size": 2}],
    "dropouts": [{"dropout": 0.1}, {"dropout": 0.0}, {"dropout": 0.5}],
    "rslora": [{"rslora": True}, {"rslora": False}],
    "layers": [{"target_modules": ("q_proj", "down_proj")}, {}, {"target_modules": ("v_proj",)}],
    "schedules": [{"schedule": "constant"}, {"schedule": "linear", "warmup_ratio": 0.5, "weight_decay": 0.1}],
    "clipping": [{"max_grad_norm": 0.01}, {"max_grad_norm": 100.0}],
    "memory": [{"gradient_checkpointing": True, "dropout": 0.1}, {}],
}


class Pack:
    """Trials that go through their base together."""

    def __init__(self, configs: Sequence[QLoRAConfig], job: Job) -> None:
        self.trials = [QLoRATrial(each, job, None) for each in configs]
        self.steps: list[list[Step]] = [[] for _ in configs]

    def train(self, turns: int = 10**9) -> "Pack":
        for _ in range(turns):
            going = [trial for trial in self.trials if not trial.over]
            if not going:
                break
            turn(going)
            for trial, done in zip(self.trials, self.steps, strict=True):
                done += trial.news().steps
        return self

    def close(self) -> None:
        for trial in self.trials:
            trial.close()


@pytest.fixture
def pack(tiny):
    """Makes packs that are closed at the end."""
    made = []

    def make(configs: Sequence[QLoRAConfig], job: Job = tiny) -> Pack:
        made.append(Pack(configs, job))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_a_trial_computes_what_it_computes_alone(pack, mixed):
    configs = [config(**changed) for changed in mixed]
    together = pack(configs).train()
    for i, each in enumerate(configs):
        alone = pack([each]).train()
        assert losses(together.steps[i]) == pytest.approx(losses(alone.steps[0]), abs=1e-5)
        assert [s.grad_norm for s in together.steps[i]] == pytest.approx(
            [s.grad_norm for s in alone.steps[0]], rel=1e-3
        )
        evaluations, expected = together.trials[i].evaluations, alone.trials[0].evaluations
        assert losses(evaluations) == pytest.approx(losses(expected), abs=1e-5)
        assert [(e.evaluation, e.step, e.tokens) for e in evaluations] == [
            (e.evaluation, e.step, e.tokens) for e in expected
        ]


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_the_gradients_of_the_first_step(pack, mixed, monkeypatch):
    """B is zero before the first step and would leave A without a gradient, so it is not."""
    found = {}
    monkeypatch.setattr(QLoRATrial, "learn", lambda trial, *told: found.update({trial: trial.adapter.gradient.clone()}))

    def gradients(configs: Sequence[QLoRAConfig]) -> list[torch.Tensor]:
        made = pack(configs)
        for trial in made.trials:
            for name, weight in trial.adapter.named.items():
                if "lora_B" in name:
                    weight.fill_(0.01)
            trial.base.refresh(trial.adapter)
        turn(made.trials)
        return [found[trial] for trial in made.trials]

    configs = [config(**changed) for changed in mixed]
    for each, together in zip(configs, gradients(configs), strict=True):
        [alone] = gradients([each])
        assert torch.linalg.vector_norm(together - alone) <= 1e-5 * torch.linalg.vector_norm(alone)


def test_fifty_steps_in_bf16(pack, tiny):
    job = replace(tiny, budget=steps(50, 1))
    configs = [config(compute_dtype="bf16", seed=seed, batch_size=4, r=r) for seed, r in ((1, 8), (2, 8), (3, 16))]
    together = pack(configs, job).train()
    for i, each in enumerate(configs):
        alone = pack([each], job).train()
        assert losses(together.steps[i]) == pytest.approx(losses(alone.steps[0]), abs=0.02)
        assert together.steps[i][-1].loss < together.steps[i][0].loss - 0.1


@pytest.mark.parametrize("target_modules", ["all-linear", ("q_proj", "down_proj")])
def test_initial_weights_are_those_of_peft(pack, tiny, target_modules):
    [trial] = pack([config(r=16, seed=11, target_modules=target_modules)]).trials
    torch.manual_seed(11)
    wanted = LoraConfig(r=16, target_modules=target_modules, task_type="CAUSAL_LM")
    theirs = get_peft_model_state_dict(get_peft_model(stock_base(tiny), wanted))
    ours = {f"base_model.model.{name}": weight for name, weight in trial.adapter.named.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight.to(ours[name])) for name, weight in theirs.items())


def test_a_pack_and_trl(tiny, pack, tmp_path):
    job = replace(tiny, budget=steps(50, 1))
    configs = [config(seed=seed, batch_size=4, accumulation=2, learning_rate=5e-3, r=r) for seed, r in ((1, 8), (2, 4))]
    made = pack(configs, job)
    initial = [
        {f"base_model.model.{name}": weight.clone() for name, weight in trial.adapter.named.items()}
        for trial in made.trials
    ]
    made.train()
    for each, weights, ours in zip(configs, initial, made.steps, strict=True):
        theirs = train_with_trl(each, job, weights, 50, tmp_path)
        assert losses(ours) == pytest.approx([logged["loss"] for logged in theirs], abs=1e-4)


@pytest.mark.parametrize("other", [{"seed": 99}, {"learning_rate": 0.5}, {"alpha": 1e4, "rslora": True}, {"r": 4}])
def test_what_another_trial_does_changes_no_bit(pack, other):
    """Rows of the other one are of the same lengths, so that the shapes are unchanged."""
    mine = config(seed=1, batch_size=40)  # all rows, in either order
    before = {"seed": 2, "batch_size": 40}
    expected = pack([mine, config(**before)]).train(6)
    disturbed = pack([mine, config(**(before | {"seed": 3} | other))]).train(6)
    assert losses(disturbed.steps[0]) == losses(expected.steps[0])
    assert torch.equal(disturbed.trials[0].adapter.weights, expected.trials[0].adapter.weights)
    assert losses(disturbed.steps[1]) != losses(expected.steps[1])


@pytest.mark.parametrize(("value", "accumulation"), [(math.nan, 1), (math.inf, 1), (math.nan, 4)])
def test_what_is_not_finite_stays_with_its_trial(pack, value, accumulation):
    # all rows: shapes are the same in each step
    configs = [config(seed=seed, batch_size=40, accumulation=accumulation) for seed in (1, 2, 3)]
    expected = pack(configs).train(3)
    poisoned = pack(configs)
    sick = poisoned.trials[1]
    sick.adapter.weights[5] = value
    sick.base.refresh(sick.adapter)
    before = sick.adapter.weights.clone()
    for _ in range(3):
        turn(poisoned.trials)
    assert sick.failure is not None
    assert sick.step == 0
    assert torch.equal(sick.adapter.weights.nan_to_num(), before.nan_to_num())
    for i in (0, 2):
        assert losses(poisoned.trials[i].news().steps) == losses(expected.steps[i])
        assert torch.equal(poisoned.trials[i].adapter.weights, expected.trials[i].adapter.weights)


def test_a_trial_that_waits_is_not_touched(pack):
    waiting, going = pack([config(seed=1), config(seed=2)]).trials
    before = waiting.adapter.weights.clone()
    turn([going])
    assert torch.equal(waiting.adapter.weights, before)
    assert not waiting.adapter.gradient.any()


def test_trials_share_the_seconds_of_a_step_by_their_tokens(pack):
    made = pack([config(seed=1, batch_size=40), config(seed=2, batch_size=40), config(seed=3, batch_size=8)])
    began = time.perf_counter()
    made.train(1)
    took = time.perf_counter() - began
    one, other, small = (done[0] for done in made.steps)
    assert one.seconds == other.seconds > small.seconds > 0
    assert small.seconds / one.seconds == pytest.approx(small.tokens / one.tokens)
    assert one.seconds + other.seconds + small.seconds <= took


def test_a_trial_is_replaced_while_others_go_on(pack):
    """What is left is moved in memory, and its numbers are not."""
    configs = [config(seed=seed, dropout=0.1, r=r) for seed, r in ((1, 8), (2, 8), (3, 8), (4, 4))]
    made = pack(configs[:3]).train(3)
    made.trials.pop(1).close()
    made.steps.pop(1)
    made.trials += pack([configs[3]]).trials
    made.steps.append([])
    made.train()
    for done, each in zip(made.steps, (configs[0], configs[2], configs[3]), strict=True):
        assert losses(done) == pytest.approx(losses(pack([each]).train().steps[0]), abs=1e-5)


def test_the_next_one_takes_the_place_of_the_one_that_left(pack, tiny):
    """Without a copy of the others, which would take as much memory once more; what half of them left is given back."""
    made = pack([config(seed=seed) for seed in range(4)])
    base = made.trials[0].base

    def held() -> list[int]:
        return [trial.adapter.gradient.data_ptr() for trial in made.trials]

    before = held()
    made.trials.pop(1).close()
    made.trials.insert(1, QLoRATrial(config(seed=9), tiny, None))
    assert held() == before
    [stack] = base._stacks.values()
    assert len(stack.gradients) == 4
    made.trials.pop(0).close()
    assert len(stack.gradients) == 4
    made.trials.pop(0).close()
    [stack] = base._stacks.values()
    assert len(stack.gradients) == 2
    assert held() == [gradient.data_ptr() for gradient in stack.gradients]


def test_from_a_pack_to_alone_and_back(pack, tiny, tmp_path):
    configs = [config(seed=seed, dropout=0.1, r=r) for seed, r in ((1, 8), (2, 8), (3, 4))]
    never_stopped = pack(configs).train()
    stopped = pack(configs).train(3)
    for i, trial in enumerate(stopped.trials):
        written = checkpoint.write(tmp_path / str(i), trial.step, trial.evaluations, trial.save)
        alone = QLoRATrial(trial.config, tiny, written)
        rest, _ = finish(alone)
        alone.close()
        expected = losses(never_stopped.steps[i])
        assert losses(rest) == pytest.approx(expected[3:], abs=1e-5)
        assert losses(alone.evaluations) == pytest.approx(losses(never_stopped.trials[i].evaluations), abs=1e-5)
    alone = QLoRATrial(configs[0], tiny, None)
    while alone.step < 2:
        alone.advance(0.0)
    written = checkpoint.write(tmp_path / "alone", alone.step, alone.evaluations, alone.save)
    alone.close()
    joined = pack(configs[1:])
    joined.trials.append(QLoRATrial(configs[0], tiny, written))
    joined.steps.append([])
    joined.train()
    assert losses(joined.steps[2]) == pytest.approx(losses(never_stopped.steps[0])[2:], abs=1e-5)


def test_each_layer_is_dequantised_once_a_pass(pack, monkeypatch):
    dequantised = []
    monkeypatch.setattr(
        layers, "dequantize_4bit", lambda *packed: dequantised.append(packed) or dequantize_4bit(*packed)
    )
    trials = pack([config(seed=seed, batch_size=2) for seed in range(8)]).trials
    turn(trials)
    # 14 layers forward and backward; that the first three, whose input is the embeddings, need no gradient of
    # their input spares them the second time
    assert len(dequantised) == 14 + 11
    while trials[0].evaluation_due is None:
        turn(trials)
    dequantised.clear()
    turn(trials)
    assert len(dequantised) == 14


def test_many_tokens_go_through_the_base_in_parts(pack, monkeypatch):
    configs = [config(seed=seed, dropout=0.1, batch_size=size) for seed, size in ((1, 2), (2, 8), (3, 4), (4, 4))]
    at_once = pack(configs).train(3)
    passes = []
    count = bases.Base.losses
    monkeypatch.setattr(
        bases.Base, "losses", lambda self, works, pad: passes.append(len(works)) or count(self, works, pad)
    )
    monkeypatch.setitem(qlora_sft.LEARNT_AT_ONCE, "cpu", 128)
    in_parts = pack(configs).train(3)
    assert len(passes) > 3
    assert sum(passes) == 3 * len(configs)
    for ours, theirs in zip(in_parts.steps, at_once.steps, strict=True):
        assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)


def row(length: int) -> bases.Row:
    return np.zeros(length, np.int32), np.ones(length, np.bool_)


@pytest.mark.parametrize(
    ("lengths", "at_once", "for_free", "expected"),
    [
        ([[64]] * 4, 256, 0, [[0, 1, 2, 3]]),
        ([[64]] * 5, 256, 0, [[0, 1, 2, 3], [4]]),
        ([[64], [64], [1024], [64]], 16384, 0, [[0, 1, 3], [2]]),  # not 4,096 tokens of which 1,216 are real
        ([[64], [64], [1024], [64]], 16384, 4096, [[0, 1, 3, 2]]),
        ([[100], [60], [80], [300, 20]], 16384, 0, [[1, 2, 0], [3]]),  # 20 % of padding, then 72 %
        ([[500], [5]], 100, 0, [[1], [0]]),
    ],
)
def test_works_of_like_length_go_together(lengths, at_once, for_free, expected):
    works = {i: bases.Work(None, [row(length) for length in each], None) for i, each in enumerate(lengths)}
    assert qlora_sft.in_groups(works, at_once, for_free) == expected


def test_rows_of_like_length_come_together_in_a_step(pack):
    """Each with the dropout that it has anyway; a step of one micro-batch stays as it is drawn."""
    whole, parts = pack([config(batch_size=40), config(batch_size=40, accumulation=4)]).trials
    ids = [whole.train[int(number)][0].tolist() for number in whole.next_rows()]
    (one,) = whole.micro_batches(whole.next_rows())
    assert [row_ids.tolist() for row_ids, _ in one.rows] == ids
    several = parts.micro_batches(parts.next_rows())
    together = [
        (row_ids.tolist(), seed) for work in several for (row_ids, _), seed in zip(work.rows, work.seeds, strict=True)
    ]
    assert [len(row_ids) for row_ids, _ in together] == sorted(map(len, ids))
    assert sorted(together) == sorted(zip(ids, one.seeds, strict=True))


def test_the_norm_of_a_long_gradient_has_no_error_of_a_long_sum(pack):
    (trial,) = pack([config()]).trials
    trial.adapter.gradient = 1 + 1e-3 * torch.randn(5_000_001, generator=torch.Generator().manual_seed(0))
    exact = float(trial.adapter.gradient.double().norm())
    assert float(trial.adapter.norm()) == pytest.approx(exact, rel=1e-7)
    trial.adapter.gradient[-1] = math.inf
    assert float(trial.adapter.norm()) == math.inf


def test_no_room_for_all_leaves_each_where_it_stood(pack, tiny, monkeypatch):
    configs = [config(seed=seed, dropout=0.1) for seed in (1, 2)]
    expected = [curve(each, tiny) for each in configs]
    label_losses = bases.label_losses
    room = 16

    def scarce(*given):
        found = label_losses(*given)
        if len(given[1].input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(bases, "label_losses", scarce)
    trials = pack(configs).trials
    turn(trials)
    room = 8
    with pytest.raises(OutOfMemory, match="CUDA out of memory"):
        turn(trials)
    assert [trial.step for trial in trials] == [1, 1]
    for trial, (training, _) in zip(trials, expected, strict=True):
        turn([trial])
        assert losses(trial.news().steps) == pytest.approx(training[:2], abs=1e-5)


def test_a_step_that_fails_takes_none_back(pack, tiny, monkeypatch):
    """What was taken before is told, and the one that failed stands where it stood."""
    configs = [config(seed=seed, dropout=0.1) for seed in (1, 2, 3)]
    expected = [curve(each, tiny)[0] for each in configs]
    trials = pack(configs).trials
    turn(trials)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as context:
        context.setattr(trials[1].adapter.optimizer, "step", full)
        with pytest.raises(OutOfMemory, match="CUDA out of memory"):
            turn(trials)
    assert [trial.step for trial in trials] == [2, 1, 1]
    told = [losses(trial.news().steps) for trial in trials]
    assert [len(each) for each in told] == [2, 1, 1]
    turn(trials)
    for trial, before, training in zip(trials, told, expected, strict=True):
        assert before + losses(trial.news().steps) == pytest.approx(training[: trial.step], abs=1e-5)


def test_a_step_makes_no_room_for_moments(pack):
    """They are there before the first one, or memory might be lacking in the middle of it."""
    [trial] = pack([config()]).trials
    before = {
        key: value.data_ptr() for key, value in trial.adapter.optimizer.state[trial.adapter.trained["adapter"]].items()
    }
    turn([trial])
    after = trial.adapter.optimizer.state[trial.adapter.trained["adapter"]]
    assert {key: value.data_ptr() for key, value in after.items()} == before
    assert after["step"] == 1
    assert after["exp_avg"].any()


def test_dropout_is_a_fair_coin_for_every_row_layer_and_place():
    seeds = torch.from_numpy(np.random.SeedSequence(3).generate_state(64).astype(np.int64))
    rates = torch.tensor([0.0, 0.05, 0.5, 0.9] * 16, dtype=torch.float64)
    dropout = layers.Dropout.of(seeds, rates, 3, 100)
    inputs = layers.input_hashes(576, torch.device("cpu"))
    ones = torch.ones(64, 100, 576)
    kept = torch.stack([dropout.mask(layer, inputs, torch.float32)(ones) for layer in range(3)])
    assert kept.shape == (3, 64, 100, 576)
    assert kept[:, 0::4].all()
    for i, rate in ((1, 0.05), (2, 0.5), (3, 0.9)):
        mine = kept[:, i::4].double()
        spread = math.sqrt(rate * (1 - rate))
        for over in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # all; by layer, row, position, input
            means = mine.mean(over)
            draws = mine.numel() / means.numel()
            assert (means - (1 - rate)).abs().max() < 5 * spread / math.sqrt(draws)
        for one, other in ((mine[0], mine[1]), (mine[:, 0], mine[:, 1]), (mine[..., 1:], mine[..., :-1])):
            correlation = ((one - 1 + rate) * (other - 1 + rate)).mean() / spread**2
            assert abs(correlation) < 5 / math.sqrt(one.numel())
    again = layers.Dropout.of(seeds[5:6], rates[5:6], 3, 40)  # in another micro-batch
    assert torch.equal(again.mask(2, inputs, torch.float32)(ones[:1, :40])[0], kept[2, 5, :40])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_a_gpu_is_that_on_a_cpu(dtype):
    seeds = torch.from_numpy(np.random.SeedSequence(5).generate_state(8).astype(np.int64))
    rates = torch.tensor([0.0, 0.05, 0.5, 1.0] * 2, dtype=torch.float64)
    x = torch.randn(8, 33, 576).to(dtype)
    dropped = []
    for device in ("cpu", "cuda"):
        dropout = layers.Dropout.of(seeds.to(device), rates.to(device), 3, 33)
        inputs = layers.input_hashes(576, torch.device(device))
        dropped.append(dropout.mask(2, inputs, dtype)(x.to(device)).cpu())
    assert torch.equal(*dropped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_wait_for_no_device(pack):
    """A backward pass through all layers is handed to the device without a look at what comes of it."""
    trials = pack([config(seed=seed, dropout=0.1) for seed in (1, 2)]).trials
    turn(trials)
    works = [trial.micro_batches(trial.next_rows())[0] for trial in trials]
    before = trials[0].base.losses(works, trials[0].pad)  # what is made once is made
    torch.stack([each.sum() for each in before]).sum().backward()
    losses_of = torch.stack([each.sum() for each in trials[0].base.losses(works, trials[0].pad)]).sum()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses_of.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_bases_side_by_side(pack, tiny):
    """Those of nf4 and of fp4 in one process."""
    configs = [config(quant_type=quant_type) for quant_type in ("nf4", "fp4")]
    trials = [pack([each]).trials[0] for each in configs]
    assert trials[0].base is not trials[1].base
    while not trials[0].over:
        for trial in trials:
            turn([trial])
    for trial, each in zip(trials, configs, strict=True):
        assert losses(trial.evaluations) == curve(each, tiny)[1]
    assert model.base(tiny.model, "nf4", "fp32", True) is trials[0].base
    assert pack([configs[0]]).trials[0].base is trials[0].base


def test_a_model_that_makes_one_of_rows_and_width_and_has_dropout_of_its_own(tmp_path):
    """OPT: its layers behind attention get (rows * width, hidden)."""
    opt = make_tiny_opt(tmp_path / "opt")
    job = job_on(str(opt), make_tiny_rows(tmp_path, train=40, validation=24), tmp_path)
    configs = [config(seed=1, learning_rate=1e-2), config(seed=2, r=4, dropout=0.1, gradient_checkpointing=True)]
    made = Pack(configs, job).train()
    made.close()
    for done, each in zip(made.steps, configs, strict=True):
        training, _ = curve(each, job)
        assert losses(done) == pytest.approx(training, abs=1e-4)
    assert losses(made.steps[0])[-1] < losses(made.steps[0])[0] - 0.1


def test_an_input_that_cannot_be_told_apart_is_refused(pack):
    [trial] = pack([config()]).trials
    turn([trial])
    layer = next(module for module in trial.base.model.modules() if isinstance(module, layers.PackedLinear))
    rows, width = trial.base.plan.shape
    with pytest.raises(ValueError, match=r"target_modules: model\.layers\.0\.self_attn\.q_proj gets an input of shape"):
        layer(torch.zeros(rows * width - 1, layer.replaced.in_features))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 16 / math.sqrt(8))])
def test_what_dropout_takes_is_made_up_for_while_training_alone(pack, rslora, scale):
    trials = pack([config(dropout=0.2, rslora=rslora), config(rslora=rslora)]).trials
    turn(trials)
    [part] = trials[0].base.plan.parts
    assert part.scales.flatten().tolist() == pytest.approx([scale / 0.8, scale])
    while trials[0].evaluation_due is None:
        turn(trials)
    turn(trials)
    [part] = trials[0].base.plan.parts
    assert part.scales.flatten().tolist() == pytest.approx([scale, scale])
    assert part.dropout is None


@pytest.mark.parametrize(
    ("dtype", "products"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_layer_by_hand(dtype, products, rate):
    """Two adapters, three rows each, and a row in front that belongs to neither; against autograd on the formula."""
    device = model.device()
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    linear = Linear4bit(64, 32, bias=True, compute_dtype=dtype, quant_type="nf4")
    linear.load_state_dict({"weight": random(32, 64).to(dtype), "bias": random(32).to(dtype)})
    linear = linear.to(device)
    plan = layers.Plan(torch.zeros((), device=device, requires_grad=True))
    layer = layers.PackedLinear(linear, "layer", 0, plan, products)
    a, b = random(2, 4, 64).to(products), random(2, 32, 4).to(products)
    pair = layers.LowRank(a, b, torch.zeros(2, 4, 64, device=device), torch.zeros(2, 32, 4, device=device))
    rates = torch.full((6,), rate, dtype=torch.float64, device=device)
    dropout = layers.Dropout.of(torch.arange(6, device=device), rates, 1, 5) if rate else None
    scales = torch.tensor([2.0, 0.5], device=device) / (1 - rate)
    plan.parts = [layers.Part(slice(1, 7), slice(0, 2), {0: pair}, scales[:, None, None], dropout)]
    plan.shape = (7, 5)
    x = random(7, 5, 64).to(dtype).requires_grad_()
    weights = random(7, 5, 32)
    y = layer(x)
    (y.float() * weights).sum().backward()

    ones = torch.ones(6, 5, 64, device=device)
    kept = dropout.mask(0, layer.inputs, torch.float32)(ones) if dropout else ones
    x2, a2, b2 = (each.detach().float().requires_grad_() for each in (x, a, b))
    base = torch.nn.functional.linear(x2, layer.weight().float(), linear.bias.float())
    dropped = (x2[1:] * kept).reshape(2, 15, 64)
    term = (dropped @ a2.mT @ b2.mT * scales[:, None, None]).reshape(6, 5, 32)
    rounded = base.to(dtype).float()  # before the terms come to it
    expected = torch.cat([rounded[:1], rounded[1:] + term]).to(dtype)
    (torch.cat([base[:1], base[1:] + term]) * weights).sum().backward()
    if products is torch.float32:
        assert torch.allclose(y.float(), expected.float(), rtol=1e-5 if dtype is products else 2**-7, atol=1e-4)
        assert dtype is products or (y == expected).double().mean() > 0.99
    off = 1e-5 if dtype is torch.float32 else 1e-2
    pairs = ((y, expected), (pair.a_gradient, a2.grad), (pair.b_gradient, b2.grad), (x.grad, x2.grad))
    for ours, theirs in pairs:
        assert torch.linalg.vector_norm(ours.float() - theirs) <= off * torch.linalg.vector_norm(theirs.float())
