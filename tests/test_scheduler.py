"""What the scheduler does when what it calls fails, which no real sweep can be made to do."""

import math
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from ray.exceptions import RayActorError
from ray.tune.schedulers import TrialScheduler

from sweep.early_stopping import settle
from sweep.engine import EngineGone, EngineLost, Engines
from sweep.preemption import Drain
from sweep.report import verdict
from sweep.scheduler import LedgerScheduler, Watch, shielded
from sweep.trainable import Failure
from tests.ledgers import add_trial, memory_ledger
from trainables.protocol import Cost, Evaluation, Slice


class Broken:
    """A display with a fault in every method."""

    def __getattr__(self, name):
        def fail(*what):
            raise KeyError(name)

        return fail


def scheduler(ledger, drain, put_back=None):
    return LedgerScheduler(
        ledger,
        settle=lambda number: False,
        put_back=put_back or (lambda number: None),
        drain=drain,
        listener=shielded(Broken()),
        lease=SimpleNamespace(holds=lambda: True),
        watch=Watch(drain, 9.0, alone=False),
    )


def result(**changes):
    told = {
        "slice": Slice((), Evaluation(1, 4, 2.0), None, False, 0),
        "cost": Cost(),
        "banner": "base",
        "notes": [],
        "halvings": 0,
        "nodes": {"n"},
        "failure": None,
    }
    return told | changes


def ray_trial(number):
    saved = SimpleNamespace(remote=lambda: "reference")
    nothing = SimpleNamespace(remote=lambda *what: None)
    actor = SimpleNamespace(save_and_leave=saved, exit=nothing, conclude=nothing)
    return SimpleNamespace(
        trial_id=f"ray's {number}",
        config={"assignment": SimpleNamespace(number=number)},
        temporary_state=SimpleNamespace(ray_actor=actor),
    )


def engine_of(*numbers, slots):
    """Engines with one that has these trials, and what it is told."""
    told = []
    made = Engines([SimpleNamespace(call=SimpleNamespace(remote=lambda *what: told.append(what)))], slots, set, print)
    made.look = lambda: None
    for number in numbers:
        made.choose(number, numbers)
    return made, told


def test_a_fault_in_the_display_is_told_and_ends_nothing():
    ledger, drain = memory_ledger(), Drain()
    number = add_trial(ledger)
    with pytest.warns(UserWarning, match="the progress display failed: KeyError"):
        decision = scheduler(ledger, drain).on_trial_result(None, ray_trial(number), result())
    assert decision == TrialScheduler.CONTINUE
    assert not drain()
    assert ledger.entry(number).losses == {1: 2.0}


@pytest.mark.filterwarnings("ignore:the progress display failed")
def test_a_trial_without_an_evaluation_ends_with_its_budget():
    ledger = memory_ledger()
    number = add_trial(ledger)
    ours = scheduler(ledger, Drain())
    for done, decision in ((False, TrialScheduler.CONTINUE), (True, TrialScheduler.STOP)):
        assert not settle(ledger, number, 0, (), 1.0)  # as when it is adopted again
        slice_ = Slice((), None, None, done, 0)
        assert ours.on_trial_result(None, ray_trial(number), result(slice=slice_)) == decision
    assert ledger.entry(number).unscored
    (line,) = verdict(ledger.entries())
    assert line == "trial 000: the validation rows were trained on, too, so there is no validation loss"


def test_a_store_that_does_not_answer_once_ends_nothing():
    ledger, drain = memory_ledger(), Drain()
    number = add_trial(ledger)
    made = scheduler(ledger, drain)

    def slow_down():
        raise OSError("AWS Error SLOW_DOWN")

    made._lease = SimpleNamespace(holds=slow_down)
    with pytest.warns(UserWarning, match="the progress display failed"):
        assert made.on_trial_result(None, ray_trial(number), result()) == TrialScheduler.CONTINUE
    assert not drain()
    assert ledger.entry(number).losses == {1: 2.0}


def test_a_ledger_that_cannot_be_written_ends_the_sweep_and_the_trial_is_saved(monkeypatch):
    ledger, drain = memory_ledger(), Drain()
    number = add_trial(ledger)
    monkeypatch.setattr(ledger, "report", lambda *what: (_ for _ in ()).throw(ConnectionError("database is gone")))
    ours = scheduler(ledger, drain)
    assert ours.on_trial_result(None, ray_trial(number), result()) == TrialScheduler.STOP
    assert ours._watch.saving == ["reference"]
    assert drain.cause == "breakdown"
    assert drain.reason == "The ledger cannot be written (ConnectionError: database is gone)"


