"""The search space through real Optuna trials: what it proposes, counts, lists, inverts and refuses."""

from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from sweep import space as spaces
from sweep.space import Space
from sweep.validation import Invalid
from trainables.config import QLoRAConfig

EVERYTHING: dict[str, Any] = {
    "r": {"values": [4, 8, 16, 32]},
    "alpha": {"times": "r", "min": 0.5, "max": 4, "log": True},
    "dropout": {"min": 0.01, "max": 0.2, "when": {"rslora": True}},
    "target_modules": {"values": ["all-linear", ["q_proj", "v_proj"]]},
    "rslora": {"values": [False, True]},
    "quant_type": {"values": ["nf4", "fp4"]},
    "double_quant": {"value": False, "when": {"quant_type": "fp4"}},
    "learning_rate": {"min": 2e-5, "max": 2e-3, "log": True},
    "warmup_ratio": {"times": "dropout", "value": 0.3, "when": {"target_modules": [["q_proj", "v_proj"]]}},
    "weight_decay": {"min": 0.0, "max": 0.1, "when": {"quant_type": "nf4", "rslora": False}},
    "batch_size": {"times": "accumulation", "values": [2, 4]},
    "accumulation": {"min": 1, "max": 4},
    "max_grad_norm": 0.5,
}
FINITE: dict[str, Any] = {
    "r": {"values": [4, 8, 16]},
    "alpha": {"times": "r", "values": [1, 2]},
    "quant_type": {"values": ["nf4", "fp4"]},
    "double_quant": {"values": [True, False], "when": {"quant_type": "nf4"}},
    "seed": {"min": 1, "max": 3, "when": {"r": [4, 8], "double_quant": False}},
    "batch_size": 4,
}


def draws(space: Space, number: int) -> list[tuple[optuna.Trial, QLoRAConfig]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
    return [(trial, space.suggest(trial)) for trial in (study.ask() for _ in range(number))]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_whatever_is_drawn_lies_in_the_space_and_is_inverted() -> None:
    space = spaces.parse(EVERYTHING)
    seen = set()
    for trial, config in draws(space, 200):
        values = config.model_dump()
        assert 0.5 <= config.alpha / config.r <= 4 + 1e-9
        assert 2e-5 <= config.learning_rate <= 2e-3
        assert config.max_grad_norm == 0.5
        assert config.batch_size in (2 * config.accumulation, 4 * config.accumulation)
        assert ("dropout" in trial.params) == config.rslora
        assert config.rslora or config.dropout == 0.05
        assert config.double_quant == (config.quant_type == "nf4")
        if config.target_modules == ("q_proj", "v_proj"):
            assert config.warmup_ratio == pytest.approx(0.3 * config.dropout, abs=1e-12)
        else:
            assert config.warmup_ratio == 0.03
        assert "max_grad_norm" not in trial.params
        found = space.params_of(values)
        assert found.keys() == trial.params.keys()
        assert space.suggest(optuna.trial.FixedTrial(found)) == config
        seen.add(config.model_dump_json())
    assert len(seen) == 200


def test_a_configuration_that_is_enqueued_comes_out_again() -> None:
    space = spaces.parse(EVERYTHING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
    wanted = [config for _, config in draws(space, 20)]
    for config in wanted:
        study.enqueue_trial(space.params_of(config.model_dump()))
    assert [space.suggest(study.ask()) for _ in wanted] == wanted


def test_parameters_survive_a_journal(tmp_path: Any) -> None:
    backend = JournalFileBackend(str(tmp_path / "study.log"))
    study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="s")
    config = spaces.parse(EVERYTHING).suggest(study.ask())
    again = optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="s").trials[0]
    assert spaces.parse(EVERYTHING).suggest(optuna.trial.FixedTrial(again.params)) == config


def test_grid_lists_every_configuration_once() -> None:
    space = spaces.parse(FINITE)
    configs = [space.suggest(optuna.trial.FixedTrial(params)).model_dump_json() for params in space.grid()]
    # r and its factor 3 x 2; fp4: 1; nf4: double_quant True 1, False 3 seeds where r is 4 or 8 (2 of 3 ranks)
    assert 6 + 6 + 2 * (3 + 3 + 1) == len(configs) == len(set(configs))
    assert {config.model_dump_json() for _, config in draws(space, 2000)} == set(configs)


