"""W&B: every trial is one run of the shared project. One function each for start, log, finish.

Training never waits for W&B. Rows go through a queue to a thread, which alone talks to wandb; the runs of a process
take turns there. wandb writes each row to a file on disk (a *fragment*, one for every attempt of a run) before it
uploads it. When W&B cannot be used the rows go to an offline fragment, to be uploaded with `sweep.sync`, and `notes`
says so.

Before it is queued, a row is appended to a file of the trial: what a killed process had not handed to wandb yet, or
not uploaded, the next attempt does. No row is recorded twice: an attempt that goes on after another leaves out what the
server has (online) or what earlier fragments on this machine hold (offline). Both are asked when the attempt starts,
so they are right after any kill.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from itertools import chain
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import psutil

from sweep.criterion import LOSS, Criterion
from trainables.config import QLoRAConfig
from trainables.protocol import Slice

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
State = Literal["complete", "stopped", "failed", "preempted"]
Row = dict[str, Any]

INIT_SECONDS = 4.0
"""How long the server may take to open a run before its rows go to an offline fragment."""
FINISH_SECONDS = 8.0
"""How long the last uploads of a run may take; what is left then stays in its fragment."""
TEARDOWN_SECONDS = 3.0
"""How long wandb's own process may take to end; the rows of finished runs are on disk after half a second."""
RETRY_SECONDS = 60.0
"""How long a process leaves W&B alone after it failed."""

ROWS, RECORDED = "rows.jsonl", "rows.recorded"
"""Files in a trial's directory: its rows, and the mark that wandb has written the run's end, with the mode."""
UNTRACKED = "tracking.mode is disabled; with --set tracking.mode=auto the trials to come are tracked"
"""Why W&B has nothing of a sweep, and what to do."""
STEP, EVALUATION = "train/global_step", "eval/evaluation"
"""Names in the rows; every row has the first, those of an evaluation the second."""

logger = logging.getLogger(__name__)
_notes: SimpleQueue[str] = SimpleQueue()
_turn = threading.Lock()  # wandb cannot open a run anew, as a fallback must, without closing all others of the process
_threads: list[threading.Thread] = []
_offline_until = 0.0  # time.monotonic(); guarded by _turn


@dataclass(frozen=True)
class Tracking:
    """What the driver decides once per sweep. Never holds a key: each machine looks up its own."""

    project: str
    entity: str | None
    """User or team; None is the default of the key's owner."""
    group: str
    """Name of the sweep."""
    mode: Mode
    directory: str
    """wandb makes its `wandb/` in it; absolute."""


@dataclass(frozen=True)
class End:
    """How an attempt of a run ended."""

    state: State
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that is being recorded."""

    queue: SimpleQueue[Row | End]
    thread: threading.Thread
    rows: Path
    """All rows of all attempts."""


def resolve(
    project: str,
    entity: str | None,
    group: str,
    mode: Literal["auto", "online", "offline", "disabled"],
    directory: Path,
) -> Tracking:
    """Settle `mode` before anything starts: `auto` is online with a key and offline without.

    The key is looked for where wandb does (WANDB_API_KEY, .netrc, its settings), without asking for it or contacting
    anyone; with `auto`, WANDB_MODE decides if it is set. ValueError when `online` is wanted and there is no usable key.
    """
    settled = _mode_here(mode) if mode == "auto" or mode == "online" else mode
    return Tracking(project, entity, group, settled, str(directory.absolute()))


def run_id(sweep_id: str, number: int) -> str:
    """The id of a trial's run, unique in a project that many sweeps share."""
    return f"{sweep_id}-{number:03d}"


USUAL = ("r", "alpha", "learning_rate", "quant_type", "compute_dtype")


def run_name(number: int, config: QLoRAConfig, searched: Iterable[str]) -> str:
    """Number of the trial and the hyperparameters that differ between trials: `007 r16 a32 lr2.0e-04 nf4 bf16`."""
    return f"{number:03d} {described(config, searched)}".rstrip()


