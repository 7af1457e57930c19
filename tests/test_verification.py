"""Is the winner real? What is said of runs over fresh seeds, and that they stay apart from the search."""

import random
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
from optuna.trial import TrialState
from scipy import stats

from sweep import verification
from sweep.criterion import LOSS
from sweep.place import Place
from sweep.progress import seeded
from sweep.spec import load
from sweep.study import Ledger, SpaceExhausted, ranking
from tests import sweeps
from tests.ledgers import add_trial, memory_ledger
from tests.wandb_files import final, records


def searched(*losses: float) -> Ledger:
    """A search of so many configurations, told apart by r."""
    ledger = memory_ledger()
    ledger.note("sweep_id", "abcd")
    for number, loss in enumerate(losses):
        add_trial(ledger, r=number + 1, seed=7)
        ledger.report(number, 1, loss)
        ledger.complete(number)
    return ledger


def trained(ledger: Ledger, wanted: list, losses: dict[int, list[float | None]]) -> None:
    """Run all that is wanted: best losses by r, seed by seed; None fails."""
    for config in wanted:
        proposal = verification.propose(ledger.entries(), wanted)
        assert proposal.config == config
        number = ledger.add(proposal).number
        loss = losses[config.r][config.seed - 8]
        if loss is None:
            ledger.fail(number, "training loss is nan")
        else:
            ledger.report(number, 1, loss)
            ledger.report(number, 2, loss + 1)  # the best one counts
            ledger.complete(number)


def test_the_best_configurations_get_the_same_fresh_seeds() -> None:
    search = searched(1.3, 1.1, 1.2, 1.4)
    before = sweeps.history(search.entries())
    ledger, wanted = verification.begin(search, top=3, seeds=2)
    assert [(config.r, config.seed) for config in wanted] == [(2, 8), (3, 8), (1, 8), (2, 9), (3, 9), (1, 9)]
    trained(ledger, wanted, {1: [1.0, 1.0], 2: [1.0, 1.0], 3: [1.0, 1.0]})
    with pytest.raises(SpaceExhausted):
        verification.propose(ledger.entries(), wanted)
    assert sweeps.history(search.entries()) == before  # the search has not learned of it
    assert ranking(search.entries())[0].number == 1
    _, more = verification.begin(search, top=3, seeds=3)
    assert [config.seed for config in more[6:]] == [10, 10, 10]
    assert verification.propose(ledger.entries(), more).config == more[6]  # what is there is not repeated


def test_seeds_that_were_searched_are_not_fresh() -> None:
    """A configuration that the search has with two seeds is one, and its runs are those of neither."""
    search = searched(1.1, 1.3, 1.4)
    for seed, loss in ((8, 1.2), (9, 1.25)):
        number = add_trial(search, r=1, seed=seed)
        search.report(number, 1, loss)
        search.complete(number)
    ledger, wanted = verification.begin(search, top=2, seeds=2)
    assert [(config.r, config.seed) for config in wanted] == [(1, 10), (2, 8), (1, 11), (2, 9)]
    trained(ledger, wanted, {1: [0, 0, 1.1, 1.12], 2: [1.31, 1.32]})
    found = verification.result(search)
    assert [(each.trial, each.values) for each in found.configurations] == [(0, (1.1, 1.12)), (1, (1.31, 1.32))]


def test_a_seed_that_is_searched_is_named_once(space) -> None:
    spec = load(space, ["space.seed={values: [0, 1]}", "verify={}"])
    assert seeded(spec.space.searched).count("seed") == 1
    assert seeded(["r"]) == ("seed", "r")


def test_means_intervals_and_verdicts_are_those_of_scipy() -> None:
    noise = random.Random(0)
    losses = {r: [mean + noise.gauss(0, 0.01) for _ in range(4)] for r, mean in ((1, 1.5), (2, 1.505), (3, 1.8))}
    search = searched(1.4, 1.5, 1.6)
    ledger, wanted = verification.begin(search, top=3, seeds=4)
    trained(ledger, wanted, losses)
    found = verification.result(search)
    assert found is not None
    assert found.left == 0
    assert [each.trial for each in found.configurations] == [0, 1, 2]
    for each in found.configurations:
        mine = losses[each.trial + 1]
        assert list(each.values) == mine
        low, high = stats.t.interval(0.95, df=3, loc=sum(mine) / 4, scale=stats.sem(mine))
        assert each.interval == pytest.approx((low, high))
    assert [each.verdict for each in found.configurations] == ["winner", "tied", "higher"]
    assert found.configurations[0].p is None
    assert found.configurations[1].p == pytest.approx(stats.ttest_ind(losses[2], losses[1], equal_var=False).pvalue)
    told = "\n".join(verification.lines(found))
    assert f"trial 001             {sum(losses[2]) / 4:.4f} (" in told
    assert "4 runs: tied within noise, p = " in told
    assert "4 runs: higher than the winner beyond noise, p < 0.001" in told
    assert "is at least 0.025 (0.05 for 2 comparisons together)" in told
    assert verification.advice(found, LOSS, Place("/sweeps/toy")) == []


def test_one_test_of_many_must_say_it_more_clearly() -> None:
    """p lies between 0.05, which is enough for one comparison, and 0.025, which each of two needs."""
    losses = {1: [1.50, 1.52, 1.54], 2: [1.55, 1.57, 1.59], 3: [1.50, 1.52, 1.54]}
    for top, verdict in ((2, "higher"), (3, "tied")):
        search = searched(1.4, 1.5, 1.6)
        trained(*verification.begin(search, top=top, seeds=3), losses)
        found = verification.result(search)
        assert found is not None
        assert 0.025 < found.configurations[1].p < 0.05
        assert found.configurations[1].verdict == verdict


