"""`sync`: what the fragments of a sweep hold and W&B does not have is sent there, every row once.

`wandb sync` sends a fragment of which W&B has nothing; it carries the system metrics, too. More it cannot be trusted
with (all of this seen with 0.31): it sends a fragment that was cut off half-way once more from its first row, which
doubles rows; it reports success, with exit code 0 and the `.synced` file, when the server refused every row; it never
marks a fragment that a kill tore; and it sends the next fragment of a run after the one before failed, which leaves a
gap that W&B does not let anyone fill.

So the server is asked how far a run got, before and after; of a fragment that it has in part the missing rows are
logged; and `.synced` stands beside a fragment when the server has all of it. This makes every repetition safe.
"""

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from sweep import tracking
from sweep.paths import LOCK_SECONDS, SweepPaths
from sweep.place import Place, driver_named
from sweep.tracking import End, Row, Tracking
from sweep.validation import Refused

ASK_SECONDS = 10.0
"""How long the server may take to say how far a run got; W&B counts as down after that."""
UPLOAD_SECONDS = 60.0
"""How long an upload may take besides what its size needs."""
UPLOAD_BYTES_PER_SECOND = 100_000.0
SETTLE_SECONDS = 10.0
"""How long the server may take to show what it was sent."""

_REMEDY = "run `wandb login` or set WANDB_API_KEY"

# What wandb itself asks before it goes on with a run.
_RUN_STATUS = """
query RunResumeStatus($project: String, $entity: String, $name: String!) {
    model(name: $project, entityName: $entity) {
        bucket(name: $name, missingOk: true) { historyLineCount historyTail summaryMetrics }
    }
}
"""

