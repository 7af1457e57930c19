"""How much data does a search train on before it has found a good configuration?

    python -m sweep run benchmarks/curves.yaml              # hours: every configuration of a small space
    python -m benchmarks.search --record sweeps/curves      # adds its validation losses to benchmarks/curves.json
    python -m benchmarks.search --seeds 20                  # replays searches on that file, in a minute or two

Replayed are random search, Optuna's TPESampler as it comes, this project (its sampler on its ledger, with its early
stopping) and Ray Tune's OptunaSearch with its ASHAScheduler. Nothing is trained: a trial reads its losses from the
file, one evaluation after another, and trials side by side take turns, as if all were equally fast. Early stopping has
grace 1 and reduction 3 in both. A search may try as often as there are configurations; one that proposes a
configuration again pays for it again. (Where a space has ranges, repeats are rare: there is less to save on them.)
Ray's is asked only when a trial can start, as with `max_concurrent_trials`.

Data needed is what all trials were given until one of them had a loss as low as the target, in budgets of one trial: an
evaluation is a ninth of it. A search that never gets there counts with all that it was given. That is less than it
would have needed, so there is a second ratio, in which it counts with what all configurations take when each is trained
to its end. Ratios are of means over the seeds, their intervals a bootstrap over these.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.trial import FixedTrial, TrialState
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from sweep import spec
from sweep.early_stopping import rungs, settle
from sweep.paths import SweepPaths
from sweep.space import Space
from sweep.study import Ledger, SpaceExhausted, propose, read_journal
from trainables.config import QLoRAConfig

SPEC = Path(__file__).with_name("curves.yaml")
CURVES = Path(__file__).with_name("curves.json")
SEARCHED = ("r", "alpha", "learning_rate", "warmup_ratio")
EVALUATIONS, GRACE, REDUCTION = 9, 1, 3
BUDGET = 16
"""What random search finds in so many trials is the target."""

Point = tuple[float, ...]
"""A configuration, by its values of `SEARCHED`."""
Ask = Callable[[], Point | None]
"""The configuration of the next trial, None when the search has no more."""
Tell = Callable[[int, int, float], bool]
"""Takes the number of a trial, of an evaluation, and its loss; says whether the trial is over."""


def point(config: QLoRAConfig) -> Point:
    return tuple(getattr(config, name) for name in SEARCHED)


def points(space: Space) -> list[Point]:
    return [point(space.suggest(FixedTrial(params))) for params in space.grid()]


def random_search(space: Space, seed: int) -> tuple[Ask, Tell]:
    """Without replacement."""
    order = points(space)
    random.Random(seed).shuffle(order)
    rest = iter(order)
    return lambda: next(rest, None), lambda number, evaluation, loss: evaluation == EVALUATIONS


def tpe(space: Space, seed: int) -> tuple[Ask, Tell]:
    """Every trial is trained to its end, and told with its best loss."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    trials: list[optuna.Trial] = []

    def ask() -> Point:
        trials.append(study.ask())
        return point(space.suggest(trials[-1]))

    def tell(number: int, evaluation: int, loss: float) -> bool:
        trials[number].report(loss, evaluation)
        if evaluation == EVALUATIONS:
            study.tell(number, min(study.trials[number].intermediate_values.values()))
        return evaluation == EVALUATIONS

    return ask, tell


def ours(space: Space, seed: int) -> tuple[Ask, Tell]:
    ledger = Ledger(optuna.storages.InMemoryStorage(), "replay")
    stops = rungs(EVALUATIONS, GRACE, REDUCTION)

    def ask() -> Point | None:
        try:
            return point(ledger.add(propose(ledger.entries(), space, "tpe", seed, first=())).config)
        except SpaceExhausted:
            return None

    def tell(number: int, evaluation: int, loss: float) -> bool:
        ledger.report(number, evaluation, loss)
        return settle(ledger, number, EVALUATIONS, stops, REDUCTION)

    return ask, tell


