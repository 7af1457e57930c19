"""spec + study -> ray.tune.Tuner -> done. The only place that assembles a Tuner."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Literal

import ray
from optuna.trial import TrialState
from ray import tune
from ray.tune.execution import class_cache

from sweep import earlier, engine, export, packing, report, scoring, sync, tracking, verification, workspace
from sweep import spec as specs
from sweep.cluster import described, fit_on, machines, ray_cluster
from sweep.early_stopping import rungs, settle
from sweep.lock import locked
from sweep.opening import check_spec, note_news, open_ledger, surroundings
from sweep.paths import SweepPaths
from sweep.place import Place
from sweep.preemption import Drain, draining_after, draining_on_signals
from sweep.progress import Progress, terminal
from sweep.repair import starting_halvings
from sweep.requests import COMMAND, Requests, enqueued
from sweep.run_ends import end_runs, wait_for_ends
from sweep.scheduler import DISK_FULL, LedgerScheduler, Listener, Watch, shielded
from sweep.search import LedgerSearcher
from sweep.space import Space
from sweep.spec import Packing, SweepSpec, Verify
from sweep.study import (
    EXHAUSTED,
    MACHINES,
    PORTABLE,
    Entry,
    Ledger,
    Observation,
    Proposal,
    as_trial,
    first_params,
    propose,
    ranking,
)
from sweep.trainable import Assignment, Lease, SlicedTrial
from sweep.validation import Refused, counted
from trainables import checkpoint, data
from trainables.protocol import Job

SECONDS_PER_RUN = 2.0
"""How long it may take to write one more run of W&B."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `run` ended."""

    ledger: Ledger
    """To be read: its `entries()` are the trials."""
    place: Place
    """The sweep directory; `place.url` says where it is."""
    cause: Literal["signal", "hours", "breakdown"] | None
    """What ended it before its time; None when no trial is left to do."""
    reason: str | None
    """The same in words."""
    exhausted: str | None
    """Why fewer than `search.trials` were tried, if so."""
    winner: Entry | None
    """The trial whose best checkpoint is in best/; None when no trial has one, or a signal or breakdown ended the
    search."""
    kept_offline: int
    """W&B runs that wait for `sync`."""
    seconds: float
    """Wall clock of this call."""


