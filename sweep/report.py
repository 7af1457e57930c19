"""The end of a run: the ranking on the terminal, and best/, ready to be taken home."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from sweep.paths import SweepPaths
from sweep.place import Place
from sweep.progress import STATES
from sweep.study import Entry, Ledger, ranking
from sweep.tracking import described
from trainables import checkpoint


def usual_default(entries: Sequence[Entry]) -> Entry | None:
    """The trial of r 16, alpha 32, learning rate 2e-4, which a sweep should beat."""
    return next((e for e in entries if (e.config.r, e.config.alpha, e.config.learning_rate) == (16, 32.0, 2e-4)), None)


def base_loss(entries: Sequence[Entry]) -> float | None:
    """Validation loss of the quantised base before any training, as the first trial measured it."""
    return next((e.losses[0] for e in entries if 0 in e.losses), None)


def show(console: Console, ledger: Ledger, searched: Sequence[str], seconds: float) -> None:
    """Print ranking, base, default, winner and time."""
    entries = ledger.entries()
    ranked = ranking(entries)
    table = Table(title="Ranking by best validation loss", title_justify="left")
    for heading in ("", "trial", "configuration", "best loss", "evaluation", "ended as", "minutes"):
        table.add_column(
            heading,
            justify="left" if heading in ("configuration", "ended as") else "right",
            no_wrap=heading != "configuration",
        )
    unscored = [e for e in entries if e.best is None]
    for place, entry in enumerate([*ranked, *unscored], start=1):
        evaluation, loss = entry.best or (None, None)
        table.add_row(
            str(place) if loss is not None else "-",
            f"{entry.number:03d}",
            described(entry.config, searched),
            "-" if loss is None else f"{loss:.4f}",
            "-" if evaluation is None else str(evaluation),
            STATES[entry.state],
            f"{entry.cost.seconds / 60:.1f}",
        )
    console.print(table)
    for entry in entries:
        if entry.state is TrialState.FAIL:
            console.print(f"trial {entry.number:03d} failed: {entry.reason}", highlight=False, soft_wrap=True)
    for line in verdict(entries):
        console.print(line, highlight=False)
    console.print(f"{len(entries)} trials, {seconds / 60:.1f} minutes", highlight=False)


def verdict(entries: Sequence[Entry]) -> list[str]:
    """Base, usual default and winner, a line each."""
    ranked = ranking(entries)
    base, default = base_loss(entries), usual_default(entries)
    lines = [f"base model            {base:.4f}"] if base is not None else []
    if default is not None and default.best is not None:
        lines.append(f"usual default         {default.best[1]:.4f}  (trial {default.number:03d})")
    if ranked:
        winner = ranked[0]
        assert winner.best is not None
        gain = ""
        if default is not None and default.best is not None:
            ahead = default.best[1] - winner.best[1]
            gain = ", the default itself" if winner is default else f", {ahead:.4f} below the default"
        lines.append(f"winner                {winner.best[1]:.4f}  (trial {winner.number:03d}{gain})")
    return lines


def standing(entries: Sequence[Entry], trials: int) -> str:
    """How far a sweep of so many trials has come, in half a sentence."""
    done = sum(entry.state is not TrialState.RUNNING for entry in entries)
    ranked = ranking(entries)
    best = ""
    if ranked:
        assert ranked[0].best is not None
        best = f", the best loss so far is {ranked[0].best[1]:.4f} (trial {ranked[0].number:03d})"
    return f"{done} of {trials} trials are done{best}"


def any_finished(entries: Sequence[Entry]) -> bool:
    """Whether a trial trained to its end or until early stopping gave it up."""
    return any(entry.state in (TrialState.COMPLETE, TrialState.PRUNED) for entry in entries)


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
    _export(ledger, place.paths, model, tokenizer, winner, kept)
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


def _export(
    ledger: Ledger, paths: SweepPaths, model: str, tokenizer: Path | None, winner: Entry, found: checkpoint.Checkpoint
) -> None:
    unfinished = paths.best.with_name(".best")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    if tokenizer is not None:
        for file in found.path.glob("adapter_*"):
            shutil.copy2(file, unfinished)
        shutil.copytree(tokenizer, unfinished, dirs_exist_ok=True)
        (unfinished / "README.md").write_text(str(model_card(ledger, winner, model, found.step)))
    numbers = {"trial": winner.number, "step": found.step, "validation_loss": found.loss}
    (unfinished / "sweep.json").write_text(
        json.dumps({"config": winner.config.model_dump(mode="json"), "model": model} | numbers, indent=2) + "\n"
    )
    shutil.rmtree(paths.best, ignore_errors=True)
    unfinished.rename(paths.best)


def model_card(ledger: Ledger, winner: Entry, model: str, step: int) -> ModelCard:
    """What the adapter is, how it was found, and how to load it."""
    card = ModelCardData(library_name="peft", base_model=model, tags=["qlora", "qlora-sweep", "lora"])
    entries = ledger.entries()
    config = winner.config
    settings = "\n".join(f"| {name} | {value} |" for name, value in config.model_dump(mode="json").items())
    versions = "\n".join(f"| {name} | {value} |" for name, value in (ledger.noted("environment") or {}).items())
    bf16 = config.compute_dtype == "bf16"
    return ModelCard(
        f"""---
{card.to_yaml()}
---

# QLoRA adapter for {model}

The best of {len(entries)} trials by validation loss (mean cross-entropy per supervised token), taken after optimiser
step {step} of trial {winner.number}.

```
{chr(10).join(verdict(entries))}
```

Load it on the base in the quantisation that it was trained on:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.{"bfloat16" if bf16 else "float32"}
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="{config.quant_type}",
    bnb_4bit_compute_dtype=dtype,
    bnb_4bit_use_double_quant={config.double_quant},
)
base = AutoModelForCausalLM.from_pretrained(
    "{model}", quantization_config=quantization, dtype=dtype, device_map={{"": device}}
)
model = PeftModel.from_pretrained(base, "best").eval()  # the directory of this file
tokenizer = AutoTokenizer.from_pretrained("best")

prompt = tokenizer("…", return_tensors="pt").to(device)
with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled={bf16}):  # as it was trained and scored
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```

| hyperparameter | value |
|---|---|
{settings}

| made with | version |
|---|---|
{versions}
"""
    )
