"""The saved view of a sweep's runs in its W&B project: the panels and columns that a sweep is read by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sweep import tracking
from sweep.criterion import LOSS, Criterion
from sweep.space import Range, Space
from sweep.status import Status
from sweep.sync import Failed, Server
from sweep.tracking import STEP
from sweep.validation import Refused

if TYPE_CHECKING:
    from wandb_workspaces import workspaces

COLUMNS = ("best_eval_loss", "first_rung_eval_loss", "state", "stop_reason", "best_step", "budget_share")
"""Of the runs table, before the searched hyperparameters; from `tracking.summary`. What is searched for comes first."""
MACHINE = {
    "gpu": "GPU utilisation (%)",
    "powerWatts": "GPU power (W)",
    "memoryAllocatedBytes": "GPU memory (bytes)",
}
"""System metrics, as W&B names them of each device, and what their panels are called."""
DEVICES = 8
"""GPUs of one machine that panels look for; those that it does not have are not drawn."""
RUNS = 100
"""Most runs that a panel draws, best first; W&B draws 10 unless told."""

# `model` is a project; without an entity, one of the key's own. What wandb asks before it goes on with a run, too.
_FIND = """
query View($project: String!, $entity: String, $view: String!) {
    model(name: $project, entityName: $entity) {
        entity { name }
        allViews(viewType: "project-view", viewName: $view) { edges { node { id } } }
    }
}
"""


@dataclass(frozen=True)
class View:
    """A view that is in the project."""

    url: str
    is_new: bool
    """Whether this call made it."""


def make_for(found: Status) -> View:
    """The view of a sweep that may be running, or not; raises what `make` does.

    Refused, too, when nothing was tracked, or all runs that this machine has are kept offline: the project would not
    have one of them.
    """
    directory, spec = str(found.place.paths.tracking), found.spec
    kept, runs = tracking.kept_offline(directory), len(tracking.run_ids(directory))
    if spec.tracking.mode == "disabled" and not runs:
        raise Refused(f"W&B has nothing of {found.place.url}: its {tracking.UNTRACKED}")
    if kept and kept == runs:
        raise Refused(f"W&B has none of its runs ({kept}) yet; upload them first: {found.place.command('sync')}")
    project = spec.tracking.project or spec.name
    sweep_id, criterion = found.ledger.noted("sweep_id"), found.ledger.criterion
    return make(project, spec.tracking.entity, spec.name, sweep_id, spec.space, criterion)


def make(
    project: str, entity: str | None, group: str, sweep_id: str, space: Space, criterion: Criterion = LOSS
) -> View:
    """The view of the runs of a `group`, which is laid out when the project does not have it.

    It is found by the sweep's id. One that is there is left as people arranged it: deleting it in W&B and asking for it
    again makes it anew. Raises `Refused` when there is no such project or no usable key, `Failed` when W&B does not
    answer, or not as it should.
    """
    server = Server()
    try:
        answer = server.query(_FIND, {"project": project, "entity": entity, "view": _internal_name(sweep_id)})
        served = answer.get("model")
        if not served:
            raise Refused(f"W&B has no project {project} yet; it begins with the first run that is uploaded")
        owner = served["entity"]["name"]
        is_new = not served["allViews"]["edges"]
        if is_new:
            _save(_layout(project, owner, group, space, criterion), sweep_id)
        return View(f"{server.app_url}{owner}/{project}?nw={sweep_id}", is_new)
    finally:
        tracking.close()


def _internal_name(sweep_id: str) -> str:
    """Of a view whose URL ends with `?nw=SWEEP_ID`."""
    return f"nw-{sweep_id}-v"


def _save(view: "workspaces.Workspace", sweep_id: str) -> None:
    view._internal_name = _internal_name(sweep_id)  # else it gets a random one, and every call would make another
    try:
        view.save()
    except (
        Exception
    ) as error:  # wandb has errors of its own, of its core process, and of answers that it did not expect
        raise Failed(f"W&B did not save the view ({' '.join(f'{type(error).__name__}: {error}'.split())})") from error


def _layout(project: str, entity: str, group: str, space: Space, criterion: Criterion) -> "workspaces.Workspace":
    """What a sweep is read by, best run first; nothing is contacted."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as wr

    best = COLUMNS[0] if criterion.is_loss else f"best_{criterion.key}"
    axes = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(name), display_name=name, log=log)
        for name, log in _scales(space).items()
    ]
    coloured_by = wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(best), display_name=best)  # the last axis is

    def curve(title: str, metric: str, **smoothing: object) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=STEP, y=[metric], **smoothing)

    smoothed = {"smoothing_type": "exponential", "smoothing_factor": 0.6, "smoothing_show_original": True}
    sections = {
        "What mattered": [
            wr.ParallelCoordinatesPlot(title=f"Configurations and best {criterion.name}", columns=[*axes, coloured_by]),
            wr.ParameterImportancePlot(with_respect_to=best),
        ],
        "Curves": [
            *([] if criterion.is_loss else [curve(criterion.name, f"eval/{criterion.key}")]),
            curve("Validation loss", "eval/loss"),
            curve("Training loss", "train/loss", **smoothed),
            curve("Learning rate", "train/learning_rate"),
        ],
        "Machine": [
            wr.LinePlot(
                title=title,
                x="RelativeTime(Process)",
                y=[f"system/gpu.{device}.{metric}" for device in range(DEVICES)],
            )
            for metric, title in MACHINE.items()
        ],
    }
    columns = [f"summary:{name}" for name in dict.fromkeys([best, *COLUMNS])] + [
        f"config:{name}.value" for name in space.searched
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Sweep {group}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(max_runs=RUNS),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == group),
            order=[expr.Ordering(expr.Summary(best), ascending=not criterion.maximized)],
            pinned_columns=columns,
        ),
    )


def _scales(space: Space) -> Mapping[str, bool]:
    """Which of the searched hyperparameters have a logarithmic axis."""
    sources = {name: space.dimensions[name].source for name in space.searched}
    return {name: isinstance(source, Range) and source.log for name, source in sources.items()}