def run_config(number: int, config: QLoRAConfig, model: str, group: str) -> dict[str, Any]:
    """The config of a run: flat, so that a panel of parallel coordinates needs no clicking about."""
    return config.model_dump() | {"trial": number, "model": model, "sweep": group}


def described(config: QLoRAConfig, searched: Iterable[str]) -> str:
    """The hyperparameters that differ between trials, or the usual ones where none do: `r16 a32 lr2.0e-04 nf4 bf16`."""
    return " ".join(_short(name, getattr(config, name)) for name in list(searched) or USUAL)


def start(
    tracking: Tracking,
    run_id: str,
    name: str,
    config: Mapping[str, Any],
    directory: Path,
    publish: Callable[[Path], object] = lambda mark: None,
) -> Run:
    """Begin to record a run, or go on with it when `run_id` was recorded before; `directory` is the trial's own.

    `publish` is called with the file RECORDED once it is there. Returns at once. Raises OSError when nothing can be
    written there.
    """
    queue: SimpleQueue[Row | End] = SimpleQueue()
    rows = directory / ROWS
    thread = threading.Thread(
        target=_record,
        args=(tracking, run_id, name, dict(config), queue, rows, publish),
        name=f"wandb {run_id}",
        daemon=True,
    )
    if tracking.mode != "disabled":
        directory.mkdir(parents=True, exist_ok=True)
        with rows.open("ab") as stream:
            stream.truncate(rows.read_bytes().rfind(b"\n") + 1)  # a killed process may have left half a row
    _threads[:] = [*(earlier for earlier in _threads if earlier.is_alive()), thread]
    thread.start()
    return Run(queue, thread, rows)


def log(run: Run, happened: Slice, criterion: Criterion = LOSS) -> None:
    """Record the optimiser steps and the evaluation of a slice, whose `score` is named by the criterion.

    Returns at once; OSError when the disk refuses.
    """
    rows = list(_rows(happened, criterion))
    if run.rows.exists():  # it is not when tracking is disabled
        with run.rows.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    if run.thread.is_alive():  # it is not when nothing can be recorded
        for row in rows:
            run.queue.put(row)


def logged(directory: Path) -> list[Row]:
    """All rows of the trial with this directory, in the order of their logging; some twice after an interruption."""
    rows = directory / ROWS
    if not rows.exists():
        return []
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be being written


def summary(
    objectives: Mapping[int, float],
    losses: Mapping[int, float],
    steps: Mapping[int, int],
    first_rung: int,
    budget_share: float,
    criterion: Criterion,
) -> Row:
    """What a table of runs shows of a trial with these objectives, losses and optimiser steps by evaluation.

    `first_rung` is the evaluation at which early stopping may end a trial for the first time, `budget_share` what
    it used of its budget. Losses are those of the evaluation that the trial is ranked by, and of the first rung.
    """
    best = min((number for number in objectives if number > 0), key=lambda number: objectives[number], default=-1)
    of = {"eval_loss": losses}
    if not criterion.is_loss:
        of[criterion.key] = {number: criterion.turned(each) for number, each in objectives.items()}
    at = {"best": best, "first_rung": first_rung}
    found = {f"{which}_{name}": values.get(at[which]) for name, values in of.items() for which in at}
    return found | {"best_step": steps.get(best), "budget_share": budget_share}


def finish(run: Run, state: State, summary: Mapping[str, Any]) -> None:
    """End this attempt of a run; `summary` is what W&B shows of it in its table. Returns at once: see `close`."""
    run.queue.put(End(state, summary))


def close(seconds: float = 10.0) -> None:
    """Wait until all that was finished in this process is safe, and end wandb: call it before the process ends.

    10 seconds are enough to write everything to disk, even when W&B does not answer. A later `start` begins anew.
    """
    closing = threading.Thread(target=_close, name="wandb close", daemon=True)
    closing.start()
    closing.join(seconds)
    if any(thread.is_alive() for thread in _threads):
        _tell(f"it was not done after {seconds:g} s; the command that runs the sweep records what is missing")