# A `wandb sync` that ends with this process, also by kill -9: one that goes on unseen would double what a repetition
# sends.
_WANDB = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("wandb", run_name="__main__")
"""


@dataclass(frozen=True)
class Outcome:
    """What a call of `upload` did. Runs by name and id."""

    runs: int
    """How many runs the sweep has fragments of."""
    sent: tuple[str, ...]
    """Runs of which W&B lacked something and has everything now."""
    failed: dict[str, str]
    """Runs of which W&B still lacks something, with the reason and what to do."""


class Failed(Exception):
    """It cannot be done now; the message says why and what to do."""


@dataclass(frozen=True)
class _Fragment:
    """What one attempt of a run recorded."""

    file: Path
    run: Row
    """As wandb opened it: project, run_id, display_name, config …"""
    rows: tuple[Row, ...]
    """Those that no earlier fragment of the run has."""
    repeats: bool
    """Whether it holds others, too."""
    end: End | None
    """None when the attempt was killed."""

    @property
    def is_offline(self) -> bool:
        return self.file.parent.name.startswith("offline-")

    @property
    def is_synced(self) -> bool:
        return tracking.is_synced(self.file)


@dataclass(frozen=True)
class _Served:
    """What the server has of a run."""

    lines: int
    """Number of rows."""
    last: Row
    """The newest row; empty when there is none."""
    summary: Row


def upload(place: Place) -> Outcome:
    """Send to W&B what this machine has of a sweep and W&B does not.

    Raises `Refused` when there is no sweep, its driver runs, or there is no key that can be used. A server that does
    not answer, or answers badly, ends in `Outcome.failed`, in bounded time; the next call goes on from there.
    """
    paths = place.paths
    if not paths.spec.exists() and place.is_remote:
        raise Refused(f"this machine has no part of {place.url}; run that sweep here once more: it then has all of it")
    if not paths.spec.exists():
        raise Refused(place.no_sweep())
    try:
        driven = place.is_driven()
    except (OSError, ValueError) as error:  # pyarrow raises both
        raise Refused(f"{place.url} does not say whether its sweep is running: {error}") from error
    if driven:
        raise _in_use(place.url, place.text(paths.lock_holder))
    with _locked(paths):
        ids = tracking.run_ids(str(paths.tracking))
        files = {run_id: tracking.fragments(str(paths.tracking), run_id) for run_id in ids}
        files = {
            run_id: found for run_id, found in files.items() if not all(tracking.is_synced(file) for file in found)
        }
        if not files:
            return Outcome(len(ids), (), {})
        server = Server()
        try:
            sent, failed = _send_all(server, paths, files)
        finally:
            tracking.close()
        return Outcome(len(ids), tuple(sent), failed)


def _send_all(server: "Server", paths: SweepPaths, files: dict[str, list[Path]]) -> tuple[list[str], dict[str, str]]:
    """The runs that were sent; why others were not."""
    sent, failed = [], {}
    runs: dict[str, list[_Fragment]] = {}
    waiting: dict[str, list[_Fragment]] = {}
    for run_id, found in files.items():
        label = run_id
        try:
            fragments = _read(found)
            if not fragments:
                continue
            label = f"{fragments[-1].run['display_name']} ({run_id})"
            runs[label] = fragments
            was_sent, untouched = _complete_begun(server, fragments)
            if untouched:
                waiting[label] = untouched
            elif was_sent:
                sent.append(label)
        except Failed as error:
            failed[label] = str(error)
    while waiting:  # a round: one fragment of each run, since none may be sent before its predecessor is there
        logs = _wandb_sync(paths, [untouched[0].file for untouched in waiting.values()])
        deadline = time.monotonic() + SETTLE_SECONDS
        for label, (fragment, *later) in list(waiting.items()):
            del waiting[label]
            attempts = runs[label][: runs[label].index(fragment) + 1]
            try:
                if not _has_arrived(server, attempts, fragment.end, deadline):
                    raise Failed(
                        f"W&B did not take all of {fragment.file.parent.name}; the newest log in {logs} says why"
                    )
            except Failed as error:
                tracking.mark(fragment.file).unlink(missing_ok=True)
                failed[label] = str(error)
                continue
            tracking.mark(fragment.file).touch()
            if later:
                waiting[label] = later
            else:
                sent.append(label)
    return sent, failed


@contextmanager
def _locked(paths: SweepPaths) -> Iterator[None]:
    """Hold the sweep directory as a driver does, so that no fragment is sent while it is being written.

    The lease of an earlier driver's trials ends with it, so one that has outlived its driver ends, too.
    """
    lock = filelock.FileLock(paths.lock, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise _in_use(paths.root, paths.lock_holder.read_text() if paths.lock_holder.exists() else None) from error
    except OSError as error:
        raise Refused(f"cannot write to {paths.root} ({error.strerror}), which marks what W&B has") from error
    try:
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f} UTC"
        paths.lock_holder.write_text(f"`sync`, process {os.getpid()} on {socket.gethostname()} since {since}")
        yield
    finally:
        lock.release()


def _in_use(where: str | Path, holder: str | None) -> Refused:
    who = f"{where} is in use by {driver_named(holder)}"
    return Refused(f"{who}: what is being written cannot be uploaded; wait until it has ended")


def _read(files: Sequence[Path]) -> list[_Fragment]:
    """The fragments of a run, oldest first."""
    fragments = []
    seen: set[tuple[float, float]] = set()
    for file in files:
        try:
            records = tracking.records(file)
        except subprocess.CalledProcessError as error:
            raise Failed(
                f"{file} cannot be read ({error.stderr.strip()}); move {file.parent} away to upload the rest of the run"
            ) from error
        opened = [record["run"] for record in records if record["type"] == "run"]
        if not opened:
            tracking.mark(file).touch()  # killed at once: it holds nothing
            continue
        found = tracking.rows_in(records)
        rows = {_place(row): row for row in found if _place(row) not in seen}
        seen |= rows.keys()
        fragments.append(_Fragment(file, opened[0], tuple(rows.values()), len(rows) < len(found), _end(records)))
    return fragments


def _end(records: list[dict[str, Any]]) -> End | None:
    updates = (record["summary"]["update"] for record in reversed(records) if record["type"] == "summary")
    update = next((update for update in updates if "state" in update), None)
    if update is None:
        return None
    infinite = {"Infinity": math.inf, "-Infinity": -math.inf}  # as they are printed
    told: Row = {
        name: infinite.get(value, value) if isinstance(value, str) else value for name, value in update.items()
    }
    return End(told.pop("state"), told)


def _place(row: Row) -> tuple[float, float]:
    """Rows of a run are in the order of their places: steps up to an evaluation, then the evaluation."""
    return row[tracking.STEP], row.get(tracking.EVALUATION, -1)


def _count(rows: Sequence[Row], served: _Served | None) -> int:
    """How many of the rows of a run, which are in their order, the server has."""
    if served is None or not served.last:
        return 0
    if tracking.STEP not in served.last:
        raise Failed("its newest row on W&B does not come from the sweep, so nobody can tell which rows are missing")
    places, last = [_place(row) for row in rows], _place(served.last)
    count = places.index(last) + 1 if last in places else sum(place <= last for place in places)
    if count > served.lines:
        raise Failed(
            f"W&B has {served.lines} of its first {count} rows, and takes none in between any more; upload it as a"
            " run of its own with `wandb sync --include-online --include-synced --id NEW_ID` and its directories"
        )
    return count


def _has_ended(served: _Served, end: End | None) -> bool:
    """Whether the server has the summary that an attempt ended with, or, of a preempted one, that a later one did.

    That may lie on another machine. wandb does not send what is None in a summary.
    """
    if end and end.state == "preempted" and served.summary.get("state") in ("complete", "stopped", "failed"):
        return True
    wanted = {**end.summary, "state": end.state} if end else {}
    return all(value is None or served.summary.get(name) == value for name, value in wanted.items())


def _has_arrived(server: "Server", fragments: Sequence[_Fragment], end: End | None, deadline: float) -> bool:
    """Whether the server has all rows of the fragments, the first ones of a run, and how the last of them ended."""
    rows = [row for fragment in fragments for row in fragment.rows]
    while True:
        served = server.ask(fragments[-1].run)
        if served and _count(rows, served) == len(rows) and _has_ended(served, end):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)


def _complete_begun(server: "Server", fragments: list[_Fragment]) -> tuple[bool, list[_Fragment]]:
    """Send what the server lacks of those fragments that it has begun to take.

    Gives whether something was sent, and the newest fragments, which `wandb sync` can send: the server has nothing of
    them. Online ones it renumbers.
    """
    served = server.ask(fragments[-1].run)
    rows = [row for fragment in fragments for row in fragment.rows]
    count = _count(rows, served)
    begun, first = len(fragments), len(rows)  # first: the number of rows before those of fragments[begun]
    while begun:
        fragment = fragments[begun - 1]
        fit_for_wandb = fragment.is_offline and not fragment.repeats
        if not fit_for_wandb or fragment.is_synced or first - len(fragment.rows) < count:
            break
        begun, first = begun - 1, first - len(fragment.rows)
    head, untouched = fragments[:begun], fragments[begun:]
    missing = rows[count:first]
    lacks_end = bool(head) and not untouched and not (served and _has_ended(served, head[-1].end))
    if missing or lacks_end:
        _log(server, head, missing)
    for fragment in head:
        tracking.mark(fragment.file).touch()
    return bool(missing or lacks_end), untouched


def _log(server: "Server", fragments: Sequence[_Fragment], missing: Sequence[Row]) -> None:
    """Go on with a run on the server with the rows of the fragments that are missing there."""
    import wandb

    opened = fragments[-1].run
    end = fragments[-1].end or End("preempted", {})  # it was killed
    config = {name: value for name, value in opened["config"]["update"].items() if name != "_wandb"}
    with tempfile.TemporaryDirectory() as elsewhere:  # wandb makes a fragment of it, which is none of the sweep's
        to = Tracking(opened["project"], opened.get("entity"), opened["run_group"], "online", elsewhere)
        try:
            run = tracking.open_run(
                to,
                "online",
                opened["run_id"],
                opened["display_name"],
                config,
                init_seconds=ASK_SECONDS,
                finish_seconds=UPLOAD_SECONDS,
                measured=False,
            )
            tracking.send(run, [*missing, end], {})
        except TimeoutError as error:
            raise server.down() from error
        except wandb.Error as error:
            tracking.close()  # the run would be stuck in wandb's process
            raise Failed(f"W&B did not take its missing rows ({' '.join(str(error).split())})") from error
    if not _has_arrived(server, fragments, end, time.monotonic() + SETTLE_SECONDS):
        raise Failed("W&B did not take all of its missing rows, and wandb gives no reason; try again later")


def _wandb_sync(paths: SweepPaths, files: Sequence[Path]) -> Path:
    """Have wandb upload fragments of which the server has nothing; gives the directory of its logs.

    Whether it did is for the server to say.
    """
    for file in files:
        file.with_suffix(".wandb.syncstate").unlink(missing_ok=True)  # where an earlier upload thought that it begins
    seconds = UPLOAD_SECONDS + sum(file.stat().st_size for file in files) / UPLOAD_BYTES_PER_SECOND
    command = [sys.executable, "-c", _WANDB, "sync", "--include-synced", "--yes", *map(str, files)]
    environment = os.environ | {"WANDB_DIR": str(paths.tracking)}  # of its logs
    environment.pop("WANDB_SERVICE", None)  # or it would let this process do the work, and killing it would end nothing
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
    return paths.tracking / "wandb" / "logs"


class Server:
    """W&B, asked with the user's key. Once it did not answer it is not waited for again."""

    def __init__(self) -> None:
        """Refused when there is no key that can be used."""
        try:
            key = tracking.find_key(_REMEDY)
        except ValueError as error:
            raise Refused(str(error)) from error
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        self._settings = wandb_setup.singleton().settings.model_copy()
        self._url = self._settings.base_url
        self._is_down = False
        if key is None:
            raise Refused(f"there is no key for W&B at {self._url}; {_REMEDY}")
        wbauth.set_auth_settings(self._settings, key)

    def down(self) -> Failed:
        """To be raised when it does not answer."""
        self._is_down = True
        return Failed(f"W&B at {self._url} does not answer; the same command goes on when it does")

    @property
    def app_url(self) -> str:
        """Of its pages; ends with a slash."""
        return f"{self._settings.app_url.rstrip('/')}/"

    def query(self, text: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a GraphQL query. Refused when the key is not accepted, Failed when there is no answer."""
        from wandb.apis.public.service_api import ServiceApi
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        if self._is_down:
            raise self.down()
        try:
            found: dict[str, Any] = ServiceApi(self._settings, ASK_SECONDS).execute_graphql(text, dict(variables))
        except WandbApiFailedError as error:
            if error.response is None:
                raise self.down() from error
            if error.response.http_status == 401:
                raise Refused(f"W&B at {self._url} does not accept the key ({error}); {_REMEDY}") from error
            raise Failed(f"W&B at {self._url} refuses to answer ({error})") from error
        return found

    def ask(self, run: Row) -> _Served | None:
        """What it has of a run, which is named as wandb recorded it; None when it does not know the run."""
        variables = {"project": run["project"], "entity": run.get("entity"), "name": run["run_id"]}
        found = self.query(_RUN_STATUS, variables)
        served = (found.get("model") or {}).get("bucket")
        if not served:
            return None
        tail = json.loads(served["historyTail"] or "[]")
        return _Served(
            served["historyLineCount"] or 0,
            json.loads(tail[-1]) if tail else {},
            json.loads(served["summaryMetrics"] or "{}"),
        )
