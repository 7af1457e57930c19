"""Turn a GGUF file into a model directory that transformers, PEFT and bitsandbytes load like any other.

    python -m trainables.gguf FILE.gguf DIRECTORY

Weights are de-quantised to bf16: the file's own quantisation is undone here and QLoRA's applied when a trial loads it.
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

from trainables.data import DataError, check_model

SOURCE = "gguf.json"
"""File in the model directory that says which GGUF it was made from."""


class GGUFError(ValueError):
    """The file cannot be converted, or the target is taken; the message says what to do."""


def convert(file: Path, directory: Path) -> bool:
    """Write `directory` (config, safetensors in bf16, tokenizer with chat template) from `file`; False when it stands.

    The directory appears by rename, complete or not at all. GGUFError when `file` is no GGUF that transformers reads,
    or `directory` holds something else.
    """
    source = {"file": file.name, "sha256": _checksum_of_gguf(file)}
    if directory.exists():
        _check_made_from(source, directory)
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{os.getpid()}"
    temporary.mkdir()
    try:
        model, tokenizer = _load(file)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / SOURCE).write_text(json.dumps(source, indent=1))
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _checksum_of_gguf(file: Path) -> str:
    if not file.is_file():
        raise GGUFError(f"{file}: no such file; give the path of a GGUF file")
    with file.open("rb") as stream:
        magic = stream.read(4)
        if magic != b"GGUF":
            raise GGUFError(f"{file}: not a GGUF file: it starts with {magic!r} where b'GGUF' must stand")
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_made_from(source: dict[str, str], directory: Path) -> None:
    try:
        check_model(str(directory))
        standing = json.loads((directory / SOURCE).read_text())
    except (DataError, OSError, ValueError) as error:
        raise GGUFError(f"{directory}: is taken by something else ({error}); move it away or name another") from error
    if standing.get("sha256") != source["sha256"]:
        raise GGUFError(
            f"{directory}: holds the model of another GGUF file, {standing.get('file')}; delete it or name another"
        )


def _load(file: Path) -> tuple[Any, Any]:
    """Model in bf16, and tokenizer."""
    import torch  # here: seconds to import, and wrong arguments are answered at once
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # Without `dequantize` the model counts as quantised, and transformers refuses to save it.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        raise GGUFError(
            f"{file}: transformers cannot read it ({type(error).__name__}: {error}); is it whole, and of an "
            "architecture that transformers reads from GGUF? Otherwise take the model's safetensors directory"
        ) from error
    if _pre_tokenizer_type(file) == "smollm":
        # llama.cpp's `smollm` cuts out each digit before it splits as GPT-2 does; transformers leaves the former out.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return model, tokenizer


def _pre_tokenizer_type(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainables.gguf", description="GGUF file -> model directory")
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    try:
        made = convert(arguments.file, arguments.directory)
    except GGUFError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.directory}: {'made from' if made else 'stands already, from'} {arguments.file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
