"""What a sweep would do, before anything is started: data, steps, early stopping, memory, and configurations."""

import importlib
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from optuna.storages import InMemoryStorage
from rich import box
from rich.console import Console
from rich.table import Table

from sweep import earlier, scoring
from sweep.early_stopping import survivors
from sweep.opening import check_spec, surroundings
from sweep.place import Place
from sweep.progress import terminal, to_verify
from sweep.spec import EarlyStopping, Packing, SweepSpec
from sweep.study import Ledger, Observation, SpaceExhausted, as_trial, first_params, propose, sample
from sweep.tracking import described
from sweep.validation import Refused
from trainables import data
from trainables.config import QLoRAConfig, by_memory
from trainables.protocol import Budget

SAMPLED = 200
"""Configurations of the space that are looked at."""
SHOWN = 10
FEW = 20
"""Validation rows, on fewer of which losses differ mostly by chance."""
RUNNING = 3
"""Checkpoints of a trial that runs, at most."""
RAY = 500_000_000
"""Bytes of a CPU's memory that the driver and Ray's own processes take together (470 to 500 MB with Ray 2.60)."""
TRACKED_RUN, TRACKED_STEP = 30_000, 1_000
"""Bytes of a W&B run on disk, and of each of its steps (12 runs of 5 or 15 steps took 32 and 40 to 43 kB)."""


@dataclass(frozen=True)
class Split:
    """Rows of one kind."""

    rows: int
    tokens: int
    median: int
    """Tokens of a row."""
    most: int
    """Tokens that 95 % of the rows do not exceed."""
    cut_off: int
    """Rows that lose labels to max_length."""


def splits(prepared: data.Prepared) -> dict[str, Split]:
    """Of tokenised data: train, validation and, where there is one, test."""
    tokens = data.load(prepared.path)
    found = {"train": tokens.train, "validation": tokens.validation, "test": tokens.test}
    return {
        name: Split(
            rows=len(rows),
            tokens=len(rows.input_ids),
            median=int(np.percentile(np.diff(rows.offsets), 50, method="inverted_cdf")),
            most=int(np.percentile(np.diff(rows.offsets), 95, method="inverted_cdf")),
            cut_off=prepared.cut_off[name],
        )
        for name, rows in found.items()
        if rows is not None
    }