def rays(space: Space, seed: int) -> tuple[Ask, Tell]:
    """Told what Tune's controller tells: of a trial that is to stop, the searcher hears when it has ended."""
    searcher = OptunaSearch(lambda trial: {"config": space.suggest(trial)}, metric="loss", mode="min", seed=seed)
    scheduler = ASHAScheduler(
        "evaluation", "loss", "min", max_t=EVALUATIONS, grace_period=GRACE, reduction_factor=REDUCTION
    )
    controller: Any = None  # ASHA does not look at it
    trials: list[Any] = []

    def ask() -> Point:
        trials.append(SimpleNamespace(trial_id=str(len(trials))))
        suggested: Any = searcher.suggest(trials[-1].trial_id)
        scheduler.on_trial_add(controller, trials[-1])
        return point(suggested["config"])

    def tell(number: int, evaluation: int, loss: float) -> bool:
        trial = trials[number]
        result = {"training_iteration": evaluation, "evaluation": evaluation, "loss": loss}
        if scheduler.on_trial_result(controller, trial, result) != TrialScheduler.STOP:
            searcher.on_trial_result(trial.trial_id, result)
            return False
        scheduler.on_trial_complete(controller, trial, result)
        searcher.on_trial_complete(trial.trial_id, result)
        return True

    return ask, tell


SEARCHES = {"random": random_search, "tpe": tpe, "ours": ours, "Ray": rays}


def replay(ask: Ask, tell: Tell, curves: Mapping[Point, Sequence[float]], concurrency: int) -> list[float]:
    """The losses of a search in the order in which they come, up to the lowest that there is."""
    lowest = min(map(min, curves.values()))
    seen: list[float] = []
    running: deque[tuple[int, Iterator[tuple[int, float]]]] = deque()
    started = 0
    while True:
        while len(running) < concurrency and started < len(curves) and (asked := ask()) is not None:
            running.append((started, enumerate(curves[asked], start=1)))
            started += 1
        if not running:
            return seen
        number, rest = running.popleft()
        evaluation, loss = next(rest)
        seen.append(loss)
        if loss == lowest:
            return seen
        if not tell(number, evaluation, loss):
            running.append((number, rest))


@dataclass(frozen=True)
class Need:
    """What a search was given until it reached a target, or in all."""

    trials: float
    """Evaluations, in budgets of one trial."""
    reached: bool


