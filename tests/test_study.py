"""The ledger, and what is proposed from it."""

import copy
import warnings

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from sweep.space import Space
from sweep.spec import load
from sweep.study import Ledger, SpaceExhausted, begun_by_newer, open_journal, propose, ranking, read_journal
from tests.ledgers import add_trial, memory_ledger
from trainables.config import QLoRAConfig
from trainables.protocol import Cost, Evaluation, Slice, Step


def space(tmp_path, text: str) -> Space:
    """The space of a toy sweep whose `space:` section is `text`."""
    file = tmp_path / "space.yaml"
    indented = "\n".join(f"  {line}" for line in text.strip().splitlines())
    file.write_text(
        f"name: t\ntrainable: toy\nbudget: {{steps: 10, evaluations: 2}}\nsearch: {{trials: 4}}\nspace:\n{indented}\n"
    )
    return load(file).space


CONTINUOUS = """
r: {values: [4, 8, 16]}
alpha: {times: r, values: [1, 2]}
learning_rate: {min: 1e-5, max: 1e-3, log: true}
"""
FINITE = """
r: {values: [4, 8]}
quant_type: {values: [nf4, fp4]}
double_quant: {values: [true, false], when: {quant_type: nf4}}
"""


def drive(ledger, space, trials, sampler="tpe", seed=3, first=()):
    """Propose and finish `trials` trials with a loss that depends on the configuration."""
    for _ in range(trials):
        entry = ledger.add(propose(ledger.entries(), space, sampler, seed, first))
        ledger.report(entry.number, 1, abs(entry.config.learning_rate - 3e-4) * 1e3 + entry.config.r / 100)
        ledger.complete(entry.number)
    return [entry.config for entry in ledger.entries()]


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_proposals_depend_on_the_ledger_alone(tmp_path, sampler):
    """A sweep cut in two by a new process proposes what an undisturbed one does."""
    searched = space(tmp_path, CONTINUOUS)
    whole = drive(memory_ledger(), searched, 14, sampler)
    drive(open_journal(tmp_path / "study.log", "t"), searched, 8, sampler)
    resumed = drive(open_journal(tmp_path / "study.log", "t"), searched, 6, sampler)
    assert resumed == whole
    assert drive(memory_ledger(), searched, 14, sampler, seed=4) != whole


def test_first_come_first(tmp_path):
    searched = space(tmp_path, CONTINUOUS)
    first = [searched.params_of({"r": 8, "alpha": 16, "learning_rate": 5e-4}), searched.params_of({})]
    configs = drive(memory_ledger(), searched, 3, first=first)
    assert configs[0] == QLoRAConfig(r=8, alpha=16, learning_rate=5e-4)
    assert configs[1] == QLoRAConfig()


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "gp"])
def test_no_configuration_twice_and_an_end_when_none_is_left(tmp_path, sampler):
    searched = space(tmp_path, FINITE)
    ledger = memory_ledger()
    configs = drive(ledger, searched, 6, sampler)  # r x (nf4 with or without double quantisation, fp4)
    assert len(set(configs)) == 6
    with pytest.raises(SpaceExhausted, match="all 6 configurations"):
        propose(ledger.entries(), searched, sampler, 3, ())


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_proposing_changes_no_trial(tmp_path, sampler):
    """Not even where those of an earlier sweep come first, so that the sampler knows them by other numbers."""
    searched = space(tmp_path, CONTINUOUS)
    earlier, ledger = memory_ledger(), memory_ledger()
    drive(earlier, searched, 3)
    drive(ledger, searched, 8)
    ledger.add(propose(ledger.entries(), searched, sampler, 3, ()))  # runs
    known, entries = [entry.trial for entry in earlier.entries()], ledger.entries()
    before = copy.deepcopy((known, entries))
    propose(entries, searched, sampler, 3, (), known)
    assert (known, entries) == before


def test_told_truthfully(tmp_path):
    ledger = open_journal(tmp_path / "study.log", "t")
    complete, stopped, failed = add_trial(ledger), add_trial(ledger), add_trial(ledger)
    ledger.report(complete, 0, 9.0)  # the base
    for evaluation, loss in enumerate([2.0, 1.5, 1.8], start=1):
        ledger.report(complete, evaluation, loss)
    ledger.report(complete, 3, 1.8)  # told again after an interruption
    ledger.complete(complete)
    ledger.report(stopped, 1, 3.0)
    ledger.spend(stopped, Cost(seconds=2.5, steps=3))
    ledger.stop(stopped, "poor")
    ledger.fail(failed, "diverged")

    entries = open_journal(tmp_path / "study.log", "t").entries()
    assert [entry.state for entry in entries] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert entries[0].best == (2, 1.5)
    assert entries[0].trial.value == 1.5
    assert entries[1].losses == {1: 3.0}
    assert entries[1].reason == "poor"
    assert entries[1].cost == Cost(seconds=2.5, steps=3)
    assert entries[2].best is None
    assert [entry.number for entry in ranking(entries)] == [complete, stopped]


def test_a_proposal_is_one_append(tmp_path):
    """A kill while a trial is being written leaves all of it or nothing."""
    searched = space(tmp_path, CONTINUOUS)
    path = tmp_path / "study.log"
    ledger = open_journal(path, "t")
    before = path.read_bytes().count(b"\n")
    ledger.add(propose(ledger.entries(), searched, "tpe", 0, ()))
    assert path.read_bytes().count(b"\n") == before + 1


