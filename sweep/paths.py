"""Every file name of a sweep directory, in one place."""

from dataclasses import dataclass
from pathlib import Path

LOCK_SECONDS = 1.0
"""How long `lock` is tried for: who asks how a sweep stands holds it for a moment."""


@dataclass(frozen=True)
class SweepPaths:
    """The files under `root`, the directory of one sweep."""

    root: Path
    verification: bool = False
    """Whether trials are those that verify the winner, rather than those of the search."""

    @property
    def spec(self) -> Path:
        """The spec as run, resolved."""
        return self.root / "space.yaml"

    @property
    def ledger(self) -> Path:
        """Optuna's journal, the default ledger."""
        return self.root / "study.log"

    @property
    def lock(self) -> Path:
        """Held by the driver for as long as it runs."""
        return self.root / "driver.lock"

    @property
    def lock_holder(self) -> Path:
        """Says who holds the lock."""
        return self.root / "driver.txt"

    @property
    def pulse(self) -> Path:
        """Written to all the time by the driver of a sweep on an object store."""
        return self.root / "driver.pulse"

    @property
    def requests(self) -> Path:
        """What is asked of the sweep from another terminal, until the driver has acted on it."""
        return self.root / "requests"

    def request(self, name: str) -> Path:
        """One of them."""
        return self.requests / f"{name}.json"

    @property
    def tokens(self) -> Path:
        """Tokenised data, a directory per content hash."""
        return self.root / "tokens"

    @property
    def tracking(self) -> Path:
        """Where W&B makes its own `wandb/`."""
        return self.root

    @property
    def best(self) -> Path:
        """The best adapter, ready to be loaded with PEFT."""
        return self.root / "best"

    @property
    def report(self) -> Path:
        """What the sweep found, as one page."""
        return self.root / "report.html"

    @property
    def trials(self) -> Path:
        """A directory for each trial."""
        return (self.root / "verification" if self.verification else self.root) / "trials"

    def trial(self, number: int) -> Path:
        """Checkpoints and rows of one trial."""
        return self.trials / f"{number:03d}"
