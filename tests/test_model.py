"""The 4-bit base: loaded once, clean between trials, told in bytes."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.tiny import make_tiny_llama
from trainables import model
from trainables.config import QLoRAConfig
from trainables.packed.adapter import Adapter
from trainables.protocol import OutOfMemory, loses_device


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


def adapter(base, **changed):
    return Adapter(QLoRAConfig(**changed), base.layers, torch.device("cpu"), base.model.dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_base_is_quantised_but_for_its_head(llama, quant_type, compute_dtype):
    base = model.base(llama, quant_type, compute_dtype, True)
    linear = [module for module in base.model.modules() if isinstance(module, torch.nn.Linear)]
    quantised = [module for module in linear if isinstance(module, Linear4bit)]
    assert [module for module in linear if module not in quantised] == [base.model.lm_head]
    assert len(quantised) == len(base.layers) == 2 * 7
    for layer in quantised:
        assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (quant_type, True)
        assert layer.weight.quant_state.dtype == model.DTYPES[compute_dtype]
    assert base.model.get_input_embeddings().weight.dtype == model.DTYPES[compute_dtype]
    assert not base.model.training
    assert not any(weight.requires_grad for weight in base.model.parameters())


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
    monkeypatch.setattr(model, "memory_of", lambda device: room_for_two)
    model.base(llama, "fp4", "fp32", True)
    model.base(llama, "nf4", "fp32", True)  # now fp4 is the one used longest ago
    model.base(llama, "nf4", "fp32", False)
    assert len(loads) == 3
    assert model.base(llama, "nf4", "fp32", True) is nf4
    assert len(loads) == 3
    model.base(llama, "fp4", "fp32", True)
    assert len(loads) == 4


def test_bases_that_serve_nobody_go_but_for_the_one_that_is_wanted(llama, loads):
    nf4, fp4 = ((llama, each, "fp32", True) for each in ("nf4", "fp4"))
    bases = [model.base(*each) for each in (nf4, fp4)]
    served = adapter(bases[0])
    bases[0].seat(served)
    assert not model.drop_idle(fp4)
    assert [model.base(*each) for each in (nf4, fp4)] == bases
    assert model.drop_idle()
    assert model.base(*nf4) is bases[0]
    assert len(loads) == 2
    bases[0].dismiss(served)


def test_a_lack_of_memory_is_known_as_such():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert model.out_of_memory(found.value)
    for said in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"):
        assert model.out_of_memory(RuntimeError(said))
        assert not loses_device(OutOfMemory(said))
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert loses_device(lost)
    assert not model.out_of_memory(lost)


@pytest.mark.parametrize(
    ("target_modules", "endings"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (("q_proj", "self_attn.v_proj"), {"q_proj", "v_proj"}),
    ],
)
def test_adapted_layers(llama, target_modules, endings):
    found = model.targets(model.base(llama, "nf4", "fp32", True).layers, llama, target_modules)
    assert {name.rpartition(".")[2] for name, _, _ in found.values()} == endings
    assert len(found) == 2 * len(endings)


@pytest.mark.parametrize("name", ["q_porj", "lm_head", "embed_tokens", "proj"])
def test_a_target_that_matches_nothing_is_named_with_what_exists(llama, name):
    base = model.base(llama, "nf4", "fp32", True)
    with pytest.raises(ValueError, match=f"'{name}'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        model.targets(base.layers, llama, ("q_proj", name))
    with pytest.raises(ValueError, match=f"'{name}'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        model.check_target_modules(llama, [("q_proj", name)])


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_scale(llama, rslora, scale):
    assert adapter(model.base(llama, "nf4", "fp32", True), r=4, alpha=8.0, rslora=rslora).scale == scale


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
    assert model.banner(base, adapter(base, r=4)).endswith("adapter r=4 on 14 layers: 0.0 M parameters, 0.0 MB")


def test_weights_stored_in_another_4_bit_type_are_refused(llama, tmp_path, loads):
    fp4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=fp4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="stored in fp4, quant_type is nf4"):
        model.base(str(tmp_path), "nf4", "fp32", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine on which torch finds no GPU")
def test_a_gpu_that_torch_does_not_find_is_not_replaced_by_the_cpu(llama, monkeypatch):
    for none in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        model.check_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(model, "_warm", {})
    with pytest.raises(OSError, match=r"finds no GPU, though this process was given one \(CUDA_VISIBLE_DEVICES is 3\)"):
        model.base(str(llama), "nf4", "bf16", True)


def test_bf16_on_a_gpu_without_it_is_refused(llama, monkeypatch):
    monkeypatch.setattr(model, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 cannot compute in bf16; set compute_dtype: fp32"):
        model._load(llama, "nf4", "bf16", True)


@pytest.mark.parametrize(("tokens", "in_fp32"), [(64, True), (65, False)])
def test_attention_to_short_rows_is_in_fp32(tokens, in_fp32):
    """The others are bit by bit torch's own, in the data type that they are in."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 16, generator=generator).bfloat16() for _ in range(3))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    found, _ = model._attend(64, module, query, key, value, None)
    wide = [each.float() if in_fp32 else each for each in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).to(torch.bfloat16)
    assert torch.equal(found, expected.transpose(1, 2))
