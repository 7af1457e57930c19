"""The verbs, thin."""

import json
import os
import re
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sweep.preemption import EXIT_PREEMPTED

if TYPE_CHECKING:
    from sweep.progress import Console
    from sweep.requests import Verb
    from sweep.runner import Outcome
    from sweep.spec import SweepSpec

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Find the QLoRA configuration to train with. Begin with: python -m sweep run space.yaml",
)

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2

SweepDirectory = Annotated[
    str, typer.Argument(help="A sweep's directory, like sweeps/pricer, or its s3:// URL.", show_default=False)
]
LedgerUrl = Annotated[
    str | None, typer.Option(help="URL of its database, when that needs a password.", show_default=False)
]


@app.callback()
def _verbs() -> None:
    """Keeps each a verb of its own."""


@app.command()
def run(
    space: Annotated[Path, typer.Argument(help="The sweep's YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace one value of the file, e.g. budget.steps=40. Repeatable."
        ),
    ] = None,
    address: Annotated[
        str, typer.Option(help="Ray cluster to join; `local` starts one on this machine alone.")
    ] = "local",
) -> None:
    """Run a sweep, or go on with it where it stood.

    Example: python -m sweep run search_spaces/pricer.yaml --set search.trials=4

    Exit codes: 0 done, 1 no trial finished or five in a row broke down,
    2 wrong input and nothing was started, 75 preempted: run it again.
    """
    _nothing_has_begun()
    from sweep.paths import SweepPaths
    from sweep.spec import SpecError, load

    try:
        spec = load(space, set_ or [])
    except SpecError as error:
        raise typer.Exit(_wrong_input(error)) from error
    here = Path(spec.storage) / spec.name
    beside = space.parent / here  # the same for an absolute path, and nothing for a URL
    if SweepPaths(beside).spec.exists() and not here.exists():
        print(f"{beside} is a sweep of this name; this one begins anew in {here}, for storage starts where you are")
    _run(spec, address)


@app.command()
def rerun(
    sweep: SweepDirectory,
    trial: Annotated[int, typer.Option(help="Number of the trial.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. budget.epochs=3. Repeatable."),
    ] = None,
    all_data: Annotated[
        bool,
        typer.Option("--all-data", help="Train on the validation rows, too: NAME-all-NNN, without a validation loss."),
    ] = False,
    address: Annotated[
        str, typer.Option(help="Ray cluster to join; `local` starts one on this machine alone.")
    ] = "local",
    ledger: LedgerUrl = None,
) -> None:
    """Train the configuration of a trial again: a sweep of one trial, NAME-rerun-NNN, beside the other.

    Example: python -m sweep rerun sweeps/pricer --trial 7 --set budget.epochs=3

    Model, data, budget and seed are as recorded unless set otherwise. The same command goes on with it.
    With --all-data the budget is, unless set, as many passes over all rows as the best checkpoint of the
    trial had made over the training rows, and the last checkpoint is what is exported.

    Exit codes: 0 done, 1 the trial did not finish, 2 wrong input and nothing was started, 75 preempted: run it again.
    """
    _nothing_has_begun()
    from sweep.spec import SpecError
    from sweep.status import NoSweep, look, rerun_spec

    try:
        spec = rerun_spec(look(sweep, ledger), trial, set_ or [], ledger, all_data=all_data)
    except (NoSweep, SpecError) as error:
        raise typer.Exit(_wrong_input(error)) from error
    _run(spec, address)