def test_what_cannot_be_listed_has_no_grid() -> None:
    space = spaces.parse({"r": {"values": [4, 8]}, "learning_rate": {"min": 1e-5, "max": 1e-3}})
    assert space.continuous == ("learning_rate",)
    with pytest.raises(ValueError, match="learning_rate"):
        space.grid()


def test_what_is_proposed_does_not_depend_on_the_order_in_the_file() -> None:
    forwards, backwards = spaces.parse(EVERYTHING), spaces.parse(dict(reversed(EVERYTHING.items())))
    assert [config for _, config in draws(forwards, 20)] == [config for _, config in draws(backwards, 20)]
    assert forwards == backwards


def test_dimensions_follow_what_they_need() -> None:
    order = list(spaces.parse(EVERYTHING).dimensions)
    assert order.index("alpha") > order.index("r")
    assert order.index("warmup_ratio") > order.index("dropout") > order.index("rslora")


def test_integers_are_drawn_whole_over_their_whole_range() -> None:
    space = spaces.parse({"r": {"min": 4, "max": 6}, "alpha": {"min": 8, "max": 16}})
    assert {config.r for _, config in draws(space, 60)} == {4, 5, 6}
    assert space.searched == ("r", "alpha")


def test_plain_is_read_back() -> None:
    space = spaces.parse(EVERYTHING)
    assert spaces.parse(space.plain()) == space


def test_a_product_is_what_one_would_write() -> None:
    space = spaces.parse({"r": {"values": [3]}, "alpha": {"times": "r", "value": 0.1}})
    assert space.suggest(optuna.trial.FixedTrial({"r": 3})).alpha == 0.3


def test_unnamed_fields_of_a_configuration_are_as_the_space_fixes_them_else_default() -> None:
    space = spaces.parse({"r": {"values": [8, 16]}, "batch_size": 4, "alpha": {"times": "r", "value": 2}})
    assert space.params_of({"r": 8}) == {"r": 8}
    assert space.params_of({"alpha": 32.0, "batch_size": 4, "dropout": 0.05}) == {"r": 16}


OUTSIDE = [
    ({"r": 64}, ["r: received 64", "should be 4, 8, 16 or 32"]),
    ({"alpha": 1000}, ["alpha: received 1000", "0.5 to 4.0 times r, which is 16"]),
    ({"r": 4}, ["alpha: not named, so it has its default 32.0", "times r, which is 4", "name it here"]),
    ({"learning_rate": 0.5}, ["learning_rate: received 0.5", "2e-05 to 0.002"]),
    ({"learning_rate": 0}, ["learning_rate: received 0, should be greater than 0"]),
    ({"max_grad_norm": 1.0}, ["max_grad_norm: received 1.0", "the space fixes it to 0.5"]),
    ({"schedule": "linear"}, ["schedule: received", "the space has no schedule", 'its default "cosine"']),
    ({"dropout": 0.1}, ["dropout: received 0.1", "condition is not met", "its default 0.05"]),
    ({"lora_r": 8}, ["lora_r: unknown key; did you mean r?"]),
    ({"r": "8", "quant_type": "nf8"}, ['r: received "8"', "without quotes", "did you mean nf4?"]),
]


@pytest.mark.parametrize(("entry", "parts"), OUTSIDE, ids=[str(entry) for entry, _ in OUTSIDE])
def test_a_configuration_outside_of_the_space_is_refused(entry: dict[str, Any], parts: list[str]) -> None:
    space = spaces.parse({**EVERYTHING, "batch_size": 8, "accumulation": 1, "warmup_ratio": {"min": 0, "max": 0.1}})
    space.params_of({})
    with pytest.raises(Invalid) as caught:
        space.params_of(entry)
    for part in parts:
        assert part in str(caught.value)


