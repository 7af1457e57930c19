"""What trials are compared by: the validation loss, or a value of the user's metric."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Criterion:
    """Inside, less is better: what the trials, the ledger, Optuna and early stopping have of a value of which more is
    better is its negative. `turned` is the one way there, and back to what people see."""

    name: str = "validation loss"
    maximized: bool = False

    @property
    def is_loss(self) -> bool:
        return self == LOSS

    @property
    def short(self) -> str:
        """For headings."""
        return "loss" if self.is_loss else self.name

    @property
    def key(self) -> str:
        """Its part of the names of W&B's columns, which sorts and filters by those of letters, digits and _ alone."""
        return re.sub(r"\W+", "_", self.name, flags=re.ASCII).strip("_") or "objective"

    @property
    def explained(self) -> str:
        """What it is, for those who see it the first time."""
        if self.is_loss:
            return f"{self.name} (mean cross-entropy per supervised token)"
        return f"{self.name} ({self.better} is better)"

    def __str__(self) -> str:
        return f"{self.name}, {self.better} is better"

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "higher" if self.maximized else "lower"

    @property
    def worse(self) -> Literal["lower", "higher"]:
        return "lower" if self.maximized else "higher"

    def turned(self, value: float) -> float:
        """A value of the user's as trials are compared by it, or the other way round."""
        return 0.0 - value if self.maximized else value  # no -0

    def text(self, objective: float) -> str:
        """What trials are compared by, for people."""
        return self.distance(self.turned(objective))

    def distance(self, value: float) -> str:
        """How far two of them are apart, for people."""
        return f"{value:.4f}" if self.is_loss else f"{value:.5g}"


LOSS = Criterion()
