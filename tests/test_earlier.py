"""`search.from`: what earlier sweeps found is known to the sampler of a new one, and nothing else of it is taken."""

import re
import shutil

import pytest

from sweep import earlier
from sweep.spec import SpecError, load
from sweep.study import Observation, as_trial, observed, propose, ranking
from tests import sweeps
from tests.ledgers import add_trial, memory_ledger


@pytest.fixture
def searched(space):
    return load(space).space


def good(number: int, loss: float = 0.5) -> Observation:
    """A whole run near r 8 and a learning rate of 1e-3."""
    params = {"r": 8, "alpha/r": 2, "learning_rate": 1e-3 - number * 1e-5, "quant_type": "nf4"}
    return Observation(params, loss + number / 100, None)


def poor(number: int) -> Observation:
    params = {"r": 32, "alpha/r": 1, "learning_rate": 3e-5 + number * 1e-6, "quant_type": "fp4"}
    return Observation(params, 3.0 + number / 100, 1)


def test_proposals_lie_where_earlier_losses_were_low(searched):
    known = [as_trial(each, searched) for each in (*map(good, range(6)), *map(poor, range(12)))]
    told = [propose([], searched, "tpe", seed, (), known).config for seed in range(8)]
    untold = [propose([], searched, "tpe", seed, ()).config for seed in range(8)]
    assert sum(config.learning_rate > 3e-4 for config in told) >= 7
    assert sum(config.learning_rate > 3e-4 for config in untold) <= 6
    assert sum(config.r == 8 for config in told) > sum(config.r == 8 for config in untold)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_proposals_are_a_function_of_the_ledger_and_what_it_notes(searched, sampler):
    known = [good(n) for n in range(8)]
    ledger = memory_ledger()
    earlier.write(ledger, known)
    read = earlier.read(ledger)
    assert read == known
    found = [[as_trial(each, searched) for each in those] for those in (read, known)]
    for _ in range(3):
        one, other = (propose(ledger.entries(), searched, sampler, 3, (), each) for each in found)
        assert one.config == other.config
        entry = ledger.add(one)
        ledger.report(entry.number, 1, 2.0)
        ledger.complete(entry.number)
    assert [entry.number for entry in ranking(ledger.entries())] == [0, 1, 2]
    assert len(ledger) == 3


def test_what_was_known_may_be_tried_again_and_first_comes_first(space):
    text = space.read_text().replace("{min: 2e-5, max: 2e-3, log: true}", "2e-4").replace("[nf4, fp4]", "[nf4]")
    space.write_text(text.replace("[4, 8, 16, 32]", "[8, 16]").replace("[1, 2]", "[1]"))
    searched = load(space).space
    known = [Observation({"r": r, "alpha/r": 1, "quant_type": "nf4"}, 1.0, None) for r in (8, 16)]
    trials = [as_trial(each, searched) for each in known]
    ledger = memory_ledger()
    ledger.add(propose([], searched, "tpe", 0, [known[1].params], trials))
    ledger.add(propose(ledger.entries(), searched, "tpe", 0, [known[1].params], trials))
    assert [entry.config.r for entry in ledger.entries()] == [16, 8]


def test_what_a_trial_tells(searched):
    ledger = memory_ledger()
    whole = add_trial(ledger, r=8, alpha=16, learning_rate=1e-3, seed=0)
    stopped = add_trial(ledger, r=16, alpha=16, learning_rate=1e-4, seed=0)
    outside = add_trial(ledger, r=64, alpha=64, learning_rate=1e-4, seed=0)
    elsewhere = add_trial(ledger, r=8, alpha=16, learning_rate=1e-3, dropout=0.5, seed=0)
    failed, running, before = (add_trial(ledger, r=8, alpha=16, learning_rate=1e-3, seed=0) for _ in range(3))
    for number in (whole, outside, elsewhere, running):
        ledger.report(number, 0, 5.0)
        ledger.report(number, 1, 1.0)
        ledger.report(number, 2, 1.5)
    for number in (whole, outside, elsewhere):
        ledger.complete(number)
    ledger.report(stopped, 1, 2.0)
    ledger.report(stopped, 3, 2.5)
    ledger.stop(stopped, "poor")
    ledger.fail(failed, "diverged")
    ledger.report(before, 0, 5.0)
    ledger.stop(before, "by hand")
    told = {entry.number: observed(entry, searched) for entry in ledger.entries()}
    assert told.pop(whole) == Observation({"r": 8, "alpha/r": 2, "learning_rate": 1e-3, "quant_type": "nf4"}, 1.0, None)
    assert told.pop(stopped) == Observation({"r": 16, "alpha/r": 1, "learning_rate": 1e-4, "quant_type": "nf4"}, 2.5, 3)
    assert list(told.values()) == [None] * 5


