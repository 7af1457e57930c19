"""The YAML file: what a good one becomes, and every kind of mistake with its line, told all at once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sweep import spec as specs
from sweep.spec import SpecError, SweepSpec, load

SHIPPED = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))

GOOD = """\
name: demo
trainable: toy
budget: {steps: 40, evaluations: 5}
search:
  trials: 8
  sampler: tpe
  first: [{r: 8, alpha: 16}]
early_stopping: {grace: 1, reduction: 3}
space:
  r: {values: [4, 8, 16]}
  alpha: {times: r, values: [1, 2]}
  learning_rate: {min: 2e-5, max: 2e-3, log: true}
  quant_type: {values: [nf4, fp4]}
"""


def written(tmp_path: Path, text: str | bytes, name: str = "space.yaml") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def problems(path: Path, overrides: tuple[str, ...] = ()) -> list[tuple[int | None, str]]:
    with pytest.raises(SpecError) as caught:
        load(path, overrides)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    for problem in caught.value.problems:
        place = problem.file if problem.line is None else f"{problem.file}:{problem.line}"
        assert str(problem) == f"{place}: {problem.message}"
    return [(problem.line, problem.message) for problem in caught.value.problems]


def test_a_good_file_is_one_typed_object(tmp_path: Path) -> None:
    spec = load(written(tmp_path, GOOD))
    assert (spec.name, spec.trainable, spec.model, spec.data) == ("demo", "toy", None, None)
    assert (spec.budget.steps, spec.budget.epochs, spec.budget.hours) == (40, None, None)
    assert spec.budget.per_trial.total_steps(rows=480, batch_size=8) == 40
    assert spec.search.first == ({"r": 8, "alpha": 16},)
    assert spec.early_stopping
    assert (spec.early_stopping.grace, spec.early_stopping.reduction) == (1, 3.0)
    assert spec.space.searched == ("r", "quant_type", "learning_rate", "alpha")
    assert (spec.tracking.mode, spec.storage, spec.ledger) == ("auto", "sweeps", None)
    assert (spec.resources.cpus, spec.resources.gpus, spec.resources.concurrency) == (1.0, 0.0, None)
    assert (spec.preemption.grace, spec.checkpoint.every, spec.checkpoint.keep) == (30.0, 5.0, 3)
    with pytest.raises(ValidationError):
        spec.name = "other"


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_shipped_file_is_good_and_opens_with_its_command(path: Path) -> None:
    spec = load(path, inputs=False)
    assert path.read_text().startswith(f"# python -m sweep run search_spaces/{path.name}\n")
    assert spec.search.first[0] == {"r": 16, "alpha": 32, "learning_rate": 2e-4}  # the usual default is there to beat


def test_demo_toy_and_gpu_example_are_shipped() -> None:
    assert {"llama-3.1-8b.yaml", "pricer.yaml", "toy.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_dump_is_read_back_as_an_equal_spec_from_anywhere(path: Path, tmp_path: Path) -> None:
    spec = load(path, inputs=False)
    again = load(written(tmp_path, specs.dump(spec)), inputs=False)
    assert again == spec
    assert specs.dump(again) == specs.dump(spec)
    assert specs.changes(spec, again) == []


def test_dump_keeps_text_that_looks_like_something_else(tmp_path: Path) -> None:
    spec = load(
        written(tmp_path, GOOD.replace("name: demo", "name: '2e-5'\nstorage: 'null'\ntracking: {project: 'true'}"))
    )
    assert (spec.name, spec.storage, spec.tracking.project) == ("2e-5", "null", "true")
    assert load(written(tmp_path, specs.dump(spec), "again.yaml")) == spec


def test_dump_of_a_space_with_nothing_in_it(tmp_path: Path) -> None:
    text = "name: t\ntrainable: toy\nbudget: {steps: 4, evaluations: 1}\nsearch: {trials: 1}\nspace: {}\n"
    spec = load(written(tmp_path, text))
    assert load(written(tmp_path, specs.dump(spec), "again.yaml")) == spec
    assert "cost" not in specs.dump(spec)
    priced = load(written(tmp_path, text + "cost: {per_hour: 2}\n", "priced.yaml"))
    assert load(written(tmp_path, specs.dump(priced), "again.yaml")) == priced


def test_every_key_has_a_description() -> None:
    assert len(specs.keys()) == 42
    assert [key for key, field in specs.keys().items() if not field.description] == []


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "2E-5", "+2e-05", ".2e-4", "0.00002", "20.e-6"])
def test_a_number_is_one_as_people_write_it(text: str, tmp_path: Path) -> None:
    spec = load(written(tmp_path, GOOD.replace("2e-5", text)))
    assert spec.space.plain()["learning_rate"]["min"] == 2e-5


MISTAKES: list[tuple[str, str, str, int, list[str]]] = [
    ("unknown key", "name: demo", "name: demo\nnaem: x", 2, ["naem: unknown key", "did you mean name?"]),
    ("key of a section", "  trials: 8", "  trails: 8", 5, ["search.trails: unknown key", "did you mean trials?"]),
    ("key of another place", "name: demo", "name: demo\nepochs: 1", 2, ["epochs: unknown key", "budget.epochs"]),
    ("field at top level", "name: demo", "name: demo\nlr: 1e-4", 2, ["lr: unknown key", "space.learning_rate"]),
    ("synonym", "  r: {", "  lora_r: {", 10, ["space.lora_r: unknown key", "did you mean r?"]),
    ("key that is no name", "name: demo", "name: demo\n[1]: 2", 2, ["a key should be a name"]),
    ("doubled key", "name: demo", "name: demo\nname: demo", 2, ["name: stands twice", "first on line 1"]),
    ("doubled field", "  alpha:", "  r: 8\n  alpha:", 11, ["space.r: stands twice", "first on line 10"]),
    ("missing name", "name: demo", "storage: x", 1, ["name: is missing"]),
    ("missing trials", "  trials: 8\n", "", 4, ["search.trials: is missing"]),
    ("missing section", "budget: {steps: 40, evaluations: 5}", "", 1, ["budget: is missing"]),
    ("empty section", "{steps: 40, evaluations: 5}", "", 3, ["budget: received nothing", "a mapping (epochs, steps"]),
    ("text for a whole number", "trials: 8", "trials: '8'", 5, ['received "8"', "a whole number", "mean 8"]),
    ("fraction for a whole number", "trials: 8", "trials: 8.5", 5, ["received 8.5", "a whole number"]),
    ("truth for a whole number", "trials: 8", "trials: true", 5, ["received true", "a whole number"]),
    ("nothing", "trials: 8", "trials:", 5, ["received nothing", "a whole number"]),
    ("too small", "trials: 8", "trials: 0", 5, ["received 0", "greater than or equal to 1"]),
    ("wrong choice", "sampler: tpe", "sampler: tpee", 6, ['"tpee"', "tpe, random, grid or gp", "did you mean tpe?"]),
    ("wrong trainable", "trainable: toy", "trainable: qlora", 2, ['"qlora"', "did you mean qlora_sft?"]),
    ("number for text", "name: demo", "name: 123", 1, ["received 123", "text", 'did you mean "123"']),
    ("nan", "reduction: 3", "reduction: .nan", 8, ["early_stopping.reduction: received .nan", "a finite number"]),
    ("infinity", "max: 2e-3", "max: 1e999", 12, ["received 1e999", "a finite number"]),
    ("no epochs nor steps", "steps: 40, ", "", 3, ["budget: received neither of epochs and steps"]),
    ("epochs and steps", "steps: 40", "steps: 40, epochs: 1", 3, ["budget: received both of epochs and steps"]),
    ("fewer steps than evaluations", "steps: 40", "steps: 4", 3, ["budget.steps: received 4", "5 evaluations"]),
    (
        "nothing to choose by",
        "evaluations: 5",
        "evaluations: 0",
        3,
        ["no validation loss to go by; set search.trials: 1", "leave verify and objective out"],
    ),
    ("zero epochs", "steps: 40", "epochs: 0", 3, ["budget.epochs: received 0", "greater than 0"]),
    ("long grace", "grace: 1", "grace: 6", 8, ["early_stopping.grace: received 6", "at most the 5 evaluations"]),
    ("reduction of 1", "reduction: 3", "reduction: 1", 8, ["early_stopping.reduction: received 1", "greater than 1"]),
    ("early stopping on", "{grace: 1, reduction: 3}", "true", 8, ["received true", "(grace, reduction) or false"]),
    ("gp with early stopping", "sampler: tpe", "sampler: gp", 6, ["complete trials only", "early_stopping: false"]),
    ("grid over a range", "sampler: tpe", "sampler: grid", 12, ["space.learning_rate", "has no grid"]),
    (
        "value out of bounds",
        "{values: [4, 8, 16]}",
        "\n    values:\n    - 4\n    - 0",
        13,
        ["space.r.values.1", "received 0"],
    ),
    ("empty range", "max: 2e-3", "max: 2e-5", 12, ["an empty range"]),
    ("inverted range", "max: 2e-3", "max: 2e-6", 12, ["min should be below max"]),
    ("log of zero", "min: 2e-5, max", "min: 0, max", 12, ["space.learning_rate.min: received 0"]),
    ("times of an unknown name", "times: r", "times: rr", 11, ["space.alpha.times", '"rr"', "did you mean r?"]),
    ("times in a circle", "times: r", "times: alpha", 11, ["alpha needs alpha"]),
    ("when on an unknown name", "[nf4, fp4]", "[nf4, fp4], when: {rr: 4}", 13, ["when.rr: unknown key"]),
    ("when on no name", "[nf4, fp4]", "[nf4, fp4], when: {rr: []}", 13, ["when.rr: unknown key"]),
    ("when never", "[nf4, fp4]", "[nf4, fp4], when: {r: []}", 13, ["when.r: received an empty list"]),
    ("product too large", "values: [1, 2]", "values: [1e308]", 11, ["space.alpha", "should be a finite number"]),
    ("no space", "  quant", " quant", 13, ["is not YAML"]),
    ("first outside", "{r: 8, alpha: 16}", "{r: 32, alpha: 32}", 7, ["first.0.r: received 32", "should be 4, 8 or 16"]),
    ("first by default outside", "{r: 8, alpha: 16}", "{r: 8}", 7, ["first.0.alpha: not named", "32.0", "name it"]),
    (
        "first names a factor",
        "{r: 8, alpha: 16}",
        "{alpha/r: 2}",
        7,
        ["search.first.0.alpha/r: unknown key", "mean alpha?"],
    ),
    ("first unknown", "alpha: 16}", "alpha: 16, lr: 1e-4}", 7, ["search.first.0.lr", "did you mean learning_rate?"]),
    ("first in another type", "alpha: 16}", "alpha: '16'}", 7, ['received "16"', "a number"]),
    ("first no list", "[{r: 8, alpha: 16}]", "{r: 8, alpha: 16}", 7, ["search.first: received", "a list"]),
    ("first no mapping", "[{r: 8, alpha: 16}]", "[8]", 7, ["search.first.0: received 8", "a mapping"]),
    ("first twice", "alpha: 16}]", "alpha: 16}, {alpha: 16, r: 8}]", 7, ["first.1: is the same", "as entry 0"]),
    (
        "first too many",
        "8\n  sampler: tpe\n  first: [",
        "1\n  first: [{r: 16}, ",
        6,
        ["first: received 2", "the 1 tri"],
    ),
    (
        "nothing searched",
        GOOD[GOOD.index("space:") :],
        "space: {r: 8, alpha: 16}",
        9,
        ["space: nothing is searched", "8 trials"],
    ),
    ("more than a GPU", "trainable: toy", "resources: {gpus: 2}", 2, ["resources.gpus: received 2.0", "at most 1"]),
    ("two GPUs", "name: demo", "name: demo\nresources: {gpus: 1.5}", 2, ["resources.gpus: received 1.5", "whole"]),
    (
        "storage",
        "name: demo",
        "name: demo\nstorage: ftp://bucket/x",
        2,
        ['storage: received "ftp://bucket/x"', "should be a directory, or begin with s3://"],
    ),
    ("a key in the URL", "name: demo", "name: demo\nstorage: s3://me:key@bucket", 2, ["alone; keys and endpoint"]),
    ("no ledger on S3", "name: demo", "name: demo\nstorage: s3://bucket/x", 1, ["ledger: is missing", "postgresql://"]),
    ("ledger", "name: demo", "name: demo\nledger: a.db", 2, ['ledger: received "a.db"', "sqlite:///"]),
    ("a password", "name: demo", "name: demo\nledger: me:planted@h", 2, ["ledger: received what may hold a password"]),
    ("name with ..", "name: demo", "name: ../demo", 1, ['name: received "../demo"', "a file name", "letters"]),
    ("name with a dot", "name: demo", "name: .demo", 1, ["a file name"]),
    ("name inside ..", "name: demo", "name: a..b", 1, ["a file name"]),
    ("absolute name", "name: demo", "name: /tmp/x", 1, ["a file name"]),
    ("empty name", "name: demo", "name: ''", 1, ["a file name"]),
    ("long name", "name: demo", f"name: {'x' * 101}", 1, ["at most 100"]),
    ("NUL in a name", "name: demo", 'name: "a\\0b"', 1, ["name: received", "a control character"]),
    ("NUL in a path", "name: demo", 'name: demo\nmodel: "a\\0b"', 2, ["model: received", "a control character"]),
    ("object tag", "name: demo", "name: !!python/object/apply:os.system [ls]", 1, ["name: the tag", "os.system"]),
    ("own tag", "trials: 8", "trials: !count 8", 5, ["search.trials: the tag !count is not allowed"]),
    ("number of too many digits", "trials: 8", f"trials: {'9' * 5000}", 5, ["which is no int"]),
    ("alias", "name: demo", "name: &n demo\nstorage: *n", 2, ["*n: aliases are not allowed"]),
    ("merge", "  r:", "  <<: *x\n  r:", 10, ["*x: aliases are not allowed"]),
    ("two documents", "search:", "---\nsearch:", 4, ["a second document starts here"]),
    ("tab", "  trials: 8", "\ttrials: 8", 5, ["is not YAML", "indent with spaces"]),
    ("nesting", "name: demo", f"name: {'[' * 5000}", 1, ["nested deeper than"]),
    ("unclosed", "[nf4, fp4]}", "[nf4, fp4", 14, ["is not YAML"]),
    ("missing file", "name: demo", "name: demo\nmodel: ./no", 2, ['model: received "./no"', "there is no"]),
    ("empty path", "name: demo", "name: demo\ndata: {train: ''}", 2, ["data.train", "should not be empty"]),
    ("missing data", "name: demo", "name: demo\ndata: {train: a.jsonl}", 2, ["data.train", '"a.jsonl"', "there is no"]),
    (
        "push a toy",
        "name: demo",
        "name: demo\ncheckpoint: {push_to: a/b}",
        2,
        ['push_to: received "a/b"', "no adapter"],
    ),
    ("no repository", "name: demo", "name: demo\ncheckpoint: {push_to: a b}", 2, ["a repository of the Hub"]),
    ("no data", "trainable: toy", "model: org/x", 1, ["data: is missing", "trainable: toy"]),
    ("no model", "trainable: toy", "data: {train: org/x}", 1, ["model: is missing"]),
    (
        "validation",
        "name: demo",
        "name: demo\ndata: {train: a/b, validation: 1.5}",
        2,
        ["received 1.5, should be less than 1"],
    ),
    ("one seed", "name: demo", "name: demo\nverify: {seeds: 1}", 2, ["verify.seeds: received 1", "equal to 2"]),
    ("metric", "name: demo", "name: demo\nmetric: a.b", 2, ['metric: received "a.b"', "package.module:function"]),
    ("metric of a toy", "name: demo", "name: demo\nmetric: a.b:c", 2, ["a toy writes nothing"]),
    (
        "objective of nothing",
        "name: demo",
        "name: demo\nobjective: {direction: minimize}",
        2,
        ["`metric`, which is missing"],
    ),
    ("no direction", "name: demo", "name: demo\nmetric: a.b:c\nobjective: {}", 3, ["objective.direction: is missing"]),
    (
        "a name that is taken",
        "name: demo",
        "name: demo\nmetric: a.b:loss\nobjective: {direction: maximize}",
        3,
        ["objective: is called loss"],
    ),
    ("validation type", "name: demo", "name: demo\ndata: {train: a/b, validation: []}", 2, ["text or a number"]),
]


@pytest.mark.parametrize(("old", "new", "line", "parts"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_told_with_its_line(old: str, new: str, line: int, parts: list[str], tmp_path: Path) -> None:
    assert GOOD.count(old) >= 1
    path = written(tmp_path, GOOD.replace(old, new, 1))
    found = problems(path)
    fitting = [text for at, text in found if at == line and all(part in text for part in parts)]
    assert len(fitting) == 1, found
    follow_up = {"is missing", "unknown key"}  # a misspelt key is a missing one too
    assert all(text in fitting or any(word in text for word in follow_up) for _, text in found), found


def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = """\
name: a/b
trainable: toy
budget: {epochs: 1, steps: 3, evaluations: 0}
search:
  trials: 2
  trials: 3
  smapler: tpe
  sampler: bayes
  first: [{r: 64, alpha: 64}, {quant_type: int4}]
