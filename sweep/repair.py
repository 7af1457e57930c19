"""Memory that ran out: how small the micro-batch of a trial must be, from what the ledger knows of it and of others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainables.config import QLoRAConfig

if TYPE_CHECKING:  # every trial's process would import a database's library with it
    from sweep.study import Entry

HALVINGS = 3
"""So often the micro-batch of a trial may be halved; a configuration that does not fit then has failed."""


def takes_at_least(config: QLoRAConfig, other: QLoRAConfig) -> bool:
    """Whether a row of `config` takes as much memory in training as one of `other`, or more.

    True only where no field makes it smaller; of configurations that are smaller in one way and larger in another
    nothing is said.
    """
    return (
        config.r >= other.r
        and config.target_modules in ("all-linear", other.target_modules)
        and config.compute_dtype in ("fp32", other.compute_dtype)
        and config.gradient_checkpointing <= other.gradient_checkpointing
        and config.optimizer in ("adamw", other.optimizer)
        and (config.dropout > 0) >= (other.dropout > 0)
    )


def may_halve(config: QLoRAConfig, halvings: int) -> bool:
    """Whether the micro-batch of a trial may be halved once more."""
    return halvings < HALVINGS and config.micro_batch(halvings) > 1


def starting_halvings(entry: "Entry", entries: Sequence["Entry"]) -> int:
    """How often the micro-batch of `entry` is to be halved before it starts.

    As often as it was so far, and until it is no larger than that of any trial that ran out of memory and takes no
    more of it.
    """
    halvings = entry.halvings
    for other in entries:
        if other.halvings and takes_at_least(entry.config, other.config):
            fits = other.config.micro_batch(other.halvings)
            while may_halve(entry.config, halvings) and entry.config.micro_batch(halvings) > fits:
                halvings += 1
    return halvings
