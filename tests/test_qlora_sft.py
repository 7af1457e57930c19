"""One trial: the mathematics of TRL's SFTTrainer, in slices, resumable at any step to the last bit."""

import errno
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    get_scheduler,
)

from tests.tiny import make_tiny_llama, make_tiny_rows
from trainables import checkpoint, data, model, qlora_sft
from trainables.checkpoint import Checkpoint
from trainables.config import DataConfig, QLoRAConfig
from trainables.packed import base, fused
from trainables.protocol import Budget, Evaluation, Job, OutOfMemory, Slice, Step

SMOLLM2 = Path(__file__).parents[1] / "models/smollm2-135m"
CONFIG = QLoRAConfig(r=8, alpha=16, learning_rate=5e-3, batch_size=8, compute_dtype="fp32", seed=3)


def steps(count: int, evaluations: int = 2) -> Budget:
    return Budget(epochs=None, steps=count, evaluations=evaluations)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Job:
    directory = tmp_path_factory.mktemp("tiny")
    llama = make_tiny_llama(directory / "llama")
    return job_on(str(llama), make_tiny_rows(directory, train=40, validation=24), directory)


def job_on(base: str, files: tuple[Path, Path], directory: Path) -> Job:
    train, validation = files
    settings = DataConfig(train=str(train), validation=str(validation), max_length=64)
    return Job(base, str(data.prepare(settings, base, directory / "tokens").path), steps(8))


def run(config: QLoRAConfig, job: Job, seconds: float = 0.0) -> tuple[list[Step], list[Evaluation]]:
    """A whole trial."""
    trial = qlora_sft.start(config, job, None)
    done, _ = finish(trial, seconds)
    trial.close()
    return done, list(trial.evaluations)


def finish(trial, seconds: float = 0.0) -> tuple[list[Step], Slice]:
    done = []
    while True:
        slice_ = trial.advance(seconds)
        done += slice_.steps
        if slice_.done:
            return done, slice_


def losses(done: list[Step] | list[Evaluation]) -> list[float]:
    return [each.loss for each in done]


def curve(config: QLoRAConfig, job: Job, found: Checkpoint | None = None) -> tuple[list[float], list[float]]:
    """Training and validation losses of what is left of a trial."""
    trial = qlora_sft.start(config, job, found)
    done, _ = finish(trial)
    trial.close()
    return losses(done), losses(trial.evaluations)


def curves(arguments: list) -> list[tuple[list[float], list[float]]]:
    return [curve(*each) for each in arguments]


def in_fresh_process(function, argument):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


# The mathematics