space:
  r: {values: [8, 16]}
  alpha: {times: r, values: [1, 2]}
  dropuot: 0.1
  rslora: yes
resources: {cpus: 0}
model: !!python/name:os.system
data: {train: missing.jsonl}
"""
    found = problems(written(tmp_path, text))
    wanted = [
        (1, "name"),
        (3, "budget: received both"),
        (3, "budget.evaluations"),
        (6, "search.trials: stands twice"),
        (7, "search.smapler: unknown key; did you mean sampler?"),
        (8, "search.sampler: received"),
        (9, "search.first.1.quant_type: received"),
        (13, "space.dropuot: unknown key; did you mean dropout?"),
        (14, "space.rslora: received"),
        (15, "resources.cpus: received 0"),
        (16, "model: the tag"),
        (17, "data.train: received"),
    ]
    assert [line for line, _ in found] == sorted(line for line, _ in found if line)
    assert len(found) == len(wanted), found
    for line, start in wanted:
        assert any(at == line and text.startswith(start) for at, text in found), (line, start, found)


NO_FILES: list[tuple[str, bytes, int | None, list[str]]] = [
    ("empty", b"", None, ["received nothing", "should be a mapping"]),
    ("comment", b"# nothing\n", None, ["received nothing", "should be a mapping"]),
    ("list", b"- a\n", 1, ['received ["a"]', "should be a mapping"]),
    ("word", b"\n\nname\n", 3, ['received "name"', "should be a mapping"]),
    ("latin-1", GOOD.replace("demo", "d\xe9mo").encode("latin-1"), 1, ["0xe9", "is not UTF-8"]),
    ("utf-16", GOOD.encode("utf-16"), 1, ["is not UTF-8"]),
    ("NUL", b"name: x\nstorage: a\0b\n", 2, ["is not YAML", "0x00"]),
]


@pytest.mark.parametrize(("content", "line", "parts"), [n[1:] for n in NO_FILES], ids=[n[0] for n in NO_FILES])
def test_what_is_no_spec_at_all(content: bytes, line: int | None, parts: list[str], tmp_path: Path) -> None:
    [(at, text)] = problems(written(tmp_path, content))
    assert at == line
    assert all(part in text for part in parts), text


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load(path) == load(written(tmp_path, GOOD, "other.yaml"))


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    written(tmp_path, GOOD, "pricer.yaml")
    [(line, text)] = problems(tmp_path / "priecr.yaml")
    assert (line, text) == (None, "there is no such file; did you mean pricer.yaml?")
    [(line, text)] = problems(tmp_path)
    assert (line, text) == (None, "is a directory; name the YAML file in it")
    assert "there is no such file" in problems(tmp_path / "no" / "pricer.yaml")[0][1]


def test_nothing_is_run_by_a_tag(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    problems(written(tmp_path, GOOD.replace("demo", f"!!python/object/apply:os.mkdir ['{victim}']")))
    assert not victim.exists()


def test_overrides_have_the_values_of_yaml_and_replace_what_the_file_has(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    spec = load(
        path,
        (
            "budget.epochs=2",
            "search.trials=4",
            "space.r.values=[8, 32]",
            "space.alpha=8",
            "space.learning_rate.max=1e-3",
            "search.first=[]",
            "tracking.project=here",
            "early_stopping=false",
        ),
    )
    assert (spec.budget.epochs, spec.budget.steps, spec.search.trials) == (2.0, None, 4)
    assert spec.space.plain()["r"] == {"values": [8, 32]}
    assert spec.space.plain()["alpha"] == 8.0
    assert spec.space.plain()["learning_rate"]["max"] == 1e-3
    assert (spec.search.first, spec.tracking.project, spec.early_stopping) == ((), "here", False)
    assert load(path, ("search.first.0.r=16",)).search.first == ({"r": 16, "alpha": 16},)


OVERRIDES = [
    ("search.trials=many", ['search.trials: received "many"', "a whole number"]),
    ("search.trails=4", ["search.trails: unknown key", "did you mean trials?"]),
    ("budget.steps=3", ["budget.steps: received 3", "5 evaluations"]),
    ("space.r.values=[0]", ["space.r.values.0: received 0"]),
    ("search.first=[{r: 32, alpha: 32}]", ["search.first.0.r: received 32", "4, 8 or 16"]),
    ("search.first.7.r=8", ["search.first", "has no 7"]),
    ("name.x=8", ['name is "demo"', "has no x"]),
    ("trakcing.project=x", ["trakcing: unknown key", "did you mean tracking?"]),
    ("name=!!python/name:os.system", ["name: the tag"]),
    ("search={trials: 4, trials: 5}", ["trials stands twice"]),
    ("name=[", ["is not YAML"]),
    ("name", ["KEY=VALUE", "budget.steps=40"]),
    ("=8", ["KEY=VALUE"]),
    ("search..trials=8", ["KEY=VALUE"]),
    ("", ["KEY=VALUE"]),
]


@pytest.mark.parametrize(("override", "parts"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_a_wrong_override_is_told_with_itself(override: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load(written(tmp_path, GOOD), (override,))
    [problem] = caught.value.problems
    assert problem.line is None
    assert str(problem).startswith(f"--set {override}:")
    assert all(part in problem.message for part in parts), problem.message


def test_contradicting_overrides_are_no_silent_choice(tmp_path: Path) -> None:
    found = problems(written(tmp_path, GOOD), ("budget.steps=20", "budget.epochs=1"))
    assert [text for _, text in found] == ["budget: received both of epochs and steps, should be exactly one"]


def test_an_override_mends_what_is_wrong_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace("trials: 8", "trials: !x many").replace("[4, 8, 16]", "[4, 4]"))
    assert load(path, ("search.trials=8", "space.r=8")).search.trials == 8


def test_input_paths_start_at_the_file_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for made in (tmp_path / "yaml", tmp_path / "models" / "tiny", home / "own", elsewhere / "models" / "here"):
        made.mkdir(parents=True)
    for name in ("train.jsonl", "saved"):
        (tmp_path / "yaml" / name).touch()
    (tmp_path / "yaml" / "link.jsonl").symlink_to(tmp_path / "yaml" / "saved")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    head = "model: {model}\ndata: {{train: {train}, validation: {validation}}}"

    def read(model: str, train: str, validation: Any) -> SweepSpec:
        text = head.format(model=model, train=train, validation=validation)
        return load(written(tmp_path / "yaml", GOOD.replace("trainable: toy", text)))

    spec = read("../models/tiny", "train.jsonl", 0.1)
    assert spec.data
    assert (spec.model, spec.data.train) == (str(tmp_path / "models/tiny"), str(tmp_path / "yaml/train.jsonl"))
    assert spec.data.validation == 0.1
    spec = read("~/own", "saved", "link.jsonl")
    assert spec.data
    assert (spec.model, spec.data.train) == (str(home / "own"), str(tmp_path / "yaml/saved"))
    assert spec.data.validation == str(tmp_path / "yaml/link.jsonl")  # a link keeps its suffix
    spec = read("meta-llama/Llama-3.1-8B", "org/rows", "org/other")
    assert spec.data
    assert (spec.model, spec.data.train) == ("meta-llama/Llama-3.1-8B", "org/rows")

    text = head.format(model="models/here", train="tarin.jsonl", validation="a/b/c").replace("\n", "\n\n")
    found = problems(written(tmp_path / "yaml", GOOD.replace("trainable: toy", text)))
    assert [line for line, _ in found] == [2, 4, 4]
    assert "seen from the working directory" in found[0][1]
    assert "did you mean train.jsonl?" in found[1][1]
    assert "a/b/c" in found[2][1]
    assert load(tmp_path / "yaml" / "space.yaml", inputs=False).model == "models/here"
    (tmp_path / "yaml" / "models").mkdir()  # now it is a path whose last part is wrong
    assert "there is no" in problems(tmp_path / "yaml" / "space.yaml")[0][1]


def test_a_name_that_no_file_system_takes_is_a_mistake_like_others(tmp_path: Path) -> None:
    [(line, text)] = problems(written(tmp_path, GOOD.replace("name: demo", f"name: demo\nmodel: ./{'x' * 5000}")))
    assert line == 2
    assert "there is no" in text


def test_changes_names_what_may_not_differ(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    recorded = load(path)
    free: tuple[str, ...] = (
        "search.trials=99",
        "resources.cpus=2",
        "tracking.mode=offline",
        "storage=x",
        "ledger=sqlite:///x.db",
    )
    free += ("checkpoint.every=1", "preemption.grace=5", "budget.hours=2", "verify={top: 2}")
    assert specs.changes(recorded, load(path, free)) == []
    other = load(path, ("space.r.values=[4, 8]", "search.seed=3", "budget.epochs=1", "space.dropout=0.1"))
    assert specs.changes(recorded, other) == [
        "budget.epochs: recorded nothing, asked 1.0",
        "budget.steps: recorded 40, asked nothing",
        "search.seed: recorded 0, asked 3",
        'space.r: recorded {"values": [4, 8, 16]}, asked {"values": [4, 8]}',
        "space.dropout: recorded nothing, asked 0.1",
    ]
    assert specs.changes(recorded, load(path, ("early_stopping=false", "search.seed=3"))) == [
        "search.seed: recorded 0, asked 3",
        'early_stopping: recorded {"grace": 1, "reduction": 3.0}, asked false',
    ]


def test_rows_that_moved_are_no_change_but_another_source_is(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "rows.jsonl").touch()
    text = GOOD.replace("name: demo", "name: demo\ndata: {train: rows.jsonl, max_length: 64}")
    here, there = (load(written(tmp_path / place, text)) for place in ("here", "there"))
    assert here != there
    assert specs.changes(here, there) == []
    hub = load(written(tmp_path / "there", text), ("data.train=org/rows", "data.max_length=32"))
    assert specs.changes(here, hub)[0].startswith('data.train: recorded "/')
    assert specs.changes(here, hub)[0].endswith(', asked "org/rows"')
    assert specs.changes(here, hub)[1] == "data.max_length: recorded 64, asked 32"


def test_a_spec_made_by_hand_is_free_of_contradictions_too() -> None:
    with pytest.raises(ValidationError, match=r"budget\.steps: received 2"):
        SweepSpec.model_validate_json(
            '{"name": "x", "trainable": "toy", "budget": {"steps": 2}, "search": {"trials": 1}, "space": {"r": 8}}'
        )


def test_importing_it_is_light() -> None:
    code = "import sys, sweep.spec; print([m for m in ('torch', 'optuna', 'ray', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_8_bit_optimizer_is_refused_without_a_gpu(tmp_path: Path) -> None:
    text = GOOD.replace("trainable: toy", "model: owner/name\ndata: {train: owner/rows}")
    text = text.replace("  r: {", "  optimizer: {values: [adamw, paged_adamw_8bit]}\n  r: {")
    with pytest.raises(SpecError, match=r"space\.optimizer: received paged_adamw_8bit, which needs a GPU"):
        load(written(tmp_path, text))
    assert load(written(tmp_path, text + "resources: {gpus: 0.5}\n")).resources.gpus == 0.5
