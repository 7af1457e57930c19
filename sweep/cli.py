"""The verbs, thin."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Find the QLoRA configuration to train with. Begin with: qlora-sweep run space.yaml",
)

EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2


@app.callback()
def _verbs() -> None:
    """Keeps `run` a verb of its own."""


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

    Example: qlora-sweep run search_spaces/pricer.yaml --set search.trials=4

    Exit codes: 0 done, 1 no trial finished or five in a row broke down,
    2 wrong input and nothing was started, 75 preempted: run it again.
    """
    from sweep.spec import SpecError, load

    try:
        spec = load(space, set_ or [])
    except SpecError as error:
        _refuse(str(error))

    from rich.console import Console

    from sweep import report, runner
    from sweep.preemption import EXIT_PREEMPTED
    from sweep.progress import Progress
    from trainables.data import DataError

    console = Console(markup=False, emoji=False)  # paths and error messages hold brackets
    again = shlex.join(["python", "-m", "sweep", *sys.argv[1:]])
    try:
        with Progress(console, spec.space.searched, spec.search.trials, spec.budget.evaluations) as progress:
            outcome = runner.run(spec, address=address, listener=progress, again=again)
    except (runner.Refused, DataError) as error:
        _refuse(str(error))
    if outcome.cause == "signal":
        console.print(f"Preempted by {outcome.reason}. The same command goes on: {again}", highlight=False)
        raise typer.Exit(EXIT_PREEMPTED)
    report.show(console, outcome.ledger, spec.space.searched, outcome.seconds)
    if outcome.winner is not None:
        console.print(f"The best adapter is in {outcome.paths.best}", highlight=False)
    if outcome.exhausted:
        console.print(f"The search ended early: {outcome.exhausted}.", highlight=False)
    if outcome.cause:
        console.print(f"{outcome.reason}. The same command goes on: {again}", highlight=False)
    if outcome.cause == "breakdown" or (outcome.cause is None and not report.any_finished(outcome.ledger.entries())):
        if outcome.cause is None:
            console.print(f"No trial finished. The ledger is in {outcome.paths.root}", highlight=False)
        raise typer.Exit(EXIT_FAILED)


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(EXIT_WRONG_INPUT)