def stock_base(job: Job):
    """The quantised base as its users load it, but for the path that trainables.model explains."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    base = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, quantization_config=quantisation, device_map={"": model.device()}
    )
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return base


def train_with_trl(
    config: QLoRAConfig, job: Job, weights: dict[str, torch.Tensor], count: int, directory: Path
) -> list:
    """What SFTTrainer.train() logs for the same rows in the same order, from the same adapter weights."""
    from trl import SFTConfig, SFTTrainer

    tokens = data.load(Path(job.tokens))
    order = [qlora_sft.rows_of_step(step, len(tokens.train), config.batch_size, config.seed) for step in range(count)]
    rows = [tokens.train[int(row)] for row in np.concatenate(order)]
    dataset = [{"input_ids": ids.tolist(), "labels": np.where(known, ids, -100).tolist()} for ids, known in rows]
    from datasets import Dataset
    from transformers import AutoTokenizer

    adapted = get_peft_model(
        stock_base(job),
        LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    settings = SFTConfig(
        output_dir=str(directory),
        per_device_train_batch_size=config.batch_size // config.accumulation,
        gradient_accumulation_steps=config.accumulation,
        max_steps=count,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=False,
        activation_checkpointing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=model.device().type == "cpu",
    )
    trainer = SFTTrainer(
        adapted,
        settings,
        train_dataset=Dataset.from_list(dataset),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # SFTTrainer has cast them to bf16
    set_peft_model_state_dict(adapted, weights)
    trainer.train()
    return [logged for logged in trainer.state.log_history if "loss" in logged]


def assert_trl_agrees(config: QLoRAConfig, job: Job, directory: Path) -> None:
    trial = qlora_sft.start(config, job, None)
    weights = {f"base_model.model.{name}": weight.clone() for name, weight in trial.adapter.named.items()}
    ours, _ = finish(trial)
    trial.close()
    theirs = train_with_trl(config, job, weights, trial.total_steps, directory)
    assert losses(ours) == pytest.approx([logged["loss"] for logged in theirs], abs=1e-4)
    assert [s.learning_rate for s in ours] == pytest.approx([logged["learning_rate"] for logged in theirs], rel=1e-4)
    assert [s.grad_norm for s in ours] == pytest.approx([logged["grad_norm"] for logged in theirs], rel=1e-4)
    assert max(s.grad_norm for s in ours) > config.max_grad_norm > min(s.grad_norm for s in ours)
    assert losses(ours)[-1] < losses(ours)[0] - 0.5


def test_trl_agrees(tiny, tmp_path):
    config = CONFIG.model_copy(
        update={"dropout": 0.0, "accumulation": 2, "warmup_ratio": 0.12, "weight_decay": 0.1, "max_grad_norm": 0.8}
    )
    assert_trl_agrees(config, replace(tiny, budget=steps(20)), tmp_path)


@pytest.mark.smollm2
@pytest.mark.timeout(900)
def test_trl_agrees_on_smollm2(tmp_path):
    files = make_tiny_rows(tmp_path, train=40, validation=8)
    job = replace(job_on(str(SMOLLM2), files, tmp_path), budget=steps(8, 1))
    config = CONFIG.model_copy(
        update={
            "dropout": 0.0,
            "accumulation": 2,
            "warmup_ratio": 0.12,
            "batch_size": 8,  # 12 labels a micro-batch: for 3, MKL sums over the vocabulary with an error of 2e-4
            "learning_rate": 2e-4,
            "max_grad_norm": 5.0,
        }
    )
    assert_trl_agrees(config, job, tmp_path)


def test_a_saved_adapter_scores_the_same_with_plain_peft(tiny, tmp_path):
    trial = qlora_sft.start(CONFIG, tiny, None)
    finish(trial)
    trial.save(tmp_path)
    trial.close()
    reloaded = PeftModel.from_pretrained(stock_base(tiny), str(tmp_path)).eval()
    total, labels = 0.0, 0
    rows = data.load(Path(tiny.tokens)).validation
    for i in range(len(rows)):
        ids, known = (torch.from_numpy(array.copy()).to(model.device()) for array in rows[i])
        with torch.no_grad():
            logits = reloaded(input_ids=ids[None].long()).logits[0, :-1]
        total += F.cross_entropy(logits[known[1:]], ids[1:][known[1:]].long(), reduction="sum").item()
        labels += int(known[1:].sum())
    assert trial.evaluations[-1].loss == pytest.approx(total / labels, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"accumulation": 4}, 1e-5),
        ({"target_modules": ("q_proj", "v_proj"), "gradient_checkpointing": True}, 1e-6),
    ],
)
def test_what_saves_memory_changes_no_loss(tiny, change, tolerance):
    plain = CONFIG.model_copy(update={"dropout": 0.1, "target_modules": change.get("target_modules", "all-linear")})
    saving = plain.model_copy(update=change)
    assert saving.gradient_checkpointing != plain.gradient_checkpointing or saving.accumulation != plain.accumulation
    for ours, theirs in zip(run(plain, tiny), run(saving, tiny), strict=True):
        assert losses(ours) == pytest.approx(losses(theirs), abs=tolerance)


def test_gradient_checkpointing_draws_the_same_dropout(tiny):
    config = CONFIG.model_copy(update={"dropout": 0.3})
    again = config.model_copy(update={"gradient_checkpointing": True})
    assert losses(run(config, tiny)[0]) == pytest.approx(losses(run(again, tiny)[0]), abs=1e-6)
    assert losses(run(config, tiny)[0]) != pytest.approx(losses(run(CONFIG, tiny)[0]), abs=1e-3)


def test_loss_in_chunks(tiny, monkeypatch):
    whole = run(CONFIG, tiny)
    monkeypatch.setattr(fused, "FP32_LOGITS", 320 * 5)
    for ours, theirs in zip(whole, run(CONFIG, tiny), strict=True):
        assert losses(ours) == pytest.approx(losses(theirs), abs=1e-6)


def heads_rows(config: QLoRAConfig, job: Job, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[list[float]]]:
    """Labels that the output head gets at a time while a trial trains, and its losses."""
    rows: list[int] = []
    linear = F.linear
    vocabulary = model.base(job.model, config.quant_type, config.compute_dtype, config.double_quant).vocabulary

    def counting(x, weight, bias=None):
        if len(weight) == vocabulary:
            rows.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    with monkeypatch.context() as context:
        context.setattr(F, "linear", counting)
        return rows, [losses(each) for each in run(config, job)]


@pytest.mark.parametrize("change", [{}, {"gradient_checkpointing": True, "dropout": 0.1}, {"compute_dtype": "bf16"}])
def test_logits_of_few_labels_at_a_time(tiny, monkeypatch, change):
    config = CONFIG.model_copy(update=change)
    whole, expected = heads_rows(config, tiny, monkeypatch)
    monkeypatch.setattr(fused, "LOGITS", 320 * 3)
    parts, found = heads_rows(config, tiny, monkeypatch)
    assert max(whole) > 3 >= max(parts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=0.02 if config.compute_dtype == "bf16" else 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        *(LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig, GemmaConfig, Gemma2Config, Phi3Config, Olmo2Config),
        *(OPTConfig, GPT2Config, GPTNeoXConfig, CohereConfig, GraniteConfig),
    ],
)
def test_logits_in_parts_are_those_of_the_model(config):
    """With whatever it does to them: they are capped (Gemma 2), divided (Granite), multiplied (Cohere)."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    own = config(**sizes, vocab_size=320, pad_token_id=0)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(own, dtype=torch.float32).eval()
    rows = [
        (np.arange(1, 12, dtype=np.int32), np.ones(11, np.bool_)),
        (np.arange(5, dtype=np.int32), np.ones(5, np.bool_)),
    ]
    batch = base.collate(rows, 0, torch.device("cpu"))
    theirs.requires_grad_(False)
    embedded: list[torch.Tensor] = []
    theirs.get_input_embeddings().register_forward_hook(
        lambda _, ids, found: embedded.append(found.detach().requires_grad_()) or embedded[-1]
    )
    decoder = base.decoder_of(theirs)
    assert decoder is not None
    weights = torch.linspace(1, 2, len(batch.labels))
    values, gradients = [], []
    for parts in (False, True):
        found = base.label_losses_in_parts(theirs, decoder, batch, 4) if parts else base.label_losses(theirs, batch)
        values.append(found.detach())
        gradients.append(torch.autograd.grad((found * weights).sum(), embedded[-1])[0])
    assert torch.allclose(*values, atol=1e-6)
    assert torch.linalg.vector_norm(gradients[1] - gradients[0]) <= 1e-5 * torch.linalg.vector_norm(gradients[0])
    assert "forward" not in vars(decoder)