def notes() -> list[str]:
    """What the user should know of W&B in this process, since the last call. Equal troubles read equal."""
    told = []
    while True:
        try:
            told.append(_notes.get_nowait())
        except Empty:
            return told


def find_key(remedy: str) -> "wandb.sdk.lib.wbauth.Auth | None":
    """The key for W&B, looked for where wandb does, without asking for it or contacting anyone.

    ValueError, which ends with `remedy`, when there is one that cannot be used.
    """
    _quieten_wandb()
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    host = wandb_setup.singleton().settings.base_url  # starts no process, unlike wandb.setup()
    try:
        return wbauth.authenticate_session(host=host, source="sweep", prompt=False, update_session=False)
    except AuthenticationError as error:
        raise ValueError(f"tracking: the key for {host} cannot be used ({error}); {remedy}") from error


def _mode_here(wanted: Literal["auto", "online"]) -> Mode:
    _quieten_wandb()
    from wandb.sdk import wandb_setup

    settings = wandb_setup.singleton().settings
    if wanted == "auto" and settings.mode == "disabled":
        return "disabled"
    if wanted == "auto" and settings.mode in ("offline", "dryrun"):
        return "offline"
    remedy = "run `wandb login`, set WANDB_API_KEY, or set tracking.mode to offline"
    key = find_key(remedy)
    if key is None and wanted == "online":
        raise ValueError(f"tracking.mode is online, but there is no key for {settings.base_url}; {remedy}")
    return "online" if key else "offline"


_ABBREVIATIONS = {
    "r": "r",
    "alpha": "a",
    "dropout": "do",
    "learning_rate": "lr",
    "warmup_ratio": "wu",
    "weight_decay": "wd",
    "max_grad_norm": "clip",
    "batch_size": "b",
    "accumulation": "acc",
    "seed": "s",
}


def _short(name: str, value: bool | float | str | tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    if isinstance(value, int | float):
        return _ABBREVIATIONS[name] + (f"{value:.1e}" if 0 < value < 0.01 else f"{round(value, 3):g}")
    return value if isinstance(value, str) else "+".join(value)


def _rows(happened: Slice, criterion: Criterion) -> Iterator[Row]:
    for step in happened.steps:
        yield {
            STEP: step.step,
            "train/loss": step.loss,
            "train/learning_rate": step.learning_rate,
            "train/grad_norm": step.grad_norm,
            "train/tokens_per_second": step.tokens / step.seconds if step.seconds else 0.0,
        }
    done = happened.evaluation
    if done is not None:
        score = {} if done.score is None else {f"eval/{criterion.key}": criterion.turned(done.score)}
        yield {STEP: done.step, EVALUATION: done.evaluation, "eval/loss": done.loss, **score}


def _record(
    tracking: Tracking,
    run_id: str,
    name: str,
    config: Row,
    queue: SimpleQueue[Row | End],
    rows: Path,
    publish: Callable[[Path], object],
) -> None:
    """The thread of a run, from start to finish."""
    if tracking.mode == "disabled":
        return
    received: list[Row | End] = []
    with _turn:
        try:
            Path(tracking.directory).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=tracking.directory).close()  # wandb would write somewhere else, and not say so
        except OSError as error:
            return _fail(f"cannot write to {tracking.directory} ({error.strerror}); trials are not recorded")
        for mode in ("offline" if time.monotonic() < _offline_until else tracking.mode, "offline"):
            try:
                _write(tracking, mode, run_id, name, config, logged(rows.parent), _all_of(received, queue))
            except Exception as error:
                logger.debug("run %s", run_id, exc_info=True)
                kept = f"rows are kept, upload them with `python -m sweep sync {shlex.quote(tracking.directory)}`"
                _fail(f"{_reason(error, run_id)}; {kept}")
                _end_wandb()
            else:
                end = received[-1]
                if isinstance(end, End) and end.state != "preempted":
                    _mark_recorded(rows.parent / RECORDED, mode, publish)
                return
        _fail("it failed twice; the rows of a trial are kept, the command that runs the sweep records them")