def _nothing_has_begun() -> None:
    """Signals end the process, until `runner` takes them over."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(EXIT_PREEMPTED))


def _run(spec: "SweepSpec", address: str) -> NoReturn:
    """Run a sweep, and end the process."""
    code = _outcome(spec, address)
    with suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # takes a local Ray cluster along, at once


def _outcome(spec: "SweepSpec", address: str) -> int:
    """Run a sweep and tell how it ended; the exit code."""
    from sweep import opening, report, requests, runner, status, verification
    from sweep.progress import terminal
    from sweep.validation import Refused, counted
    from trainables.data import DataError

    console = terminal()
    words = [re.sub(r"[\w+]+://.+", lambda url: opening.without_password(url[0]), word) for word in sys.argv[1:]]
    again = shlex.join(["python", "-m", "sweep", *words])
    try:
        outcome = runner.run(spec, address=address, again=again, leave_ray=True)
    except (Refused, DataError) as error:
        return _wrong_input(error)
    except OSError as error:
        console.print(f"{error}. What was written is intact.", highlight=False, soft_wrap=True)
        console.print(f"The same command goes on: {again}", highlight=False, soft_wrap=True)
        return EXIT_FAILED
    if outcome.cause == "signal":
        verified = verification.result(outcome.ledger)
        done = report.standing(outcome.ledger.entries(), spec.search.trials, verified.left if verified else 0)
        farewell = f"Preempted by {outcome.reason}: {done}.\nThe same command goes on: {again}"
        console.print(farewell, highlight=False, soft_wrap=True)
        if console.quiet:
            with suppress(OSError):  # where standard error goes the same way
                print(farewell, file=sys.stderr)
        return EXIT_PREEMPTED
    report.show(console, outcome.ledger, spec.space.searched, outcome.seconds, spec.cost.per_hour)
    _report_at_the_end(outcome, spec, console)
    if outcome.winner is not None:
        what = "configuration" if spec.trainable == "toy" else "adapter"
        console.print(f"The best {what} is in {outcome.place.url}/best", highlight=False, soft_wrap=True)
    if outcome.kept_offline:
        one = outcome.kept_offline == 1
        console.print(
            f"{counted(outcome.kept_offline, 'W&B run')} {'is' if one else 'are'} kept offline;"
            f" upload {'it' if one else 'them'} with: {outcome.place.command('sync')}",
            highlight=False,
            soft_wrap=True,
        )
        lay_out = outcome.place.command("workspace")
        console.print(f"Then lay them out in W&B with: {lay_out}", highlight=False, soft_wrap=True)
    nothing = outcome.winner is None and not report.any_finished(outcome.ledger.entries())
    if outcome.cause is None and (outcome.winner is not None or nothing):
        for line in status.onward(outcome.ledger, spec, outcome.place):
            console.print(line, highlight=False, soft_wrap=True)
    if outcome.exhausted:
        console.print(f"The search ended early: {outcome.exhausted}.", highlight=False)
    for line in requests.not_tried(outcome.ledger, spec.space, spec.search.trials):
        console.print(line, highlight=False, soft_wrap=True)
    if outcome.cause:
        console.print(f"{outcome.reason}. The same command goes on: {again}", highlight=False, soft_wrap=True)
    return EXIT_FAILED if outcome.cause == "breakdown" or nothing else 0


def _report_at_the_end(outcome: "Outcome", spec: "SweepSpec", console: "Console") -> None:
    """Make report.html; a sweep does not fail because of it."""
    try:
        from sweep import page
        from sweep.status import Status

        file = page.write(Status(outcome.place, spec, outcome.ledger, outcome.ledger.entries(), None))
        said = f"What it found is in {file}"
    except Exception as error:  # noqa: BLE001 - it is told, and the sweep is done
        again = outcome.place.command("report")
        said = f"No report was made ({type(error).__name__}: {error}); once that is mended: {again}"
    console.print(said, highlight=False, soft_wrap=True)


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Base model: directory or Hub id.", show_default=False)],
    data: Annotated[str, typer.Argument(help="Training rows: file, saved dataset or Hub id.", show_default=False)],
    space: Annotated[Path, typer.Argument(help="The YAML file to be written.")] = Path("space.yaml"),
) -> None:
    """Write a first YAML file for a model and a data file; it runs as it is.

    Example: python -m sweep init models/smollm2-135m search_spaces/data/pricer-train.jsonl

    Exit codes: 0 written, 2 model or data cannot be used, or the file is there already.
    """
    from rich.console import Console

    from sweep.init import starter

    try:
        if space.exists():
            other = shlex.join(["python", "-m", "sweep", "init", model, data, f"{space.with_suffix('')}-2.yaml"])
            raise ValueError(f"{space} is there already; name another file: {other}")
        with Console(stderr=True).status(f"Looking at {model} and {data}"):  # on a terminal
            text = starter(model, data, space)
        space.write_text(text)
    except (ValueError, OSError, RuntimeError) as error:  # a DataError is a ValueError; models of others raise the last
        raise typer.Exit(_wrong_input(error)) from error
    print(f"{space} is written. Look at it, then: {shlex.join(['python', '-m', 'sweep', 'plan', str(space)])}")


@app.command()
def plan(
    space: Annotated[Path, typer.Argument(help="The sweep's YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace one value of the file, as with `run`. Repeatable."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Time the lightest and the heaviest trial here: adds hours and cost.")
    ] = False,
) -> None:
    """Say what a sweep would do, and start nothing: data, steps, early stopping, memory, configurations.

    Example: python -m sweep plan search_spaces/pricer.yaml

    Exit codes: 0 it can be started, 2 wrong input, for which `run` would start nothing.
    """
    from sweep.spec import SpecError, load

    try:
        spec = load(space, set_ or [])
    except SpecError as error:
        raise typer.Exit(_wrong_input(error)) from error

    from sweep.plan import show
    from sweep.validation import Refused

    try:
        show(spec, probe=probe)
    except (Refused, ValueError, OSError, RuntimeError) as error:  # models of others raise the last
        raise typer.Exit(_wrong_input(error)) from error
    words = ["run", str(space), *(word for value in set_ or [] for word in ("--set", value))]
    print(f"Run it with: {shlex.join(['python', '-m', 'sweep', *words])}")


@app.command()
def sync(
    sweep: Annotated[
        str,
        typer.Argument(
            help="A sweep's directory, like sweeps/pricer, or the s3:// URL of one that ran here.", show_default=False
        ),
    ],
) -> None:
    """Send to W&B what it lacks of a sweep: offline runs, and online ones whose upload was cut off.

    Example: python -m sweep sync sweeps/pricer

    Every row is sent once, also when this is interrupted and repeated.

    Exit codes: 0 W&B has everything, 1 it does not yet: run it again,
    2 wrong input and nothing was sent: no sweep there, a sweep that is running, no usable key.
    """
    from sweep.place import Place
    from sweep.sync import upload
    from sweep.tracking import UNTRACKED
    from sweep.validation import Refused

    place = Place.at(sweep)
    try:
        outcome = upload(place)
    except Refused as error:
        raise typer.Exit(_wrong_input(error)) from error
    for reason in dict.fromkeys(outcome.failed.values()):
        runs = [run for run, why in outcome.failed.items() if why == reason]
        print(f"{', '.join(runs) if len(runs) < 4 else f'{len(runs)} runs'}: {reason}", file=sys.stderr)
    if not outcome.runs:
        print(f"{sweep} has no W&B runs on this machine: no trial has begun, or {UNTRACKED}.")
        return
    complete = outcome.runs - len(outcome.failed)
    print(f"W&B has {complete} of {outcome.runs} runs of {sweep}, {len(outcome.sent)} of them sent now.")
    if outcome.failed:
        raise typer.Exit(EXIT_FAILED)
    print(f"Lay them out in W&B with: {place.command('workspace')}")


@app.command()
def status(
    sweep: SweepDirectory,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, for programs.")] = False,
    ledger: LedgerUrl = None,
) -> None:
    """Show how a sweep stands, from another terminal or long after.

    Example: python -m sweep status sweeps/pricer

    Exit codes: 0 shown, 2 no sweep there, or one that cannot be read.
    """
    from sweep import status as statuses
    from sweep.progress import terminal

    try:
        found = statuses.look(sweep, ledger)
    except statuses.NoSweep as error:
        raise typer.Exit(_wrong_input(error)) from error
    if as_json:
        print(json.dumps(statuses.as_json(found), indent=1))
    else:
        statuses.show(terminal(), found)


@app.command()
def report(sweep: SweepDirectory, ledger: LedgerUrl = None) -> None:
    """Write report.html into a sweep's directory: what mattered, how trials learned, and which to train with.

    Example: python -m sweep report sweeps/pricer

    It may be asked for while the sweep runs; `run` makes it at the end.

    Exit codes: 0 written, 1 it could not be written, 2 no sweep there, or one that cannot be read.
    """
    from sweep import page
    from sweep import status as statuses

    try:
        found = statuses.look(sweep, ledger)
        print(f"{page.write(found)} is written; open it in a browser.")
    except statuses.NoSweep as error:
        raise typer.Exit(_wrong_input(error)) from error
    except OSError as error:  # a directory of somebody else, a full disk, a store that does not answer
        print(f"{sweep}: report.html cannot be written: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from error
    for line in statuses.onward(found.ledger, found.spec, found.place) if found.is_done else []:
        print(line)


@app.command()
def stop(
    sweep: SweepDirectory,
    trial: Annotated[int, typer.Option(help="Number of the trial.", show_default=False)],
    ledger: LedgerUrl = None,
) -> None:
    """Stop a trial of a sweep, also of one that runs: it ends with its next slice, and is ranked with what it has.

    Example: python -m sweep stop sweeps/pricer --trial 7

    Exit codes: 0 done or asked for, 1 the directory cannot be written,
    2 wrong input: no sweep there, or the trial has ended.
    """
    _ask(sweep, ledger, "stop", trial=trial)


@app.command()
def revive(
    sweep: SweepDirectory,
    trial: Annotated[int, typer.Option(help="Number of the trial.", show_default=False)],
    ledger: LedgerUrl = None,
) -> None:
    """Have a trial that was stopped, by early stopping or by hand, go on from its checkpoint, or else begin anew.

    Example: python -m sweep revive sweeps/pricer --trial 3

    Of trials that have ended, only the best `checkpoint.keep` have a checkpoint
    still, mostly none that early stopping ended. It says which of the two it is.

    Exit codes: 0 done or asked for, 1 the directory cannot be written,
    2 wrong input: no sweep there, or the trial was not stopped.
    """
    _ask(sweep, ledger, "revive", trial=trial)


@app.command()
def enqueue(
    sweep: SweepDirectory,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="The configuration; what it does not name is as the space fixes it, else the documented default.",
            show_default=False,
        ),
    ],
    ledger: LedgerUrl = None,
) -> None:
    """Have a configuration tried next; it is one of `search.trials`.

    Example: python -m sweep enqueue sweeps/pricer r=16 learning_rate=1e-4

    Exit codes: 0 done or asked for, 1 the directory cannot be written,
    2 wrong input: no sweep there, or a configuration that is not in its space, or was tried.
    """
    from sweep.document import SpecError, parse

    config = {}
    for assignment in values:
        key, equals, text = assignment.partition("=")
        if key in config:
            raise typer.Exit(_wrong_input(f"{assignment}: {key} is given twice; enqueue one configuration at a time"))
        try:
            config[key] = parse(text, assignment).data if equals else None
        except SpecError as error:
            raise typer.Exit(_wrong_input(error)) from error
    _ask(sweep, ledger, "enqueue", config=config)


@app.command()
def pause(sweep: SweepDirectory, ledger: LedgerUrl = None) -> None:
    """Have a sweep that runs, here or on another machine, write checkpoints and end, as a SIGTERM does.

    Example: python -m sweep pause sweeps/pricer

    Exit codes: 0 done or asked for, 1 the directory cannot be written,
    2 wrong input: no sweep there, or it is not running.
    """
    _ask(sweep, ledger, "pause")


def _ask(sweep: str, ledger: str | None, verb: "Verb", **about: Any) -> None:
    from sweep import requests
    from sweep import status as statuses
    from sweep.validation import Refused

    try:
        told = requests.ask(statuses.look(sweep, ledger), verb, **about)
    except (statuses.NoSweep, Refused) as error:
        raise typer.Exit(_wrong_input(error)) from error
    except OSError as error:
        print(f"{sweep}: that could not be asked for: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from error
    for line in told:
        print(line)


@app.command()
def export(
    sweep: SweepDirectory,
    trial: Annotated[
        int | None, typer.Option(help="Number of the trial; the best one unless given.", show_default=False)
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole model in bf16, the adapter added to its weights.")
    ] = False,
    push_to: Annotated[
        str | None, typer.Option(help="Repository of the Hub to upload it to, made private if new.", show_default=False)
    ] = None,
    ledger: LedgerUrl = None,
) -> None:
    """Take a trial home: its adapter, or the merged model, with tokenizer and model card, in the working directory.

    Example: python -m sweep export sweeps/pricer --merge

    Exit codes: 0 done, 1 the machine or the Hub did not do it,
    2 wrong input: no sweep there, no checkpoint of that trial, a name that the Hub does not allow.
    """
    from sweep import export as exports
    from sweep import status as statuses
    from sweep.spec import repository

    try:
        if push_to is not None:
            repository(push_to)
    except ValueError as error:
        raise typer.Exit(_wrong_input(f"--push-to {push_to}: {error}")) from error
    try:
        found = statuses.look(sweep, ledger)
        home = exports.take_home(found, trial, merge=merge, public=push_to is not None)
    except (statuses.NoSweep, exports.NotKept, ValueError) as error:
        raise typer.Exit(_wrong_input(error)) from error
    except (OSError, RuntimeError, MemoryError) as error:  # a disk that is full, memory that is not enough
        print(f"{sweep}: nothing was exported: {type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from error
    where = f"{home.directory} has trial {home.trial} as it was after step {home.step}"
    print(f"{where}: {home.result}. How to load it: cat {shlex.quote(f'{home.directory}/README.md')}")
    if found.newer:
        print(found.newer, file=sys.stderr)
    if push_to is not None:
        try:
            print(f"Uploaded to {exports.push(home.directory, push_to)}")
        except OSError as error:
            again = shlex.join(["hf", "upload", push_to, str(home.directory), "--private"])
            print(
                f"--push-to {push_to}: {error}; {home.directory} is complete, upload it with: {again}", file=sys.stderr
            )
            raise typer.Exit(EXIT_FAILED) from error


@app.command()
def workspace(sweep: SweepDirectory, ledger: LedgerUrl = None) -> None:
    """Lay out the runs of a sweep in its W&B project, as a saved view, or say where that is.

    Example: python -m sweep workspace sweeps/pricer

    Exit codes: 0 the view is there, 1 W&B did not save it,
    2 wrong input: no sweep there, no run that was uploaded, no usable key.
    """
    from sweep import status as statuses
    from sweep import sync as syncs
    from sweep import workspace as workspaces
    from sweep.validation import Refused

    try:
        view = workspaces.make_for(statuses.look(sweep, ledger))
    except (statuses.NoSweep, Refused) as error:
        raise typer.Exit(_wrong_input(error)) from error
    except syncs.Failed as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from error
    print(view.url if view.is_new else f"{view.url} is there already; delete the view in W&B to have it made anew")


@app.command()
def dashboard(
    sweep: SweepDirectory,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0 takes a free one.")] = 8080,
    ledger: LedgerUrl = None,
) -> None:
    """Serve optuna-dashboard on a sweep's ledger, also while it runs; it can change nothing there.

    Example: python -m sweep dashboard sweeps/pricer

    Exit codes: 0 ended with Ctrl-C,
    2 wrong input: no sweep there, a port that is taken, optuna-dashboard is not installed.
    """
    from sweep import dashboard as dashboards
    from sweep import status as statuses

    try:
        server = dashboards.server(statuses.look(sweep, ledger), ledger, port)
    except (statuses.NoSweep, dashboards.NotInstalled) as error:
        raise typer.Exit(_wrong_input(error)) from error
    except OSError as error:
        raise typer.Exit(_wrong_input(f"--port {port}: {error.strerror}; name another one")) from error
    print(f"http://{dashboards.HOST}:{server.server_port} shows {sweep}. Ctrl-C ends it.", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


def _wrong_input(error: Exception | str) -> int:
    print(error, file=sys.stderr)
    return EXIT_WRONG_INPUT
