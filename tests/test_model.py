"""The 4-bit base: loaded once, clean between trials, told in bytes."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from tests.tiny import make_tiny_llama
from trainables import model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(make_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def loads(monkeypatch):
    """Starts with no warm base; the models loaded since."""
    monkeypatch.setattr(model, "_warm", {})
    loaded = []
    load = AutoModelForCausalLM.from_pretrained

    def counted(name, **options):
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    return loaded


def attach(base, r=4, alpha=8.0, dropout=0.0, target_modules="all-linear", rslora=False):
    return model.attach(base, r, alpha, dropout, target_modules, rslora)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_base_is_quantised_but_for_its_head(llama, quant_type, compute_dtype):
    base = model.base(llama, quant_type, compute_dtype, True)
    linear = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    quantised = {name: module for name, module in linear.items() if isinstance(module, Linear4bit)}
    assert set(linear) - set(quantised) == {"lm_head"}
    assert len(quantised) == 2 * 7
    for layer in quantised.values():
        assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (quant_type, True)
        assert (layer.compute_dtype, layer.support_avx512bf16_for_cpu) == (model.DTYPES[compute_dtype], False)
    assert base.get_input_embeddings().weight.dtype == model.DTYPES[compute_dtype]
    assert not base.training
    assert not any(weight.requires_grad for weight in base.parameters())


def test_a_warm_base_is_not_loaded_again(llama, loads):
    first = model.base(llama, "nf4", "bf16", True)
    other = model.base(llama, "fp4", "bf16", True)
    assert model.base(llama, "nf4", "bf16", True) is first
    assert model.base(llama, "fp4", "bf16", True) is other
    assert len(loads) == 2
    model.base(llama, "nf4", "bf16", False)
    model.base(llama, "nf4", "fp32", True)
    assert len(loads) == 4


def test_the_least_recently_used_base_goes_when_memory_is_short(llama, loads, monkeypatch):
    nf4 = model.base(llama, "nf4", "fp32", True)
    room_for_two = 4 * 2 * model.footprint(nf4)[0]
    monkeypatch.setattr(model, "_memory", lambda device: room_for_two)
    model.base(llama, "fp4", "fp32", True)
    model.base(llama, "nf4", "fp32", True)  # now fp4 is the one used longest ago
    model.base(llama, "nf4", "fp32", False)
    assert len(loads) == 3
    assert model.base(llama, "nf4", "fp32", True) is nf4
    assert len(loads) == 3
    model.base(llama, "fp4", "fp32", True)
    assert len(loads) == 4


def state_of(base):
    """All that a trial could leave behind."""
    return {
        "modules": {name: type(module) for name, module in base.named_modules()},
        "hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in base.modules()
        ),
        "training": [name for name, module in base.named_modules() if module.training],
        "trained": [name for name, weight in base.named_parameters() if weight.requires_grad],
        "gradients": [name for name, weight in base.named_parameters() if weight.grad is not None],
        "checkpointing": base.is_activation_checkpointing,
        "attributes": sorted(vars(base)),
    }


def copies(base):
    return [weight.detach().clone() for weight in base.parameters()]


def test_an_adapter_leaves_the_base_clean(llama, recwarn):
    base = model.base(llama, "nf4", "fp32", True)
    weights, before = copies(base), state_of(base)
    for _ in range(2):
        adapted = attach(base, dropout=0.1)
        adapted.train()
        adapted(input_ids=torch.arange(10)[None]).logits.sum().backward()
        model.detach(adapted)
        assert state_of(base) == before
        for old, new in zip(weights, copies(base), strict=True):
            assert torch.equal(old, new)
    assert not recwarn.list


def test_a_base_carries_one_adapter_at_a_time(llama):
    base = model.base(llama, "nf4", "fp32", True)
    adapted = attach(base)
    with pytest.raises(RuntimeError, match="close that trial first"):
        attach(base)
    model.detach(adapted)


@pytest.mark.parametrize(
    ("target_modules", "endings"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (("q_proj", "self_attn.v_proj"), {"q_proj", "v_proj"}),
    ],
)
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_adapted_layers(llama, target_modules, endings, compute_dtype):
    adapted = attach(model.base(llama, "nf4", compute_dtype, True), target_modules=target_modules)
    layers = [name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    assert {name.rpartition(".")[2] for name in layers} == endings
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {torch.float32}
    assert not any(module.training for module in adapted.modules())
    model.detach(adapted)


@pytest.mark.parametrize("name", ["q_porj", "lm_head", "embed_tokens", "proj"])
def test_a_target_that_matches_nothing_is_named_with_what_exists(llama, name):
    base = model.base(llama, "nf4", "fp32", True)
    with pytest.raises(ValueError, match=f"'{name}'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        attach(base, target_modules=("q_proj", name))
    model.detach(attach(base))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_scaling(llama, rslora, scaling):
    adapted = attach(model.base(llama, "nf4", "fp32", True), r=4, alpha=8.0, rslora=rslora)
    assert {m.scaling["default"] for m in adapted.modules() if isinstance(m, BaseTunerLayer)} == {scaling}
    model.detach(adapted)


def test_bf16_products_on_a_cpu_without_bf16_are_those_of_fp32_rounded():
    model.multiply_bf16_in_fp32()
    draw = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*shape, generator=draw) for shape in ((3, 40, 64), (96, 64), (96,)))
    rounded = [tensor.bfloat16() for tensor in (x, w, bias)]
    exact = torch.nn.functional.linear(*(tensor.double() for tensor in rounded))
    x16, w16, _ = (tensor.requires_grad_() for tensor in rounded)
    product = torch.nn.functional.linear(*rounded)
    assert product.dtype == torch.bfloat16
    assert torch.equal(product, exact.bfloat16())
    product.sum().backward()
    assert (x16.grad.dtype, w16.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    ones = torch.ones(120, 96, dtype=torch.float64)
    assert torch.equal(x16.grad.flatten(0, 1), (ones @ w16.double()).bfloat16())
    assert torch.equal(torch.bmm(x16, x16.mT), torch.bmm(x16.double(), x16.double().mT).bfloat16())
    scaled = torch.addmm(bias, x[0], w.T, beta=0.5, alpha=2)
    assert torch.allclose(scaled, 0.5 * bias + 2 * x[0] @ w.T, atol=1e-5)  # fp32 is what it was


@pytest.mark.parametrize(("double_quant", "constants"), [(True, 1 / 64 + 4 / 64 / 256), (False, 4 / 64)])
def test_footprint(llama, double_quant, constants):
    base = model.base(llama, "nf4", "bf16", double_quant)
    in_4, in_16, in_32 = model.footprint(base)
    stock = AutoModelForCausalLM.from_pretrained(llama)
    parameters = sum(weight.numel() for weight in stock.parameters())
    linear = sum(m.weight.numel() for m in stock.modules() if isinstance(m, torch.nn.Linear) and m is not stock.lm_head)
    assert (in_16, in_32) == (2 * parameters, 4 * parameters)
    # Half a byte a weight, the constants of each block of 64, and a table of 16 (and one of 256) a layer.
    tables = 14 * (16 * 4 + (256 * 4 if double_quant else 0))
    expected = linear * (0.5 + constants) + 2 * (parameters - linear) + tables
    assert in_4 == pytest.approx(expected, rel=1e-3)
    adapted = attach(base)
    assert model.footprint(adapted) == (in_4, in_16, in_32)
    assert model.banner(adapted, 4).endswith("adapter r=4 on 14 layers: 0.0 M parameters, 0.0 MB")
    model.detach(adapted)


def test_weights_stored_in_another_4_bit_type_are_refused(llama, tmp_path, loads):
    model.base(llama, "fp4", "fp32", True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stored in fp4, quant_type is nf4"):
        model.base(str(tmp_path), "nf4", "fp32", True)


def test_bf16_on_a_gpu_without_it_is_refused(llama, monkeypatch):
    monkeypatch.setattr(model, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 cannot compute in bf16; set compute_dtype: fp32"):
        model._load(llama, "nf4", "bf16", True)
