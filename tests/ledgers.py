"""Ledgers for tests."""

from dataclasses import replace
from queue import SimpleQueue
from threading import Thread

import optuna

from sweep import scoring, tracking
from sweep.early_stopping import rungs, settle
from sweep.place import Place
from sweep.spec import SweepSpec, dump
from sweep.status import Status
from sweep.study import Ledger, Proposal, first_params, propose
from trainables import toy
from trainables.config import QLoRAConfig
from trainables.protocol import Cost, Job


def memory_ledger() -> Ledger:
    return Ledger(optuna.storages.InMemoryStorage(), "test")


def add_trial(ledger: Ledger, **config) -> int:
    """A trial with a configuration of its own, not from any search."""
    config.setdefault("seed", len(ledger))
    return ledger.add(Proposal(QLoRAConfig(**config), {}, {})).number


def swept(spec: SweepSpec, place: Place) -> Status:
    """The sweep of a toy `spec` at its end, without Ray: its ledger is in memory, the rows of its trials are files.

    Every trial has used a second and 100 MB for each rank.
    """
    ledger = memory_ledger()
    ledger.compare_by(spec.criterion)
    rule, evaluations = spec.early_stopping, spec.budget.evaluations
    stops = rungs(evaluations, rule.grace, rule.reduction) if rule else ()
    job = Job(model="", tokens="", budget=spec.budget.per_trial, completions=spec.completions)
    first = first_params(spec.space, spec.search.first)
    for number in range(spec.search.trials):
        entry = ledger.add(propose(ledger.entries(), spec.space, spec.search.sampler, spec.search.seed, first))
        trial = toy.start(entry.config, replace(job, score_base=number == 0), None)
        directory = place.paths.trial(number)
        directory.mkdir(parents=True)
        run = tracking.Run(SimpleQueue(), Thread(), directory / tracking.ROWS)
        run.rows.touch()
        over, rank = False, entry.config.r
        while not over:
            slice_ = trial.advance(0)
            done = slice_.evaluation
            if done is not None and slice_.written is not None:
                value = scoring.objective_of(spec.metric, spec.criterion.name, slice_.written, 60.0)
                done = replace(done, score=spec.criterion.turned(value))
                slice_ = replace(slice_, evaluation=done)
            tracking.log(run, slice_, spec.criterion)
            cost = Cost(rank * trial.step / trial.total_steps, trial.step, 8 * trial.step, 100_000_000 * rank)
            if done is not None:
                ledger.spend(number, cost)
                ledger.report(number, done.evaluation, done.objective, None if done.score is None else done.loss)
                over = settle(ledger, number, evaluations, stops, rule.reduction if rule else 1.0)
    place.paths.spec.write_text(dump(spec))
    return Status(place, spec, ledger, ledger.entries(), None)
