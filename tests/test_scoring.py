"""What the winner writes, and what a metric makes of it."""

import math
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from search_spaces import pricing
from sweep import scoring
from sweep.place import Place
from sweep.preemption import Drain, draining_on_signals
from sweep.study import Ledger
from tests.ledgers import add_trial, memory_ledger
from tests.test_qlora_sft import CONFIG, finish, stock_base
from tests.test_qlora_sft import tiny as tiny  # a fixture
from trainables import answers, data, qlora_sft
from trainables.checkpoint import ADAPTER
from trainables.packed import base
from trainables.packed.base import Base
from trainables.protocol import Job, OutOfMemory, Scored
from trainables.scoring import score


@pytest.fixture(scope="module")
def trained(tiny: Job, tmp_path_factory) -> tuple[Path, list[float]]:
    """A directory with an adapter, and the validation losses of its evaluations, that of the base first."""
    trial = qlora_sft.start(CONFIG, Job(tiny.model, tiny.tokens, tiny.budget, score_base=True), None)
    finish(trial)
    directory = tmp_path_factory.mktemp("adapter")
    trial.save(directory)
    trial.close()
    return directory, [evaluation.loss for evaluation in trial.evaluations]


@pytest.mark.parametrize("adapted", [True, False])
def test_loss_is_that_of_the_trial_and_completions_are_those_of_peft(tiny, trained, adapted, monkeypatch):
    directory, losses = trained
    monkeypatch.setitem(qlora_sft.SCORED_AT_ONCE, "cpu", 200)  # batches of some rows of different lengths
    adapter = (directory / ADAPTER).read_bytes() if adapted else None
    tokens = Path(tiny.tokens)
    scored = score(tiny.model, CONFIG, adapter, tokens, "validation", halvings=0, loss=True, completions=True)
    assert scored.loss == pytest.approx(losses[-1] if adapted else losses[0], abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tokens / data.TOKENIZER)
    rows = data.load(tokens).validation
    assert scored.rows == len(rows) == len(scored.completions)
    plain = stock_base(tiny)
    if adapted:
        plain = PeftModel.from_pretrained(plain, str(directory))
    plain.eval()
    longest = max(int(supervised.sum()) for _, supervised in (rows[i] for i in range(len(rows))))
    for number in range(len(rows)):
        ids, supervised = rows[number]
        prompt = torch.from_numpy(ids[~supervised].astype(np.int64))[None]
        with torch.no_grad():
            written = plain.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        assert scored.completions[number] == tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
        assert scored.prompts[number].endswith(" =")
        assert scored.references[number] == tokenizer.decode(ids[supervised], skip_special_tokens=True)
        assert int(scored.references[number]) in range(1, 10)
    assert len(set(scored.completions)) > 1 or not adapted


def test_only_what_is_asked_for(tiny, trained):
    tokens = Path(tiny.tokens)
    asked = {"halvings": 0, "loss": True, "completions": False}
    assert score(tiny.model, CONFIG, None, tokens, "validation", **asked).completions == ()
    asked = {"halvings": 1, "loss": False, "completions": True}
    assert score(tiny.model, CONFIG, None, tokens, "validation", **asked).loss is None


def test_memory_that_runs_out_halves_what_is_scored_together(tiny, trained, monkeypatch):
    """Down to a single row; what is found is the same."""
    adapter, tokens = (trained[0] / qlora_sft.ADAPTER).read_bytes(), Path(tiny.tokens)
    asked = (tiny.model, CONFIG, adapter, tokens, "validation")
    whole = score(*asked, halvings=0, loss=True, completions=True)
    roomy, free, tried = base.label_losses, base.Base.continuations, []

    def scarce(rows: int, work, *arguments):
        tried.append(rows)
        if rows > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*arguments)

    monkeypatch.setattr(base, "label_losses", lambda model, rows: scarce(len(rows.input_ids), roomy, model, rows))
    monkeypatch.setattr(base.Base, "continuations", lambda *given: scarce(len(given[2]), free, *given))
    for fits in (3, 1):
        tried.clear()
        scored = score(*asked, halvings=0, loss=True, completions=True)
        assert scored.loss == pytest.approx(whole.loss, abs=1e-6)
        assert (scored.references, scored.completions) == (whole.references, whole.completions)
        assert sum(rows for rows in tried if rows <= fits) == 2 * whole.rows  # nothing twice
        assert sum(rows > fits for rows in tried) < 12
    fits = 0
    with pytest.raises(OutOfMemory, match=r"a single row of \d+ tokens does not fit beside the model; free memory"):
        score(*asked, halvings=0, loss=True, completions=False)


