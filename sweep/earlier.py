"""What earlier sweeps found (`search.from`), for the sampler of a new one: read once, noted in the new ledger."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from optuna.trial import TrialState

from sweep import status
from sweep.spec import SweepSpec
from sweep.study import Ledger, Observation, observed, of_known
from sweep.validation import shown

NOTE = "known"
"""Of the ledger: the observations that its sweep began with."""


class Unusable(ValueError):
    """An earlier sweep is not there, or its losses say nothing of this one's; the message says what to do."""


def gather(
    sources: Sequence[str], spec: SweepSpec, inputs: Mapping[str, str] | None, note: Callable[[str], object]
) -> list[Observation]:
    """What the sampler of a new sweep can learn from those at `sources`, which are only read.

    `inputs` are the hashes of the new sweep's model and data; None leaves them uncompared. `note` is told how much
    there was. Raises `Unusable`.
    """
    found: list[Observation] = []
    for source in dict.fromkeys(sources):
        earlier = _look(source, spec.ledger)
        if earlier.unknown:
            raise Unusable(f"search.from: {source}: {earlier.newer}")
        differences = _differences(earlier.spec, spec)
        if inputs is not None:
            differences += _changed(earlier.ledger.noted("inputs") or {}, inputs)
        if differences:
            raise Unusable(
                f"search.from: the losses of {source} cannot be compared with this sweep's:\n  "
                + "\n  ".join(differences)
                + "\nLeave it out, or give this sweep what that one had."
            )
        ended = [entry for entry in earlier.entries if entry.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        known = [each for each in (observed(entry, spec.space) for entry in ended) if each is not None]
        found += known
        outside, others = len(ended) - len(known), len(earlier.entries) - len(ended)
        left_out = [f"{outside} lie outside of this space"] if outside else []
        left_out += [f"{others} failed or have not ended"] if others else []
        note(
            f"search.from {source}: {len(known)} of its {len(earlier.entries)} trials are known to the sampler"
            + (f" ({', '.join(left_out)})" if left_out else "")
        )
    return found


def write(ledger: Ledger, found: Sequence[Observation]) -> None:
    """Note what a sweep begins with: from now on proposals depend on its own ledger alone."""
    ledger.note(NOTE, [asdict(each) for each in found])


def read(ledger: Ledger) -> list[Observation]:
    """What `write` noted."""
    return [of_known(Observation, each) for each in ledger.noted(NOTE) or ()]


def _look(source: str, ledger: str | None) -> status.Status:
    """`ledger` is this sweep's database: one with a password mostly holds the earlier sweep, too."""
    try:
        return status.look(source)
    except status.NoSweep as error:
        if ledger is None or "***" not in str(error):  # of its database's password
            raise Unusable(f"search.from: {error}") from error
    try:
        return status.look(source, ledger)
    except status.NoSweep as error:
        raise Unusable(f"search.from: {error}") from error


def _differences(recorded: SweepSpec, asked: SweepSpec) -> list[str]:
    """What decides a loss beside the configuration and the content of model and data."""
    before, now = (
        {
            "trainable": spec.trainable,
            "data.max_length": spec.data and spec.data.max_length,
            "budget.epochs": spec.budget.epochs,
            "budget.steps": spec.budget.steps,
            "budget.evaluations": spec.budget.evaluations,
            "metric": spec.objective and spec.metric,
            "objective": spec.objective and spec.objective.model_dump(exclude_none=True),
        }
        for spec in (recorded, asked)
    )
    return [f"{key}: there {shown(before[key])}, here {shown(now[key])}" for key in now if before[key] != now[key]]


def _changed(recorded: Mapping[str, str], inputs: Mapping[str, str]) -> list[str]:
    keys = [key for key in {**inputs, **recorded} if key != "data.test"]
    return [f"{key}: another content" for key in keys if recorded.get(key) != inputs.get(key)]
