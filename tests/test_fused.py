"""Norms and gates as one operation: what the model's own code computes, forward and backward, and less kept for it."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, OPTConfig, Qwen3Config

from trainables.packed import fused
from trainables.packed.fused import cross_entropy, fuse, fusible

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def small(config, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for weight in model.parameters():  # norms begin as ones
        weight.data.mul_(torch.rand_like(weight) + 0.5)
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            LlamaConfig(**SMALL),
            ["layers.0.mlp", "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"],
        ),
        (
            Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
            [
                "layers.0.self_attn.q_norm",
                "layers.0.self_attn.k_norm",
                "layers.0.mlp",
                "layers.0.input_layernorm",
                "layers.0.post_attention_layernorm",
                "norm",
            ],
        ),
        (
            LlamaConfig(**SMALL, hidden_act="gelu"),
            ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"],
        ),
        # rounds after its weight has been multiplied with
        (Olmo2Config(**SMALL), ["layers.0.mlp"]),
        (
            OPTConfig(hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=64),
            [],
        ),
    ],
    ids=["llama", "qwen3", "gelu", "olmo2", "opt"],
)
def test_only_what_computes_the_same_is_replaced(config, names):
    found = fusible(small(config, device="meta"))
    assert sorted(found) == sorted(f"model.{name}" for name in names)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm", "model.layers.0.mlp"])
def test_values_and_gradients_are_those_of_the_model(name, dtype, device):
    model = small(LlamaConfig(**SMALL), dtype, device)
    x = (8 * torch.randn(3, 7, 64, device=device)).to(dtype).requires_grad_()  # gates of up to 2
    back = torch.randn(3, 7, 64, device=device).to(dtype)
    module = model.get_submodule(name)

    def run():
        kept = {}
        x.grad = None
        with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
            y = module(x)
        y.backward(back)
        return y.detach(), x.grad, sum(t.nbytes for t in kept.values())

    theirs, their_gradient, their_bytes = run()
    fuse(model, fusible(model))
    ours, our_gradient, our_bytes = run()
    relative, share = (1e-5, 1e-6) if dtype == torch.float32 else (1e-2, 4e-3)
    for mine, wanted in [(ours, theirs), (our_gradient, their_gradient)]:
        torch.testing.assert_close(mine, wanted, rtol=relative, atol=share * wanted.abs().max().item())
    if dtype == torch.bfloat16 or device == "cpu":  # in fp32 a GPU's sums differ in the last bit
        assert (ours == theirs).float().mean() > 0.95  # rounded where they round
    if dtype == torch.bfloat16 or name.endswith("mlp"):
        assert our_bytes < their_bytes
    else:
        assert our_bytes <= their_bytes


@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm", "model.layers.0.mlp"])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number_stays_so(name, device):
    model = small(LlamaConfig(**SMALL), torch.bfloat16, device)
    fuse(model, fusible(model))
    x = torch.randn(2, 3, 64, device=device).bfloat16()
    x[0, 1] = float("nan")
    y = model.get_submodule(name)(x)
    assert y[0, 1].isnan().all()
    assert y[[0, 1], [0, 0]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_torch(dtype, device, monkeypatch):
    """Of doubtful and of confident tokens, few at a time: labels whose loss is nearly none have a gradient, too."""
    monkeypatch.setattr(fused, "FP32_LOGITS", 3 * 320)
    torch.manual_seed(0)
    logits = torch.randn(8, 320, device=device) - 100
    labels = torch.arange(8, device=device)
    logits[range(8), labels] += torch.linspace(0, 16, 8, device=device)
    logits = logits.to(dtype).requires_grad_()
    back = torch.rand(8, device=device) + 0.5
    exact = logits.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    wanted.backward(back.double())
    losses = cross_entropy(logits, labels)
    losses.backward(back)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=5e-7)
    rounding = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=5e-7)
