"""What is taken home of a sweep: an adapter, or a merged model, with a card that says how it was found."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from sweep.place import Place
from sweep.report import verdict
from sweep.study import Entry, Ledger, ranking
from trainables import checkpoint, data


def export_best(
    ledger: Ledger, place: Place, model: str, tokenizer: Path | None, warn: Callable[[str], object]
) -> Entry | None:
    """Make best/ from the checkpoint with the lowest validation loss of all that are intact.

    What is in best/ stays when it is of a lower loss than those. `tokenizer` is the directory of its files; without
    one, of a toy, only the configuration is written. Returns the trial of which best/ is, None when there is none;
    `warn` is told when that is not the one with the lowest loss of the sweep.
    """
    entries = ledger.entries()
    found = _lowest_intact(entries, place, warn)
    before = _exported(place)
    if before is not None and (found is None or before[1] < found[1]):
        warn(f"best/ is left as it is, of trial {before[0]:03d}: its checkpoint is damaged or gone")
        return entries[before[0]]
    if found is None:
        return None
    winner, loss, kept = found
    lowest = ranking(entries)[0]
    if lowest.best is not None and lowest.best[1] < loss:
        warn(
            f"best/ is of trial {winner.number:03d} ({loss:.4f}): the checkpoint of trial {lowest.number:03d}"
            f" ({lowest.best[1]:.4f}) is damaged or gone"
        )
    export(ledger, place.paths.best, model, tokenizer, winner, kept)
    place.push(place.paths.best)
    return winner


def _lowest_intact(
    entries: Sequence[Entry], place: Place, warn: Callable[[str], object]
) -> tuple[Entry, float, checkpoint.Checkpoint] | None:
    """Of all checkpoints that are intact, that with the lowest validation loss, which is given, too, and its trial."""
    for entry in entries:
        place.pull_checkpoints(place.paths.trial(entry.number), manifests_alone=True)
    kept = [(entry, checkpoint.best(place.paths.trial(entry.number))) for entry in entries]
    scored = [(entry, found.loss, found) for entry, found in kept if found and found.loss is not None]
    for entry, loss, found in sorted(scored, key=lambda row: (row[1], row[0].number)):
        place.pull_checkpoints(found.path.parent)
        try:
            checkpoint.read(found.path)
        except ValueError as error:
            warn(str(error))
        else:
            return entry, loss, found
    return None


def _exported(place: Place) -> tuple[int, float] | None:
    """Trial and loss of what is in best/, None when there is nothing."""
    file = place.paths.best / "sweep.json"
    place.pull_file(file)
    if not file.exists():
        return None
    facts = json.loads(file.read_text())
    return facts["trial"], facts["validation_loss"]


def export(
    ledger: Ledger, to: Path, model: str, tokenizer: Path | None, entry: Entry, found: checkpoint.Checkpoint
) -> None:
    """Put the adapter of a checkpoint into the directory `to`, as best/ has it; what is there goes when it is done."""
    with _replacing(to) as unfinished:
        if tokenizer is not None:
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                shutil.copy2(found.path / name, unfinished)
            shutil.copytree(tokenizer, unfinished, dirs_exist_ok=True)
            (unfinished / "README.md").write_text(str(model_card(ledger, entry, model, found.step, to.name)))
        _write_facts(unfinished, model, entry, {"step": found.step, "validation_loss": found.loss})


def export_merged(
    ledger: Ledger, to: Path, model: str, named: str, tokens: Path, entry: Entry, found: checkpoint.Checkpoint
) -> float:
    """Put the base model with the adapter of a checkpoint added to its weights, in bf16, into the directory `to`.

    `named` is what the model is called there, `tokens` are those of the sweep. Returns the validation loss of what was
    written, which is not that of the adapter: that was trained on the base in 4 bits. Raises what `merging.merge` does.
    """
    merging = importlib.import_module("trainables.merging")  # brings torch, which nothing else here needs
    with _replacing(to) as unfinished:
        loss: float = merging.merge(model, found.path, tokens, unfinished)
        shutil.copytree(tokens / data.TOKENIZER, unfinished, dirs_exist_ok=True)
        card = model_card(ledger, entry, named, found.step, to.name, merged=loss)
        (unfinished / "README.md").write_text(str(card))
        losses = {"step": found.step, "validation_loss": found.loss, "validation_loss_merged": loss}
        _write_facts(unfinished, named, entry, losses)
    return loss


def chosen(place: Place, entries: Sequence[Entry], number: int | None) -> tuple[Entry, checkpoint.Checkpoint]:
    """A trial, or that of the lowest validation loss, and its best checkpoint. Raises `NotKept`."""
    if number is not None and not any(entry.number == number for entry in entries):
        raise NotKept(f"there is no trial {number}; {place.url} has {len(entries)}, from 0 on")
    complaints: list[str] = []
    wanted = [entry for entry in entries if number in (None, entry.number) and entry.best]
    found = _lowest_intact(wanted, place, complaints.append)
    if found is None:
        kept = [entry.number for entry in entries if checkpoint.best(place.paths.trial(entry.number))]
        what = "no trial" if number is None else f"trial {number} no longer"
        why = f" ({'; '.join(complaints)})" if complaints else ""
        raise NotKept(
            f"{place.url}: {what} has an intact checkpoint of an evaluation{why}; of trials that have ended the best"
            f" `checkpoint.keep` have theirs, here {', '.join(map(str, kept)) or 'none'}"
        )
    entry, _, best = found
    return entry, best


def push(directory: Path, repo: str) -> str:
    """Upload a directory to a repository of the Hub, which is made, private, when there is none.

    Returns its address, and who sees it.

    Raises OSError when the Hub does not answer or does not allow it.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        seen = "private" if api.repo_info(url.repo_id).private else "public"
        api.upload_folder(repo_id=url.repo_id, folder_path=directory)
    except Exception as error:  # the Hub's client has errors of its own, of its HTTP library, and of the system
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())) from error
    return f"{url}, which is {seen}"