def test_another_space_takes_what_lies_in_it(undisturbed, tmp_path):
    first, _, entries = undisturbed
    source = str(first.parent / "sweeps/toy")
    space = tmp_path / "second.yaml"
    space.write_text(sweeps.TOY.replace("name: toy", "name: second").replace("[4, 8, 16, 32]", "[8, 16]"))
    spec = load(space)
    notes: list[str] = []
    found = earlier.gather([source, source], spec, {}, notes.append)
    inside = [entry for entry in entries if entry.config.r in (8, 16)]
    assert [each.params["learning_rate"] for each in found] == [entry.config.learning_rate for entry in inside]
    assert 0 < len(inside) < len(entries)
    outside = len(entries) - len(inside)
    said = f"{len(inside)} of its {len(entries)} trials are known to the sampler ({outside} lie outside of this space)"
    assert notes == [f"search.from {source}: {said}"]


@pytest.mark.parametrize(
    ("change", "inputs", "message"),
    [
        (("steps: 60", "steps: 90"), {}, "budget.steps: there 60, here 90"),
        (("evaluations: 9", "evaluations: 6"), {}, "budget.evaluations: there 9, here 6"),
        (
            ("", ""),
            {"model": "0", "data.train": "1"},
            "model: another content\n  data.train: another content\nLeave it",
        ),
    ],
)
def test_losses_that_cannot_be_compared(undisturbed, tmp_path, change, inputs, message):
    space = tmp_path / "second.yaml"
    space.write_text(sweeps.TOY.replace(*change))
    source = str(undisturbed[0].parent / "sweeps/toy")
    with pytest.raises(earlier.Unusable) as caught:
        earlier.gather([source], load(space), inputs, print)
    assert f"search.from: the losses of {source} cannot be compared with this sweep's" in str(caught.value)
    assert message in str(caught.value)
    assert earlier.gather([source], load(undisturbed[0]), {"data.test": "1"}, print)  # nothing was scored with it


def test_a_sampler_that_learns_nothing(space):
    with pytest.raises(SpecError, match=r"search\.from: received other sweeps, from which random learns nothing"):
        load(space, ["search.sampler=random", "search.from=[sweeps/x]"])


def test_read_once(undisturbed, tmp_path):
    """The earlier sweep may be gone when the new one is resumed; a trial of it is none of the new one's."""
    source = tmp_path / "sweeps/first"
    shutil.copytree(undisturbed[0].parent / "sweeps/toy", source)
    before = (source / "study.log").read_bytes()
    space = tmp_path / "toy.yaml"
    space.write_text(sweeps.TOY.replace("seed: 5", "seed: 5, from: [sweeps/first]"))
    refused = sweeps.run(space, "--set", "budget.evaluations=3", "--set", "name=refused")
    assert refused.returncode == 2
    assert "budget.evaluations: there 9, here 3" in refused.stderr
    assert not (tmp_path / "sweeps/refused").exists()
    done = sweeps.run(space, "--set", "search.trials=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "search.from sweeps/first: 8 of its 8 trials are known to the sampler" in done.stdout
    assert re.search(r"^2 trials; this run took \d+\.\d minutes$", done.stdout, re.MULTILINE)
    assert (source / "study.log").read_bytes() == before
    shutil.rmtree(source)
    more = sweeps.run(space, "--set", "search.trials=4")
    assert more.returncode == 0, more.stdout + more.stderr
    entries = sweeps.entries(space)
    assert [entry.state.is_finished() for entry in entries] == [True] * 4
    spec = load(space)
    known = [as_trial(each, spec.space) for entry in undisturbed[2] if (each := observed(entry, spec.space))]
    proposed = propose(entries[:3], spec.space, "tpe", 5, (), known)
    assert proposed.config == entries[3].config


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_draws_of_an_earlier_sweep_with_this_seed_are_not_repeated(searched, sampler):
    """As before the sampler knows enough to be trusted."""
    before = memory_ledger()
    for _ in range(3):
        entry = before.add(propose(before.entries(), searched, sampler, 0, ()))
        before.report(entry.number, 1, 2.0)
        before.complete(entry.number)
    known = [as_trial(observed(entry, searched), searched) for entry in before.entries()]
    ledger = memory_ledger()
    for _ in range(3):
        ledger.add(propose(ledger.entries(), searched, sampler, 0, (), known))
    assert not {entry.config for entry in ledger.entries()} & {entry.config for entry in before.entries()}
