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


def ahead(spec: SweepSpec, ledger: Ledger | None, left: int, engines: Sequence[int]) -> Any:
    """An engine for `slots` whose process starts now; None where it is known that trials have processes of their own.

    `ledger` is None when the sweep has none yet; the rest is as for `slots`.
    """
    decided = _decided(spec, left, engines)
    if decided is None and ledger is not None and (measured := _recorded(spec, ledger)) is not None:
        decided = _chosen(spec, measured, left, engines)
    return None if not left or decided == 1 else _launch(spec)


def load(engine: Any, spec: SweepSpec) -> None:
    """Have the engine load a base that trials will need; one of them meets, and tells of, what goes wrong."""
    config, _ = to_be_measured(_configs(spec), 0)
    engine.call.remote("load", spec.model, config)


def slots(
    spec: SweepSpec,
    job: Job,
    ledger: Ledger,
    left: int,
    engines: Sequence[int],
    engine: Any,
    drained: Callable[[], bool],
    note: Callable[[str], None],
) -> tuple[int, Any]:
    """How many of the trials that are `left` share a device, and an engine, if one runs already and is of further use.

    `engines` are those that each machine has room for; `engine` is one that was started `ahead`. Unless nothing can be
    learned from earlier trials, `auto` has at most a third of the sweep's run at a time. What was measured is in the
    ledger, for the next run on such a device.
    """
    chosen = _decided(spec, left, engines)
    if chosen is None:
        measured = _recorded(spec, ledger)
        if measured is None:
            note("Measuring how many trials should share a device")
            engine = engine or _launch(spec)
            measured = _measured(engine, spec, job, ledger, drained)
        chosen = 1 if measured is None else _chosen(spec, measured, left, engines)
        if isinstance(measured, Measured):
            told = f"a step takes {measured.fixed:.3f} s and {measured.each:.3f} s for each trial"
            if chosen > 1:
                gain = f"{measured.gain(chosen // bases_of(_configs(spec))):.1f} times as fast as one after the other"
                note(f"Packing: {chosen} trials share a device, {gain}; {told}")
            else:
                note(f"{ALONE}: {told}")
        elif measured is not None:
            note(f"{ALONE}: a step of two could not be measured ({measured})")
    if engine is not None and (chosen == 1 or not left):  # of the trials of an earlier run some may just have ended
        ray.kill(engine)
        engine = None
    return chosen, engine


def _launch(spec: SweepSpec) -> Any:
    most = spec.packing.slots if isinstance(spec.packing, Packing) else MOST
    return launch(spec.resources.cpus, spec.resources.gpus, most)


def _configs(spec: SweepSpec) -> list[QLoRAConfig]:
    """Some of the space, always the same."""
    return sample(spec.space, SAMPLED, spec.search.seed)


def _decided(spec: SweepSpec, left: int, engines: Sequence[int]) -> int | None:
    """How many trials share a device, where that does not depend on what would be measured."""
    if isinstance(spec.packing, Packing):
        return spec.packing.slots
    alone = spec.trainable == "toy" or most_together(spec, left, engines) // bases_of(_configs(spec)) < 2
    return 1 if alone else None


def _chosen(spec: SweepSpec, measured: Measured | str, left: int, engines: Sequence[int]) -> int:
    """The same from what was measured, or from why it could not be."""
    if isinstance(measured, str):
        return 1
    most = most_together(spec, left, engines)
    return fastest(measured, spec.resources.gpus, engines, bases_of(_configs(spec)), most)


def processes(gpus: float, places: int, trials: int, slots: int) -> int:
    """How many processes train so many trials at a time, up to `slots` in each.

    Where each has a GPU, or more, of its own: one at each of so many places, as soon as there is a trial for it. Where
    places are parts of a device, each with a base of its own: as few as hold the trials.
    """
    return min(places, trials if gpus >= 1 else -(-trials // slots))


def most_together(spec: SweepSpec, left: int, engines: Sequence[int]) -> int:
    """How many of the trials that are `left` may share a device, so that others can learn from them."""
    learns = spec.early_stopping or spec.search.sampler in ("tpe", "gp")
    at_a_time = min(left, spec.search.trials // 3 if learns else left, spec.resources.concurrency or left)
    return at_a_time // sum(engines)


def bases_of(configs: Sequence[QLoRAConfig]) -> int:
    """Over how many bases trials are spread."""
    return len({(config.quant_type, config.compute_dtype, config.double_quant) for config in configs})


def to_be_measured(configs: Sequence[QLoRAConfig], halvings: int) -> tuple[QLoRAConfig, int]:
    """The configuration that takes most memory, and the rows of a typical micro-batch."""
    return max(configs, key=by_memory), statistics.median_low([c.micro_batch(halvings) for c in configs])


def fastest(measured: Measured, gpus: float, engines: Sequence[int], bases: int, most: int) -> int:
    """How many trials should share a device, on each of which an engine has so many `gpus`."""
    sharing = (int(1 / gpus + 1e-9) if gpus < 1 else 1) if gpus else max(engines)  # the memory
    room = (measured.room - (sharing - 1) * measured.base) // sharing
    of_trial = measured.of_trial + (0 if gpus else CALLER_BYTES)
    return formula.slots(replace(measured, room=room, of_trial=of_trial), bases, most)


def _recorded(spec: SweepSpec, ledger: Ledger) -> Measured | str | None:
    """What was measured on such a device, or why it could not be; None when nothing was."""
    recorded = ledger.noted("packing")
    if recorded is None or recorded["on"] != _device(spec):
        return None
    found = recorded["measured"]
    return found if isinstance(found, str) else Measured(**found)


def _device(spec: SweepSpec) -> dict[str, Any]:
    """That for which a measurement holds."""
    kinds = sorted(kind for kind in ray.cluster_resources() if kind.startswith("accelerator_type:"))
    asked = spec.resources
    return {"cpus": asked.cpus, "gpus": asked.gpus, "devices": kinds, "memory": psutil.virtual_memory().total}


def _measured(
    engine: Any, spec: SweepSpec, job: Job, ledger: Ledger, drained: Callable[[], bool]
) -> Measured | str | None:
    """What an engine measures now, or why it could not; None when the sweep drains."""
    job = replace(job, halvings=max((entry.halvings for entry in ledger.entries()), default=0))
    asked = engine.call.remote("measure", *to_be_measured(_configs(spec), job.halvings), job)
    began = time.monotonic()
    while not ray.wait([asked], timeout=0.2)[0]:
        if drained():
            return None
        if time.monotonic() - began > spec.trial_timeout:
            return f"nothing was heard of it for {spec.trial_timeout:g} s"
    measured: Measured | str
    try:
        measured = ray.get(asked)
    except RayTaskError as error:  # it would be the same again
        measured = f"{type(error.cause).__name__}: {error.cause}"
    except RayError as error:
        return str(error).splitlines()[0]
    noted = measured if isinstance(measured, str) else asdict(measured)
    ledger.note("packing", {"on": _device(spec), "measured": noted})
    return measured
