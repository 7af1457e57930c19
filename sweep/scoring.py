"""The winner on the test rows, once, and beside it the base: their loss, and the user's metric of what they write."""

import hashlib
import importlib
import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from numbers import Real
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil

from sweep.place import Place
from sweep.validation import listed
from trainables.checkpoint import ADAPTER
from trainables.protocol import Scored

if TYPE_CHECKING:  # every trial's process would import a database's library with it
    from sweep.study import Entry, Ledger

T = TypeVar("T")
Metric = Callable[[list[str], list[str], list[str]], Any]
"""Of prompts, references and completions, row by row; gives a number, or several by name."""


_VALUES_OF, _ASKED = "metric_file", "metric_asked"
"""Notes in the ledger: the hash of the file that the first values of what is searched for are of, and of that which was
asked before training."""


class MetricFault(Exception):
    """The user's metric gives no number to search for: it cannot be imported, raises, or gives something else."""


@dataclass(frozen=True)
class Scores:
    """The best checkpoint of the winner, and the base in the same quantisation."""

    trial: int
    step: int
    """Of the checkpoint."""
    split: Literal["test", "validation"]
    """The rows: validation where there are no test rows."""
    rows: int
    loss: float | None
    """Mean cross-entropy per supervised token of test rows, nats; None without them."""
    base_loss: float | None
    metric: str | None
    """Name of the function, `package.module:function`; None when there is none."""
    values: Mapping[str, float] | None
    """What it gave for the winner; None when it gave nothing."""
    base_values: Mapping[str, float] | None
    trouble: str | None
    """Why it gave nothing."""


def scores(ledger: "Ledger") -> Scores | None:
    """The newest ones, None when nothing was scored."""
    found = _recorded(ledger)
    return found[-1] if found else None


def lines(ledger: "Ledger") -> list[str]:
    """The newest scores in words."""
    found = scores(ledger)
    if found is None:
        return []
    values, base = found.values or {}, found.base_values or {}
    told = []
    if values or found.loss is not None:
        rows = f"{found.split} set, {found.rows} rows"
        told.append(f"{rows}: the best checkpoint of trial {found.trial:03d}, and the base model")
    width = max([21, *map(len, values)])
    if found.loss is not None and found.base_loss is not None:
        told.append(f"{'loss':{width}} {found.loss:.4f}  (base {found.base_loss:.4f})")
    for name, value in values.items():
        told.append(f"{name:{width}} {value:.5g}" + (f"  (base {base[name]:.5g})" if name in base else ""))
    if found.trouble is not None:  # which may name files of this machine: see `trouble`
        whose = "the base" if values else f"trial {found.trial:03d}"
        told.append(f"metric {found.metric} gave no number for what {whose} writes on the {found.split} rows")
    before = [each for each in _recorded(ledger)[:-1] if each.loss is not None]
    earlier = {each.trial for each in before if (each.trial, each.step) != (found.trial, found.step)}
    if earlier:
        told.append(
            f"The test set was scored before, with winners of that time: {', '.join(map(str, sorted(earlier)))}"
        )
    return told


def trouble(ledger: "Ledger") -> list[str]:
    """Why the metric gave nothing, if so. Not for others to read: what it raised may name files of this machine."""
    found = scores(ledger)
    if found is None or found.trouble is None:
        return []
    return [f"metric {found.metric}: {found.trouble}; mend it and run the sweep again, it is computed anew"]


def find_metric(name: str) -> Metric:
    """The function called `package.module:function`, seen from the working directory or installed.

    A module that was imported before, as in a notebook, is read anew when its file has changed. Raises ValueError that
    says why there is none.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # it is there with `python -m`
        sys.path.append(here)
    try:
        before = sys.modules.get(module)
        loaded = importlib.import_module(module)
        content = _content(loaded)
        known = _CONTENT.get(module, content if not content or _is_older(loaded) else b"")
        if loaded is before and content != known:
            loaded = importlib.reload(loaded)
        _CONTENT[module] = content
        found: Metric = getattr(loaded, function)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"metric: {name} cannot be imported ({type(error).__name__}: {error}); it should be a function of a module"
            f" that is installed or lies below {here}"
        ) from error
    if not callable(found):
        raise ValueError(f"metric: {name} is {found!r}, should be a function of prompts, references and completions")
    return found


_CONTENT: dict[str, bytes] = {}
"""Of the files of modules that metrics were found in, as they were then."""


def _content(module: ModuleType) -> bytes:
    """Of its file; empty for what has none, as a notebook's cell, or is built in."""
    spec = module.__spec__
    if spec is None or spec.origin is None or not spec.has_location:
        return b""
    return Path(spec.origin).read_bytes()