def test_another_configuration_that_is_better_is_named_and_the_winner_stays() -> None:
    search = searched(1.4, 1.5, 1.6)
    trained(*verification.begin(search, top=3, seeds=3), {1: [1.60, 1.61, 1.62], 2: [1.50, 1.51, 1.52], 3: [1.4] * 3})
    found = verification.result(search)
    assert [each.verdict for each in found.configurations] == ["winner", "lower", "lower"]
    told = verification.lines(found)
    assert told[-1] == "Trial 002 has a lower mean than the winner, beyond noise. best/ stays what the search chose"
    advice = verification.advice(found, LOSS, Place("/my sweeps/toy"))
    assert advice == ["Take trial 002 home with: python -m sweep export '/my sweeps/toy' --trial 2"]
    assert ranking(search.entries())[0].number == 0


def test_failed_and_unfinished_runs_are_told_and_nothing_is_compared() -> None:
    search = searched(1.4, 1.5)
    ledger, wanted = verification.begin(search, top=2, seeds=3)
    assert "6 of its runs are not done" in verification.lines(verification.result(search))[-1]
    trained(ledger, wanted[:4], {1: [1.40, 1.41], 2: [1.50, 1.51]})
    told = "\n".join(verification.lines(verification.result(search)))
    assert "2 of its runs are not done; nothing is compared before" in told
    assert "2 runs: not compared" in told
    trained(ledger, wanted[4:], {1: [0, 0, 1.42], 2: [0, 0, None]})
    found = verification.result(search)
    assert (found.left, found.configurations[1].failed, found.configurations[1].p) == (0, 1, None)
    assert "2 runs and 1 that failed: not compared" in "\n".join(verification.lines(found))


def test_a_winner_that_was_not_verified_is_compared_with_nothing() -> None:
    """As when more trials were searched and have not been verified."""
    search = searched(1.4, 1.5)
    trained(*verification.begin(search, top=2, seeds=2), {1: [1.4, 1.5], 2: [1.5, 1.6]})
    add_trial(search, r=9)
    search.report(2, 1, 1.3)
    search.complete(2)
    found = verification.result(search)
    assert [each.verdict for each in found.configurations] == [None, None]


def test_losses_without_any_noise() -> None:
    search = searched(1.4, 1.5, 1.6)
    trained(*verification.begin(search, top=3, seeds=2), {1: [1.5, 1.5], 2: [1.5, 1.5], 3: [1.6, 1.6]})
    found = verification.result(search)
    assert [each.verdict for each in found.configurations] == ["winner", "tied", "higher"]
    assert found.configurations[0].interval == (1.5, 1.5)
    assert asdict(found)["configurations"][1]["p"] == 1.0


def test_a_finished_sweep_is_verified_killed_and_verified(undisturbed, space):
    """The same command goes on with the verification, of which the search knows nothing."""
    file, _, expected = undisturbed
    shutil.copytree(file.parent / "sweeps", space.parent / "sweeps")
    asked = ("--set", "verify={top: 2, seeds: 2}", "--set", "tracking.mode=offline")
    before = sweeps.reported(space)
    process = sweeps.start(space, *asked, TOY_STEP_SECONDS="0.05")
    sweeps.wait_until(lambda: sweeps.reported(space) >= before + 12, process)
    process.kill()
    output, _ = process.communicate()
    assert "Verification: 4 trials, numbered anew" in output

    done = sweeps.run(space, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The sweep goes on: 1 trial done, 1 unfinished, 4 asked for." in done.stdout
    assert sweeps.history(sweeps.entries(space)) == sweeps.history(expected)
    runs = verified(space)
    top = [entry.config for entry in ranking(expected)[:2]]
    assert [entry.config for entry in runs] == [
        config.model_copy(update={"seed": seed}) for seed in (1, 2) for config in top
    ]
    for entry in runs:
        assert entry.state is TrialState.COMPLETE
        assert list(entry.losses) == list(range(1, 10))  # no early stopping, and the base has been scored
        assert entry.cost.steps >= 60
    directory = space.parent / "sweeps/toy"
    assert not list(directory.glob("verification/trials/*/step-*"))
    assert len(list(directory.glob("verification/trials/*/rows.jsonl"))) == 4
    for number in range(4):
        fragments = sorted(directory.glob(f"wandb/*run-*/run-*-v-{number:03d}.wandb"), key=lambda f: f.stat().st_mtime)
        found = records(fragments[-1])
        assert found["run"][0]["run_group"] == "toy verification"
        assert found["run"][0]["display_name"].endswith(f"s{runs[number].config.seed}")
        assert final(found)["state"] == "complete"
    told = "\n".join(verification.lines(verification.result(sweeps.ledger(space))))
    assert told in done.stdout
    asked_of = [sys.executable, "-m", "sweep", "status", str(directory)]
    shown = subprocess.run(asked_of, env=sweeps.environment(), capture_output=True, text=True, check=True)
    assert told in shown.stdout

    again = sweeps.run(space, *asked)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Nothing is left to do: 4 trials done, 4 asked for." in again.stdout
    assert sweeps.history(verified(space)) == sweeps.history(runs)


def verified(space):
    return sweeps.ledger(space).verification().entries()