def without_paths(directory: Path) -> None:
    """Take this machine's directories out of an exported adapter or model: of a local base its name stays."""
    for file in (directory / "sweep.json", directory / "adapter_config.json"):
        if file.exists():
            facts = json.loads(file.read_text())
            for key in ("model", "base_model_name_or_path"):
                if key in facts and not data.is_hub_id(facts[key]):
                    facts[key] = Path(facts[key]).name
            file.write_text(json.dumps(facts, indent=2) + "\n")


class NotKept(Exception):
    """There is nothing to be taken home; the message says what there is."""


@contextmanager
def _replacing(to: Path) -> Iterator[Path]:
    """A new directory that takes the place of `to` when it is done."""
    with TemporaryDirectory(prefix=f".{to.name}.", dir=to.absolute().parent) as scratch:
        unfinished = Path(scratch) / to.name
        unfinished.mkdir()
        yield unfinished
        shutil.rmtree(to, ignore_errors=True)
        unfinished.rename(to)


def _write_facts(directory: Path, model: str, entry: Entry, numbers: Mapping[str, Any]) -> None:
    facts = {"config": entry.config.model_dump(mode="json"), "model": model, "trial": entry.number} | dict(numbers)
    (directory / "sweep.json").write_text(json.dumps(facts, indent=2) + "\n")


def model_card(
    ledger: Ledger, entry: Entry, model: str, step: int, directory: str, merged: float | None = None
) -> ModelCard:
    """What it is, how it was found, and how to load it from the `directory`.

    `merged` is the validation loss of the model when it is not an adapter.
    """
    library = "peft" if merged is None else "transformers"
    base_model = model if data.is_hub_id(model) else None  # the Hub refuses a path
    card = ModelCardData(library_name=library, base_model=base_model, tags=["qlora", "qlora-sweep", "lora"])
    entries = ledger.entries()
    config = entry.config
    settings = "\n".join(f"| {name} | {value} |" for name, value in config.model_dump(mode="json").items())
    versions = "\n".join(f"| {name} | {value} |" for name, value in (ledger.noted("environment") or {}).items())
    what = f"QLoRA adapter for {model}" if merged is None else f"{model}, fine-tuned with QLoRA"
    rank = [ranked.number for ranked in ranking(entries)].index(entry.number) + 1
    place = "The best" if rank == 1 else f"Number {rank}"
    bf16 = config.compute_dtype == "bf16"
    how = _LOAD_ADAPTER if merged is None else _LOAD_MERGED
    return ModelCard(
        f"""---
{card.to_yaml()}
---

# {what}

{place} of {len(entries)} trials by validation loss (mean cross-entropy per supervised token), taken after optimiser
step {step} of trial {entry.number}.

```
{chr(10).join(verdict(entries))}
```
{"" if merged is None else _MERGED.format(loss=merged)}
{how.format(config=config, model=model, directory=directory, dtype=_TORCH[config.compute_dtype], bf16=bf16)}
| hyperparameter | value |
|---|---|
{settings}

| made with | version |
|---|---|
{versions}
"""
    )


_TORCH = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}
_MERGED = """
Those losses are of the adapter on the base in 4 bits. With its term added to the weights in bf16, which is what this
model is, the validation loss is {loss:.4f}.
"""
_LOAD_ADAPTER = """Load it on the base in the quantisation that it was trained on:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

device = "cuda" if torch.cuda.is_available() else "cpu"
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{config.quant_type}",
    bnb_4bit_compute_dtype={dtype},
    bnb_4bit_use_double_quant={config.double_quant},
)
base = AutoModelForCausalLM.from_pretrained(
    "{model}", quantization_config=quantization, dtype={dtype}, device_map={{"": device}}
)
model = PeftModel.from_pretrained(base, "{directory}").eval()  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained("{directory}")

prompt = tokenizer("…", return_tensors="pt").to(device)
# Below as it was trained and scored.
with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled={bf16}):
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```
"""
_LOAD_MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# The directory of this file.
model = AutoModelForCausalLM.from_pretrained("{directory}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{directory}")

prompt = tokenizer("…", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```
"""