@pytest.mark.filterwarnings("ignore:the progress display failed")
def test_five_refusals_in_a_row_end_the_sweep_and_progress_counts_anew(monkeypatch):
    monkeypatch.setattr("sweep.scheduler._cause", lambda trial: RayActorError())
    ledger, drain, back = memory_ledger(), Drain(), []
    number = add_trial(ledger)
    ours = scheduler(ledger, drain, back.append)
    refusal = Failure.of(PermissionError(13, "Permission denied", "x"))
    refused = result(slice=Slice((), None, None, False, 0), failure=refusal)
    for round_ in (3, 4):
        for _ in range(round_):
            assert ours.on_trial_result(None, ray_trial(number), refused) == TrialScheduler.CONTINUE
            handed_out = len(back)
            ours.on_trial_error(None, ray_trial(number))  # its process has ended
            assert len(back) == handed_out + 1  # and not before that
        if round_ == 3:
            ours.on_trial_result(None, ray_trial(number), result())
    assert not drain()
    assert ours.on_trial_result(None, ray_trial(number), refused) == TrialScheduler.STOP
    assert back == [number] * 7
    assert drain.reason.startswith("5 trials in a row broke down, the last with PermissionError")


@pytest.mark.filterwarnings("ignore:the progress display failed")
@pytest.mark.parametrize(("preempted", "deaths"), [(True, ()), (False, (-1,))])
def test_a_machine_that_is_taken_away_is_no_unexplained_death(monkeypatch, preempted, deaths):
    monkeypatch.setattr("sweep.scheduler._machine_is_gone", lambda cause: False)
    monkeypatch.setattr("sweep.scheduler._cause", lambda trial: RayActorError(preempted=preempted))
    ledger, back = memory_ledger(), []
    number = add_trial(ledger)
    scheduler(ledger, Drain(), back.append).on_trial_error(None, ray_trial(number))
    assert back == [number]
    assert ledger.entry(number).deaths == deaths


@pytest.mark.filterwarnings("ignore:the progress display failed")
def test_a_trial_is_not_handed_out_again_without_end():
    """Others get on in between, so that its accidents are never five in a row."""
    ledger, drain = memory_ledger(), Drain()
    number, other = add_trial(ledger), add_trial(ledger)
    ours = scheduler(ledger, drain)
    refusal = Failure.of(ConnectionError("no route to host"))
    for _ in range(9):
        assert not drain()
        ours.on_trial_result(None, ray_trial(number), result(slice=Slice((), None, None, False, 0), failure=refusal))
        ours.on_trial_result(None, ray_trial(other), result())
    assert drain.reason.startswith("trial 0 broke down for the 9th time, with ConnectionError: no route")
    assert ledger.entry(number).state is TrialState.RUNNING


@pytest.mark.filterwarnings("ignore:the progress display failed")
def test_a_trial_that_somebody_stops_ends_with_its_next_slice():
    """Whose loss is written before."""
    ledger = memory_ledger()
    number, other = add_trial(ledger), add_trial(ledger)
    ours = scheduler(ledger, Drain())
    ours._watch.requests = SimpleNamespace(to_stop={number})
    assert ours.on_trial_result(None, ray_trial(other), result()) == TrialScheduler.CONTINUE
    assert ours.on_trial_result(None, ray_trial(number), result(cost=Cost(steps=4))) == TrialScheduler.STOP
    entry = ledger.entry(number)
    assert (entry.state, entry.reason, entry.losses) == (TrialState.PRUNED, "stopped by hand", {1: 2.0})
    assert entry.cost.steps == 4


@pytest.mark.filterwarnings("ignore:the progress display failed")
def test_a_displaced_driver_writes_nothing(monkeypatch):
    """Another one has the sweep, as after a long pause of this machine."""
    monkeypatch.setattr("sweep.scheduler._cause", lambda trial: RayActorError())
    for told in (lambda ours, n: ours.on_trial_result(None, ray_trial(n), result()), None):
        ledger, drain, back = memory_ledger(), Drain(), []
        number = add_trial(ledger)
        ours = scheduler(ledger, drain, back.append)
        ours._lease = SimpleNamespace(holds=lambda: False, place=SimpleNamespace(url="s3://sweeps/toy"))
        told(ours, number) if told else ours.on_trial_error(None, ray_trial(number))
        entry = ledger.entry(number)
        assert (dict(entry.losses), entry.deaths, back) == ({}, (), [])
        assert drain.reason == "Another driver has taken over s3://sweeps/toy"


