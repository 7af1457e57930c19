"""The Ray Searcher of a sweep: hands out unfinished trials first, then asks the study."""

from collections.abc import Callable
from typing import Any

from optuna.trial import TrialState
from ray.tune.search import Searcher

from sweep.preemption import Drain
from sweep.study import Entry, Ledger, Proposal, SpaceExhausted


class LedgerSearcher(Searcher):
    """Every trial of the ledger that has no end yet, by number, then new ones up to `trials` in total.

    Holds the limit on concurrent trials itself, because Ray asks for one trial more than can run; learns of ends from
    the ledger, because Ray does not tell a searcher of all of them.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        trials: int,
        concurrency: int,
        propose: Callable[[list[Entry]], Proposal],
        settle: Callable[[int], bool],
        assign: Callable[[Entry], Any],
        drain: Drain,
        started: Callable[[Entry], None],
        ready: Callable[[int], bool] = lambda running: True,
    ) -> None:
        """`assign` turns an entry into what its process gets; `settle` decides what an earlier driver left open; beside
        so many others a trial is handed out only when something is `ready` to train it."""
        super().__init__(metric="validation_loss", mode="min")
        self._ledger = ledger
        self._trials = trials
        self._concurrency = concurrency
        self._propose = propose
        self._assign = assign
        self._drain = drain
        self._started = started
        self._ready = ready
        self._unfinished = [
            entry.number for entry in ledger.entries() if entry.state is TrialState.RUNNING and not settle(entry.number)
        ]
        self._handed_out: set[int] = set()
        self.exhausted: str | None = None
        """Why no further trial could be proposed, once that happened."""

    def suggest(self, trial_id: str) -> Any:
        """What a process gets; None when as many trials run as may; FINISHED when there is nothing left to do."""
        if self._drain():
            return Searcher.FINISHED
        try:
            return self._suggest()
        except Exception as error:  # noqa: BLE001 - whatever the ledger's storage raises; out of here it would end Tune
            self._drain.request("breakdown", f"No trial can be handed out ({type(error).__name__}: {error})")
            return Searcher.FINISHED

    def _suggest(self) -> Any:
        self._handed_out = {number for number in self._handed_out if self._is_open(number)}
        self._unfinished = [number for number in self._unfinished if self._is_open(number)]
        if not self._is_left():
            return None if self._handed_out else Searcher.FINISHED  # one of those may have to be handed out again
        if len(self._handed_out) >= self._concurrency or not self._ready(len(self._handed_out)):
            return None
        entry = self._next()
        if entry is None:  # the space is exhausted
            return None if self._handed_out else Searcher.FINISHED
        self._handed_out.add(entry.number)
        self._started(entry)
        return {"assignment": self._assign(entry)}

    def hand_out_again(self, number: int) -> None:
        """Put a trial back that lost its process, or was revived: it is the next, and goes on from its newest
        checkpoint."""
        self._handed_out.discard(number)
        if number not in self._unfinished:
            self._unfinished.insert(0, number)

    def _is_open(self, number: int) -> bool:
        return self._ledger.entry(number).state is TrialState.RUNNING

    def _is_left(self) -> bool:
        return bool(self._unfinished) or (len(self._ledger) < self._trials and not self.exhausted)

    def _next(self) -> Entry | None:
        if self._unfinished:
            return self._ledger.entry(self._unfinished.pop(0))
        try:
            return self._ledger.add(self._propose(self._ledger.entries()))
        except SpaceExhausted as end:
            self.exhausted = str(end)
            return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the scheduler has told the ledger."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what a sweep goes on from."""

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Ray writes its pieces to disk for a restore that is never used."""
        return {}

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""
