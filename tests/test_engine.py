"""Trials of many callers in one engine: each gets what it would get alone."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from optuna.trial import TrialState

from sweep.early_stopping import rungs, settle
from sweep.study import ranking
from tests.ledgers import add_trial, memory_ledger
from tests.test_qlora_sft import CONFIG, curve, losses, steps
from tests.test_qlora_sft import tiny as tiny  # a fixture
from tests.test_scoring import written_by
from trainables import checkpoint, model, qlora_sft
from trainables.config import QLoRAConfig
from trainables.packed import base as bases
from trainables.packed import engine as engines
from trainables.packed.engine import Engine
from trainables.protocol import Evaluation, Forgotten, Job, NoRoomYet, OutOfMemory, Scored, Step


def config(**changed: object) -> QLoRAConfig:
    return CONFIG.model_copy(update={"learning_rate": 1e-3, **changed})


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    for number in range(12):
        made.forget(number)


def drive(engine: Engine, number: int, each: QLoRAConfig, job: Job, found=None) -> tuple[list[Step], list[Evaluation]]:
    """What a process does with its trial, until it is done."""
    key = f"trial {number}"
    engine.start(key, number, each, job, found)
    done, evaluations = [], []
    while True:
        slice_, _ = engine.advance(key, 0.05)
        done += slice_.steps
        evaluations += [slice_.evaluation] if slice_.evaluation else []
        if slice_.done:
            engine.close(key)
            return done, evaluations


def drive_all(engine: Engine, configs: list[QLoRAConfig], job: Job) -> list[tuple[list[Step], list[Evaluation]]]:
    with ThreadPoolExecutor(len(configs)) as pool:
        return list(pool.map(lambda i: drive(engine, i, configs[i], job), range(len(configs))))


def make_room_for(rows: int, monkeypatch) -> None:
    """Memory runs out when more rows than these are trained on together."""
    label_losses = bases.label_losses

    def scarce(model, batch):
        if len(batch.input_ids) > rows and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return label_losses(model, batch)

    monkeypatch.setattr(bases, "label_losses", scarce)


def counted_turns(monkeypatch) -> list[int]:
    """Trials in each turn of what follows."""
    turns: list[int] = []
    monkeypatch.setattr(engines, "turn", lambda trials: turns.append(len(trials)) or qlora_sft.turn(trials))
    return turns


def test_measures(engine, tiny):
    """With two trials that leave nothing behind."""
    found = engine.measure(config(batch_size=4), 4, tiny)
    assert found.fixed >= 0
    assert found.of_trial >= 5 * 4 * 16 * (64 + 64)  # at least as much as the adapter of one layer
    assert found.each > 0
    assert found.room > found.base > 0
    assert model.base(tiny.model, CONFIG.quant_type, CONFIG.compute_dtype, CONFIG.double_quant).idle


def test_a_base_that_was_loaded_ahead_is_that_of_the_trial(engine, tiny, monkeypatch):
    monkeypatch.setattr(model, "_warm", {})
    engine.load(tiny.model, config(quant_type="fp4"))
    [loaded] = model._warm.values()
    engine.start("a", 0, config(quant_type="fp4"), tiny, None)
    assert list(model._warm.values()) == [loaded]
    assert not loaded.idle


CONFIGS = [
    config(seed=1, dropout=0.1),
    config(seed=2, r=4),
    config(seed=3, batch_size=4),
    config(seed=4, quant_type="fp4"),
    config(seed=5, compute_dtype="bf16"),
]


def test_each_gets_what_it_gets_alone(engine, tiny, monkeypatch):
    job = replace(tiny, budget=steps(12, 3), score_base=True)
    turns = counted_turns(monkeypatch)
    together = drive_all(engine, CONFIGS, job)
    assert max(turns) == 3  # those that share a base
    for (done, evaluations), each in zip(together, CONFIGS, strict=True):
        tolerance = 1e-5 if each.compute_dtype == "fp32" else 0.02
        training, validation = curve(each, job)
        assert losses(done) == pytest.approx(training, abs=tolerance)
        assert losses(evaluations) == pytest.approx(validation, abs=tolerance)


def test_each_writes_what_it_writes_alone(engine, tiny):
    job = replace(tiny, budget=steps(8, 4), completions=9)
    changes = [{}, {"r": 4}, {"seed": 5, "batch_size": 4}, {"quant_type": "fp4"}]
    configs = [CONFIG.model_copy(update=changed) for changed in changes]
    alone = []
    for each in configs:
        trial = qlora_sft.start(each, job, None)
        alone.append(written_by(trial))
        trial.close()

    def in_engine(number: int) -> list[Scored]:
        key = f"trial {number}"
        engine.start(key, number, configs[number], job, None)
        found: list[Scored] = []
        while True:
            slice_, _ = engine.advance(key, 0.05)
            found += [slice_.written] if slice_.written else []
            if slice_.done:
                return found

    with ThreadPoolExecutor(len(configs)) as pool:
        assert list(pool.map(in_engine, range(len(configs)))) == alone
    assert len({tuple(scored.completions for scored in each) for each in alone}) == len(configs)


def decided(curves: list[list[float]]) -> tuple[list[tuple[TrialState, int]], list[int]]:
    """How each trial ends and after which evaluation, and the ranking, when they report in their order."""
    ledger = memory_ledger()
    numbers = [add_trial(ledger) for _ in curves]
    last = len(curves[0])
    for evaluation in range(1, last + 1):
        for number in numbers:
            if ledger.entry(number).state is TrialState.RUNNING:
                ledger.report(number, evaluation, curves[number][evaluation - 1])
                settle(ledger, number, last, rungs(last, 1, 2), 2)
    entries = ledger.entries()
    return [(entry.state, entry.reported) for entry in entries], [entry.number for entry in ranking(entries)]


def test_twelve_configurations_are_stopped_and_ranked_as_alone(engine, tiny):
    job = replace(tiny, budget=steps(12, 4))
    configs = [
        config(seed=i, r=(4, 8, 16)[i % 3], dropout=(0.0, 0.1)[i % 2], learning_rate=10 ** (-4 + i / 6))
        for i in (7, 2, 11, 4, 0, 9, 5, 1, 10, 3, 8, 6)
    ]
    together = [losses(evaluations) for _, evaluations in drive_all(engine, configs, job)]
    alone = [curve(each, job)[1] for each in configs]
    ends, order = decided(alone)
    assert decided(together) == (ends, order)
    assert len(set(ends)) > 2  # some are stopped early, some late, some not


def test_a_trial_goes_on_up_to_its_evaluation_and_no_further(engine, tiny):
    engine.start("a", 0, CONFIG, replace(tiny, budget=steps(40, 2)), None)
    first, _ = engine.advance("a", 0.0)
    assert 1 <= len(first.steps) < 20
    while engine._members["a"].goes_on:  # though nobody asks
        time.sleep(0.01)
    second, _ = engine.advance("a", 0.0)
    assert second.evaluation is not None
    assert len(first.steps) + len(second.steps) == 20
    time.sleep(0.2)
    assert engine.hold("a").steps == ()


def test_what_is_held_and_saved_goes_on_elsewhere(engine, tiny, tmp_path):
    job = replace(tiny, budget=steps(16, 1))
    each = config(dropout=0.1)
    training, validation = curve(each, job)  # before the engine's thread uses the base
    engine.start("a", 0, each, job, None)
    engine.start("b", 1, config(seed=9), job, None)
    done = list(engine.advance("a", 0.2)[0].steps)
    engine.advance("b", 0.0)
    done += engine.hold("a").steps
    evaluations: tuple[Evaluation, ...] = ()
    written = checkpoint.write(tmp_path, len(done), evaluations, lambda directory: engine.save("a", directory))
    time.sleep(0.5)
    assert engine.hold("a").steps == ()  # it waits, while the other goes on
    engine.close("a")
    assert losses(done) == pytest.approx(training[: len(done)], abs=1e-5)
    rest, ended = drive(engine, 0, each, job, written)
    assert losses(done + rest) == pytest.approx(training, abs=1e-5)
    assert losses(ended) == pytest.approx(validation, abs=1e-5)


def test_a_second_attempt_ends_the_first_and_lost_ones_go(engine, tiny):
    engine.start("a", 7, CONFIG, tiny, None)
    engine.start("again", 7, CONFIG, tiny, None)
    with pytest.raises(Forgotten):
        engine.hold("a")
    engine.start("b", 8, CONFIG, tiny, None)
    engine.forget(7)
    with pytest.raises(Forgotten):
        engine.hold("again")
    assert engine.hold("b").steps == ()


def test_what_does_not_fit_together_is_taken_in_parts(engine, tiny, monkeypatch):
    job = replace(tiny, budget=steps(6, 1))
    configs = [config(seed=seed) for seed in (1, 2, 3, 4)]
    expected = [curve(each, job)[0] for each in configs]
    make_room_for(2 * CONFIG.batch_size, monkeypatch)
    notes: list[str] = []
    advance = Engine.advance

    def noting(self, key, seconds):
        slice_, said = advance(self, key, seconds)
        notes.extend(said)
        return slice_, said

    monkeypatch.setattr(Engine, "advance", noting)
    turns = counted_turns(monkeypatch)
    together = drive_all(engine, configs, job)
    assert any("do not fit into memory together" in note for note in notes)
    assert sum(size > 2 for size in turns) <= 2  # at first, and anew when one of the four had ended
    for (done, _), training in zip(together, expected, strict=True):
        assert losses(done) == pytest.approx(training, abs=1e-5)


def test_one_that_does_not_fit_alone_is_told_so_and_the_others_go_on(engine, tiny, monkeypatch):
    job = replace(tiny, budget=steps(6, 1))
    small, large = config(seed=1, batch_size=4), config(seed=2, batch_size=16)
    expected = curve(small, job)[0]
    make_room_for(8, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        fine = pool.submit(drive, engine, 0, small, job)
        fails = pool.submit(drive, engine, 1, large, job)
        with pytest.raises(OutOfMemory, match="CUDA out of memory"):
            fails.result()
        assert losses(fine.result()[0]) == pytest.approx(expected, abs=1e-5)


def test_one_that_does_not_fit_beside_the_others_waits_for_one_to_end(engine, tiny, monkeypatch):
    """Three trials of which two fit; each begins anew when it comes back."""
    job = replace(tiny, budget=steps(6, 1))
    configs = [config(seed=seed, dropout=0.1) for seed in range(3)]
    expected = [curve(each, job)[0] for each in configs]
    label_losses, crowds, gave_way = bases.label_losses, [], []

    def scarce(*given):
        crowds.append(len(engine._members))
        if crowds[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return label_losses(*given)

    def drive_on(number: int) -> list[Step]:
        while True:
            try:
                return drive(engine, number, configs[number], job)[0]
            except NoRoomYet:
                time.sleep(0.05)
            except OutOfMemory:
                assert engine.give_way(f"trial {number}")
                gave_way.append(number)

    monkeypatch.setattr(bases, "label_losses", scarce)
    for number, each in enumerate(configs):
        engine.start(f"first {number}", number, each, job, None)
    with pytest.raises(OutOfMemory):
        engine.advance("first 0", 0.0)
    assert engine.give_way("first 0")
    with pytest.raises(NoRoomYet):
        engine.start("trial 0", 0, configs[0], job, None)
    engine.close("first 1")
    with pytest.raises(NoRoomYet):  # it is the turn of the one that waits
        engine.start("trial 1", 1, configs[1], job, None)
    engine.start("trial 0", 0, configs[0], job, None)
    with pytest.raises(NoRoomYet):  # two fit beside each other
        engine.start("trial 1", 1, configs[1], job, None)
    engine.close("trial 0")
    engine.close("first 2")
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(drive_on, range(3)))
    assert max(crowds) == 3
    assert 2 in crowds[crowds.index(3) :]
    for ours, theirs in zip(done, expected, strict=True):
        assert losses(ours) == pytest.approx(theirs, abs=1e-5)


def test_one_that_does_not_fit_at_all_cannot_give_way(engine, tiny, monkeypatch):
    make_room_for(0, monkeypatch)
    engine.start("a", 0, CONFIG, tiny, None)
    with pytest.raises(OutOfMemory):
        engine.advance("a", 0.0)
    assert not engine.give_way("a")


def test_one_that_waits_and_is_wanted_no_more_keeps_nobody_waiting(engine, tiny, monkeypatch):
    make_room_for(0, monkeypatch)
    for number, key in enumerate("abc"):
        engine.start(key, number, CONFIG, tiny, None)
    with pytest.raises(OutOfMemory):
        engine.advance("a", 0.0)
    assert engine.give_way("a")
    engine.close("c")
    with pytest.raises(NoRoomYet):
        engine.start("d", 3, CONFIG, tiny, None)
    engine.forget(0)
    engine.start("d", 3, CONFIG, tiny, None)


@pytest.mark.parametrize(("trials", "room"), [(2, 1), (3, 2), (4, 3), (4, 1)])
def test_all_that_do_not_fit_together_come_to_their_end(engine, tiny, monkeypatch, trials, room):
    """All of them tell at the same time that memory ran out; none is blamed."""
    job = replace(tiny, budget=steps(4, 1))
    configs = [config(seed=seed) for seed in range(trials)]
    label_losses = bases.label_losses

    def scarce(*given):
        if len(engine._members) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return label_losses(*given)

    monkeypatch.setattr(bases, "label_losses", scarce)
    all_here = threading.Barrier(trials)

    def drive_on(number: int) -> list[Step]:
        key = f"trial {number}"
        engine.start(key, number, configs[number], job, None)
        all_here.wait()
        while True:
            try:
                engine.advance(key, 0.0)
                return drive(engine, number, configs[number], job)[0]
            except NoRoomYet:
                time.sleep(0.05)
            except OutOfMemory:
                time.sleep(0.2)  # a checkpoint, and the way through Ray
                assert engine.give_way(key)
            except Forgotten:
                with suppress(NoRoomYet):
                    engine.start(key, number, configs[number], job, None)

    with ThreadPoolExecutor(trials) as pool:
        assert [len(done) for done in pool.map(drive_on, range(trials))] == [4] * trials
    assert not engine._gave_way


@pytest.mark.parametrize("where", ["step", "save", "close"])
def test_a_lost_device_ends_the_process_and_blames_nobody(tiny, tmp_path, monkeypatch, where):
    """Wherever CUDA tells of it; Ray makes another one."""
    engine, ended = Engine(), threading.Event()

    def end(code: int) -> None:
        ended.set()
        threading.Event().wait()  # for ever

    def lost(*_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    engine.start("a", 0, CONFIG, replace(tiny, budget=steps(1000, 1)), None)
    monkeypatch.setattr(engines.os, "_exit", end)
    trial = engine._members["a"].trial
    calls = {
        "step": (bases, "label_losses", lambda: engine.advance("a", 0.0)),
        "save": (trial, "save", lambda: engine.save("a", tmp_path)),
        "close": (trial, "close", lambda: engine.close("a")),
    }
    owner, name, call = calls[where]
    told: list[str] = []

    def ask() -> None:
        try:
            call()
        except RuntimeError as error:
            told.append(str(error))

    with monkeypatch.context() as context:
        context.setattr(owner, name, lost)
        threading.Thread(target=ask, daemon=True).start()
        assert ended.wait(30)
    trial.close()
    assert told == ["CUDA error: unspecified launch failure"]


def test_an_error_is_told_to_its_trial_alone(engine, tiny, monkeypatch):
    job = replace(tiny, budget=steps(6, 1))
    sick, well = config(seed=1), config(seed=2)
    expected = curve(well, job)[0]
    micro_batches = qlora_sft.QLoRATrial.micro_batches

    def broken(trial, numbers):
        if trial.config.seed == 1 and trial.step == 3:
            raise ValueError("a broken row")
        return micro_batches(trial, numbers)

    monkeypatch.setattr(qlora_sft.QLoRATrial, "micro_batches", broken)
    with ThreadPoolExecutor(2) as pool:
        fails = pool.submit(drive, engine, 0, sick, job)
        fine = pool.submit(drive, engine, 1, well, job)
        with pytest.raises(ValueError, match="a broken row"):
            fails.result()
        assert losses(fine.result()[0]) == pytest.approx(expected, abs=1e-5)


def test_a_trial_that_cannot_start_is_told_so(engine, tiny):
    with pytest.raises(ValueError, match="ends the name of no linear layer"):
        engine.start("a", 0, config(target_modules=("q_porj",)), tiny, None)
    engine.start("b", 1, CONFIG, tiny, None)


def test_closing_one_that_somebody_waits_for(engine, tiny):
    engine.start("a", 0, CONFIG, replace(tiny, budget=steps(1000, 1)), None)
    told = []

    def wait() -> None:
        try:
            engine.advance("a", 1000.0)
        except Forgotten as error:
            told.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.5)
    engine.forget(0)
    thread.join(timeout=30)
    assert told == ["trial 0 was closed"]


def test_no_room_for_another_base_until_others_end(engine, tiny, monkeypatch):
    started = qlora_sft.start
    engine.start("a", 0, CONFIG, tiny, None)
    engine.start("c", 2, CONFIG, tiny, None)

    def full(*key):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(qlora_sft.model, "base", full)
    with pytest.raises(NoRoomYet, match="no room for the model"):
        engine.start("b", 1, config(quant_type="fp4"), tiny, None)
    monkeypatch.setattr(qlora_sft, "start", None)
    with pytest.raises(NoRoomYet, match="beside the trials that are here"):  # it has been tried
        engine.start("b", 1, config(quant_type="fp4"), tiny, None)
    monkeypatch.setattr(qlora_sft, "start", started)
    engine.close("a")
    with pytest.raises(NoRoomYet, match="no room for the model"):  # not beside the same ones
        engine.start("b", 1, config(quant_type="fp4"), tiny, None)
    engine.close("c")
    with pytest.raises(MemoryError, match="no room for the model", check=lambda error: type(error) is MemoryError):
        engine.start("b", 1, config(quant_type="fp4"), tiny, None)


def test_a_base_that_serves_nobody_goes_before_a_trial_does(engine, tiny, monkeypatch):
    """Memory is short as long as it is there."""
    job = replace(tiny, budget=steps(4, 1))
    expected = curve(CONFIG, job)[0]
    label_losses = bases.label_losses

    def scarce(*given):
        if len(model._warm) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return label_losses(*given)

    engine.load(tiny.model, config(quant_type="fp4"))
    engine.start("here", 1, CONFIG, tiny, None)
    monkeypatch.setattr(bases, "label_losses", scarce)
    assert losses(drive(engine, 0, CONFIG, job)[0]) == pytest.approx(expected, abs=1e-5)


def test_those_who_ask_without_end_leave_time_for_turns(engine, tiny):
    """Such as trials that wait for room: there is always another attempt by the time that one has failed."""
    engine.start("a", 0, CONFIG, replace(tiny, budget=steps(1000, 1)), None)
    asked = threading.Event()

    def ask() -> None:
        if not asked.is_set():
            engine._calls.put(ask)

    for _ in range(2):
        engine._calls.put(ask)
    with ThreadPoolExecutor(1) as pool:
        try:
            slice_, _ = pool.submit(engine.advance, "a", 0.0).result(30)
        finally:
            asked.set()
    assert slice_.steps


def test_after_an_error_amid_their_steps_no_trial_takes_one_too_many(engine, tiny, monkeypatch):
    """The first has taken its last step when the second cannot take its own."""
    job = replace(tiny, budget=replace(steps(1, 1), evaluations=0))
    for number in range(2):
        engine.start(f"trial {number}", number, config(seed=number), job, None)
    learn, failed = qlora_sft.QLoRATrial.learn, []

    def broken(trial, loss, norm):
        if trial.config.seed == 1 and not failed:
            failed.append(trial)
            raise ValueError("no step")
        learn(trial, loss, norm)

    def take_turn() -> None:
        members = list(engine._members.values())
        for member in members:
            member.running = True
        engine._turn(members)

    monkeypatch.setattr(qlora_sft.QLoRATrial, "learn", broken)
    engine._called(take_turn)
    assert failed
    assert not any(member.error for member in engine._members.values())
    slices = [engine.hold(f"trial {number}") for number in range(2)]
    assert [[step.step for step in slice_.steps] for slice_ in slices] == [[1], [1]]


def test_nobody_starves_when_few_fit_together(engine, tiny, monkeypatch):
    """Of two bases with four trials each, two at a time."""
    job = replace(tiny, budget=steps(8, 1))
    configs = [config(seed=seed, quant_type=quant_type) for seed in range(4) for quant_type in ("nf4", "fp4")]
    make_room_for(2 * CONFIG.batch_size, monkeypatch)
    for number, each in enumerate(configs):
        engine.start(f"trial {number}", number, each, replace(job, budget=steps(1000, 1)), None)

    def take_turns() -> None:
        for member in engine._members.values():
            member.running = True
        for _ in range(60):
            engine._turn(engine._group())
        for member in engine._members.values():
            member.running = False

    engine._called(take_turns)
    done = [len(engine.hold(f"trial {number}").steps) for number in range(len(configs))]
    assert min(done) > 0
    assert max(done) - min(done) <= 0.3 * max(done)