def run(
    spec: SweepSpec,
    *,
    address: str = "local",
    listener: Listener | None = None,
    again: str = "sweep.run(spec)",
    leave_ray: bool = False,
) -> Outcome:
    """Run the sweep, or go on with it where its directory says that it stands.

    `address` is Ray's; `local` starts a cluster of this machine alone. At the end Ray is shut down (5 seconds) or, with
    `leave_ray`, left to end with the process. `listener` is told what happens; without one it is printed. `again`
    is what continues the sweep, for messages.

    To be called in the main thread, also of a notebook: SIGTERM and SIGINT (a notebook's interrupt) have the trials
    write checkpoints, and the call returns; a second one, or `preemption.grace` seconds, end the process.

    Raises `Refused`, or `trainables.data.DataError` for data or a model that cannot be used, before a trial is started;
    OSError where the machine does not do what it should.
    """
    if listener is None:
        trials, evaluations, rule = spec.search.trials, spec.budget.evaluations, spec.early_stopping or None
        with Progress(terminal(), spec.space.searched, trials, evaluations, rule, spec.verify) as progress:
            return run(spec, address=address, listener=progress, again=again, leave_ray=leave_ray)
    if threading.current_thread() is not threading.main_thread():
        raise Refused("a sweep takes over SIGTERM and SIGINT, as only the main thread of a process can: call it there")
    began = time.monotonic()
    place = Place.at(spec.directory)
    listener = shielded(listener)
    paths = place.paths
    inputs = _check_inputs(spec)
    metric, tracked = surroundings(spec, paths)
    if isinstance(spec.packing, Packing) and spec.packing.slots > 1 and not _may_pack(place, address):
        raise Refused(
            f"packing.slots: received {spec.packing.slots}, but with {place.url} the machines of a cluster do not see"
            " each other's files; leave out --address, take a storage that they share, or set packing.slots=1"
        )
    drain = Drain()
    winner = None
    farewell = f"Preempted. The same command goes on: {again}"
    with draining_on_signals(drain, spec.preemption.grace, farewell), locked(place, drain, listener) as lease:
        since = time.time_ns()
        place.pull_file(paths.spec)
        check_spec(spec, paths)
        recorded = open_ledger(spec, paths, inputs, (), listener) if paths.spec.exists() else None
        # Before anything starts: what cannot be used leaves no sweep behind.
        known = _known(spec, inputs, listener) if recorded is None else []
        listener.note(f"Sweep {spec.name}: {counted(spec.search.trials, 'trial')} in {place.url}, W&B {tracked.mode}")
        with (
            ray_cluster(address, spec.resources.cpus, spec.resources.gpus, leave_ray) as side_by_side,
            draining_after(drain, spec.budget.hours),
        ):
            left = _left(spec, recorded)
            ahead = packing.ahead(spec, recorded, left, side_by_side) if _may_pack(place, address) else None
            _check_with_torch(spec, ahead)
            if ahead is not None:  # not beside the check: transformers sets a data type for all threads meanwhile
                packing.load(ahead, spec)
            job = _job(spec, paths, listener)  # before the ledger, too
            if job.tokens and not place.holds(Path(job.tokens) / data.SUMMARY):
                place.push(Path(job.tokens))
            searched_for = metric if spec.objective else None
            if searched_for and not (recorded and scoring.was_asked(recorded, searched_for[1])):
                _try_objective(spec, place, job, drain, alone=ahead is None)
            ledger = open_ledger(spec, paths, inputs, known, listener) if recorded is None else recorded
            note_news(ledger, MACHINES, sorted({*(ledger.noted(MACHINES) or ()), *map(described, machines())}))
            note_news(ledger, PORTABLE, specs.dump(specs.portable(spec)))
            if searched_for and not drain():
                for told in scoring.note_asked(ledger, *searched_for):
                    listener.note(told)
            learned = [as_trial(each, spec.space) for each in earlier.read(ledger)]
            place.push(paths.spec)
            note_news(ledger, COMMAND, again)
            requests = Requests(
                ledger,
                place,
                spec.space,
                spec.budget.evaluations,
                since=since,
                holds=lease.holds,
                drain=drain,
                listener=listener,
            )
            requests.begin()
            first = first_params(spec.space, spec.search.first)
            if not first:
                listener.note(
                    "The documented defaults are not in the space, so none of the trials is the usual default"
                )
            train = partial(
                _train,
                search=ledger,
                requests=requests,
                job=job,
                side_by_side=side_by_side,
                address=address,
                lease=lease,
                drain=drain,
                listener=listener,
            )

            def ask(entries: list[Entry]) -> Proposal:
                tried_first = [*enqueued(ledger), *first]
                return propose(entries, spec.space, spec.search.sampler, spec.search.seed, tried_first, learned)

            def export_best() -> Entry | None:
                tokenizer = Path(job.tokens) / data.TOKENIZER if job.tokens else None
                return export.export_best(ledger, place, spec.model or spec.trainable, tokenizer, listener.note)

            keep = max(spec.checkpoint.keep, spec.verify.top if spec.verify else 0)
            exhausted = train(spec, ledger=ledger, place=place, tracked=tracked, ask=ask, keep=keep, ahead=ahead)
            if exhausted is not None and drain.cause != "breakdown":
                note_news(ledger, EXHAUSTED, exhausted)
            if drain.cause not in ("signal", "breakdown"):
                winner = export_best()
            requests.end_search()
            if spec.verify is not None and winner is not None and not drain():
                _verify(spec, spec.verify, ledger, place, tracked, listener, train)
            if winner is not None and not drain():
                scored = _score(spec, ledger, place, winner, job, metric, requests.drained, listener)
                if not drain():
                    if scored or spec.verify is not None:
                        winner = export_best()  # once more: the model card tells of it
                    with _pushing(spec, job, ledger, place, listener, drain):  # that one, too
                        pass
    seconds = time.monotonic() - began
    kept_offline = tracking.kept_offline(tracked.directory)
    if tracked.mode == "online" and kept_offline:
        listener.note("W&B did not answer, or not in time, while the sweep ran")
    return Outcome(
        ledger=ledger,
        place=place,
        cause=drain.cause,
        reason=drain.reason,
        exhausted=exhausted,
        winner=winner,
        kept_offline=kept_offline,
        seconds=seconds,
    )


