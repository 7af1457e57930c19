"""A model and a dataset small enough to make on the spot: random weights, a real tokenizer, a learnable task."""

import json
import random
from pathlib import Path
from typing import Any

SENTENCES = [
    "How many letters stand here? There are so many of them that I lost count.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "You are a helpful assistant. Answer with one number: 0 1 2 3 4 5 6 7 8 9 10.",
    "user asks, assistant answers, system listens; the price is $1795 to the nearest dollar.",
]
# ChatML with the generation markers that tell TRL which tokens the assistant says.
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def make_tiny_llama(directory: Path) -> Path:
    """Save a Llama of 2 layers (about 100,000 random parameters, always the same) with its tokenizer to `directory`."""
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds to import, and not every test needs it

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,  # as in SmolLM2
    )
    return _save(LlamaForCausalLM, config, directory)


def make_tiny_opt(directory: Path) -> Path:
    """The same of an OPT, with much dropout of its own and biases."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
        dropout=0.5,
        attention_dropout=0.5,
    )
    return _save(OPTForCausalLM, config, directory)


def _save(kind: Any, config: Any, directory: Path) -> Path:
    import torch

    tokenizer = tiny_tokenizer()
    config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 320 tokens with bos, eos, pad and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_tiny_rows(directory: Path, train: int, validation: int) -> tuple[Path, Path]:
    """Write prompt/completion JSONL files: how often does the letter stand there? No row stands in both."""
    numbers = random.Random(0).sample(range(26 * 9 * 90), train + validation)
    rows = [_row(number) for number in numbers]
    files = directory / "train.jsonl", directory / "validation.jsonl"
    for file, part in zip(files, (rows[:train], rows[train:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return files


def _row(number: int) -> dict[str, str]:
    number, letter = divmod(number, 26)
    name, count = divmod(number, 9)
    return {"prompt": f"{name}: {chr(ord('a') + letter) * (count + 1)} =", "completion": f" {count + 1}"}