def _is_older(module: ModuleType) -> bool:
    """Whether its file has been as it is since before this process began."""
    assert module.__spec__ is not None
    assert module.__spec__.origin is not None
    return Path(module.__spec__.origin).stat().st_mtime <= psutil.Process().create_time()


def was_asked(ledger: "Ledger", metric: Metric) -> bool:
    """Whether `try_objective` has asked this metric, as its file is now, for this sweep."""
    return bool(ledger.noted(_ASKED) == _file_of(metric)[1])


def note_asked(ledger: "Ledger", name: str, metric: Metric) -> list[str]:
    """Note that it was. Gives a line when values in the ledger are of another file, the base's among them."""
    file, now = _file_of(metric)
    before = ledger.noted(_VALUES_OF)
    if ledger.noted(_ASKED) != now:
        ledger.note(_ASKED, now)
    if before is None or not any(entry.objectives for entry in ledger.entries()):
        ledger.note(_VALUES_OF, now)
        return []
    changed = f"metric {name}: {file} is not the file that earlier values are of; they may not compare with new ones"
    return [changed] if before != now else []


def _file_of(metric: Metric) -> tuple[str, str]:
    """Where it is written, and the hash of that; empty when it is built in, or of a notebook's cell."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(metric)) or ""
        return file, hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return "", ""


def values_of(name: str, metric: Metric, scored: Scored) -> dict[str, float]:
    """What the metric gives, by name; a single number has the function's. Raises ValueError that says what is wrong."""
    try:
        given = metric(list(scored.prompts), list(scored.references), list(scored.completions))
    except (Exception, SystemExit) as error:
        raise ValueError(f"raised {type(error).__name__}: {error}") from error
    named = given if isinstance(given, Mapping) else {name.partition(":")[2]: given}
    for value in (*named.values(), *([] if named else [given])):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"gave {given!r}, should be a finite number or a dict of them")
    return {str(key): float(value) for key, value in named.items()}


@cache
def _in_this_process(name: str) -> Metric:
    """The function as it was at the first call: values of one that is edited meanwhile would not be comparable."""
    return find_metric(name)


def objective_of(
    name: str, value: str, scored: Scored, seconds: float, find: Callable[[str], Metric] = _in_this_process
) -> float:
    """The value of this name that the metric called `name`, `package.module:function`, gives in this process.

    Raises MetricFault, also when it takes longer than so many seconds, its import included: it is left then, in a
    thread of its own.
    """
    until = time.monotonic() + seconds
    try:
        values = _beside(lambda: values_of(name, find(name), scored), lambda: time.monotonic() > until)
        if values is None:
            raise ValueError(f"has not come to an end after {seconds:g} s, half of trial_timeout")
    except ValueError as error:
        raise MetricFault(f"metric {name}: {str(error).removeprefix('metric: ')}") from error
    if value not in values:
        raise MetricFault(f"metric {name}: gave {listed(values)}, and nothing called {value} (see objective.value)")
    return values[value]


_OF_OTHERS = "it was asked about validation rows with other rows' answers"


def try_here(name: str, value: str, tokens: Path, rows: int, seconds: float) -> None:
    """Have the metric judge the first validation rows, each answered with the reference of the next one, in this
    process.

    `tokens` is their directory. Raises MetricFault, as `objective_of` does.
    """
    answers, data = (importlib.import_module(f"trainables.{module}") for module in ("answers", "data"))
    shifted = answers.shifted(tokens, data.load(tokens).validation, rows)
    try:
        objective_of(name, value, shifted, seconds, find_metric)
    except MetricFault as error:
        raise MetricFault(f"{error}; {_OF_OTHERS}") from error