def _mark_recorded(mark: Path, mode: str, publish: Callable[[Path], object]) -> None:
    try:
        mark.write_text(mode)
        publish(mark)
    except OSError as error:  # the end is recorded once more, then
        _tell(f"that a run has ended could not be noted ({error})")


def _all_of(received: list[Row | End], queue: SimpleQueue[Row | End]) -> Iterator[Row | End]:
    """What was received, for a fragment that has to be begun anew; then what comes, which is added to it."""
    yield from received
    while True:
        received.append(queue.get())
        yield received[-1]


def _write(
    tracking: Tracking, mode: str, run_id: str, name: str, config: Row, before: list[Row], items: Iterator[Row | End]
) -> None:
    """Write a fragment: the rows that the trial had `before`, then `items` up to their End.

    Raises whatever wandb raises.
    """
    _quieten_wandb()
    known: dict[str, int] = {}
    if mode != "online":
        for file in fragments(tracking.directory, run_id):
            for row in rows_in(records(file)):
                _is_new(row, known)
    run = open_run(
        tracking, mode, run_id, name, config, init_seconds=INIT_SECONDS, finish_seconds=FINISH_SECONDS, measured=True
    )
    if mode == "online":
        seen: dict[str, int] = {}
        each_once = [row for row in before if _is_new(row, seen)]
        if run.starting_step <= len(each_once):
            # Not by the summary: where an upload was cut off, it is behind the rows that the server has, or ahead.
            for row in each_once[: run.starting_step]:  # W&B counts rows from 0
                _is_new(row, known)
        else:  # the server has rows that were lost with another machine
            known = {clock: int(last) for clock, last in dict(run.summary).items() if clock in (STEP, EVALUATION)}
    try:
        send(run, chain(before, items), known)
    except TimeoutError:
        _fail(
            f"uploading was cut off after {FINISH_SECONDS:g} s; all rows are kept, "
            f"`python -m sweep sync {shlex.quote(tracking.directory)}` sends those that are missing"
        )


def send(run: "wandb.Run", items: Iterable[Row | End], known: dict[str, int]) -> None:
    """Log those rows that are beyond `known`, up to the End, and finish. TimeoutError when uploading was cut off."""
    for item in items:
        if isinstance(item, End):
            end = item
            break
        if _is_new(item, known):
            run.log(item, commit=True)
    run.summary.update({**end.summary, "state": end.state})
    if end.state == "preempted":
        run.mark_preempting()
    run.finish(exit_code=0 if end.state in ("complete", "stopped") else 1)


def open_run(
    tracking: Tracking,
    mode: str,
    run_id: str,
    name: str,
    config: Row,
    *,
    init_seconds: float,
    finish_seconds: float,
    measured: bool,
) -> "wandb.Run":
    """Open a run, or go on with it. wandb raises when opening or finishing it takes longer than the two times say.

    `measured`: record this machine, and its load.
    """
    import wandb

    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        id=run_id,
        name=name,
        config=config,
        dir=tracking.directory,
        mode="online" if mode == "online" else "offline",
        resume="allow",  # offline, too: without it `wandb sync` lets a later fragment begin at step 0 again
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            symlink=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
            allow_val_change=True,
            init_timeout=init_seconds,
            finish_timeout=finish_seconds,
            finish_timeout_raises=True,
            stop_fn=lambda: _tell("a stop was asked for on its page; it is ignored, interrupt the sweep instead"),
            x_disable_meta=not measured,
            x_disable_stats=not measured,
            x_save_requirements=False,
            x_stats_gpu_device_ids=_gpus(),
            x_transaction_log_flush_interval=0.5,  # seconds
        ),
    )
    run.define_metric(STEP)
    run.define_metric("train/*", step_metric=STEP)
    run.define_metric("eval/*", step_metric=STEP)
    return run


def _is_new(row: Row, known: dict[str, int]) -> bool:
    """Whether `row` is beyond the last step and evaluation on record, which are `known`; it is known from now on."""
    clock = EVALUATION if EVALUATION in row else STEP
    if row[clock] <= known.get(clock, -1):
        return False
    known[clock] = row[clock]
    return True