def show(spec: SweepSpec, console: Console | None = None, *, probe: bool = False) -> None:
    """Print the plan of a sweep: data, steps, early stopping, memory, configurations. Nothing is started.

    With `probe` the lightest and the heaviest configuration are timed on this machine, which takes a minute or two, and
    hours and, with `cost.per_hour`, the cost follow. `console` is standard output unless given.

    Raises what `run` does before it starts anything: `Refused`, or `trainables.data.DataError` for data or a model that
    cannot be used; and ValueError for layers that the model does not have, for `search.from` that cannot be used, and
    for trials that do not run here.
    """
    place = Place.at(spec.directory)
    surroundings(spec, place.paths)
    place.pull_file(place.paths.spec)
    check_spec(spec, place.paths)
    console = console or terminal()

    def say(what: str, lines: Iterable[str]) -> None:
        for line in lines:
            console.print(f"{what:<9}{line}", highlight=False, soft_wrap=True)
            what = ""

    console.print(f"Plan of {spec.name}: nothing was started.", highlight=False)
    if place.paths.spec.exists():
        say(
            "there", [f"{place.shown} is this sweep already, and `run` goes on with it ({place.command('status')} says"]
        )
        say("", ["how it stands); below is what it would be from its beginning"])
    configs = sample(spec.space, SAMPLED, spec.search.seed)
    if spec.trainable == "toy":
        if probe:
            raise ValueError("--probe: the steps of a toy take no time; leave it out")
        say("trials", _trials(spec))
    else:
        assert spec.data is not None
        assert spec.model is not None
        data.check_model(spec.model)
        with TemporaryDirectory(prefix="qlora-plan-") as scratch, ThreadPoolExecutor(1) as beside:
            importing = beside.submit(importlib.import_module, "trainables.memory")  # seconds, as tokenising takes
            prepared = data.prepare(spec.data, spec.model, Path(scratch))
            memory = importing.result()
            tokens = data.load(prepared.path)
            train = tokens.trained_on(spec.budget.evaluations)
            if spec.metric is not None:
                data.with_answers(tokens.validation if spec.objective else tokens.test or tokens.validation)
                if spec.objective is not None:
                    _try_objective(spec, spec.metric, prepared.path)
            say("data", [*_data(prepared), *prepared.notes])
            say("steps", _steps(spec.budget.per_trial, configs, len(train)))
            rule = spec.early_stopping or None
            say("", _too_early(spec.budget.per_trial, rule, configs, len(train)))
            say("trials", _trials(spec, prepared.rows["validation"]))
            shapes, on = memory.shapes(spec.model), memory.device_of(spec.resources.gpus)
            say("base", _base(memory, spec.model, configs, shapes.parameters))
            candidates = [
                *sorted(configs, key=by_memory)[-3:],
                max(configs, key=lambda config: memory.size(spec.model, config)),
            ]
            needed = {
                name: max(
                    (
                        (config, memory.estimate(spec.model, config, *memory.largest_micro_batch(train, config), on))
                        for config in those
                    ),
                    key=lambda each: each[1].total,
                )
                for name, those in {"lightest": [min(configs, key=by_memory)], "heaviest": candidates}.items()
            }
            device, _ = memory.this_device(on)
            free, process = memory.free(on), memory.of_a_process(on)
            room = free - (RAY if on.type == "cpu" else 0)

            def fits(config: QLoRAConfig) -> bool:
                taken = memory.estimate(spec.model, config, *memory.largest_micro_batch(train, config), on)
                return bool(taken.total + process <= room)

            if spec.resources.gpus and device == "a CPU":
                say(
                    "gpu",
                    ["trials ask for one, and this machine has none: `run` would refuse. Of a CPU they would take:"],
                )
            say("cpu", _too_many(spec.resources.cpus, os.cpu_count() or 1))
            heaviest = needed["heaviest"][1].total + process
            say("memory", _room(heaviest, process, device, free, room))
            if isinstance(spec.packing, Packing) and spec.packing.slots > 1:
                say("", [f"with packing.slots up to {spec.packing.slots} share a process and its base, and take less"])
            if heaviest > room:
                say("", _too_large(configs, fits, spec.space.searched))
            console.print(_memory(needed, spec.space.searched))
            sizes = sorted((memory.size(spec.model, config), config.r) for config in configs)
            say("adapter", _adapters(sizes[0], sizes[-1]))
            largest = max(memory.trained_bytes(spec.model, config) for config in configs)
            bases = {(c.quant_type, c.compute_dtype, c.double_quant) for c in configs}
            of_bases = sum(memory.base_bytes(spec.model, *each) for each in bases)
            smallest = min(config.batch_size for config in configs)
            tracked = _tracked(spec, spec.budget.per_trial.total_steps(len(train), smallest))
            say("disk", _disk(spec, largest, of_bases, prepared.path, tracked))
            if probe:
                probes = importlib.import_module("sweep.probe")  # brings Ray
                chosen = {name: config for name, (config, _) in needed.items()}
                expected = survivors(spec.search.trials, spec.budget.evaluations, spec.early_stopping or None)
                measured = probes.probe(spec, chosen, prepared.path)
                for what, lines in probes.told(measured, spec, chosen, expected, len(train)).items():
                    say(what, lines)
    notes: list[str] = []
    known = earlier.gather(spec.search.from_, spec, None, notes.append)
    say("known", notes)
    say("first", ["as long as none of them has a loss, these are tried:"])
    console.print(_configurations(spec, known))


def _try_objective(spec: SweepSpec, metric: str, tokens: Path) -> None:
    try:
        scoring.try_here(metric, spec.criterion.name, tokens, spec.completions, spec.trial_timeout / 2)
    except scoring.MetricFault as error:
        raise Refused(str(error)) from error