def _verify(
    spec: SweepSpec,
    verify: Verify,
    search: Ledger,
    place: Place,
    tracked: tracking.Tracking,
    listener: Listener,
    train: Callable[..., str | None],
) -> None:
    """Train the best configurations again, as a search that has a list of them and stops none of them early."""
    ledger, wanted = verification.begin(search, verify.top, verify.seeds)
    trials: int = ledger.noted("trials")
    listener.verifying(trials)
    train(
        spec.model_copy(
            update={
                "search": spec.search.model_copy(update={"trials": trials, "sampler": "random"}),  # nothing is learned
                "early_stopping": False,
            }
        ),
        ledger=ledger,
        place=replace(place, verification=True),
        tracked=replace(tracked, group=f"{tracked.group} verification"),
        ask=lambda entries: verification.propose(entries, wanted),
        keep=0,
        ahead=None,
    )


def _score(
    spec: SweepSpec,
    ledger: Ledger,
    place: Place,
    winner: Entry,
    job: Job,
    metric: tuple[str, scoring.Metric] | None,
    drained: Callable[[], bool],
    listener: Listener,
) -> bool:
    """Score the winner and the base on what they have not been scored on; whether there was something."""
    exported = export.exported(place)
    if spec.data is None or spec.model is None or exported is None:  # a toy
        return False
    return scoring.score_winner(
        ledger,
        place,
        winner,
        exported["step"],
        spec.model,
        Path(job.tokens).name,
        "validation" if spec.data.test is None else "test",
        metric,
        {"num_cpus": spec.resources.cpus, "num_gpus": spec.resources.gpus},
        drained,
        listener.note,
    )


