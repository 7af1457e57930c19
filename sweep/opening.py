"""What a sweep was begun with: its ledger and its spec, and that a run goes on with the same."""

import importlib.metadata
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import get_token
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from sweep import earlier, scoring, tracking
from sweep import spec as specs
from sweep.paths import SweepPaths
from sweep.spec import SpecError, SweepSpec
from sweep.study import PROGRAM, UPDATE, Ledger, Observation, begun_by_newer, open_journal, unknown_fields
from sweep.validation import Refused

if TYPE_CHECKING:  # it brings Ray, for which `plan` need not wait
    from sweep.scheduler import Listener

PACKAGES = (PROGRAM, "ray", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "wandb", "optuna")
_NO_LEDGER = "Restore it from a backup or name the right one; to begin anew, move the directory away."


def surroundings(spec: SweepSpec, paths: SweepPaths) -> tuple[tuple[str, scoring.Metric] | None, tracking.Tracking]:
    """The metric, with its name, that a sweep asks for, and where its W&B runs go; nothing is started or contacted.

    Refused when one of them is not there as asked for, or when there is no token for the Hub where it is to upload.
    """
    wanted = spec.tracking
    try:
        metric = None if spec.metric is None else (spec.metric, scoring.find_metric(spec.metric))
        project = wanted.project or spec.name
        tracked = tracking.resolve(project, wanted.entity, spec.name, wanted.mode, paths.tracking)
    except ValueError as error:
        raise Refused(str(error)) from error
    if spec.checkpoint.push_to and get_token() is None:
        raise Refused(
            "checkpoint.push_to: there is no token for the Hub; run `hf auth login`, set HF_TOKEN, or leave it out"
        )
    return metric, tracked


def check_spec(spec: SweepSpec, paths: SweepPaths) -> None:
    """Refuse to go on with a sweep directory that holds another spec."""
    if not paths.spec.exists():
        return
    try:
        recorded = specs.load(paths.spec, inputs=False)
    except SpecError as error:
        raise Refused(
            f"the spec that {paths.root} was begun with cannot be read:\n{error}\nIf a newer version wrote it, {UPDATE}"
        ) from error
    changed = specs.changes(recorded, spec)
    if changed:
        raise Refused(
            f"{paths.root} holds a sweep with another spec:\n  "
            + "\n  ".join(changed)
            + f"\nGive this one another `name`, restore the old values (they are in {paths.spec}), or move the"
            " directory away."
        )


def open_ledger(
    spec: SweepSpec, paths: SweepPaths, inputs: Mapping[str, str], known: Sequence[Observation], listener: "Listener"
) -> Ledger:
    """The ledger of a new or a recorded sweep. `inputs` are hashes of what it is about, and a new one begins with what
    is `known`.

    OSError when the database of a recorded one does not answer.
    """
    begun = paths.spec.exists()
    place = without_password(spec.ledger) if spec.ledger else str(paths.ledger)
    if begun and not spec.ledger and not paths.ledger.exists():
        raise Refused(f"{paths.root} holds a sweep, but its ledger {place} is gone. {_NO_LEDGER}")
    try:
        if spec.ledger:
            ledger = Ledger.at_url(spec.ledger, spec.name)
        else:
            ledger = open_journal(paths.ledger, spec.name, listener.note)
    except (SQLAlchemyError, ImportError, ValueError, OSError) as error:
        why = f"ledger: {place} cannot be opened ({' '.join(str(error).split())})"
        if begun and isinstance(error, OperationalError):
            raise OSError(why) from error
        raise Refused(why) from error
    if newer := begun_by_newer(ledger):
        raise Refused(f"{paths.root}: {newer}")
    if unknown := unknown_fields(ledger):
        raise Refused(f"{paths.root}: its trials have {', '.join(unknown)}, which only a newer version knows: {UPDATE}")
    recorded = ledger.noted("inputs")
    if begun and recorded is None:
        raise Refused(f"{paths.root} holds a sweep, but {place} knows nothing of it. {_NO_LEDGER}")
    if spec.ledger and not begun and recorded is not None:
        raise Refused(
            f"ledger: {place} has a study called {spec.name} already, but {paths.root} holds no sweep. Give this sweep"
            " another `name`, or bring that sweep's directory here."
        )
    if recorded is None:
        ledger.note("environment", _environment())
        ledger.note("sweep_id", secrets.token_hex(4))
        ledger.compare_by(spec.criterion)
        earlier.write(ledger, known)
        ledger.note("inputs", inputs)
    elif recorded != inputs:
        changed = ", ".join(name for name in inputs if inputs[name] != recorded.get(name))
        raise Refused(
            f"{changed}: the content is not that which {paths.root} was begun with. Give this sweep another `name`,"
            " restore the files, or move the directory away."
        )
    header = "".join(f"# {name}: {value}\n" for name, value in ledger.noted("environment").items())
    shown = spec.model_copy(update={"ledger": place}) if spec.ledger else spec
    unfinished = paths.spec.with_suffix(".tmp")
    unfinished.write_text(f"# The spec as run, resolved.\n{header}{specs.dump(shown)}")
    unfinished.rename(paths.spec)
    return ledger


def note_news(ledger: Ledger, key: str, value: Any) -> None:
    """Note what is not known yet: a journal grows with each note."""
    if ledger.noted(key) != value:
        ledger.note(key, value)


def without_password(url: str) -> str:
    """A database URL that may be written down."""
    try:
        parsed = make_url(url)
        shown = {key: "***" if "pass" in key else value for key, value in parsed.query.items()}
        return parsed.set(query=shown).render_as_string(hide_password=True)
    except SQLAlchemyError:  # it is none, which is told when it is opened
        return "the URL given"


def _environment() -> dict[str, str]:
    """Versions and git commit that a sweep was begun with."""
    commit = "none"
    if git := shutil.which("git"):
        commit = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return versions | {"git commit": commit or "none"}
