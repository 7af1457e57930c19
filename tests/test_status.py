"""How a sweep stands, asked while it runs and afterwards."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from sweep import cli, page, verification
from sweep.earlier import Unusable, gather
from sweep.opening import check_spec, open_ledger
from sweep.place import Place
from sweep.progress import sparkline
from sweep.requests import COMMAND, Request
from sweep.spec import load
from sweep.status import NoSweep, Status, as_json, look, rerun_spec, show
from sweep.study import open_journal
from sweep.validation import Refused
from tests import sweeps
from tests.ledgers import add_trial, memory_ledger
from trainables.protocol import Cost


def status(directory: Path, *options: str) -> Result:
    return CliRunner().invoke(cli.app, ["status", str(directory), *options], env={"COLUMNS": "160"})


def of_tomorrow(ledger: Path, ours: str, theirs: str) -> None:
    """As a version writes it that knows more."""
    text = ledger.read_text()
    assert ours in text
    ledger.write_text(re.sub(r',"checksum":"\w+"', "", text.replace(ours, theirs)))


def test_while_it_runs_and_when_it_has_ended(space):
    process = sweeps.start(space, "--set", "search.trials=12", "--set", "early_stopping=false")
    directory = space.parent / "sweeps/toy"
    sweeps.wait_until(lambda: sweeps.reported(space) >= 1, process)
    seen = [status(directory) for _ in range(2)]  # each of them must leave the driver alone
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for shown in seen:
        assert shown.exit_code == 0, shown.stderr
        driver = rf"process {process.pid} on .* since [\d-]+ [\d:]+ UTC"
        assert re.search(rf"^Sweep toy in .*, running in {driver}\n", shown.stdout)

    told = status(directory)
    assert told.stdout.startswith(f"Sweep toy in {directory}, not running\n")
    assert "\n100%: 12 complete\n" in told.stdout
    assert "12 of 12 trials are done" in told.stdout
    assert told.stdout.endswith(f"See what it found with: python -m sweep report {directory}\n")
    told = json.loads(status(directory, "--json").stdout)
    entries = sweeps.entries(space)
    assert (told["driver"], told["asked_for"], told["evaluations"]) == (None, 12, 9)
    assert [trial["config"] for trial in told["trials"]] == [entry.config.model_dump() for entry in entries]
    assert [trial["best_loss"] for trial in told["trials"]] == [entry.best[1] for entry in entries]
    assert min(trial["best_loss"] for trial in told["trials"]) == told["trials"][told["best_trial"]]["best_loss"]
    assert {trial["state"] for trial in told["trials"]} <= {"complete", "stopped"}
    assert (told["share_done"], told["seconds_left"], told["waiting"]) == (1.0, 0.0, [])
    assert (told["best_loss"], told["default_loss"]) == (min(e.best[1] for e in entries), entries[0].best[1])
    assert all(entry.cost.elapsed > 0 for entry in entries)


def test_what_is_left(space):
    """Of nine evaluations of 2 s each; on a GPU that computes half the time."""
    ledger = memory_ledger()
    number = add_trial(ledger)
    ledger.report(number, 1, 2.0)
    ledger.spend(number, Cost(elapsed=2.0, gpu_seconds=1.0, peak_memory=3 * 10**9))
    spec = load(space, ["search.trials=1", "early_stopping=false"])
    out = io.StringIO()
    found = Status(Place("/sweeps/toy"), spec, ledger, ledger.entries(), "me", [])
    told = as_json(found)
    assert (told["seconds_left"], told["trials"][0]["seconds_left"], told["share_done"]) == (16.0, 16.0, 1 / 9)
    assert (told["gpu_load"], told["peak_memory"]) == (0.5, 3 * 10**9)
    show(Console(file=out, width=120), found)
    assert "11%: 1 running\n" in out.getvalue()
    assert "about 16 s left." in out.getvalue()
    assert "GPU memory of the largest process 3.0 GB, GPUs compute 50% of the time" in out.getvalue()
    show(Console(file=out, width=120), replace(found, driver=None))
    assert "11%: 1 unfinished\n" in out.getvalue()
    assert "about 16 s left, once it goes on." in out.getvalue()


def shown(found: Status) -> str:
    out = io.StringIO()
    show(Console(file=out, width=120, markup=False), found)
    return out.getvalue()


def test_before_the_first_trial(space):
    found = Status(Place("/sweeps/toy"), load(space), memory_ledger(), [], None)
    assert shown(found) == "Sweep toy in /sweeps/toy, not running\n0 of 8 trials are done.\n"
    told = as_json(found)
    assert (told["share_done"], told["seconds_left"], told["trials"], told["best_trial"]) == (0.0, None, [], None)


def test_what_ended_a_sweep_and_what_goes_on_with_it(space):
    ledger = memory_ledger()
    ledger.note(COMMAND, "python -m sweep run 'my toy.yaml'")
    ledger.fail(add_trial(ledger), "training loss is nan at step 1 [of 60]")
    dead = Status(Place("/sweeps/toy"), load(space, ["search.trials=2"]), ledger, ledger.entries(), None)
    assert "trial 000 failed: training loss is nan at step 1 [of 60]\n" in shown(dead)
    assert shown(dead).endswith("1 of 2 trials are done.\nIt goes on with: python -m sweep run 'my toy.yaml'\n")
    assert "It goes on with" not in shown(replace(dead, driver="me"))
    told = as_json(dead)
    assert told["command"] == "python -m sweep run 'my toy.yaml'"
    assert told["trials"][0]["reason"] == "training loss is nan at step 1 [of 60]"

    number = add_trial(ledger)
    assert "It goes on with" in shown(replace(dead, entries=ledger.entries()))  # it was begun
    ledger.complete(number)
    over = replace(dead, entries=ledger.entries())
    assert "It goes on with" not in shown(over)
    assert "\n100%: 1 complete, 1 failed\n" in shown(over)
    assert "It goes on with" in shown(replace(over, waiting=[Request("1-a", "stop", trial=0)]))
    asked = replace(over, spec=load(space, ["search.trials=2", "verify={top: 1, seeds: 2}"]))
    assert "It goes on with" not in shown(asked)  # there is no winner
    ledger.report(add_trial(ledger), 1, 1.5)
    ledger.complete(2)
    left = replace(asked, entries=ledger.entries())
    assert shown(left).splitlines()[-2:] == [
        "3 of 2 trials are done, the best loss so far is 1.5000 (trial 002), 2 runs of the verification left.",
        "It goes on with: python -m sweep run 'my toy.yaml'",
    ]


def test_what_comes_after_a_sweep(space):
    ledger = memory_ledger()
    spec = load(space, ["search.trials=1"])
    trained = spec.model_copy(update={"model": "llama"})

    def last_line(asked):
        return shown(Status(Place("/sweeps/toy"), asked, ledger, ledger.entries(), None)).splitlines()[-1]

    ledger.fail(add_trial(ledger), "training loss is nan at step 1")
    again = "No trial finished; train one of them again with: python -m sweep rerun /sweeps/toy --trial 0"
    assert last_line(spec) == last_line(trained) == again
    ledger.report(add_trial(ledger), 1, 1.5)
    ledger.complete(1)
    assert last_line(trained) == "Take the winner home with: python -m sweep export /sweeps/toy"
    assert last_line(spec) == "See what it found with: python -m sweep report /sweeps/toy"


def test_the_verification_is_a_part_of_the_sweep(space):
    """A search of two trials of nine parts, 2 s each, then the better one with two seeds, one at a time."""
    search = memory_ledger()
    search.note("sweep_id", "abcd")
    spec = load(space, ["search.trials=2", "early_stopping=false", "verify={top: 1, seeds: 2}"])

    def train(ledger, number, evaluations):
        for evaluation in range(1, evaluations + 1):
            ledger.report(number, evaluation, 2.0 - number / 10)
        ledger.spend(number, Cost(elapsed=2.0 * evaluations))
        if evaluations == 9:
            ledger.complete(number)

    def now():
        found = Status(Place("/sweeps/toy"), spec, search, search.entries(), "me")
        told = as_json(found)
        return found, told, (told["share_done"], told["seconds_left"])

    train(search, add_trial(search, r=4, seed=0), 9)
    train(search, add_trial(search, r=8, seed=0), 3)
    found, told, left = now()
    assert left == (12 / 36, 2.0 * (6 + 18))  # it is to come
    assert "2 runs of the verification left, about 48 s left.\n" in shown(found)
    train(search, 1, 9)
    _, told, left = now()
    assert left == (18 / 36, None)  # how many go on at a time?
    assert told["verification"] is None

    ledger, wanted = verification.begin(search, top=1, seeds=2)
    train(ledger, ledger.add(verification.propose(ledger.entries(), wanted)).number, 4)
    found, told, left = now()
    assert left == (22 / 36, 2.0 * (5 + 9))
    (run,) = told["verification"]["trials"]
    assert (run["trial"], run["state"], run["seconds_left"], run["config"]["seed"]) == (0, "running", 10.0, 1)
    text = shown(found)
    heading, row = "Verification: 2 trials, numbered anew, of the best configurations with other seeds\n", "000  s1 "
    assert row not in text[: text.index(heading)]
    assert re.search(r"000  s1 r8 .* running +4/9 .* 10 s", text[text.index(heading) :])
    assert "2 runs of the verification left, about 28 s left.\n" in text

    train(ledger, 0, 9)
    ledger.fail(ledger.add(verification.propose(ledger.entries(), wanted)).number, "its process died")
    found, told, left = now()
    assert left == (1.0, 0.0)
    assert [run["reason"] for run in told["verification"]["trials"]] == [None, "its process died"]
    assert "verification, trial 001 failed: its process died\n" in shown(found)
    assert "It goes on with" not in shown(replace(found, driver=None))


def test_a_killed_sweep_is_unfinished(space):
    process = sweeps.start(space)
    sweeps.wait_until(lambda: sweeps.reported(space) >= 1, process)
    process.kill()
    process.wait()
    told = status(space.parent / "sweeps/toy")
    assert told.exit_code == 0, told.stderr
    assert "not running" in told.stdout
    assert "unfinished" in told.stdout
    assert f"It goes on with: python -m sweep run {space}\n" in told.stdout


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda sweep: shutil.rmtree(sweep), "or begin one: python -m sweep run space.yaml"),
        (lambda sweep: (sweep / "space.yaml").unlink(), "holds no sweep; name the directory of one"),
        (lambda sweep: shutil.rmtree(sweep) or sweep.write_text("name: toy"), "toy is a file; name the directory of a"),
        (lambda sweep: (sweep / "space.yaml").write_text("name: [toy"), "its space.yaml cannot be read"),
        (lambda sweep: (sweep / "study.log").unlink(), "has no ledger: its driver has not begun"),
        (lambda sweep: (sweep / "study.log").write_bytes(b""), "knows no sweep called toy"),
        (lambda sweep: (sweep / "study.log").write_bytes(b"{\n"), "study.log:1: the ledger is damaged"),
        (
            lambda sweep: of_tomorrow(sweep / "study.log", r"\"nf4\"", r"\"int2\""),
            "knows (quant_type: Input should be 'nf4' or 'fp4'); if a newer one wrote it, get the newest source, then:",
        ),
    ],
)
def test_nothing_to_tell(undisturbed, tmp_path, damage, message):
    sweep = tmp_path / "toy"
    shutil.copytree(undisturbed[0].parent / "sweeps/toy", sweep)
    damage(sweep)
    told = status(sweep)
    assert told.exit_code == 2
    assert told.stdout == ""
    assert message in told.stderr
    assert "Traceback" not in told.stderr


def test_what_a_newer_version_began_is_shown_and_said(undisturbed, tmp_path):
    sweep = tmp_path / "toy"
    shutil.copytree(undisturbed[0].parent / "sweeps/toy", sweep)
    ledger = open_journal(sweep / "study.log", "toy")
    ledger.note("environment", {"qlora-sweep": "99.1"})
    told = status(sweep)
    assert told.exit_code == 0, told.stderr
    assert "qlora-sweep 99.1 began this sweep, and this is " in told.stdout
    assert "winner" in told.stdout
    assert "qlora-sweep 99.1 began this sweep" in page.render(look(str(sweep)), {})


def test_what_a_newer_version_wrote_is_left_out_and_said(undisturbed, tmp_path):
    """Of whoever only looks; nothing is trained by less than what was written."""
    sweep, space = tmp_path / "toy", undisturbed[0]
    shutil.copytree(space.parent / "sweeps/toy", sweep)
    ours = look(str(sweep))
    paths, spec = ours.place.paths, load(space, [f"storage={tmp_path}"])
    of_tomorrow(paths.ledger, r"{\"r\":", r"{\"doubt\":1,\"r\":")
    with pytest.raises(Refused, match="its trials have doubt, which only a newer version knows: get the newest source"):
        open_ledger(spec, paths, {}, (), SimpleNamespace(note=print))
    text = paths.spec.read_text().replace("  first: []\n", "  first: [{doubt: 2}]\n  luck: 3\n")
    paths.spec.write_text(text.replace("space:\n", "space:\n  doubt: {values: [1, 2]}\n") + "mood: {good: true}\n")
    with pytest.raises(Refused, match=r"search\.luck: unknown key(?s:.*)If a newer version wrote it, get the newest"):
        check_spec(spec, paths)

    found = look(str(sweep))
    assert [entry.config for entry in found.entries] == [entry.config for entry in ours.entries]
    assert found.spec == ours.spec.model_copy(update={"search": found.spec.search})
    assert found.spec.search.first == ({},)
    left_out = "search.first.0.doubt, search.luck, space.doubt, mood, doubt of the trials"
    said = f"does not know, and leaves out here: {left_out}. A newer version has run this sweep: get the newest source,"
    told = status(sweep)
    assert told.exit_code == 0, told.stderr
    assert said in told.stdout
    assert "winner" in told.stdout
    assert said in as_json(found)["newer"]
    assert said in page.render(found, {})
    with pytest.raises(NoSweep, match="leaves out here"):
        rerun_spec(found, 0)
    with pytest.raises(Unusable, match="leaves out here"):
        gather([str(sweep)], spec, None, print)


def test_asking_makes_no_database(undisturbed, tmp_path):
    told = status(undisturbed[0].parent / "sweeps/toy", "--ledger", f"sqlite:///{tmp_path}/typo.db")
    assert told.exit_code == 2
    assert "there is no file" in told.stderr
    assert list(tmp_path.iterdir()) == []


def test_bars_are_shares_of_what_lies_below():
    scale = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 90.0]
    assert sparkline([90.0, 1.6, 1.3, 1.0], scale) == "█▇▄▁"
    assert sparkline([], []) == ""