REFUSED: list[tuple[Any, tuple[str | int, ...], list[str]]] = [
    ([1], (), ["received [1]", "a mapping of fields"]),
    (None, (), ["received nothing", "a mapping of fields"]),
    ({"lora_r": 8}, ("lora_r",), ["unknown key", "did you mean r?"]),
    ({"learning_rat": 1e-4}, ("learning_rat",), ["did you mean learning_rate?"]),
    ({"r": 0}, ("r",), ["received 0", "greater than or equal to 1"]),
    ({"r": None}, ("r",), ["received nothing", "a whole number"]),
    ({"r": "8"}, ("r",), ['received "8"', "a whole number", "did you mean 8 (without quotes)?"]),
    ({"r": 8.5}, ("r",), ["received 8.5", "a whole number"]),
    ({"r": 8.0}, ("r",), ["received 8.0", "did you mean 8?"]),
    ({"r": True}, ("r",), ["received true", "a whole number"]),
    ({"r": [4, 8]}, ("r",), ["received [4, 8]", "{values: [4, 8]}"]),
    ({"dropout": 1.5}, ("dropout",), ["received 1.5", "less than 1"]),
    ({"dropout": True}, ("dropout",), ["received true", "a number"]),
    ({"learning_rate": "2e-4"}, ("learning_rate",), ["did you mean 2e-4 (without quotes)?"]),
    ({"rslora": "yes"}, ("rslora",), ['received "yes"', "true or false", "did you mean true?"]),
    ({"rslora": 1}, ("rslora",), ["received 1", "true or false"]),
    ({"compute_dtype": "fp16"}, ("compute_dtype",), ['received "fp16"', "bf16 or fp32", "did you mean bf16?"]),
    ({"target_modules": "q_proj"}, ("target_modules",), ['received "q_proj"', "all-linear or a list"]),
    ({"target_modules": ["q_proj", 5]}, ("target_modules", 1), ["received 5", "text"]),
    ({"target_modules": []}, ("target_modules",), ["received []", "at least one layer"]),
    ({"r": {"values": [8, 0, 16]}}, ("r", "values", 1), ["received 0", "greater than or equal to 1"]),
    ({"r": {"values": []}}, ("r", "values"), ["received []", "at least one"]),
    ({"r": {"values": [8, 16, 8]}}, ("r", "values"), ["received 8 twice"]),
    ({"r": {"values": 8}}, ("r", "values"), ["received 8", "a list"]),
    ({"r": {}}, ("r",), ["nothing to choose from", "value, or values, or min and max"]),
    ({"r": {"min": 4}}, ("r",), ["received min", "min and max"]),
    ({"r": {"min": 4, "max": 8, "values": [4]}}, ("r",), ["received values and min and max"]),
    ({"r": {"min": 8, "max": 4}}, ("r", "min"), ["min 8 and max 4", "min should be below max"]),
    ({"r": {"min": 8, "max": 8}}, ("r", "min"), ["an empty range"]),
    ({"r": {"min": 4.5, "max": 8}}, ("r", "min"), ["received 4.5", "a whole number"]),
    ({"r": {"low": 4, "max": 8}}, ("r", "low"), ["unknown key", "did you mean min?"]),
    ({"r": {"choices": [4]}}, ("r", "choices"), ["unknown key", "did you mean values?"]),
    ({"dropout": {"min": 0, "max": 1}}, ("dropout", "max"), ["received 1", "less than 1"]),
    ({"warmup_ratio": {"min": 0, "max": 0.1, "log": True}}, ("warmup_ratio", "min"), ["log", "above 0", "drop log"]),
    ({"warmup_ratio": {"min": 0, "max": 0.1, "log": "yes"}}, ("warmup_ratio", "log"), ['"yes"', "true or false"]),
    ({"r": {"values": [4], "log": True}}, ("r", "log"), ["beside min and max"]),
    ({"quant_type": {"min": 1, "max": 2}}, ("quant_type",), ["a range", "no numbers", "values"]),
    ({"alpha": {"times": "rank", "values": [1]}}, ("alpha", "times"), ['received "rank"', "did you mean r?"]),
    ({"alpha": {"times": ["r"], "values": [1]}}, ("alpha", "times"), ['received ["r"]', "a field"]),
    ({"alpha": {"times": "quant_type", "values": [1]}}, ("alpha", "times"), ["quant_type holds no numbers"]),
    ({"r": {"times": "alpha", "values": [1]}}, ("r", "times"), ["r holds whole numbers, alpha holds numbers"]),
    ({"alpha": {"times": "alpha", "value": 1}}, ("alpha",), ["depends on itself", "alpha needs alpha"]),
    ({"alpha": {"times": "r", "values": [0, 1]}}, ("alpha", "values", 0), ["received 0", "above 0"]),
    ({"batch_size": {"times": "r", "values": [1.5]}}, ("batch_size", "values", 0), ["1.5", "a whole number above 0"]),
    ({"dropout": {"times": "r", "values": [0.1]}}, ("dropout",), ["0.1 times r", "received 1.6", "less than 1"]),
    ({"alpha": {"times": "dropout", "value": 2}, "dropout": {"values": [0, 0.1]}}, ("alpha", "times"), ["can be 0"]),
    (
        {"dropout": {"times": "r", "value": 0.1}, "learning_rate": {"times": "dropout", "value": 1}},
        ("dropout",),
        ["received 1.6"],
    ),
    ({"dropout": {"min": 0, "max": 0.1, "when": {"quant": 1}}}, ("dropout", "when", "quant"), ["unknown key"]),
    ({"dropout": {"value": 0.1, "when": "nf4"}}, ("dropout", "when"), ["{quant_type: nf4}"]),
    (
        {"dropout": {"value": 0.1, "when": {"quant_type": "nf5"}}},
        ("dropout", "when", "quant_type"),
        ["did you mean nf4"],
    ),
    (
        {"dropout": {"value": 0.1, "when": {"quant_type": "fp4"}}},
        ("dropout", "when", "quant_type"),
        ["never is", "nf4"],
    ),
    (
        {"r": {"values": [4, 8]}, "dropout": {"value": 0.1, "when": {"r": [4, 5]}}},
        ("dropout", "when", "r"),
        ["5", "never"],
    ),
    (
        {"learning_rate": {"min": 1e-5, "max": 1e-3}, "dropout": {"value": 0.1, "when": {"learning_rate": 1e-4}}},
        ("dropout", "when", "learning_rate"),
        ["cannot be listed"],
    ),
    (
        {"r": {"values": [4], "when": {"rslora": True}}, "rslora": {"values": [True, False], "when": {"r": 4}}},
        ("r",),
        ["depends on itself", "r needs rslora needs r"],
    ),
    (
        {"batch_size": {"values": [8, 12]}, "accumulation": {"values": [2, 8]}},
        ("accumulation",),
        ["8 does not divide", "12"],
    ),
    ({"accumulation": 3}, ("accumulation",), ["accumulation 3 does not divide batch_size 8"]),
    ({"batch_size": 6, "accumulation": {"value": 4, "when": {"r": 16}}}, ("accumulation",), ["4 does not divide"]),
]


