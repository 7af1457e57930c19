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

EXIT_NO_TRIAL_FINISHED = 1
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

    Exit codes: 0 done, 1 no trial finished, 2 wrong input (nothing was started), 75 preempted (run it again).
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

    console = Console()
    again = shlex.join(["python", "-m", "sweep", *sys.argv[1:]])
    try:
        with Progress(console, spec.space.searched, spec.search.trials, spec.budget.evaluations) as progress:
            outcome = runner.run(spec, address=address, listener=progress, again=again)
    except (runner.Refused, DataError) as error:
        _refuse(str(error))
    if outcome.preempted:
        console.print(f"Preempted by {outcome.interrupted}. The same command goes on: {again}", highlight=False)
        raise typer.Exit(EXIT_PREEMPTED)
    report.show(console, outcome.ledger, spec.space.searched, outcome.seconds)
    if outcome.exhausted:
        console.print(f"The search ended early: {outcome.exhausted}.", highlight=False)
    if outcome.interrupted:
        console.print(f"{outcome.interrupted}. The same command goes on: {again}", highlight=False)
    if outcome.winner is None:
        console.print(f"No trial finished. The ledger is {outcome.paths.root}.", highlight=False)
        raise typer.Exit(EXIT_NO_TRIAL_FINISHED)
    console.print(f"The best adapter is in {outcome.paths.best}", highlight=False)


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(EXIT_WRONG_INPUT)