@pytest.mark.filterwarnings("ignore:the progress display failed")
def test_a_trial_that_does_not_leave_in_time_may_be_killed_again(monkeypatch):
    """A drained node whose process hangs: the watch kills it, and keeps watching the next attempt."""
    monkeypatch.setattr("sweep.scheduler._cause", lambda trial: RayActorError())
    ledger, back = memory_ledger(), []
    number = add_trial(ledger)
    ours = scheduler(ledger, Drain(), back.append)
    ours._watch.draining = {"n"}
    assert ours.on_trial_result(None, ray_trial(number), result()) == TrialScheduler.CONTINUE
    ours._watch.silenced.add(f"ray's {number}")
    ours.on_trial_error(None, ray_trial(number))
    assert back == [number]
    assert ledger.entry(number).silences == 0


@pytest.mark.parametrize(
    ("heard", "killed", "silenced", "stranded"),
    [
        ({"a": 0, "b": 0, "c": 5}, ["engine"], set(), {"a", "b"}),
        ({"a": 0, "b": 1, "c": 5}, [], set(), set()),  # it will show which of the two it is
        ({"a": 0, "b": 6, "c": 5}, ["a"], {"a"}, set()),
        ({"a": 0, "b": None, "c": 5}, ["engine"], set(), {"a", "b"}),  # b has only begun
        ({"a": 0, "c": 5}, ["a", "engine"], {"a"}, set()),  # it may be either
        ({"a": 5, "b": 5, "c": 0}, ["c"], {"c"}, set()),
    ],
)
def test_what_a_silent_trial_hangs_in_is_killed(monkeypatch, heard, killed, silenced, stranded):
    """After 9 s; it is second 9.5 and each was heard of at that one. Only a and b share an engine. What is silent once
    more after the engine was killed hangs in its own process."""
    clock, found = [0.0], []
    watch = Watch(Drain(), 9.0, alone=False)
    monkeypatch.setattr(watch, "_looked", math.inf)  # no cluster is asked
    monkeypatch.setattr("sweep.scheduler.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("sweep.scheduler.ray", SimpleNamespace(kill=lambda actor, no_restart=True: found.append(actor)))
    trials = [
        SimpleNamespace(
            trial_id=name,
            status="RUNNING",
            config={"assignment": SimpleNamespace(number="abc".index(name), engine=None if name == "c" else "engine")},
            temporary_state=SimpleNamespace(ray_actor=name),
        )
        for name in heard
    ]
    for trial in trials:
        if heard[trial.trial_id] is not None:
            clock[0] = heard[trial.trial_id]
            watch.on_trial_result(0, trials, trial, {})
    clock[0] = 9.5
    for iteration in range(2):
        watch.on_step_begin(iteration, trials)
    assert (sorted(found), watch.silenced, watch.stranded) == (killed, silenced, stranded)
    if stranded:
        clock[0] += 9.5
        watch.on_step_begin(2, trials[:2])
        assert (sorted(found), watch.silenced) == (["a", "b", "engine"], {"a", "b"})
        watch.on_trial_result(3, trials, trials[0], {})
        assert watch.stranded == {"b"}


@pytest.mark.filterwarnings("ignore:the progress display failed")
@pytest.mark.parametrize(
    ("error", "hung", "halvings"), [(EngineLost, False, 1), (EngineLost, True, 0), (EngineGone, False, 0)]
)
def test_an_engine_that_dies_twice_at_a_place_is_taken_for_memory(monkeypatch, error, hung, halvings):
    """Unless its machine is gone, or it was killed for its silence. None of its trials fails; with nothing left to
    halve, fewer are together."""
    monkeypatch.setattr("sweep.scheduler.BREAKDOWNS", 9)
    clock = [0.0]
    monkeypatch.setattr("sweep.scheduler.time", SimpleNamespace(monotonic=lambda: clock[0]))
    ledger, drain = memory_ledger(), Drain()
    number, smallest, another = (add_trial(ledger, batch_size=rows) for rows in (2, 1, 1))
    ours = scheduler(ledger, drain)
    ours._watch.engines, _ = engine_of(number, smallest, another, slots=8)
    ours._watch.stranded = {f"ray's {n}" for n in (number, smallest, another)} if hung else set()
    lost = result(slice=Slice((), None, None, False, 0), failure=Failure.of(error("it died")))
    for times, expected in enumerate((0, halvings, halvings), start=1):
        clock[0] += 100
        for each in (number, smallest, another):
            assert ours.on_trial_result(None, ray_trial(each), lost) == TrialScheduler.CONTINUE
        assert ledger.entry(number).halvings == expected
        assert ledger.entry(smallest).halvings == 0
        assert ours._watch.engines._slots == (8 if times == 1 or error is EngineGone else 2)
    assert [entry.state for entry in ledger.entries()] == [TrialState.RUNNING] * 3
    ledger.report(number, 1, 2.0)  # elsewhere it counts anew
    ours.on_trial_result(None, ray_trial(number), lost)
    assert ledger.entry(number).halvings == halvings
    assert not drain()
    for _ in range(20):  # there are few remedies
        ours.on_trial_result(None, ray_trial(number), lost)
    assert drain()


@pytest.mark.filterwarnings("ignore:the progress display failed")
def test_one_that_kills_its_engine_again_and_again_has_failed_and_no_other(monkeypatch):
    """Two trials of single rows share an engine with room for 16, until they are apart; the other one tells late."""
    clock = [0.0]
    monkeypatch.setattr("sweep.scheduler._cause", lambda trial: RayActorError())
    monkeypatch.setattr("sweep.scheduler.time", SimpleNamespace(monotonic=lambda: clock[0]))
    ledger, drain = memory_ledger(), Drain()
    sick, well = (add_trial(ledger, batch_size=1) for _ in range(2))
    ours = scheduler(ledger, drain)
    ours._watch.engines, told = engine_of(sick, well, slots=16)
    lost = result(slice=Slice((), None, None, False, 0), failure=Failure.of(EngineLost("it died")))

    def lose(number: int) -> str:
        clock[0] += 100
        decision = ours.on_trial_result(None, ray_trial(number), lost)
        if decision == TrialScheduler.CONTINUE:
            ours.on_trial_error(None, ray_trial(number))
        return decision

    for slots in (16, 1):
        assert [lose(sick), lose(well)] == [TrialScheduler.CONTINUE] * 2
        assert ours._watch.engines._slots == slots
        if slots > 1:
            for number in (sick, well):
                ours._watch.engines.choose(number, (sick, well))
    for decision in (TrialScheduler.CONTINUE, TrialScheduler.STOP):
        ours._watch.engines.choose(sick, (sick, well))
        assert lose(sick) == decision
    assert [entry.state for entry in ledger.entries()] == [TrialState.FAIL, TrialState.RUNNING]
    assert ledger.entry(sick).reason.startswith("it lost its engine 4 times at the same place, the last time alone")
    assert told == [("forget", sick)]
    assert not drain()


@pytest.mark.parametrize(("told", "after"), [(False, 1.0), (False, 60.0), (True, 60.0)])
def test_a_sweep_that_drains_waits_for_first_slices(monkeypatch, told, after):
    """Of trials that have told nothing, but not for ever: most load their model. For others until they have saved."""
    drain, clock = Drain(), [100.0]
    watch = Watch(drain, 1800.0, alone=False)
    monkeypatch.setattr(watch, "_looked", math.inf)  # no cluster is asked
    monkeypatch.setattr("sweep.scheduler.time", SimpleNamespace(monotonic=lambda: clock[0]))
    trial = SimpleNamespace(
        trial_id="a",
        status="RUNNING",
        config={"assignment": SimpleNamespace(number=0)},
        temporary_state=SimpleNamespace(ray_actor=None),
    )
    if told:
        watch.on_trial_result(0, [], trial, {})
    watch.on_step_begin(0, [trial])
    drain.request("signal", "SIGTERM")
    assert not watch.stop_all()
    watch.on_step_begin(1, [trial])
    clock[0] += after
    watch.on_step_begin(2, [trial])
    assert watch.stop_all() == (after > 4 and not told)
    watch.on_step_begin(3, [])
    assert watch.stop_all()
