"""A GGUF file becomes a model directory with the weights and tokenizer that went into it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import CHATML, make_tiny_llama
from trainables.data import check_model
from trainables.gguf import GGUFError, convert

TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(model: Path, file: Path, architecture: str = "llama", pre_tokenizer: str = "gpt-2") -> Path:
    """What llama.cpp's converter makes of the tiny Llama: heads rotated, tensors renamed, the tokenizer inside."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    weights = load_file(model / "model.safetensors")
    writer = GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in TENSORS.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(theirs)
            if heads:
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "llama")


def test_a_gguf_becomes_the_model_that_it_was_made_from(llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path / "models" / "tiny"
    assert convert(write_gguf(llama, tmp_path / "tiny.gguf"), directory)
    check_model(str(directory))
    assert [path.name for path in directory.parent.iterdir()] == ["tiny"]

    made = AutoModelForCausalLM.from_pretrained(directory)
    source = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert made.config.tie_word_embeddings
    assert made.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(made.state_dict()[name], weight) for name, weight in source.state_dict().items())
    tokenizer, original = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(llama)
    text = "<|im_start|>user\nThere are  12\n\n345 of them<|im_end|>"
    assert tokenizer(text).input_ids == original(text).input_ids
    assert (tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token) == (CHATML, "<|im_end|>", "<|pad|>")

    weights = directory / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert not convert(tmp_path / "tiny.gguf", directory)
    assert weights.stat().st_mtime_ns == before
    other = write_gguf(llama, tmp_path / "other.gguf", pre_tokenizer="smollm")
    with pytest.raises(GGUFError, match=r"holds the model of another GGUF file, tiny\.gguf; delete it or name another"):
        convert(other, directory)


def test_smollm_digits_stand_alone(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert(write_gguf(llama, tmp_path / "tiny.gguf", pre_tokenizer="smollm"), tmp_path / "tiny")
    split = AutoTokenizer.from_pretrained(tmp_path / "tiny").backend_tokenizer.pre_tokenizer.pre_tokenize_str(
        "a\n\n17 b"
    )
    assert [piece for piece, _ in split] == ["a", "ĊĊ", "1", "7", "Ġb"]


def test_what_is_no_gguf_or_cannot_be_read_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    whole = write_gguf(llama, tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "torn.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "header.gguf").write_bytes(whole[:1000])
    write_gguf(llama, tmp_path / "strange.gguf", architecture="no-such-llm")
    for name, complaint in (
        ("absent.gguf", "no such file"),
        ("text.gguf", "not a GGUF file: it starts with b'hell' where b'GGUF' must stand"),
        ("torn.gguf", "transformers cannot read it .*is it whole"),
        ("header.gguf", "transformers cannot read it .*is it whole"),
        ("strange.gguf", "transformers cannot read it .*no-such-llm is not supported"),
    ):
        with pytest.raises(GGUFError, match=complaint):
            convert(tmp_path / name, tmp_path / "made")
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".gguf"]


def test_the_command_answers_with_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "empty.gguf").write_bytes(b"GGUF")
    command = [sys.executable, "-m", "trainables.gguf", str(tmp_path / "empty.gguf"), str(tmp_path / "taken")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is taken by something else" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.smollm2
def test_smollm2_speaks() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = check_model(str(Path(__file__).parents[1] / "models" / "smollm2-135m"))
    model, tokenizer = (kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**asked, max_new_tokens=10, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
