"""What a sweep would take of this machine, in hours and money, from steps that are timed here."""

import importlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray._private.utils

from sweep import packing
from sweep.cluster import fit_on
from sweep.progress import to_verify
from sweep.repair import may_halve
from sweep.report import money
from sweep.spec import Packing, SweepSpec
from sweep.study import sample
from sweep.tracking import described
from sweep.validation import counted
from trainables.apart import one_process
from trainables.config import QLoRAConfig
from trainables.packed.slots import Measured
from trainables.protocol import Job, OutOfMemory, Timed


@dataclass(frozen=True)
class Probed:
    """What was measured on this machine."""

    timed: Mapping[str, Timed]
    """Of each configuration, by name."""
    halvings: Mapping[str, int]
    """How often the micro-batch was halved until it fitted."""
    imports: float
    """Seconds that a process takes to start."""
    at_a_time: int
    """Trials that train at the same time."""
    places: int
    """Processes in which they do."""
    slots: int
    """Trials in a process, at most."""
    gain: float
    """How many times as fast as one after the other those train."""


def probe(spec: SweepSpec, configs: Mapping[str, QLoRAConfig], tokens: Path) -> Probed:
    """Time two optimiser steps and an evaluation of each configuration, in a process of its own.

    `tokens` is what `data.prepare` made. Raises ValueError when trials cannot run on this machine; it names the
    configuration that does not fit.
    """
    assert spec.model is not None
    job = Job(spec.model, str(tokens), spec.budget.per_trial, completions=spec.completions)
    prepare = partial(_prepare, spec.resources.gpus)
    try:
        began = time.monotonic()
        with one_process(prepare) as pool:
            pool.submit(_imported).result()
            imports = time.monotonic() - began
            found = {name: _timed(pool, spec, name, config, job) for name, config in configs.items()}
            machine = {"CPU": ray._private.utils.get_num_cpus(), "GPU": next(iter(found.values()))[1].devices}
            fit = fit_on(machine, spec.resources.cpus, spec.resources.gpus)
            if not fit:
                raise ValueError(
                    f"resources: a trial asks for {spec.resources.cpus:g} cpus and {spec.resources.gpus:g}"
                    " gpus, which this machine does not have; ask for less, or probe where they will run"
                )
            slots, gain = _packed(pool, spec, job, fit)
    except BrokenProcessPool as error:
        raise ValueError("the process that timed trials died, mostly for want of memory") from error
    most = min(fit * slots, spec.resources.concurrency or fit * slots, spec.search.trials)
    places = packing.processes(spec.resources.gpus, fit, most, slots)
    together = -(-most // places)
    return Probed(
        timed={name: timed for name, (_, timed) in found.items()},
        halvings={name: halvings for name, (halvings, _) in found.items()},
        imports=imports,
        at_a_time=most,
        places=places,
        slots=together,
        gain=gain(together),
    )


def told(
    probed: Probed, spec: SweepSpec, configs: Mapping[str, QLoRAConfig], survivors: Sequence[float], rows: int
) -> dict[str, list[str]]:
    """Lines by heading: what was measured, and the hours and the cost of a sweep over so many training rows, with its
    verification.

    `survivors` are the trials that are expected to reach evaluation 1, 2, ….
    """
    places, evaluations = probed.places, spec.budget.evaluations
    longer = [each + to_verify(spec.verify, [], spec.search.trials) for each in survivors]
    measured, whole, verifying = [], [], []
    for name, config in configs.items():
        timed, halvings = probed.timed[name], probed.halvings[name]
        steps = spec.budget.per_trial.total_steps(rows, config.batch_size)
        alone = steps * timed.step + evaluations * timed.evaluation
        fitted = f", in micro-batches of {config.micro_batch(halvings)} rows, which fit" if halvings else ""
        measured.append(
            f"{name}: {timed.step:.3f} s a step, {timed.evaluation:.2f} s an evaluation; {steps:,} steps and"
            f" {counted(evaluations, 'evaluation')} take {alone / 60:,.1f} min{fitted}"
        )
        search, both = (
            sweep_seconds(timed, steps, evaluations, each, places, probed.gain) for each in (survivors, longer)
        )
        whole.append((probed.imports + both) / 3600)
        verifying.append((both - search) / 3600)
    any_of = next(iter(probed.timed.values()))
    starts = f"a process starts in {probed.imports + any_of.start:.0f} s"
    at_a_time = f"{probed.at_a_time} trials at a time"
    if probed.slots > 1:
        at_a_time += f", {probed.slots} in a process, {probed.gain:.1f} times as fast as one after the other"
    low, high = min(whole), max(whole)
    of_which = f"; {money(min(verifying))} to {money(max(verifying))} of them verification" if spec.verify else ""
    lines = {
        "probe": [f"{any_of.device}, one trial alone; {starts}", *measured],
        "hours": [f"{money(low)} to {money(high)} on this machine, {at_a_time}{of_which}"],
    }
    if (per_hour := spec.cost.per_hour) is not None:
        lines["cost"] = [f"{money(low * per_hour)} to {money(high * per_hour)}, at {per_hour:g} an hour"]
    lines["assumed"] = [
        "every trial takes as long as one of these, and early stopping lets through what is expected above;",
        "trials side by side do not slow each other, and no place is empty before the end",
    ]
    if spec.metric is not None or (spec.data is not None and spec.data.test is not None):
        lines["assumed"].append("what scoring the winner takes comes to it")
    return lines


def sweep_seconds(
    timed: Timed, steps: int, evaluations: int, survivors: Sequence[float], places: int, gain: float
) -> float:
    """Until a sweep is done all of whose trials take what was `timed`, in processes that train at so many places.

    `gain` is how many times as fast as one after the other the trials of a process train. The base is scored once.
    """
    training = sum(survivors) / len(survivors) * steps * timed.step / gain
    scoring = (sum(survivors) + 1) * timed.evaluation if evaluations else 0.0
    return timed.start + (training + scoring) / places


def _prepare(gpus: float) -> None:
    """Make the process one like that of a trial, before torch is imported."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _imported() -> None:
    importlib.import_module("trainables.probe")


def _timed(pool: ProcessPoolExecutor, spec: SweepSpec, name: str, config: QLoRAConfig, job: Job) -> tuple[int, Timed]:
    """How often the micro-batch had to be halved, and what a trial then takes."""
    threads, on_gpu = max(1, int(spec.resources.cpus)), spec.resources.gpus > 0
    try:
        return job.halvings, pool.submit(_call, "trainables.probe", "probe", config, job, threads, on_gpu).result()
    except OutOfMemory as error:
        if not may_halve(config, job.halvings):
            why = f"not even with a micro-batch of {config.micro_batch(job.halvings)}: {error}"
            raise _too_large(name, config, spec, why) from error
    except MemoryError as error:
        raise _too_large(name, config, spec, str(error)) from error
    except BrokenProcessPool as error:
        raise _too_large(name, config, spec, "the process that timed it died, mostly for want of memory") from error
    return _timed(pool, spec, name, config, replace(job, halvings=job.halvings + 1))


def _too_large(name: str, config: QLoRAConfig, spec: SweepSpec, why: str) -> ValueError:
    return ValueError(
        f"the {name} configuration, {described(config, spec.space.searched)}, does not fit on this machine ({why}). Set"
        " gradient_checkpointing: true or a lower data.max_length, take it out of the space, or probe where there is"
        " more memory"
    )


def _packed(pool: ProcessPoolExecutor, spec: SweepSpec, job: Job, fit: int) -> tuple[int, Callable[[int], float]]:
    """How many trials may share a process, of which so many fit on this machine, and how many times as fast as one
    after the other how many of them train."""
    configs = sample(spec.space, packing.SAMPLED, spec.search.seed)
    bases = packing.bases_of(configs)
    given = spec.packing.slots if isinstance(spec.packing, Packing) else None
    most = given or packing.most_together(spec, spec.search.trials, [fit])
    if most // bases < 2:
        return given or 1, lambda together: 1.0
    try:
        asked = packing.to_be_measured(configs, job.halvings)
        measured: Measured = pool.submit(_call, "trainables.packed.measure", "measure", *asked, job).result()
    except (OutOfMemory, MemoryError):  # two do not fit
        return given or 1, lambda together: 1.0
    slots = given or packing.fastest(measured, spec.resources.gpus, [fit], bases, most)
    return slots, lambda together: measured.gain(max(1, together // bases))


def _call(module: str, function: str, *arguments: Any) -> Any:
    """In the process of the pool, which keeps an error until the next one."""
    try:
        return getattr(importlib.import_module(module), function)(*arguments)
    except OutOfMemory as error:
        reason = str(error)  # the error itself holds on to the tensors of its frames
    raise OutOfMemory(reason)