def test_a_model_whose_logits_are_made_of_something_else_has_them_at_once(tiny, monkeypatch):
    theirs = AutoModelForCausalLM.from_config(OPTConfig(vocab_size=320, hidden_size=64, num_attention_heads=4))
    for other in (lambda self: self.model, lambda self: self):  # of which it asks a part, or that is no decoder
        monkeypatch.setattr(PreTrainedModel, "get_decoder", other)
        assert base.decoder_of(theirs) is None
    monkeypatch.setattr(fused, "LOGITS", 320 * 3)
    monkeypatch.setattr(base, "decoder_of", lambda of: None)
    monkeypatch.setattr(model, "_warm", {})
    rows, _ = heads_rows(CONFIG, tiny, monkeypatch)
    assert max(rows) > 3


def test_a_batch_by_hand():
    rows = [
        (np.array([5, 6, 7], np.int32), np.array([True, False, True])),
        (np.array([8, 9, 10, 11], np.int32), np.array([False, True, True, False])),
    ]
    batch = base.collate(rows, pad=0, device=torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch.positions.tolist() == [1, 4, 5]
    assert batch.labels.tolist() == [7, 9, 10]


@pytest.mark.parametrize(("schedule", "name"), [("cosine",) * 2, ("linear",) * 2, ("constant", "constant_with_warmup")])
@pytest.mark.parametrize("warmup_steps", [0, 3, 10])
def test_schedules_are_those_of_transformers(schedule, name, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    theirs = get_scheduler(name, optimizer, warmup_steps, 10)
    ours = qlora_sft.learning_rates(schedule, 2e-4, warmup_steps, 10)
    for step in range(10):
        assert ours(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("ratio", "warmup_steps"), [(0.0, 0), (0.01, 1), (0.25, 2), (0.3, 3), (1.0, 8)])
def test_warmup_is_rounded_up(tiny, ratio, warmup_steps):
    config = CONFIG.model_copy(update={"warmup_ratio": ratio, "schedule": "constant"})
    rates = [step.learning_rate for step in run(config, tiny)[0]]
    assert rates == pytest.approx([5e-3 * min(1.0, step / warmup_steps) if warmup_steps else 5e-3 for step in range(8)])


def test_order_of_the_data():
    epoch = [qlora_sft.rows_of_step(step, rows=21, batch_size=8, seed=1) for step in range(6)]
    assert [len(rows) for rows in epoch] == [8, 8, 5, 8, 8, 5]
    assert sorted(np.concatenate(epoch[:3])) == sorted(np.concatenate(epoch[3:])) == list(range(21))
    assert np.concatenate(epoch[:3]).tolist() != np.concatenate(epoch[3:]).tolist()
    assert epoch[0].tolist() == qlora_sft.rows_of_step(0, rows=21, batch_size=8, seed=1).tolist()
    assert epoch[0].tolist() != qlora_sft.rows_of_step(0, rows=21, batch_size=8, seed=2).tolist()


def test_evaluation_batches_waste_little():
    lengths = np.random.default_rng(0).integers(5, 120, 300)
    lengths[17] = 900
    batches = data.micro_batches(lengths, tokens=512)
    assert sorted(np.concatenate(batches)) == list(range(300))
    padded = [len(batch) * max(lengths[batch]) for batch in batches]
    assert max(padded[:-1]) <= 512
    assert batches[-1].tolist() == [17]
    assert sum(padded) < 1.1 * sum(lengths)


# Slices


def test_slices_change_nothing(tiny, monkeypatch):
    job = replace(tiny, score_base=True)
    whole = run(CONFIG, job, seconds=1000.0)
    monkeypatch.setattr(qlora_sft, "EVALUATION_TOKENS", {"cpu": 100, "cuda": 100})
    cut = run(CONFIG, job, seconds=0.0)
    assert losses(whole[0]) == losses(cut[0])
    assert losses(whole[1]) == pytest.approx(losses(cut[1]), abs=1e-6)
    assert [(e.evaluation, e.step, e.tokens) for e in whole[1]] == [(e.evaluation, e.step, e.tokens) for e in cut[1]]
    assert [(e.evaluation, e.step) for e in whole[1]] == [(0, 0), (1, 4), (2, 8)]


def test_a_slice_is_a_step_or_a_part_of_an_evaluation(tiny, monkeypatch):
    monkeypatch.setattr(qlora_sft, "EVALUATION_TOKENS", {"cpu": 150, "cuda": 150})
    trial = qlora_sft.start(CONFIG, replace(tiny, budget=steps(2)), None)
    assert trial.total_steps == 2
    slices = [trial.advance(0.0)]
    while not slices[-1].done:
        slices.append(trial.advance(0.0))
    assert sum(len(s.steps) for s in slices) == trial.step == 2
    assert max(len(s.steps) for s in slices) == 1
    assert len([s for s in slices if not s.steps and not s.evaluation]) >= 4
    assert [s.evaluation for s in slices if s.evaluation] == list(trial.evaluations)
    assert slices[-1].evaluation == trial.evaluations[-1]
    assert all(s.peak_memory > 0 and s.failure is None for s in slices)
    assert trial.advance(0.0) == replace(
        slices[-1], steps=(), evaluation=None, peak_memory=trial.advance(0).peak_memory
    )
    trial.close()


def test_tokens_are_counted_without_padding(tiny):
    tokens = data.load(Path(tiny.tokens))
    done, evaluations = run(CONFIG, replace(tiny, budget=steps(5, 1)))
    assert sum(step.tokens for step in done) == len(tokens.train.input_ids)  # 40 rows, 8 a step
    assert evaluations[-1].tokens == len(tokens.validation.input_ids)


# The same bits


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_resumed_at_any_step_is_never_stopped(tiny, tmp_path, compute_dtype):
    config = CONFIG.model_copy(update={"compute_dtype": compute_dtype, "dropout": 0.1, "accumulation": 2})
    job = replace(tiny, score_base=True)
    never_stopped = curve(config, job)
    trial = qlora_sft.start(config, job, None)
    stopped = []
    for _ in range(1000):
        slice_ = trial.advance(0.0)
        if slice_.steps:
            checkpoint.write(tmp_path / str(trial.step), trial.step, trial.evaluations, trial.save)
            stopped += losses(slice_.steps)
        if slice_.done:
            break
    trial.close()
    assert stopped == never_stopped[0]
    for step in range(1, 9):
        rest, evaluations = curve(config, job, checkpoint.newest(tmp_path / str(step)))
        assert stopped[:step] + rest == never_stopped[0]
        assert evaluations == never_stopped[1]


def test_a_fresh_process_gives_the_bits_of_a_warm_one(tiny, tmp_path, monkeypatch):
    loaded = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(model, "_warm", {})
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **options: loaded.append(args) or load(*args, **options)
    )
    first = CONFIG.model_copy(update={"compute_dtype": "bf16", "r": 16, "seed": 1, "gradient_checkpointing": True})
    second = CONFIG.model_copy(update={"compute_dtype": "bf16", "target_modules": ("q_proj", "down_proj"), "seed": 2})
    a, b = curve(first, tiny), curve(second, tiny)
    assert curve(first, tiny) == a
    assert len(loaded) == 1
    assert a[0] != b[0]
    trial = qlora_sft.start(first, tiny, None)
    while trial.step < 3:
        trial.advance(0.0)
    found = checkpoint.write(tmp_path, trial.step, trial.evaluations, trial.save)
    trial.close()
    cold, resumed = in_fresh_process(curves, [(second, tiny), (first, tiny, found)])
    assert cold == b
    assert resumed == (a[0][3:], a[1])


def test_a_closed_trial_leaves_the_base_as_it_was(tiny):
    used = model.base(tiny.model, CONFIG.quant_type, CONFIG.compute_dtype, CONFIG.double_quant)
    before = [weight.clone() for weight in used.model.parameters()]
    expected = curve(CONFIG, tiny)
    for change in ({"gradient_checkpointing": True}, {"r": 3}, {"target_modules": ("q_proj",)}):
        trial = qlora_sft.start(CONFIG.model_copy(update=change), tiny, None)
        assert trial.base is used
        trial.advance(0.0)
        trial.close()
        trial.close()  # a second time does no harm
        assert used.idle
        assert not any(weight.requires_grad or weight.grad is not None for weight in used.model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, used.model.parameters(), strict=True))
    assert curve(CONFIG, tiny) == expected