def test_rows_with_the_answers_of_others(tiny):
    validation = data.load(Path(tiny.tokens)).validation
    asked = {"halvings": 0, "loss": False, "completions": True}
    scored = score(tiny.model, CONFIG, None, Path(tiny.tokens), "validation", **asked)
    found = answers.shifted(Path(tiny.tokens), validation, 3)
    assert (found.rows, found.prompts, found.references) == (3, scored.prompts[:3], scored.references[:3])
    assert found.completions == (*scored.references[1:3], scored.references[0])


def written_by(trial) -> list[Scored]:
    """What a trial writes at each evaluation, to its end."""
    found = []
    while True:
        slice_ = trial.advance(0.0)
        assert (slice_.written is None) == (slice_.evaluation is None)
        found += [slice_.written] if slice_.written else []
        if slice_.done:
            return found


def test_a_trial_writes_what_its_saved_adapter_writes(tiny, trained, monkeypatch):
    directory, losses = trained
    monkeypatch.setitem(qlora_sft.SCORED_AT_ONCE, "cpu", 200)
    trial = qlora_sft.start(CONFIG, replace(tiny, score_base=True, completions=10), None)
    written = written_by(trial)
    trial.close()
    assert [evaluation.loss for evaluation in trial.evaluations] == losses  # which do not change by it
    assert len(written) == len(losses)
    for found, adapter in ((written[0], None), (written[-1], (directory / qlora_sft.ADAPTER).read_bytes())):
        asked = {"halvings": 0, "loss": False, "completions": True}
        scored = score(tiny.model, CONFIG, adapter, Path(tiny.tokens), "validation", **asked)
        assert found.rows == 10
        assert found.prompts == scored.prompts[:10]
        assert found.references == scored.references[:10]
        assert found.completions == scored.completions[:10]
    assert written[0].completions != written[-1].completions


def test_no_memory_for_many_answers_halves_them_and_for_a_single_one_has_the_evaluation_begin_again(tiny, monkeypatch):
    """What a step learns from at once stays as it is."""
    job = replace(tiny, score_base=True, completions=100)  # there are 24
    trial = qlora_sft.start(CONFIG, job, None)
    continuations, tried = Base.continuations, []

    def scarce(*asked):
        tried.append(len(asked[2]))
        if tried[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return continuations(*asked)

    monkeypatch.setattr(Base, "continuations", scarce)
    fits = 0
    with pytest.raises(OutOfMemory, match="a single row of"):
        trial.advance(math.inf)
    assert trial.evaluations == ()
    fits = 3
    tried.clear()
    slice_ = trial.advance(math.inf)
    assert (slice_.evaluation.evaluation, slice_.written.rows) == (0, 24)
    assert sum(rows for rows in tried if rows <= fits) == 24  # nothing twice
    prompts = sum(len(prompt) for prompt, _ in data.with_answers(data.load(Path(tiny.tokens)).validation))
    assert slice_.evaluation.tokens > len(trial.validation.input_ids) + prompts
    trial.close()


SCORED = Scored(2, None, ("a", "b"), ("100", "1,000"), ("$90.5", "no idea"))


def test_prices():
    assert scoring.values_of("search_spaces.pricing:errors", pricing.errors, SCORED) == {
        "mean absolute error, $": (9.5 + 1000) / 2,
        "share within 20 %": 0.5,
    }
    with pytest.raises(ValueError, match=r"raised ValueError: the reference 'cheap' has no price"):
        scoring.values_of("m:f", pricing.errors, Scored(1, None, ("a",), ("cheap",), ("1",)))


def raises(*texts):
    raise KeyError("nothing")


def leaves(*texts):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (raises, "raised KeyError: 'nothing'"),
        (leaves, "raised SystemExit: 3"),
        (lambda *texts: "good", "gave 'good', should be a finite number or a dict of them"),
        (lambda *texts: True, "gave True, should be"),
        (lambda *texts: None, "gave None, should be"),
        (lambda *texts: math.nan, "gave nan, should be"),
        (lambda *texts: {}, "gave {}, should be"),
        (lambda *texts: {"a": 1.0, "b": [2]}, "should be a finite number or a dict of them"),
        (lambda one: 1.0, "raised TypeError: "),
    ],
)
def test_a_metric_that_gives_no_number(metric, message):
    with pytest.raises(ValueError, match=r".") as caught:
        scoring.values_of("m:f", metric, SCORED)
    assert message in str(caught.value)