def _train(
    spec: SweepSpec,
    *,
    ledger: Ledger,
    search: Ledger,
    requests: Requests,
    place: Place,
    tracked: tracking.Tracking,
    ask: Callable[[list[Entry]], Proposal],
    keep: int,
    ahead: Any,
    job: Job,
    side_by_side: Sequence[int],
    address: str,
    lease: Lease,
    drain: Drain,
    listener: Listener,
) -> str | None:
    """Train what is unfinished in a ledger, then what `ask` proposes, up to `search.trials` in total.

    The ledger is that of the `search`, or of its verification. Of the trials that have ended, the checkpoints of the
    best `keep` stay. `ahead` is what `packing.ahead` gave. Returns why fewer were trained, if so.
    """
    emptied: set[int] = set()
    place.claim(ledger.noted("sweep_id"))
    if len(ledger):
        listener.resumed(ledger.entries())

    first_rung = spec.early_stopping.grace if spec.early_stopping else 1
    searched = tuple(dict.fromkeys([*spec.space.searched, *(["seed"] if place.verification else [])]))
    known = [] if ledger is search else search.entries()

    watch = Watch(drain, spec.trial_timeout, alone=address == "local")
    watch.requests = requests
    left = _left(spec, ledger)
    if _may_pack(place, address):
        told = (requests.drained, listener.note)
        slots, ahead = packing.slots(spec, job, search, left, side_by_side, ahead, *told)
    else:
        slots = 1
        if spec.packing == "auto" and spec.trainable != "toy":
            listener.note(f"{packing.ALONE}: the machines of this cluster do not see each other's files")
    most = sum(side_by_side) * slots
    limit = min(most, spec.resources.concurrency or most)
    if left:
        here = packing.processes(spec.resources.gpus, max(side_by_side), min(limit, spec.search.trials), slots)
        ledger.note(report.SIDE_BY_SIDE, here)
    engines = None
    if slots > 1 and left:
        wanted = packing.processes(spec.resources.gpus, sum(side_by_side), min(limit, left), slots)
        more = range(wanted - (ahead is not None))
        launched = [engine.launch(spec.resources.cpus, spec.resources.gpus, slots) for _ in more]
        engines = engine.Engines(filter(None, [ahead, *launched]), slots, lambda: watch.draining, listener.note)
        watch.engines = engines

    def assign(entry: Entry) -> Assignment:
        entries = ledger.entries()
        running = [other.number for other in entries if other.state is TrialState.RUNNING]
        unknown = spec.budget.evaluations > 0 and report.base([*known, *entries]) is None
        score_base = unknown and entry.number == min(running)
        halvings = starting_halvings(entry, [*known, *entries])
        if halvings > entry.halvings:
            ledger.halve(entry.number, halvings)
        return Assignment(
            number=entry.number,
            trainable=spec.trainable,
            config=entry.config,
            job=replace(job, score_base=score_base, halvings=halvings),
            lease=replace(lease, place=place),
            reported=entry.reported,
            cost=entry.cost,
            first_rung=first_rung,
            tracking=tracked,
            sweep_id=ledger.noted("sweep_id"),
            searched=searched,
            checkpoint_minutes=spec.checkpoint.every,
            engine=engines.choose(entry.number, running) if engines else None,
            criterion=spec.criterion,
            metric=spec.metric if spec.objective else None,
            metric_seconds=spec.trial_timeout / 2,
        )

    def started(entry: Entry) -> None:
        try:
            tidy(ledger, place, keep, emptied)
        except OSError as error:
            listener.note(f"Checkpoints that nobody needs could not be deleted: {error}")
        listener.started(entry)

    def settled(number: int) -> bool:
        rule = spec.early_stopping
        stops = rungs(spec.budget.evaluations, rule.grace, rule.reduction) if rule else ()
        return settle(ledger, number, spec.budget.evaluations, stops, rule.reduction if rule else 1.0)

    ending: set[int] = set()

    model, evaluations = spec.model or "", spec.budget.evaluations
    supply_ends = partial(end_runs, ledger, place, tracked, searched, model, evaluations, first_rung, ending)
    supply_ends()
    searcher = LedgerSearcher(
        ledger,
        trials=spec.search.trials,
        concurrency=limit,
        propose=ask,
        settle=settled,
        assign=assign,
        drain=drain,
        started=started,
        ready=engines.ready if engines else lambda running: True,
    )
    requests.put_back = searcher.hand_out_again
    if engines:
        requests.ended = engines.forget
    scheduler = LedgerScheduler(
        ledger,
        settle=settled,
        put_back=searcher.hand_out_again,
        drain=drain,
        listener=listener,
        lease=lease,
        watch=watch,
    )
    if left and not drain():
        asked = spec.resources
        needs = {"cpu": engine.CALLER_CPUS} if engines else {"cpu": asked.cpus, "gpu": asked.gpus}
        at_once = limit
        if not engines and address != "local":  # others may have what the cluster has
            at_once = max(1, min(limit, fit_on(ray.available_resources(), asked.cpus, asked.gpus)))
        with nullcontext() if place.verification else _pushing(spec, job, ledger, place, listener, drain):
            _tune(searcher, scheduler, watch, drain, needs, at_once)
        for note in watch.unsaved():
            listener.note(note)
    if engines and not drain():
        engines.end()
    if drain.cause != "signal":
        if tracked.mode != "disabled":
            wait_for_ends(ledger, place)
        supply_ends()
    tracking.close(10 + SECONDS_PER_RUN * len(ending) if drain.cause != "signal" else 10)
    if tracked.mode == "online" and not place.verification and drain.cause not in ("signal", "breakdown"):
        _lay_out_view(tracked, spec.space, ledger, place, listener)
    for note in tracking.notes():
        listener.note(note)
    if drain.cause not in ("signal", "breakdown"):
        tidy(ledger, place, keep, emptied)
    return searcher.exhausted