def fragments(directory: str, run_id: str) -> list[Path]:
    """Files of earlier attempts, oldest first; their directories are named [offline-]run-DATE_TIME-ID."""
    found = Path(directory, "wandb").glob(f"*run-*/run-{escape(run_id)}.wandb")
    return sorted(found, key=lambda file: file.parent.name.removeprefix("offline-"))


def run_ids(directory: str) -> list[str]:
    """Of all runs that this machine has fragments of."""
    return sorted({file.stem.removeprefix("run-") for file in Path(directory, "wandb").glob("*run-*/run-*.wandb")})


def mark(fragment: Path) -> Path:
    """Stands beside a fragment that the server has; wandb's own name, so that `wandb sync` and `wandb clean` see it."""
    return fragment.with_suffix(".wandb.synced")


def kept_offline(directory: str) -> int:
    """Runs of which W&B lacks something because it could not be, or was not to be, used."""
    found = Path(directory, "wandb").glob("offline-run-*/run-*.wandb")
    return len({file.name for file in found if not is_synced(file)})


def is_synced(fragment: Path) -> bool:
    """Whether the server has all of a fragment; one that went on after its upload was not over then."""
    marked = mark(fragment)
    return marked.exists() and marked.stat().st_mtime >= fragment.stat().st_mtime


def records(fragment: Path) -> list[dict[str, Any]]:
    """All that wandb wrote to a fragment, also when it is torn: what can be read here is what can be uploaded.

    subprocess.CalledProcessError, with wandb's words in `stderr`, when it is not a fragment.
    """
    from wandb.util import get_core_path

    # What `wandb leet inspect --json FILE` runs, without the second that importing wandb once more takes.
    inspect = ["leet", "inspect", "--json", "--no-observability", "--run-file", str(fragment), str(fragment.parent)]
    printed = subprocess.run([get_core_path(), *inspect], capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in printed.splitlines()]


def rows_in(found: Iterable[dict[str, Any]]) -> list[Row]:
    """Our rows among the records of a fragment."""
    rows = (record["history"]["item"] for record in found if record["type"] == "history")
    return [
        {name: float(value) if isinstance(value, str) else value for name, value in row.items() if name[0] != "_"}
        for row in rows  # non-finite numbers are printed as strings
    ]


def _gpus() -> list[int] | None:
    """The devices that Ray gave to this process, for the system metrics; None for all."""
    numbers = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [int(number) for number in numbers] if all(number.isdigit() for number in numbers) else None


def _quieten_wandb() -> None:
    """To be called before wandb is imported: these have no other switch."""
    os.environ["WANDB_SILENT"] = "true"  # also: no prompts
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry, which it sends from offline runs too


def _close() -> None:
    for thread in _threads:
        thread.join()
    if "wandb" in sys.modules:
        with _turn:  # one that takes longer than `close` waits for it must not end what is begun meanwhile
            _end_wandb()


def _end_wandb() -> None:
    """Have wandb's own process write what it holds and end: a run that failed to open is stuck in it otherwise.

    It sometimes never ends after a request that W&B did not answer (0.31), and is killed then.
    """
    ending = threading.Thread(target=_teardown, name="wandb teardown", daemon=True)
    ending.start()
    ending.join(TEARDOWN_SECONDS)
    if ending.is_alive():
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it has ended after all
                if "wandb-core" in child.name():
                    child.kill()
        ending.join(TEARDOWN_SECONDS)


def _teardown() -> None:
    import wandb

    try:
        wandb.teardown()
    except (Exception, SystemExit):  # as when it is dead, or was killed
        logger.debug("wandb.teardown", exc_info=True)


def _fail(trouble: str) -> None:
    global _offline_until
    _offline_until = time.monotonic() + RETRY_SECONDS
    _tell(trouble)


def _tell(what: str) -> None:
    _notes.put(f"W&B: {what}")
    logger.warning("W&B: %s", what)


def _reason(error: Exception, run_id: str) -> str:
    """One line, the same for every run."""
    return " ".join((str(error) or type(error).__name__).replace(run_id, "…").split())