def test_a_trial_neither_sees_nor_moves_the_random_state_of_its_process(tiny):
    config = CONFIG.model_copy(update={"dropout": 0.2})
    alone = curve(config, tiny)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    trial = qlora_sft.start(config, tiny, None)
    disturbed = []
    while True:
        slice_ = trial.advance(0.0)
        disturbed += losses(slice_.steps)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)
        before = torch.get_rng_state()
        if slice_.done:
            break
    trial.close()
    assert (disturbed, losses(trial.evaluations)) == alone


def test_a_checkpoint_in_the_middle_of_an_evaluation_repeats_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(qlora_sft, "EVALUATION_TOKENS", {"cpu": 150, "cuda": 150})
    never_stopped = curve(CONFIG, tiny)
    trial = qlora_sft.start(CONFIG, tiny, None)
    while not (trial.step == 4 and not trial.advance(0.0).steps):
        trial.advance(0.0)
    assert trial.evaluations == ()
    found = checkpoint.write(tmp_path, trial.step, trial.evaluations, trial.save)
    trial.close()
    rest, evaluations = curve(CONFIG, tiny, found)
    assert (rest, evaluations) == (never_stopped[0][4:], never_stopped[1])


@pytest.mark.parametrize("step", [0, 8])
def test_checkpoints_at_the_ends(tiny, tmp_path, step):
    job = replace(tiny, score_base=True)
    never_stopped = curve(CONFIG, job)
    trial = qlora_sft.start(CONFIG, job, None)
    while not (trial.step == step and trial.evaluations and trial.evaluations[-1].step == step):
        trial.advance(0.0)
    found = checkpoint.write(tmp_path, trial.step, trial.evaluations, trial.save)
    trial.close()
    assert found.loss == never_stopped[1][-1 if step else 0]
    assert curve(CONFIG, job, found) == (never_stopped[0][step:], never_stopped[1])