def test_a_number_has_the_name_of_the_function():
    assert scoring.values_of("package.module:share", lambda *texts: np.float32(0.5), SCORED) == {"share": 0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:f", "nowhere.at_all:f cannot be imported (ModuleNotFoundError: No module named 'nowhere'"),
        ("search_spaces.pricing:error", "search_spaces.pricing:error cannot be imported (AttributeError: "),
        ("search_spaces.pricing:CLOSE", "is 0.2, should be a function of prompts"),
    ],
)
def test_a_metric_that_is_not_there(name, message):
    with pytest.raises(ValueError, match="metric: ") as caught:
        scoring.find_metric(name)
    assert message in str(caught.value)


def test_a_metric_that_was_edited_meanwhile(tmp_path, monkeypatch):
    """In a notebook, between two sweeps; a module that stayed as it was keeps its state."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "metric_of_mine.py"
    for text, value in (("1.0", 1.0), ("2.0 + 1.0", 3.0), ("4.0", 4.0)):
        file.write_text(f"def metric(*texts):\n    return {text}\n")
        os.utime(file, (value, value))  # a backup may be old
        found = scoring.find_metric("metric_of_mine:metric")
        assert scoring.values_of("m:f", found, SCORED) == {"f": value}
    assert scoring.find_metric("search_spaces.pricing:errors") is pricing.errors
    assert scoring.find_metric("math:fsum") is math.fsum
    monkeypatch.setattr("__main__.metric", raises, raising=False)
    assert scoring.find_metric("__main__:metric") is raises


def test_another_file_of_what_is_searched_for_is_told(tmp_path, monkeypatch):
    """Once there are values that it may not compare with. Whatever it is, it is to be asked before training."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "metric_that_changes.py"
    file.write_text("def metric(*texts):\n    return 1.0\n")
    ledger, metric = memory_ledger(), scoring.find_metric("metric_that_changes:metric")
    number = add_trial(ledger)

    def told() -> list[str]:
        assert not scoring.was_asked(ledger, metric)
        found = scoring.note_asked(ledger, "m:f", metric)
        assert scoring.was_asked(ledger, metric)
        return found

    assert told() == []
    file.write_text("def metric(*texts):\n    return 2.0\n")
    assert told() == []
    ledger.report(number, 0, 2.0)  # the base has one
    file.write_text("def metric(*texts):\n    return 3.0\n")
    assert told() == [
        f"metric m:f: {file} is not the file that earlier values are of; they may not compare with new ones"
    ]
    assert len(scoring.note_asked(ledger, "m:f", metric)) == 1  # also in the next run
    ledger = memory_ledger()
    assert not scoring.was_asked(ledger, math.fsum)
    assert scoring.note_asked(ledger, "math:fsum", math.fsum) == []
    assert scoring.was_asked(ledger, math.fsum)


def score_again(ledger: Ledger, number: int, metric: str | None) -> bool:
    """Ask for the scores of a trial; Ray, which is not running, would have to be asked for new ones."""
    found = None if metric is None else (metric, pricing.errors)
    entry = ledger.entry(number)
    return scoring.score_winner(
        ledger, Place("/nowhere"), entry, 24, "model", "tokens", "test", found, {}, Drain(), [].append
    )