def _left(spec: SweepSpec, ledger: Ledger | None) -> int:
    """How many trials are to be trained, or on."""
    entries = [] if ledger is None else ledger.entries()
    unfinished = sum(entry.state is TrialState.RUNNING for entry in entries)
    exhausted = ledger is not None and ledger.noted(EXHAUSTED)
    return unfinished + (0 if exhausted else max(0, spec.search.trials - len(entries)))


def _may_pack(place: Place, address: str) -> bool:
    """Whether an engine can read and write what the processes of its trials can."""
    return address == "local" or not place.is_remote


def tidy(ledger: Ledger, place: Place, keep: int, emptied: set[int]) -> None:
    """Of the trials that have ended, keep the best checkpoint of the best `keep`, the last one of those that came to no
    evaluation and may go on, and nothing of the others.

    `emptied` are those of which nothing is left, to be passed to the next call: they are not looked at again.
    """
    entries = ledger.entries()
    ended = [entry for entry in entries if entry.state is not TrialState.RUNNING]
    emptied -= {entry.number for entry in entries} - {entry.number for entry in ended}  # they were revived
    unscored = [each for each in ended if each.best is None and each.state is not TrialState.FAIL]
    contenders = {entry.number for entry in [*ranking(ended)[:keep], *unscored]}
    for entry in [entry for entry in ended if entry.number not in emptied]:
        directory = place.paths.trial(entry.number)
        if entry.number in contenders:
            place.pull_checkpoints(directory, manifests_alone=True)
        else:
            emptied.add(entry.number)
        newest = checkpoint.best if entry.best else checkpoint.last
        found = newest(directory) if entry.number in contenders else None
        if found is None and entry in unscored:  # its last one is damaged, the one before it is all that there is
            continue
        checkpoint.prune(directory, {found.path} if found else set())
        place.prune(directory)


def _pushing(
    spec: SweepSpec, job: Job, ledger: Ledger, place: Place, listener: Listener, drain: Drain
) -> AbstractContextManager[None]:
    if spec.checkpoint.push_to is None or spec.model is None:
        return nullcontext()

    def hurried() -> bool:
        return drain.cause in ("signal", "breakdown")

    tokenizer = Path(job.tokens) / data.TOKENIZER
    upload = export.Upload(spec.checkpoint.push_to, ledger, place, spec.model, tokenizer, listener.note)
    return export.pushing_best(upload, hurried)


def _lay_out_view(tracked: tracking.Tracking, space: Space, ledger: Ledger, place: Place, listener: Listener) -> None:
    try:
        view = workspace.make(
            tracked.project, tracked.entity, tracked.group, ledger.noted("sweep_id"), space, ledger.criterion
        )
    except Exception as error:  # noqa: BLE001 - of wandb's core process, too; it is told, and the search is done
        told = error if isinstance(error, Refused | sync.Failed) else f"{type(error).__name__}: {error}"
        listener.note(f"W&B has no view of the sweep ({told}); make it with: {place.command('workspace')}")
    else:
        listener.note(f"The runs are laid out at {view.url}")


def _check_inputs(spec: SweepSpec) -> dict[str, str]:
    """Look at model and data without starting anything; returns hashes of their content, none for `toy`."""
    if spec.trainable == "toy":
        return {}
    assert spec.model is not None
    assert spec.data is not None
    return data.content_hashes(spec.data, spec.model)


def _try_objective(spec: SweepSpec, place: Place, job: Job, drain: Drain, *, alone: bool) -> None:
    """Call the metric once. `alone`: no engine has the device."""
    if spec.trainable == "toy":  # its rows have no text
        return
    assert spec.metric is not None
    asked = spec.resources
    try:
        scoring.try_objective(
            spec.metric,
            spec.criterion.name,
            place,
            Path(job.tokens).name,
            job.completions,
            {"num_cpus": asked.cpus, "num_gpus": asked.gpus} if alone else {"num_cpus": engine.CALLER_CPUS},
            spec.trial_timeout / 2,
            drain,
        )
    except scoring.MetricFault as error:
        raise Refused(str(error)) from error