def test_files_of_a_checkpoint(tiny, tmp_path):
    trial = qlora_sft.start(CONFIG, tiny, None)
    trial.advance(0.0)
    trial.save(tmp_path)
    trial.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "training_state.safetensors", "state.json"}
    assert not {path.suffix for path in tmp_path.iterdir()} & {".bin", ".pt", ".pth", ".pkl"}
    facts = json.loads((tmp_path / "state.json").read_text())
    assert QLoRAConfig.model_validate(facts["config"]) == CONFIG
    assert (facts["step"], facts["total_steps"], facts["warmup_steps"]) == (1, 8, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": CONFIG.model_copy(update={"learning_rate": 1e-3})}, "has config .*'learning_rate': 0.001"),
        ({"budget": steps(9)}, "has total_steps 8, this trial has 9"),
    ],
)
def test_another_trials_checkpoint_is_refused(tiny, tmp_path, change, words):
    trial = qlora_sft.start(CONFIG, tiny, None)
    trial.advance(0.0)
    found = checkpoint.write(tmp_path, trial.step, trial.evaluations, trial.save)
    trial.close()
    with pytest.raises(ValueError, match=words):
        qlora_sft.start(change.get("config", CONFIG), replace(tiny, budget=change.get("budget", tiny.budget)), found)
    qlora_sft.start(CONFIG, tiny, found).close()  # the base was left clean