@pytest.mark.parametrize(("hangs", "split"), [(True, "validation"), (True, "test"), (False, "test")])
def test_a_metric_that_hangs_is_left_when_the_sweep_is_told_to_end(hangs, split, tmp_path, monkeypatch):
    """The loss on the test rows, which was taken before, is kept."""
    ledger, place, drain, over, notes = memory_ledger(), Place(str(tmp_path)), Drain(), Event(), []
    winner = ledger.entry(add_trial(ledger))
    place.paths.best.mkdir()
    (place.paths.best / "adapter_model.safetensors").touch()
    remote = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda adapter: adapter))
    monkeypatch.setattr("ray.remote", lambda task: remote)
    monkeypatch.setattr("ray.wait", lambda asked, **how: (asked, []))
    monkeypatch.setattr("ray.get", lambda asked: [replace(SCORED, loss=2.0)] * 2)

    def metric(*texts):
        if hangs and not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
            over.wait(20)
        return 1.0

    judged = ("m:f", metric)
    with draining_on_signals(drain, 60.0, ""):
        done = scoring.score_winner(
            ledger, place, winner, 24, "model", "tokens", split, judged, {}, drain, notes.append
        )
    over.set()
    assert drain() == hangs
    found = scoring.scores(ledger)
    assert done == (found is not None) == (split == "test")
    if found is not None:
        assert (found.loss, found.metric, found.values) == (2.0, *((None, None) if hangs else ("m:f", {"f": 1.0})))
    assert ("metric m:f has not come to an end" in notes[-1]) == hangs


def test_the_test_rows_are_scored_once(monkeypatch):
    ledger = memory_ledger()
    for number in (add_trial(ledger), add_trial(ledger)):
        ledger.report(number, 1, 1.5)
        ledger.complete(number)
    mine = scoring.Scores(0, 24, "test", 200, 1.5, 4.9, "m:f", {"error": 7.0}, {"error": 900.0}, None)
    ledger.note("scores", [asdict(mine) | {"of_a_newer_version": 1}])
    assert scoring.scores(ledger) == mine
    assert scoring.lines(ledger) == [
        "test set, 200 rows: the best checkpoint of trial 000, and the base model",
        "loss                  1.5000  (base 4.9000)",
        "error                 7  (base 900)",
    ]
    asked: list[bytes | None] = []
    monkeypatch.setattr("ray.remote", lambda task: asked.append(None))
    assert not score_again(ledger, 0, "m:f")
    assert not score_again(ledger, 0, None)
    assert asked == []
    for number, metric in ((0, "m:other"), (1, "m:f")):  # another metric, another winner
        with pytest.raises(AttributeError, match="options"):
            score_again(ledger, number, metric)
    assert len(asked) == 2
    ledger.note("scores", [asdict(mine), asdict(replace(mine, trial=1))])
    assert scoring.lines(ledger)[-1] == "The test set was scored before, with winners of that time: 0"


def test_that_a_metric_gave_no_number_is_said():
    """To all who read the scores; why, to whoever ran the sweep alone."""
    ledger = memory_ledger()
    found = scoring.Scores(0, 24, "validation", 20, None, None, "m:f", None, None, "gave 'good' of /home/me")
    told = "metric m:f gave no number for what trial 000 writes on the validation rows"
    for scores, lines in (
        (found, [told]),
        (
            replace(found, split="test", loss=1.5, base_loss=4.9),
            [
                "test set, 20 rows: the best checkpoint of trial 000, and the base model",
                "loss                  1.5000  (base 4.9000)",
                told.replace("validation", "test"),
            ],
        ),
        (
            replace(found, values={"error": 7.0}),
            [
                "validation set, 20 rows: the best checkpoint of trial 000, and the base model",
                "error                 7",
                told.replace("trial 000", "the base"),
            ],
        ),
    ):
        ledger.note("scores", [asdict(scores)])
        assert scoring.lines(ledger) == lines
        assert scoring.trouble(ledger) == [
            "metric m:f: gave 'good' of /home/me; mend it and run the sweep again, it is computed anew"
        ]
