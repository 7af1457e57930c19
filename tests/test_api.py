"""What notebooks and programs import from `sweep`, and that a process can use it more than once."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sweep
from sweep import NoSweep, SpecError, load, look, records, rerun_spec
from sweep.spec import dump
from sweep.study import Entry
from tests import sweeps

NAMES = [
    *("DataError", "Entry", "Failed", "Home", "Ledger", "NoSweep", "NotKept", "Outcome", "Refused", "SpecError"),
    *("Status", "SweepSpec", "ask", "load", "look", "make_view", "ranking", "records", "rerun_spec", "run"),
    *("show_plan", "starter", "take_home", "upload", "write_report"),
]

NOTEBOOK = """
import asyncio, json, signal, threading
from sweep import Refused, load, look, ranking, rerun_spec, run

def elsewhere(spec, said):
    try:
        run(spec)
    except Refused as error:
        said.append(str(error))

async def cell():  # as a notebook runs its cells: in the main thread, in an event loop
    before = signal.getsignal(signal.SIGINT)
    first = run(load("toy.yaml", ["search.trials=2"]))
    best = ranking(first.ledger.entries())[0]
    spec = rerun_spec(look("sweeps/toy"), best.number)
    second = run(spec)
    said = []
    thread = threading.Thread(target=elsewhere, args=(spec, said))
    thread.start()
    thread.join()
    told = {
        "best": [best.number, best.losses],
        "winners": [first.winner.number, second.winner.number],
        "again": [[entry.config == best.config, entry.losses] for entry in second.ledger.entries()],
        "place": second.place.url,
        "handlers": signal.getsignal(signal.SIGINT) is before,
        "elsewhere": said,
    }
    print(json.dumps(told))

asyncio.run(cell())
"""


def test_names_are_frozen():
    assert sweep.__all__ == NAMES == dir(sweep)
    for name in NAMES:
        assert getattr(sweep, name).__doc__, name
        assert importlib.util.find_spec(f"sweep.{name}") is None  # it would take the name's place once it is imported
    with pytest.raises(AttributeError, match="has no attribute 'runn'"):
        _ = sweep.runn


def test_the_example_of_the_readme_uses_them():
    code = (Path(sweep.__file__).parent.parent / "README.md").read_text().split("```python\n")[1].split("```")[0]
    imported = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imported] == ["sweep"]
    assert {alias.name for node in imported for alias in node.names} <= set(NAMES)


def test_importing_it_costs_nothing():
    heavy = {"torch", "ray", "optuna", "pydantic", "rich"}
    check = f"import sys, sweep; dir(sweep); sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_process_of_a_trial_brings_little():
    heavy = {"torch", "optuna", "sqlalchemy", "plotly"}
    check = f"import sys, sweep.trainable; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_two_sweeps_in_one_process(space):
    """The second trains the first one's winner again: its losses are the same to the last bit."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        cwd=space.parent,
        env=sweeps.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search(
        r"trial   0 started: r\d+ a\d+ lr\S+ (nf4|fp4) bf16\n", done.stdout
    )  # of the second: nothing varies
    told = json.loads(done.stdout.splitlines()[-1])
    number, losses = told["best"]
    assert told["winners"] == [number, 0]
    assert told["place"] == str(space.parent / f"sweeps/toy-rerun-{number:03d}")
    [[same, again]] = told["again"]
    assert same
    assert losses.items() <= again.items()  # whole, also when early stopping ended the first
    assert again.keys() >= set(map(str, range(10)))
    assert told["handlers"]
    assert "only the main thread" in told["elsewhere"][0]


def test_a_process_that_goes_on_after_an_interrupt_is_left_alone():
    interrupted = (
        "import os, signal, time; from sweep.preemption import Drain, draining_on_signals\n"
        "drain = Drain()\n"
        "with draining_on_signals(drain, 0.2, 'by force'):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(0.5)\n"
        "print(drain.reason)"
    )
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "SIGINT\n")


def winner(entries: list[Entry]) -> Entry:
    return min((entry for entry in entries if entry.best), key=lambda entry: entry.best[1])


def test_a_rerun_is_a_sweep_of_its_own(undisturbed, tmp_path):
    file, _, _ = undisturbed
    found, best = look(str(file.parent / "sweeps/toy")), winner(undisturbed[2])
    spec = rerun_spec(found, best.number)
    assert (spec.name, spec.storage) == (f"toy-rerun-{best.number:03d}", str(file.parent / "sweeps"))
    assert (spec.search.trials, spec.early_stopping, spec.tracking.project) == (1, False, "toy")
    assert spec.budget == load(file).budget
    assert spec.space.searched == ()
    assert spec.space.params_of(best.config.model_dump(mode="json")) == {}
    assert {name: spec.space.values(name) for name in spec.space.dimensions} == {
        name: (value,) for name, value in best.config.model_dump().items()
    }
    recorded = tmp_path / "space.yaml"
    recorded.write_text(dump(spec))
    assert load(recorded) == spec
    longer = rerun_spec(found, best.number, ["budget.epochs=3", "space.seed={values: [1, 2]}", "search.trials=2"])
    assert (longer.budget.epochs, longer.budget.steps, longer.search.trials) == (3.0, None, 2)
    assert longer.space.searched == ("seed",)
    with pytest.raises(NoSweep, match=r"there is no trial 99; .*toy has 0, 1, 2, 3, 4, 5, 6, 7"):
        rerun_spec(found, 99)
    with pytest.raises(SpecError, match=r"--set budget\.epoch=3: budget\.epoch: unknown key; did you mean epochs"):
        rerun_spec(found, 0, ["budget.epoch=3"])
    assert [trial["trial"] for trial in records(found)] == list(range(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trial", "99"], "there is no trial 99"),
        (["--trial", "0", "--set", "search.trials=2"], "nothing is searched, so all 2 trials would be equal"),
        (["--trial", "0", "--ledger", "sqlite:///typo.db"], "there is no file typo.db"),
    ],
)
def test_a_rerun_that_cannot_be(undisturbed, tmp_path, options, message):
    directory = undisturbed[0].parent / "sweeps/toy"
    told = subprocess.run(
        [sys.executable, "-m", "sweep", "rerun", str(directory), *options],
        cwd=tmp_path,
        env=sweeps.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode == 2, told.stdout + told.stderr
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert list(tmp_path.iterdir()) == []