def try_objective(
    name: str,
    value: str,
    place: Place,
    tokens: str,
    rows: int,
    resources: Mapping[str, float],
    seconds: float,
    drained: Callable[[], bool],
) -> None:
    """Do what `try_here` does where trials do it.

    What it cannot do, or does not call `value`, is then known before hours of training. `tokens` is the directory's
    name, `resources` are those of a process in which trials call it (Ray's `num_cpus`, `num_gpus`); it may take so many
    `seconds`. Raises MetricFault.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    def task() -> None:
        here = place.paths.tokens / tokens
        place.pull_directory(here)
        try_here(name, value, here, rows, seconds)

    asked = ray.remote(task).options(max_retries=0, **resources).remote()
    while not ray.wait([asked], timeout=0.2)[0]:
        if drained():
            ray.cancel(asked, force=True)
            return
    try:
        ray.get(asked)
    except RayTaskError as error:
        if isinstance(error.cause, MetricFault):
            raise error.cause from error
        raise
    except RayError as error:
        died = f"its process died ({str(error).splitlines()[0]})"
        raise MetricFault(f"metric {name}: {died}; {_OF_OTHERS}") from error


def score_winner(
    ledger: "Ledger",
    place: Place,
    winner: "Entry",
    step: int,
    model: str,
    tokens: str,
    split: Literal["test", "validation"],
    metric: tuple[str, Metric] | None,
    resources: Mapping[str, float],
    drained: Callable[[], bool],
    note: Callable[[str], object],
) -> bool:
    """Score what is in best/, the checkpoint of the `winner` after `step`, and the base, and write it to the ledger.

    What the ledger has is not done again, but for a metric that is new, or had trouble. `tokens` is the directory's
    name. `resources` are those of a trial (Ray's `num_cpus`, `num_gpus`). What goes wrong is told, and left to the next
    run. Returns whether the ledger has something new.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    recorded = _recorded(ledger)
    mine = next(
        (each for each in recorded if (each.trial, each.step, each.split) == (winner.number, step, split)), None
    )
    loss = split == "test" and mine is None
    completions = metric is not None and (mine is None or mine.metric != metric[0] or mine.trouble is not None)
    if not (loss or completions):
        return False
    what = "the test rows" if split == "test" else "what it writes on the validation rows"
    note(f"Scoring the winner, trial {winner.number}, and the base on {what}")

    def task(adapter: bytes | None) -> Scored:
        here = place.paths.tokens / tokens
        place.pull_directory(here)
        scoring = importlib.import_module("trainables.scoring")
        scored: Scored = scoring.score(
            model,
            winner.config,
            adapter,
            here,
            split,
            halvings=winner.halvings,
            loss=loss,
            completions=completions,
        )
        return scored

    try:
        remote: Any = ray.remote(task)
        options = remote.options(max_retries=2, **resources)
        adapter = place.paths.best / ADAPTER
        place.pull_file(adapter)
        # The base beside it, where there is room.
        asked = [options.remote(adapter.read_bytes()), options.remote(None)]
        while len(ray.wait(asked, num_returns=2, timeout=0.2)[0]) < 2:
            if drained():
                for each in asked:
                    ray.cancel(each, force=True)
                return False
        adapted, base = ray.get(asked)
    except (RayError, OSError, ValueError) as error:  # the last of a store
        cause = error.cause if isinstance(error, RayTaskError) else error
        why = f"{type(cause).__name__}: {cause}".splitlines()[0]
        note(f"The winner could not be scored ({why}); the command that runs the sweep tries again")
        return False
    found = mine or Scores(
        trial=winner.number,
        step=step,
        split=split,
        rows=adapted.rows,
        loss=adapted.loss,
        base_loss=base.loss,
        metric=None,
        values=None,
        base_values=None,
        trouble=None,
    )
    if metric is not None and completions:
        judged = _beside(partial(_judged, found, *metric, adapted, base), drained)
        if judged is None:
            note(f"metric {metric[0]} has not come to an end; the command that runs the sweep asks it again")
            if not loss:
                return False
        found = judged or found
    ledger.note("scores", [asdict(each) for each in recorded if each != mine] + [asdict(found)])
    return True


def _judged(found: Scores, name: str, metric: Metric, adapted: Scored, base: Scored) -> Scores:
    """The scores with what the metric gives for the winner and the base, or why it gives nothing."""
    found = replace(found, metric=name, values=None, base_values=None, trouble=None)
    try:
        found = replace(found, values=values_of(name, metric, adapted))
        return replace(found, base_values=values_of(name, metric, base))
    except ValueError as error:
        return replace(found, trouble=str(error))


def _beside(work: Callable[[], T], given_up: Callable[[], bool]) -> T | None:
    """What somebody's code gives; None when it is given up before.

    It has a thread of its own, which may be left: this one, the main thread, is where Python handles signals.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answer.set_exception(error)

    Thread(target=run, name="metric", daemon=True).start()
    while not wait([answer], timeout=0.2).done:
        if given_up():
            return None
    return answer.result()


def _recorded(ledger: "Ledger") -> list[Scores]:
    from sweep.study import of_known

    return [of_known(Scores, each) for each in ledger.noted("scores") or []]