def need(seen: Sequence[float], target: float) -> Need:
    hit = next((count for count, loss in enumerate(seen, start=1) if loss <= target), None)
    return Need((hit or len(seen)) / EVALUATIONS, hit is not None)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of the means, with a bootstrap interval of 90 % over the seeds, which stay paired."""
    pairs = np.array([ours, theirs]).T
    drawn = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    mine, other = pairs[drawn].mean(axis=1).T
    low, high = np.quantile(mine / other, [0.05, 0.95])
    return f"{statistics.mean(ours) / statistics.mean(theirs):.2f} ({low:.2f} to {high:.2f})"


def record(root: Path, target: Path) -> None:
    """Add the curves of a sweep that were trained to their end to a file, a line for each configuration.

    So a record may be made in parts, by sweeps over parts of the space. Raises SystemExit when they were trained on
    something else than those in the file.
    """
    paths = SweepPaths(root)
    if not paths.ledger.exists():
        raise SystemExit(f"{root} holds no sweep with a ledger; train one: python -m sweep run benchmarks/curves.yaml")
    recorded = spec.load(paths.spec, inputs=False)
    ledger = read_journal(paths.ledger, recorded.name)
    versions = {name: number for name, number in ledger.noted("environment").items() if name != "git commit"}
    head = {
        "command": "python -m sweep run benchmarks/curves.yaml",
        "model": Path(recorded.model or recorded.trainable).name,
        "inputs": ledger.noted("inputs"),
        "versions": versions,
    }
    known = json.loads(target.read_text()) if target.exists() else {**head, "curves": []}
    if differing := [name for name in head if head[name] != known[name]]:
        raise SystemExit(f"{root}: {', '.join(differing)} differ from those of {target}; record to another file")
    curves = {tuple(row[name] for name in SEARCHED): row["losses"] for row in known["curves"]}
    for entry in ledger.entries():
        if entry.state is TrialState.COMPLETE and entry.reported == EVALUATIONS:
            losses = [round(entry.losses[number], 6) for number in range(1, EVALUATIONS + 1)]
            curves[point(entry.config)] = losses
    wanted = points(spec.load(SPEC, inputs=False).space)
    rows = [dict(zip(SEARCHED, each, strict=True)) | {"losses": curves[each]} for each in wanted if each in curves]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    target.write_text(json.dumps(head, indent=1).removesuffix("\n}") + f',\n "curves": [\n{lines}\n ]\n}}\n')
    print(f"{target.name}: {len(rows)} of {len(wanted)} curves of {EVALUATIONS} validation losses")


def compare(file: Path, seeds: int, concurrency: int) -> None:
    if not file.exists():
        raise SystemExit(f"{file.name} is not there; record it: python -m benchmarks.search --record sweeps/curves")
    recorded = json.loads(file.read_text())
    curves: dict[Point, list[float]] = {
        tuple(row[name] for name in SEARCHED): row["losses"] for row in recorded["curves"]
    }
    space = spec.load(SPEC, inputs=False).space
    if lacking := len(set(points(space)) - curves.keys()):
        raise SystemExit(
            f"{file.name} lacks {lacking} configurations of {SPEC.name}; train them: python -m sweep run"
            " benchmarks/curves.yaml, and add them: python -m benchmarks.search --record sweeps/curves"
        )
    seen = {
        name: [replay(*search(space, seed), curves, concurrency) for seed in range(seeds)]
        for name, search in SEARCHES.items()
    }
    good = statistics.median(min(losses[: BUDGET * EVALUATIONS]) for losses in seen["random"])
    best = min(map(min, curves.values()))
    needs = {name: [[need(losses, to) for losses in runs] for to in (good, best)] for name, runs in seen.items()}
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "optuna", "qlora-sweep"))
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {packages}")
    print(f"{len(curves)} curves of {recorded['model']}")
    print(f"{seeds} seeds, {concurrency} trials side by side; data needed, in budgets of one trial, until a loss is at")
    print(f"  good  {good:.6f}, what random search has after {BUDGET} trials (median over the seeds)")
    print(f"  best  {best:.6f}, the lowest of all")
    print("search       good: mean   median   reached      best: mean   median   reached")
    for name, (to_good, to_best) in needs.items():
        print(f"{name:10}   {cells(to_good)}      {cells(to_best)}")
    for failed, told in ((None, ""), (len(curves), f", {len(curves)} for a search that never gets there")):
        ratios = [
            ratio(*([each.trials if each.reached else failed or each.trials for each in runs] for runs in pair))
            for pair in zip(needs["ours"], needs["Ray"], strict=True)
        ]
        print(f"ours / Ray (90 % interval): good {ratios[0]}, best {ratios[1]}{told}")


def cells(needs: Sequence[Need]) -> str:
    trials = [each.trials for each in needs]
    reached = f"{sum(each.reached for each in needs)}/{len(needs)}"
    return f"{statistics.mean(trials):10.2f}   {statistics.median(trials):6.2f}   {reached:>7}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--record", type=Path, metavar="SWEEP", help="directory of a sweep over that space, or a part of it"
    )
    parser.add_argument("--curves", type=Path, default=CURVES, help="file to write to or to replay")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=4)
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if asked.record:
        record(asked.record, asked.curves)
    else:
        compare(asked.curves, asked.seeds, asked.concurrency)


if __name__ == "__main__":
    main()
