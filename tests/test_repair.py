"""How small a micro-batch must be, from what the ledger knows."""

import pytest

from sweep.repair import may_halve, starting_halvings, takes_at_least
from tests.ledgers import add_trial, memory_ledger
from trainables.config import QLoRAConfig


@pytest.mark.parametrize(
    ("config", "other", "expected"),
    [
        ({}, {}, True),
        ({"r": 32}, {}, True),
        ({"r": 8}, {}, False),
        ({"compute_dtype": "fp32"}, {}, True),
        ({}, {"compute_dtype": "fp32"}, False),
        ({"gradient_checkpointing": True}, {}, False),
        ({}, {"gradient_checkpointing": True}, True),
        ({"optimizer": "paged_adamw_8bit"}, {}, False),
        ({"dropout": 0.0}, {}, False),
        ({"target_modules": ("q_proj",)}, {}, False),
        ({}, {"target_modules": ("q_proj",)}, True),
        ({"r": 32, "gradient_checkpointing": True}, {}, False),  # larger in one way, smaller in another
        ({"learning_rate": 1e-3, "quant_type": "fp4", "batch_size": 64}, {}, True),  # no more memory for a row
    ],
)
def test_what_takes_at_least_as_much(config, other, expected):
    assert takes_at_least(QLoRAConfig(**config), QLoRAConfig(**other)) is expected


def test_no_more_than_three_halvings_and_no_less_than_a_row():
    assert [QLoRAConfig(batch_size=16).micro_batch(k) for k in range(6)] == [16, 8, 4, 2, 1, 1]
    assert [may_halve(QLoRAConfig(batch_size=16), k) for k in range(4)] == [True, True, True, False]
    assert [may_halve(QLoRAConfig(batch_size=8, accumulation=4), k) for k in range(2)] == [True, False]


def test_later_trials_begin_where_others_ended():
    ledger = memory_ledger()
    tight = add_trial(ledger, r=16, batch_size=8)
    ledger.halve(tight, 1)  # 4 rows fit
    larger, small, finer = (
        add_trial(ledger, r=32, batch_size=16),
        add_trial(ledger, r=8, batch_size=16),
        add_trial(ledger, r=16, batch_size=8, accumulation=4),
    )
    entries = ledger.entries()
    assert starting_halvings(entries[tight], entries) == 1
    assert starting_halvings(entries[larger], entries) == 2  # 16 -> 4
    assert starting_halvings(entries[small], entries) == 0
    assert starting_halvings(entries[finer], entries) == 0  # 2 rows already