# What a configuration may ask for


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("change", [{}, {"rslora": True, "double_quant": False}], ids=["plain", "rslora"])
def test_every_quantisation_learns(tiny, quant_type, compute_dtype, change):
    config = CONFIG.model_copy(update={"quant_type": quant_type, "compute_dtype": compute_dtype, **change})
    done, evaluations = run(config, replace(tiny, score_base=True, budget=steps(12)))
    assert losses(evaluations)[-1] < losses(evaluations)[0] - 0.5
    assert all(math.isfinite(step.loss) and step.seconds > 0 for step in done)


def test_the_banner_tells_sizes(tiny):
    trial = qlora_sft.start(CONFIG, tiny, None)
    assert trial.banner.startswith(
        "base 0.1 M parameters: 0.1 MB in 4 bits (0.2 MB in 16, 0.4 MB in 32)\nadapter r=8 on"
    )
    trial.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has what is asked for")
def test_8_bit_optimizer_without_a_gpu_is_refused(tiny):
    config = CONFIG.model_copy(update={"optimizer": "paged_adamw_8bit"})
    with pytest.raises(ValueError, match="needs a CUDA device and there is none; set optimizer: adamw"):
        qlora_sft.start(config, tiny, None)


# Failures


def poison_weights(trial) -> None:
    trial.adapter.weights[:100].fill_(math.nan)
    trial.base.refresh(trial.adapter)


def poison_gradient(trial) -> None:
    """A finite loss with a gradient that is not: backward passes add to what is there."""
    trial.adapter.gradient[5] = math.inf


