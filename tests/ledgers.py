"""Ledgers for tests."""

import optuna

from sweep.study import Ledger, Proposal
from trainables.config import QLoRAConfig


def memory_ledger() -> Ledger:
    return Ledger(optuna.storages.InMemoryStorage(), "test")


def add_trial(ledger: Ledger, **config) -> int:
    """A trial with a configuration of its own, not from any search."""
    config.setdefault("seed", len(ledger))
    return ledger.add(Proposal(QLoRAConfig(**config), {}, {})).number
