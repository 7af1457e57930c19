"""The ends of W&B runs whose trial's process was killed before it could tell."""

import time

from sweep import tracking
from sweep.place import Place
from sweep.study import ENDED_AS, Entry, Ledger
from sweep.trainable import WAIT_SECONDS


def end_runs(
    ledger: Ledger,
    place: Place,
    tracked: tracking.Tracking,
    searched: tuple[str, ...],
    model: str,
    evaluations: int,
    first_rung: int,
    ending: set[int],
) -> None:
    """Have W&B know the end of trials that ended when their process was killed. `evaluations` are a whole budget.

    On an object store this machine gets to have the whole runs of all ended trials that are not online. `ending` are
    trials that this was begun for, to be passed to the next call: by Optuna's number, for one that is revived gets
    another end.
    """
    if tracked.mode == "disabled":
        return
    for entry in _without_end(ledger, place, needed=tracked.mode):
        if entry.trial.number in ending:
            continue
        ending.add(entry.trial.number)
        directory = place.paths.trial(entry.number)
        place.pull_log(directory / tracking.ROWS)
        rows = [row for row in tracking.logged(directory) if tracking.EVALUATION in row]
        steps = {row[tracking.EVALUATION]: row[tracking.STEP] for row in rows}
        share = 1.0 if entry.unscored else max(entry.reported, 0) / max(evaluations, 1)
        told = tracking.summary(entry.objectives, entry.losses, steps, first_rung, share, entry.criterion)
        facts = told | {"stop_reason": entry.reason}
        name = tracking.run_name(entry.number, entry.config, searched)
        config = tracking.run_config(entry.number, entry.config, model, tracked.group)
        run_id = tracking.run_id(ledger.noted("sweep_id"), entry.number)
        run = tracking.start(tracked, run_id, name, config, directory, place.push)
        tracking.finish(run, ENDED_AS[entry.state], facts)


def wait_for_ends(ledger: Ledger, place: Place) -> None:
    """Until the processes of ended trials have handed everything to W&B; those that were killed never will."""
    began = time.monotonic()
    while _without_end(ledger, place, needed=None) and time.monotonic() - began < WAIT_SECONDS:
        time.sleep(0.1)


def _without_end(ledger: Ledger, place: Place, *, needed: str | None) -> list[Entry]:
    """Ended trials with rows of which wandb was not seen to write the run's end.

    Where it is `needed` offline, this machine must have written it; online, any. None: any, in either way.
    """
    found = []
    for entry in ledger.entries():
        directory = place.paths.trial(entry.number)
        if entry.state.is_finished() and not (directory / tracking.RECORDED).exists():
            how = place.text(directory / tracking.RECORDED) if place.is_remote else None
            written = how is not None if needed is None else how == needed == "online"
            if not written and place.holds(directory / tracking.ROWS):
                found.append(entry)
    return found