def _data(prepared: data.Prepared) -> Iterator[str]:
    for name, split in splits(prepared).items():
        cut = f", {split.cut_off:,} of them ({split.cut_off / split.rows:.1%}) cut off" if split.cut_off else ""
        yield (
            f"{name}: {split.rows:,} rows, {split.tokens:,} tokens; a row has {split.median} (median),"
            f" 95 % have at most {split.most}{cut}"
        )
    if (few := prepared.rows["validation"]) < FEW:
        yield f"losses on so few validation rows, {few}, differ mostly by chance: a higher data.validation has more"


def _steps(budget: Budget, configs: Sequence[QLoRAConfig], rows: int) -> Iterator[str]:
    for batch_size in sorted({config.batch_size for config in configs}):
        steps = budget.total_steps(rows, batch_size)
        at = budget.evaluation_steps(steps)
        shown = ", ".join(map(str, at if len(at) < 6 else [*at[:3], "…", at[-1]]))
        epochs = steps / -(-rows // batch_size)
        scored = f"validation after {shown}" if at else "no validation, its rows are trained on, too"
        of = f"{batch_size} rows" if batch_size <= rows else f"all {rows} rows (batch_size {batch_size} is more)"
        yield f"{steps:,} of {of} are {epochs:.2f} epochs; {scored}"


def _too_early(budget: Budget, rule: EarlyStopping | None, configs: Sequence[QLoRAConfig], rows: int) -> Iterator[str]:
    """Where early stopping would compare trials that have not learned yet."""
    for batch_size in sorted({config.batch_size for config in configs}):
        steps = budget.total_steps(rows, batch_size)
        warm_up = max(math.ceil(config.warmup_ratio * steps) for config in configs if config.batch_size == batch_size)
        if rule and rule.grace <= budget.evaluations:
            first = budget.evaluation_steps(steps)[rule.grace - 1]
            if first <= warm_up:
                yield (
                    f"early stopping looks after step {first} for the first time, and the learning rate of some rises"
                    f" from 0 until step {warm_up}: set fewer budget.evaluations, or a later early_stopping.grace"
                )


def _trials(spec: SweepSpec, validation: int | None = None) -> Iterator[str]:
    """`validation` are its rows, of a model that may be asked to write."""
    rule = spec.early_stopping or None
    expected = survivors(spec.search.trials, spec.budget.evaluations, rule)
    yield f"{spec.search.trials}, proposed by {spec.search.sampler}"
    if rule:
        shown = ", ".join(f"{count:.0f}" for count in expected)
        share = sum(expected) / (spec.search.trials * spec.budget.evaluations)
        yield f"expected to reach evaluations 1 to {len(expected)}: {shown} (ASHA; {share:.0%} of all training)"
    verifications = to_verify(spec.verify, [], spec.search.trials)
    if spec.verify:
        top, seeds = verifications // spec.verify.seeds, spec.verify.seeds
        yield f"then {verifications} whole ones: the best {top} with {seeds} other seeds each"
    if spec.objective:
        rows = min(spec.objective.rows, validation or spec.objective.rows)
        written = rows * (1 + sum(expected) + verifications * spec.budget.evaluations)
        yield f"compared by {spec.criterion}"
        yield f"{rows} answers are written at each evaluation, the base's, too, about {written:,.0f} in all"


def _base(memory: Any, model: str, configs: Sequence[QLoRAConfig], parameters: int) -> Iterator[str]:
    in_16, in_32 = (parameters * each / 1e6 for each in (2, 4))
    yield f"{parameters / 1e6:,.1f} M parameters: {in_16:,.1f} MB in 16 bits, {in_32:,.1f} in 32"
    for key in sorted({(config.quant_type, config.compute_dtype, config.double_quant) for config in configs}):
        quant_type, compute_dtype, double_quant = key
        once = "" if double_quant else ", constants not quantised"
        yield f"{memory.base_bytes(model, *key) / 1e6:,.1f} MB in {quant_type} with the rest in {compute_dtype}{once}"


def _memory(needed: Mapping[str, tuple[QLoRAConfig, Any]], searched: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("MB", "base", "adapter", "optimizer", "activations", "passing", "together", "configuration"):
        table.add_column(heading, justify="left" if heading in ("MB", "configuration") else "right")
    for name, (config, memory) in needed.items():
        parts = (*astuple(memory), memory.total)
        table.add_row(name, *(f"{part / 1e6:,.0f}" for part in parts), described(config, searched))
    return table


def _too_many(asked: float, cores: int) -> Iterator[str]:
    if asked > cores:
        yield f"trials ask for {asked:g} cores, and this machine has {cores}: `run` would refuse here"


def _room(heaviest: int, process: int, device: str, free: int, room: int) -> Iterator[str]:
    """`heaviest` are the bytes of the process of a trial, `process` those of them that are no tensors; trials have
    `room`, of what is `free` now."""
    ray = f", the driver and Ray {(free - room) / 1e9:.1f}" if room < free else ""
    if room >= heaviest:
        yield f"{device} with {free / 1e9:.1f} GB free: {room // heaviest} of the heaviest trials fit, each in a"
        yield f"process of its own with its own base; it takes {process / 1e9:.1f} GB besides what is below{ray}"
    else:
        yield (
            f"{device} with {free / 1e9:.1f} GB free: the heaviest trials do not fit, and would go on with smaller"
            " micro-batches. Set gradient_checkpointing: true, a higher accumulation, or a lower data.max_length"
        )


def _too_large(
    configs: Sequence[QLoRAConfig], fits: Callable[[QLoRAConfig], bool], searched: Sequence[str]
) -> Iterator[str]:
    """How many do not fit, of configurations of which the heaviest does not: found in a few looks, for each takes a
    second."""
    ordered = sorted(configs, key=by_memory)
    fit = bisect_left(ordered, True, key=lambda config: not fits(config))
    if fit < len(ordered):
        lightest = described(ordered[fit], searched)
        yield f"{len(ordered) - fit} of {len(ordered)} drawn from the space do not fit, the lightest of them {lightest}"


def _adapters(lightest: tuple[int, int], heaviest: tuple[int, int]) -> Iterator[str]:
    """Of each, parameters and rank."""
    for size, r in dict.fromkeys([lightest, heaviest]):
        yield f"{size / 1e6:,.2f} M parameters with r {r}: {4 * size / 1e6:,.1f} MB"


def _tracked(spec: SweepSpec, steps: int) -> int:
    """Bytes of W&B's files, of trials of so many steps."""
    if spec.tracking.mode == "disabled":
        return 0
    evaluations, verifications = spec.budget.evaluations, to_verify(spec.verify, [], spec.search.trials)
    expected = survivors(spec.search.trials, evaluations, spec.early_stopping or None)
    whole = sum(expected) / len(expected) + verifications
    return int((spec.search.trials + verifications) * TRACKED_RUN + whole * steps * TRACKED_STEP)


def _disk(spec: SweepSpec, checkpoint: int, bases: int, tokens: Path, tracked: int) -> Iterator[str]:
    """Each running trial has up to three checkpoints, of an adapter in fp32 and its moments."""
    of_tokens = sum(file.stat().st_size for file in tokens.rglob("*") if file.is_file())
    kept = max(spec.checkpoint.keep, spec.verify.top if spec.verify else 0)
    whole = (kept + RUNNING) * checkpoint + of_tokens + bases + tracked
    yield f"{whole / 1e6:,.0f} MB with a trial at a time, {RUNNING * checkpoint / 1e6:,.0f} more for each beside it:"
    yield f"checkpoints of {checkpoint / 1e6:,.1f} at most, {kept} of ended trials, up to {RUNNING} of each that runs;"
    yield f"tokens {of_tokens / 1e6:,.1f}; bases {bases / 1e6:,.1f}, once per machine; W&B about {tracked / 1e6:,.1f}"


def _configurations(spec: SweepSpec, known: Sequence[Observation]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True, show_header=False)
    ledger = Ledger(InMemoryStorage(), spec.name)
    first = first_params(spec.space, spec.search.first)
    learned = [as_trial(each, spec.space) for each in known]
    with suppress(SpaceExhausted):
        for _ in range(min(SHOWN, spec.search.trials)):
            entries, search = ledger.entries(), spec.search
            entry = ledger.add(propose(entries, spec.space, search.sampler, search.seed, first, learned))
            table.add_row(f"{entry.number:03d}", described(entry.config, spec.space.searched))
    return table