def _known(spec: SweepSpec, inputs: Mapping[str, str], listener: Listener) -> list[Observation]:
    try:
        return earlier.gather(spec.search.from_, spec, inputs, listener.note)
    except earlier.Unusable as error:
        raise Refused(str(error)) from error


def _check_with_torch(spec: SweepSpec, ahead: Any) -> None:
    """See `engine.check`: by the engine that was started ahead, or by a process of its own."""
    asked = spec.resources
    bf16 = asked.gpus > 0 and "bf16" in spec.space.values("compute_dtype")
    layers = [names for names in spec.space.values("target_modules") if names != "all-linear"]
    if spec.model is None or not (asked.gpus or layers):
        return
    alone = ray.remote(num_cpus=asked.cpus, num_gpus=asked.gpus, max_retries=2)
    try:
        ray.get((alone(engine.check) if ahead is None else ahead.check).remote(spec.model, layers, bf16))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError):
            raise Refused(str(error.cause)) from error
        raise
    except ray.exceptions.RayError as error:
        said = str(error).splitlines()
        why = said[-1] if "creation task" in said[0] else f"{said[0]}, mostly for want of memory"
        raise OSError(f"{spec.model}: the processes that were to look at it before the trials died ({why})") from error


def _job(spec: SweepSpec, paths: SweepPaths, listener: Listener) -> Job:
    """What all trials have in common; the data are tokenised here, before any of them starts."""
    budget = spec.budget.per_trial
    if spec.trainable == "toy":
        return Job(model="", tokens="", budget=budget, completions=spec.completions)
    assert spec.model is not None
    assert spec.data is not None
    prepared = data.prepare(spec.data, spec.model, paths.tokens)
    if spec.metric is not None:
        tokens = data.load(prepared.path)
        data.with_answers(tokens.test or tokens.validation)
        if spec.objective is not None:
            data.with_answers(tokens.validation)
    for note in prepared.notes:
        listener.note(note)
    if not budget.evaluations:
        rows = prepared.rows["train"] + prepared.rows["validation"]
        long = f"{budget.steps:,} steps" if budget.steps else f"{budget.epochs:.3g} epochs"
        listener.note(
            f"All {rows:,} rows of training and validation are trained on, for {long}: no validation loss follows"
        )
    return Job(spec.model, str(prepared.path), budget, completions=spec.completions)


def _tune(
    searcher: LedgerSearcher, scheduler: LedgerScheduler, watch: Watch, drain: Drain, resources: Any, at_once: int
) -> None:
    """Let Ray Tune run what the searcher hands out; so many processes start `at_once`.

    Nothing of Tune's own files is ever read: they go when it is done.
    """
    # Tune sends the driver's AWS keys to trials, through Ray's logs and its server; each machine has its own.
    kept_here = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(kept_here)
    with TemporaryDirectory(prefix="qlora-sweep-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(SlicedTrial, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,  # the searcher says when it is done
                reuse_actors=True,
                trial_name_creator=lambda trial: f"{trial.config['assignment'].number:03d}",
                trial_dirname_creator=lambda trial: f"{trial.config['assignment'].number:03d}",
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                callbacks=[watch],
                stop=watch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
            ),
        )
        try:
            with _environment_variable("TUNE_MAX_PENDING_TRIALS_PG", str(at_once)):  # Tune's own choice is 1
                tuner.fit()
        except Exception as error:  # noqa: BLE001 - what Tune does not expect of Ray it raises, with trials under way
            why = f"Ray Tune failed ({type(error).__name__}: {error})"
            if getattr(error, "errno", None) in DISK_FULL:
                why += f"; free space for temporary files, on the disk of {gettempdir()} and of RAY_TMPDIR (/tmp)"
            drain.request("breakdown", why)


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Set for the block, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