def notes(file) -> dict[str, str]:
    """What a database has of them, as it is stored."""
    with sqlalchemy.create_engine(f"sqlite:///{file}").connect() as database:
        return dict(database.execute(sqlalchemy.text("SELECT key, value_json FROM study_user_attributes")).all())


def test_a_long_note_is_kept_in_parts_that_any_database_takes(tmp_path):
    file = tmp_path / "ledger.db"
    ledger = Ledger.at_url(f"sqlite:///{file}", "t")
    short, long = [{"name": 'a "quoted" ä'}], [{"name": f'\\ "ä" {number}', "loss": 0.1} for number in range(6000)]
    ledger.note("requests", short)
    assert notes(file)["requests"]
    for value in (long, short, [*long, *short]):  # one that was long may get short again
        ledger.note("requests", value)
        assert ledger.noted("requests") == Ledger.at_url(f"sqlite:///{file}", "t").noted("requests") == value
    kept = notes(file)
    assert max(len(value.encode()) for value in kept.values()) < 65_535  # a TEXT of MySQL
    assert len(kept) > 10
    ledger.note("command", "run")
    assert ledger.noted("command") == "run"
    assert ledger.noted("parts") is None


def test_a_kill_in_the_middle_of_a_long_note_leaves_the_one_before(tmp_path, monkeypatch):
    path, write, room = tmp_path / "study.log", Ledger._write, 0

    def killed(ledger, key, value):
        nonlocal room
        room -= 1
        if room < 0:
            raise KeyboardInterrupt
        write(ledger, key, value)

    for before in (["short"], ["long"] * 9000, ["longer"] * 12000):
        ledger, room = open_journal(path, "t"), 2
        ledger.note("requests", before)
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "_write", killed)
            with pytest.raises(KeyboardInterrupt):
                ledger.note("requests", ["another"] * 10000)
        assert open_journal(path, "t").noted("requests") == before


def test_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "study.log"
    ledger = open_journal(path, "t")
    number = add_trial(ledger)
    ledger.report(number, 1, 2.0)
    whole = path.read_bytes()
    ledger.report(number, 2, 1.0)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="last line is torn"):
        ledger = open_journal(path, "t")
    assert path.read_bytes() == whole
    ledger.report(number, 2, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_journal(path, "t").entry(number).losses == {1: 2.0, 2: 1.0}


def test_reading_disturbs_nothing(tmp_path):
    """Neither the driver's file, nor its lock, nor what it is about to write."""
    path = tmp_path / "study.log"
    ledger = open_journal(path, "t")
    number = add_trial(ledger)
    ledger.report(number, 1, 2.0)
    lock = path.with_name("study.log.lock.of-a-driver")
    lock.touch()
    with path.open("ab") as stream:
        stream.write(b'{"op_code": 7, ')  # is being written
    before = path.read_bytes()
    seen = read_journal(path, "t")
    assert seen.entry(number).losses == {1: 2.0}
    with pytest.raises(TypeError):
        seen.report(number, 2, 1.0)
    assert path.read_bytes() == before
    assert lock.exists()
    with pytest.raises(ValueError, match=r"study\.log knows no sweep called u"):
        read_journal(path, "u")
    with pytest.raises(FileNotFoundError):
        read_journal(tmp_path / "none.log", "t")
    assert not (tmp_path / "none.log").exists()


def test_damage_elsewhere_stops(tmp_path):
    path = tmp_path / "study.log"
    add_trial(open_journal(path, "t"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{half\n", *lines[1:]]))
    with pytest.raises(ValueError, match=r"study\.log:2: the ledger is damaged"):
        open_journal(path, "t")


def test_a_lock_left_by_a_killed_process_is_no_obstacle(tmp_path):
    path = tmp_path / "study.log"
    add_trial(open_journal(path, "t"))
    (tmp_path / "study.log.lock").symlink_to(path)
    add_trial(open_journal(path, "t"))
    assert len(open_journal(path, "t")) == 2


def test_optuna_reads_the_ledger_as_its_own(tmp_path):
    add_trial(open_journal(tmp_path / "study.log", "t"))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
    assert len(optuna.load_study(study_name="t", storage=storage).trials) == 1


def test_cost_adds_up_over_slices():
    steps = (Step(1, 2.0, 1e-4, 1.0, tokens=30, seconds=0.5), Step(2, 2.0, 1e-4, 1.0, tokens=20, seconds=0.5))
    cost = Cost(seconds=1.0, steps=1, tokens=10, peak_memory=7)
    cost = cost.plus(Slice(steps, None, None, False, 5), 1.5)
    cost = cost.plus(Slice((), Evaluation(1, 2, 1.0, 40, 2.0), None, False, 9, gpu_load=0.5), 3.0)
    assert cost == Cost(seconds=4.0, steps=3, tokens=100, peak_memory=9, elapsed=4.5, gpu_seconds=1.5)


def test_what_a_newer_version_noted_besides_is_done_without():
    ledger = memory_ledger()
    number = add_trial(ledger)
    assert begun_by_newer(ledger) is None
    ledger._storage.set_trial_user_attr(ledger._id(number), "cost", {"steps": 3, "watts": 7})
    assert ledger.entry(number).cost == Cost(steps=3)
    ledger.note("environment", {"qlora-sweep": "99.1", "ray": "2"})
    assert begun_by_newer(ledger).startswith("qlora-sweep 99.1 began this sweep, and this is ")