@pytest.mark.parametrize(
    ("poison", "words"), [(poison_weights, "training loss is nan"), (poison_gradient, "gradient norm is")]
)
def test_what_is_not_finite_ends_the_trial_before_the_update(tiny, poison, words):
    trial = qlora_sft.start(CONFIG, tiny, None)
    trial.advance(0.0)
    trial.advance(0.0)
    poison(trial)
    before = trial.adapter.weights.clone()
    slice_ = trial.advance(1000.0)
    assert slice_.failure is not None
    assert slice_.failure.startswith(words)
    assert slice_.failure.endswith("in step 3")
    assert (slice_.done, slice_.steps, slice_.evaluation, trial.step) == (True, (), None, 2)
    assert torch.equal(trial.adapter.weights.nan_to_num(), before.nan_to_num())
    assert trial.advance(0.0).failure == slice_.failure
    trial.close()


def test_out_of_memory_leaves_the_trial_where_it_stood(tiny, tmp_path, monkeypatch):
    """Memory runs out in the middle of step 3, after random numbers were drawn: no weight, no draw is lost to it."""
    config = CONFIG.model_copy(update={"dropout": 0.1})
    never_disturbed = curve(config, tiny)
    label_losses, room = base.label_losses, 8

    def scarce(model, batch):
        loss = label_losses(model, batch)
        if len(batch.input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(base, "label_losses", scarce)
    trial = qlora_sft.start(config, tiny, None)
    done = losses(trial.advance(0.0).steps) + losses(trial.advance(0.0).steps)
    room = 4
    for _ in range(2):
        with pytest.raises(OutOfMemory, match="CUDA out of memory"):
            trial.advance(1000.0)
    assert trial.step == 2
    found = checkpoint.write(tmp_path, trial.step, trial.evaluations, trial.save)
    trial.close()
    room = 24
    rest, evaluations = curve(config, tiny, found)
    assert (done + rest, evaluations) == never_disturbed


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_no_room_for_the_model_is_the_machines_fault(tiny, monkeypatch, error):
    def full(*key):
        raise error

    monkeypatch.setattr(model, "base", full)
    with pytest.raises(MemoryError, match="no room for the model"):
        qlora_sft.start(CONFIG, tiny, None)


def test_halved_micro_batches_learn_the_same(tiny):
    config = CONFIG.model_copy(update={"dropout": 0.1})
    whole, halved = curve(config, tiny), curve(config, replace(tiny, halvings=3))
    assert halved[0] == pytest.approx(whole[0], abs=1e-5)
    assert halved[1] == pytest.approx(whole[1], abs=1e-5)


def test_a_validation_loss_that_is_not_finite_ends_the_trial(tiny):
    trial = qlora_sft.start(CONFIG, tiny, None)
    while trial.step < 4:
        trial.advance(0.0)
    poison_weights(trial)
    slice_ = trial.advance(1000.0)
    assert slice_.failure == "validation loss is nan after step 4"
    assert slice_.done
    assert slice_.evaluation is not None
    assert math.isnan(slice_.evaluation.loss)
    trial.close()


def test_a_full_disk_is_an_os_error(tiny, tmp_path):
    import resource

    trial = qlora_sft.start(CONFIG, tiny, None)
    trial.advance(0.0)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large", check=lambda error: error.errno == errno.EFBIG):
            checkpoint.write(tmp_path, trial.step, trial.evaluations, trial.save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(tmp_path.iterdir()) == []
    trial.close()


# A GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_resume_on_a_gpu(tiny, tmp_path, optimizer):
    # r 128 makes weights large enough (4,096 elements) to be kept in 8 bits
    config = CONFIG.model_copy(update={"optimizer": optimizer, "r": 128, "dropout": 0.1, "compute_dtype": "bf16"})
    never_stopped = curve(config, tiny)
    trial = qlora_sft.start(config, tiny, None)
    while trial.step < 3:
        trial.advance(0.0)
    found = checkpoint.write(tmp_path, trial.step, trial.evaluations, trial.save)
    assert trial.advance(0.0).peak_memory > 0
    trial.close()
    rest, evaluations = curve(config, tiny, found)
    assert rest == pytest.approx(never_stopped[0][3:], abs=1e-3)
    assert evaluations == pytest.approx(never_stopped[1], abs=1e-3)
