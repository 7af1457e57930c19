"""What is taken home of a sweep: an adapter, or a merged model, with a card that says how it was found."""

import importlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars
from optuna.trial import TrialState

from sweep.place import Place
from sweep.report import UNSCORED, conclusion
from sweep.status import Status, tokenised
from sweep.study import MACHINES, PORTABLE, Entry, Ledger, ranking
from sweep.validation import counted
from trainables import checkpoint, data

LOOK_SECONDS = 5.0
"""How often the ledger is looked at for a better checkpoint to upload."""
AGAIN_SECONDS = 60.0
"""How long the Hub is left alone after an upload failed."""
LAST_SECONDS = 60.0
"""How long the end of a sweep waits for an upload."""
OBJECTIVE = "objective"
"""In sweep.json: the value of what was searched for, where that is not the validation loss."""


@dataclass(frozen=True)
class Home:
    """What was taken home."""

    directory: Path
    trial: int
    step: int
    """Optimiser steps that it was trained for."""
    result: str
    """What it reached in validation, in words."""


def export_best(
    ledger: Ledger, place: Place, model: str, tokenizer: Path | None, warn: Callable[[str], object]
) -> Entry | None:
    """Make best/ from the checkpoint with the best evaluation of all that are intact, or from the last one of a trial
    that has no validation loss.

    What is in best/ stays when it is better than those. `tokenizer` is the directory of its files; without
    one, of a toy, only the configuration is written. Returns the trial of which best/ is, None when there is none;
    `warn` is told when that is not the best one of the sweep.
    """
    entries, criterion = ledger.entries(), ledger.criterion
    found = _best_intact(entries, place, warn)
    before = exported(place)
    objective = None if found is None else found[1].objective
    key = "validation_loss" if criterion.is_loss else OBJECTIVE
    if before is not None and (found is None or (objective is not None and criterion.turned(before[key]) < objective)):
        number: int = before["trial"]
        warn(f"best/ is left as it is, of trial {number:03d}: its checkpoint is damaged or gone")
        return ledger.entry(number)
    if found is None:
        for entry in entries:
            if entry.unscored:
                warn(
                    f"trial {entry.number:03d} lacks its last checkpoint, which is damaged or gone: nothing goes into"
                    " best/"
                )
        return None
    winner, kept = found
    first = next(iter(ranking(entries)), winner)
    if first.best is not None and objective is not None and first.best[1] < objective:
        warn(
            f"best/ is of trial {winner.number:03d} ({criterion.text(objective)}): the checkpoint of trial"
            f" {first.number:03d} ({criterion.text(first.best[1])}) is damaged or gone"
        )
    export(ledger, place.paths.best, model, tokenizer, winner, kept)
    place.push(place.paths.best)
    return winner


def _best_intact(
    entries: Sequence[Entry], place: Place, warn: Callable[[str], object]
) -> tuple[Entry, checkpoint.Checkpoint] | None:
    """Of all checkpoints that are intact, that with the lowest objective, and its trial; see `to_take_home`."""
    for entry in entries:
        place.pull_checkpoints(place.paths.trial(entry.number), manifests_alone=True)
    kept = [(entry, found) for entry in entries if (found := to_take_home(place, entry)) is not None]
    for entry, found in sorted(kept, key=lambda row: (row[1].objective or 0.0, row[0].number)):
        place.pull_checkpoints(found.path.parent)
        try:
            checkpoint.read(found.path)
        except ValueError as error:
            warn(str(error))
        else:
            return entry, found
    return None


def to_take_home(place: Place, entry: Entry) -> checkpoint.Checkpoint | None:
    """What there is of a trial here: the checkpoint of its best evaluation; of one that has none, for it was trained on
    the validation rows, too, its last."""
    directory = place.paths.trial(entry.number)
    return checkpoint.last(directory) if entry.unscored else checkpoint.best(directory)


def exported(place: Place) -> dict[str, Any] | None:
    """What is in best/, None when there is nothing: trial, step, validation_loss, config and model; OBJECTIVE, too,
    where that is not the loss."""
    file = place.paths.best / "sweep.json"
    place.pull_file(file)
    if not file.exists():
        return None
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