@pytest.mark.parametrize(("entries", "key", "parts"), REFUSED, ids=[str(entries) for entries, *_ in REFUSED])
def test_a_wrong_space_is_refused(entries: Any, key: tuple[str | int, ...], parts: list[str]) -> None:
    with pytest.raises(Invalid) as caught:
        spaces.parse(entries)
    texts = [text for at, text in caught.value.faults if at == key]
    assert texts, caught.value.faults
    for part in parts:
        assert any(part in text for text in texts), texts
    assert {at for at, _ in caught.value.faults} == {key}  # nothing else is told


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(Invalid) as caught:
        spaces.parse({"r": 0, "alpha": {"times": "rr", "values": []}, "lr": 1, "dropout": {"min": 2, "max": "x"}})
    assert {key for key, _ in caught.value.faults} == {
        ("r",),
        ("alpha", "times"),
        ("alpha", "values"),
        ("lr",),
        ("dropout", "min"),
        ("dropout", "max"),
    }


@pytest.mark.parametrize(
    ("entries", "value", "expected"),
    [
        ({}, "bf16", True),  # the documented default
        ({}, "fp32", False),
        ({"compute_dtype": "fp32"}, "bf16", False),
        ({"compute_dtype": {"values": ["fp32", "bf16"]}}, "bf16", True),
        ({"compute_dtype": {"value": "fp32", "when": {"quant_type": "fp4"}}}, "bf16", True),  # the default elsewhere
    ],
)
def test_what_a_field_may_be(entries: dict[str, Any], value: str, expected: bool) -> None:
    space = spaces.parse({"quant_type": {"values": ["nf4", "fp4"]}, **entries})
    assert (value in space.values("compute_dtype")) is expected
