"""How many trials share a device: what the spec says, or what an engine has measured to be fastest."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from sweep.engine import CALLER_BYTES, launch
from sweep.spec import Packing, SweepSpec
from sweep.study import Ledger, sample
from trainables.config import QLoRAConfig, by_memory
from trainables.packed import slots as formula
from trainables.packed.slots import MOST, Measured
from trainables.protocol import Job

SAMPLED = 64
"""Configurations of the space that are looked at."""
ALONE = "Packing: each trial has a process of its own"


def slots(
    spec: SweepSpec,
    job: Job,
    ledger: Ledger,
    left: int,
    engines: Sequence[int],
    drained: Callable[[], bool],
    note: Callable[[str], None],
) -> tuple[int, Any]:
    """How many of the trials that are `left` share a device, and the engine that has measured it just now, if it is of
    further use.

    `engines` are those that each machine has room for. Unless nothing can be learned from earlier trials, `auto` has at
    most a third of the sweep's run at a time. What was measured is in the ledger, for the next run on such a device.
    """
    if isinstance(spec.packing, Packing):
        return spec.packing.slots, None
    if spec.trainable == "toy":
        return 1, None
    configs = sample(spec.space, SAMPLED, spec.search.seed)
    most, bases = most_together(spec, left, engines), bases_of(configs)
    if most // bases < 2:
        return 1, None
    measured, engine = _measured(spec, job, ledger, configs, drained, note)
    chosen = 1
    if isinstance(measured, Measured):
        chosen = fastest(measured, spec.resources.gpus, engines, bases, most)
        told = f"a step takes {measured.fixed:.3f} s and {measured.each:.3f} s for each trial"
        if chosen > 1:
            gain = f"{measured.gain(chosen // bases):.1f} times as fast as one after the other"
            note(f"Packing: {chosen} trials share a device, {gain}; {told}")
        else:
            note(f"{ALONE}: {told}")
    elif measured is not None:
        note(f"{ALONE}: a step of two could not be measured ({measured})")
    if chosen == 1 and engine is not None:
        ray.kill(engine)
        engine = None
    return chosen, engine


def most_together(spec: SweepSpec, left: int, engines: Sequence[int]) -> int:
    """How many of the trials that are `left` may share a device, so that others can learn from them."""
    learns = spec.early_stopping or spec.search.sampler in ("tpe", "gp")
    at_a_time = min(left, spec.search.trials // 3 if learns else left, spec.resources.concurrency or left)
    return at_a_time // sum(engines)


def bases_of(configs: Sequence[QLoRAConfig]) -> int:
    """Over how many bases trials are spread."""
    return len({(config.quant_type, config.compute_dtype, config.double_quant) for config in configs})


def to_be_measured(configs: Sequence[QLoRAConfig], job: Job) -> tuple[QLoRAConfig, int]:
    """The configuration that takes most memory, and the rows of a typical micro-batch."""
    return max(configs, key=by_memory), statistics.median_low([c.micro_batch(job.halvings) for c in configs])


def fastest(measured: Measured, gpus: float, engines: Sequence[int], bases: int, most: int) -> int:
    """How many trials should share a device, on each of which an engine has so many `gpus`."""
    sharing = (int(1 / gpus + 1e-9) if gpus < 1 else 1) if gpus else max(engines)  # the memory
    room = (measured.room - (sharing - 1) * measured.base) // sharing
    of_trial = measured.of_trial + (0 if gpus else CALLER_BYTES)
    return formula.slots(replace(measured, room=room, of_trial=of_trial), bases, most)


def _measured(
    spec: SweepSpec,
    job: Job,
    ledger: Ledger,
    configs: Sequence[QLoRAConfig],
    drained: Callable[[], bool],
    note: Callable[[str], None],
) -> tuple[Measured | str | None, Any]:
    """What the ledger has of such a device or an engine measures now, or why it could not; None when the sweep drains.

    And that engine.
    """
    gpus = spec.resources.gpus
    kinds = sorted(kind for kind in ray.cluster_resources() if kind.startswith("accelerator_type:"))
    here = {"cpus": spec.resources.cpus, "gpus": gpus, "devices": kinds, "memory": psutil.virtual_memory().total}
    recorded = ledger.noted("packing")
    if recorded is not None and recorded["on"] == here:
        found = recorded["measured"]
        return found if isinstance(found, str) else Measured(**found), None
    note("Measuring how many trials should share a device")
    job = replace(job, halvings=max((entry.halvings for entry in ledger.entries()), default=0))
    engine = launch(spec.resources.cpus, gpus, MOST)
    asked = engine.call.remote("measure", *to_be_measured(configs, job), job)
    began = time.monotonic()
    while not ray.wait([asked], timeout=0.2)[0]:
        if drained():
            return None, engine
        if time.monotonic() - began > spec.trial_timeout:
            return f"nothing was heard of it for {spec.trial_timeout:g} s", engine
    measured: Measured | str
    try:
        measured = ray.get(asked)
    except RayTaskError as error:  # it would be the same again
        measured = f"{type(error.cause).__name__}: {error.cause}"
    except RayError as error:
        return str(error).splitlines()[0], engine
    ledger.note("packing", {"on": here, "measured": measured if isinstance(measured, str) else asdict(measured)})
    return measured, engine