def export(
    ledger: Ledger, to: Path, model: str, tokenizer: Path | None, entry: Entry, found: checkpoint.Checkpoint
) -> None:
    """Put the adapter of a checkpoint into the directory `to`, as best/ has it; what is there goes when it is done.

    `model` is what its base is called there.
    """
    with _replacing(to) as unfinished:
        if tokenizer is not None:
            shutil.copy2(found.path / checkpoint.ADAPTER, unfinished)
            adapter = json.loads((found.path / "adapter_config.json").read_text())
            adapter["base_model_name_or_path"] = model
            (unfinished / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
            shutil.copytree(tokenizer, unfinished, dirs_exist_ok=True)
            (unfinished / "README.md").write_text(str(model_card(ledger, entry, model, found.step, to.name)))
        _write_facts(unfinished, model, entry, _numbers(entry, found))


def export_merged(
    ledger: Ledger, to: Path, model: str, named: str, tokens: Path, entry: Entry, found: checkpoint.Checkpoint
) -> float | None:
    """Put the base model with the adapter of a checkpoint added to its weights, in bf16, into the directory `to`.

    `named` is what the model is called there, `tokens` are those of the sweep. Returns the validation loss of what was
    written, which is not that of the adapter: that was trained on the base in 4 bits; None when it was trained on the
    validation rows. Raises what `merging.merge` does.
    """
    merging = importlib.import_module("trainables.merging")  # brings torch, which nothing else here needs
    with _replacing(to) as unfinished:
        loss: float | None = merging.merge(model, found.path, unfinished, None if entry.unscored else tokens)
        shutil.copytree(tokens / data.TOKENIZER, unfinished, dirs_exist_ok=True)
        card = model_card(ledger, entry, named, found.step, to.name, merged=True, loss=loss)
        (unfinished / "README.md").write_text(str(card))
        _write_facts(unfinished, named, entry, _numbers(entry, found) | {"validation_loss_merged": loss})
    return loss


def take_home(sweep: Status, number: int | None = None, *, merge: bool = False, public: bool = False) -> Home:
    """Put the best checkpoint of a trial, or of the sweep, into a new directory here: its adapter, or the merged model.

    With `public` no file names a path of this machine. Raises `NotKept`, and what `data.prepare`, where tokens are to
    be made again, and `merging.merge` do.
    """
    model, place = sweep.spec.model, sweep.place
    if model is None:
        raise NotKept(f"{place.url}: a toy has nothing to take home")
    entry, best = chosen(place, sweep.entries, number)
    to = Path(f"{sweep.spec.name}-{entry.number:03d}{'-merged' if merge else ''}")
    if to.exists() or to.is_symlink():
        raise NotKept(f"{to} is there already; move it away, or export in another directory")
    tokens, inputs = tokenised(place), sweep.ledger.noted("inputs")
    if tokens is None:  # they were deleted, or the sweep ran on other machines
        assert sweep.spec.data is not None
        if data.content_hashes(sweep.spec.data, model) != inputs:
            raise NotKept(f"{place.url}: its tokens are gone, and model or data are not what they were; restore those")
        tokens = data.prepare(sweep.spec.data, model, place.paths.tokens).path
    if merge and data.model_hash(model) != inputs["model"]:
        raise NotKept(f"{model} is not what the sweep trained on; restore that, or do not merge")
    named = without_path(model) if public else model
    result = UNSCORED if entry.unscored else f"validation loss {best.loss:.4f}"
    if merge:
        loss = export_merged(sweep.ledger, to, model, named, tokens, entry, best)
        if loss is not None and best.loss is not None:
            result += f" with the base in 4 bits, {loss:.4f} merged in bf16 ({loss - best.loss:+.4f})"
    else:
        export(sweep.ledger, to, named, tokens / data.TOKENIZER, entry, best)
    if best.objective is not None and not entry.criterion.is_loss:
        result = f"{entry.criterion.name} {entry.criterion.text(best.objective)}, {result}"
    return Home(to, entry.number, best.step, result)


def chosen(place: Place, entries: Sequence[Entry], number: int | None) -> tuple[Entry, checkpoint.Checkpoint]:
    """A trial, or the best one, and its best checkpoint. Raises `NotKept`."""
    numbers = [entry.number for entry in entries]
    if number is not None and number not in numbers:
        raise NotKept(f"there is no trial {number}; {place.url} has {', '.join(map(str, numbers)) or 'none'}")
    complaints: list[str] = []
    asked = [entry for entry in entries if number in (None, entry.number)]
    wanted = [entry for entry in asked if entry.best or entry.unscored]
    if asked and all(entry.state is TrialState.FAIL for entry in asked) and not wanted:
        who = f"all trials ({len(asked)}) failed" if number is None else f"trial {number} failed"
        raise NotKept(f"{place.url}: {who} before an evaluation; why is told by: {place.command('status')}")
    found = _best_intact(wanted, place, complaints.append)
    if found is None:
        kept = [entry.number for entry in entries if checkpoint.best(place.paths.trial(entry.number))]
        what = "no trial" if number is None else f"trial {number} no longer"
        why = f" ({'; '.join(complaints)})" if complaints else ""
        once_more = (ranking(wanted) or wanted)[:1]
        again = [f"; train it again: {place.command('rerun', '--trial', str(each.number))}" for each in once_more]
        raise NotKept(
            f"{place.url}: {what} has an intact checkpoint of an evaluation{why}; of trials that have ended the best"
            f" `checkpoint.keep` have theirs, here {', '.join(map(str, kept)) or 'none'}{''.join(again)}"
        )
    return found


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


@dataclass(frozen=True)
class Upload:
    """What of a sweep is uploaded, and where to."""

    repo: str
    """Of the Hub."""
    ledger: Ledger
    place: Place
    model: str
    tokenizer: Path
    """Directory of its files."""
    note: Callable[[str], object]
    """Is told where it is, and when it is not."""

    @property
    def by_hand(self) -> str:
        """What to do when it could not be done."""
        verb = self.place.command("export", "--push-to", self.repo)
        return f"once the sweep has ended, upload it with: {verb}"


@contextmanager
def pushing_best(upload: Upload, hurried: Callable[[], bool]) -> Iterator[None]:
    """While the block runs, upload the best adapter whenever there is a better one.

    Nothing waits for it, but the end, unless that is `hurried`. Of those that come while one is uploaded, the last is
    next. An empty block uploads the one that there is, with a card of this moment; the Hub's client leaves out files
    that are there already.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_push_best, args=(upload, ended), name="push", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        if not hurried():
            thread.join(LAST_SECONDS)
            if thread.is_alive():
                upload.note(f"checkpoint.push_to: not done after {LAST_SECONDS:g} s; {upload.by_hand}")


def _push_best(upload: Upload, ended: threading.Event) -> None:
    """The thread of `pushing_best`: looks until it has `ended`, and then once more."""
    disable_progress_bars()  # they would be drawn into the live table
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns when no file has changed
    pushed: object = None
    rests_until = 0.0  # time.monotonic(), after a failure
    is_last = False
    while not is_last:
        is_last = ended.wait(LOOK_SECONDS)
        if time.monotonic() < rests_until and not is_last:
            continue
        try:
            entries = upload.ledger.entries()
            best = next(iter([*ranking(entries), *(entry for entry in entries if entry.unscored)]), None)
            if best is not None and (first := (best.number, best.best)) != pushed:
                _push(upload, entries, best)
                pushed, rests_until = first, 0.0
        except Exception as error:  # noqa: BLE001 - it is told; no sweep ends for an upload
            gave_way = isinstance(error, NotKept | FileNotFoundError)  # the checkpoint, to a better one
            if is_last or not (gave_way or rests_until):
                upload.note(f"checkpoint.push_to: {upload.repo} lacks the best adapter ({error}); {upload.by_hand}")
            if not gave_way:
                rests_until = time.monotonic() + AGAIN_SECONDS


def _push(upload: Upload, entries: Sequence[Entry], best: Entry) -> None:
    """Upload the adapter of the `best` trial, or of one that is better by now; none that is worse in its place."""
    lowest, text = best.best[1] if best.best else math.inf, best.criterion.text
    entry, found = chosen(upload.place, entries, None)
    if found.objective is not None and found.objective > lowest:  # it may just have given way to a better one
        entry, found = chosen(upload.place, entries, None)
    if found.objective is not None and found.objective > lowest:
        upload.note(
            f"checkpoint.push_to: {upload.repo} is left as it is: the checkpoint of trial {best.number:03d}, which is"
            f" the best ({text(lowest)}), is damaged or gone. There is an intact one of trial {entry.number:03d}"
            f" ({text(found.objective)}); {upload.by_hand}"
        )
        return
    with TemporaryDirectory(prefix="qlora-sweep-") as scratch:
        adapter = Path(scratch) / upload.repo.rpartition("/")[2]
        export(upload.ledger, adapter, without_path(upload.model), upload.tokenizer, entry, found)
        upload.note(f"The best adapter so far is at {push(adapter, upload.repo)}")


def without_path(model: str) -> str:
    """What a base model is called elsewhere: its Hub id, or a directory to be filled in, which is no Hub id either."""
    return model if data.is_hub_id(model) else f"PATH/TO/{Path(model).name}"


class NotKept(Exception):
    """There is nothing to be taken home; the message says what there is."""


@contextmanager
def _replacing(to: Path) -> Iterator[Path]:
    """A new directory that takes the place of `to` when it is done."""
    with TemporaryDirectory(prefix=f".{to.name}.", dir=to.absolute().parent) as scratch:
        unfinished = Path(scratch) / to.name
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):  # safetensors gives its files to their owner alone
            if file.is_file():
                file.chmod((unfinished / "sweep.json").stat().st_mode)
        shutil.rmtree(to, ignore_errors=True)
        unfinished.rename(to)


def _numbers(entry: Entry, found: checkpoint.Checkpoint) -> dict[str, Any]:
    """What sweep.json says of a checkpoint."""
    numbers: dict[str, Any] = {"step": found.step, "validation_loss": found.loss}
    if found.objective is not None and not entry.criterion.is_loss:
        numbers[OBJECTIVE] = entry.criterion.turned(found.objective)
    return numbers


def _write_facts(directory: Path, model: str, entry: Entry, numbers: Mapping[str, Any]) -> None:
    facts = {"config": entry.config.model_dump(mode="json"), "model": model, "trial": entry.number} | dict(numbers)
    (directory / "sweep.json").write_text(json.dumps(facts, indent=2) + "\n")


def model_card(
    ledger: Ledger,
    entry: Entry,
    model: str,
    step: int,
    directory: str,
    *,
    merged: bool = False,
    loss: float | None = None,
) -> ModelCard:
    """What it is, how it was found, and how to load it from the `directory`.

    `merged`: it is no adapter; `loss` is the validation loss of the whole model then, where there is one.
    """
    library = "transformers" if merged else "peft"
    base_model = model if data.is_hub_id(model) else None  # the Hub refuses a path
    name = base_model or Path(model).name
    card = ModelCardData(library_name=library, base_model=base_model, tags=["qlora", "qlora-sweep", "lora"])
    entries = ledger.entries()
    config = entry.config
    settings = "\n".join(f"| {name} | {value} |" for name, value in config.model_dump(mode="json").items())
    environment, inputs = ledger.noted("environment") or {}, ledger.noted("inputs") or {}
    versions = "\n".join(
        [
            *(f"| {name} | {value} |" for name, value in environment.items()),
            *(f"| machine | {machine} |" for machine in ledger.noted(MACHINES) or ()),
            *(f"| {name}, hash of its content | {value} |" for name, value in inputs.items()),
        ]
    )
    spec = ledger.noted(PORTABLE)
    what = f"{name}, fine-tuned with QLoRA" if merged else f"QLoRA adapter for {name}"
    if entry.unscored:
        found = f"Trial {entry.number} as it was after its last optimiser step, {step}."
    else:
        rank = [ranked.number for ranked in ranking(entries)].index(entry.number) + 1
        place = "The best" if rank == 1 else f"Number {rank}"
        found = (
            f"{place} of {counted(len(entries), 'trial')} by {entry.criterion.explained}, taken after optimiser\n"
            f"step {step} of trial {entry.number}."
        )
    if base_model is None:
        found += f"\n\nIts base, {name}, is a local model with the content hash {inputs.get('model', 'not on record')}."
    bf16 = config.compute_dtype == "bf16"
    how = _LOAD_MERGED if merged else _LOAD_ADAPTER
    return ModelCard(
        f"""---
{card.to_yaml()}
---

# {what}

{found}

```
{chr(10).join(conclusion(ledger))}
```
{"" if loss is None else _MERGED.format(loss=loss)}
{how.format(config=config, model=model, directory=directory, dtype=_TORCH[config.compute_dtype], bf16=bf16)}
| hyperparameter | value |
|---|---|
{settings}

| made with | version |
|---|---|
{versions}
{"" if spec is None else _SEARCHED.format(spec=spec)}"""
    )


_SEARCHED = """
The rows, how long a trial trained, and what was searched, as `python -m sweep run` takes it:

```yaml
{spec}```
"""
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
