"""Figures of report.html: those of Optuna over derived studies, and the few that Optuna has not."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
import plotly.colors
import plotly.graph_objects as go
import plotly.io
from optuna import visualization
from optuna.trial import TrialState

from sweep.findings import Curve
from sweep.study import Entry

plotly.io.templates.default = "none"  # they are 7 kB and 0.1 s a figure

DRAWN = 100
"""Trials that are drawn where each has a line of its own; more are slow and hide each other."""
NAMED = 5
"""Best trials that the legend of the curves names."""
AXIS = 80
"""Pixels that an axis of the parallel coordinates needs for its name and values."""
POINTS = 300
"""Training losses that are drawn of a trial: means over as many equal stretches."""
COLORS = plotly.colors.qualitative.Dark24
FULL, FAINT, GOOD, BAD = "#1f5fa8", "rgba(110, 120, 135, 0.35)", "#1a7f4b", "#b3341f"


def drawn(ranked: Sequence[Entry], most: int = DRAWN) -> list[Entry]:
    """The best third of `most` trials, and from the others as many as fit at equal distances in the ranking."""
    if len(ranked) <= most:
        return list(ranked)
    top = most // 3
    others, wanted = ranked[top:], most - top
    return [*ranked[:top], *(others[index * len(others) // wanted] for index in range(wanted))]


def parallel_coordinates(study: optuna.Study, target: str) -> go.Figure:
    figure = visualization.plot_parallel_coordinate(study, target_name=target)
    figure.update_traces(opacity=0.7)
    figure.update_traces(marker_showscale=False, selector={"mode": "markers"})  # the first axis says it
    names = [name.replace("_", "_<br>").replace(" ", "<br>") for name in figure.layout.xaxis.ticktext]
    return _calm(figure, 350, hovermode="closest", xaxis_tickangle=0, xaxis_ticktext=names)


def slices(study: optuna.Study, target: str) -> dict[str, go.Figure]:
    """The target over each parameter."""
    names = sorted({name for trial in study.get_trials(deepcopy=False) for name in trial.params})
    figures = {name: visualization.plot_slice(study, params=[name], target_name=target) for name in names}
    for figure in figures.values():
        figure.update_traces(marker_showscale=False, marker_size=8)
        for trace in figure.data:
            if all(isinstance(x, str) for x in trace.x):  # Optuna puts names in quotes
                trace.x = [x.strip("'") for x in trace.x]
        if (names_there := figure.layout.xaxis.categoryarray) is not None:
            figure.update_xaxes(categoryarray=[name.strip("'") for name in names_there])
        _calm(figure, 300)
    return figures


def importances(study: optuna.Study, found: Mapping[str, tuple[float, float, float]]) -> go.Figure:
    """`found` is median and two percentiles of each parameter (`findings.importance`)."""
    medians = {name: median for name, (median, *_) in found.items()}
    figure = visualization.plot_param_importances(study, evaluator=_Known(medians))
    names = figure.data[0].y
    figure.update_traces(
        x=[found[name][0] for name in names],  # Optuna makes their sum 1, of which percentiles know nothing
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [found[name][2] - found[name][0] for name in names],
            "arrayminus": [found[name][0] - found[name][1] for name in names],
        },
        text=None,
    )
    return _calm(figure, 90 + 36 * len(names), xaxis_title="importance", yaxis_title=None, showlegend=False)


class _Known(optuna.importance.BaseImportanceEvaluator):
    """Hands Optuna's figure importances that are known already."""

    def __init__(self, found: Mapping[str, float]) -> None:
        self._found = found

    def evaluate(self, study: optuna.Study, params: Any = None, *, target: Any = None) -> dict[str, float]:
        return dict(self._found)


def validation_curves(
    study: optuna.Study, entries: Sequence[Entry], names: Mapping[int, str], evaluations: int
) -> go.Figure:
    """What is searched for, by evaluation, of each trial in the study. The trials with `names`, best first, stand out;
    a cross is where one was stopped."""
    figure = visualization.plot_intermediate_values(study)
    places = {number: place for place, number in enumerate(names)}
    for trace in figure.data:
        number = int(trace.name.removeprefix("Trial"))
        trace.name = names.get(number, f"{number:03d}")
        if number in names:
            place = places[number]
            color = COLORS[place % len(COLORS)]
            trace.update(line={"color": color, "width": 2}, marker={"color": color}, legendrank=place)
            trace.showlegend = place < NAMED
        else:
            trace.update(line={"color": FAINT, "width": 1}, marker={"color": FAINT, "size": 4}, showlegend=False)
    figure.data = sorted(figure.data, key=lambda trace: trace.line.width)  # the named ones above the others
    there = {trial.number for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])}
    stopped = [e for e in entries if e.number in there and e.state is TrialState.PRUNED and e.best]
    figure.add_scatter(
        x=[entry.reported for entry in stopped],
        y=[entry.criterion.turned(entry.objectives[entry.reported]) for entry in stopped],
        text=[f"{entry.number:03d}, {entry.reason}" for entry in stopped],
        mode="markers",
        marker={"symbol": "x", "size": 8, "color": BAD},
        name="stopped",
        showlegend=bool(stopped),
        hovertemplate="%{y:.4f}: %{text}<extra></extra>",
    )
    shown = [entry for entry in entries if entry.number in there]
    criterion = shown[0].criterion
    values = sorted(criterion.turned(each) for e in shown for number, each in e.objectives.items() if number > 0)
    ceiling = values[-1]
    if criterion.is_loss:  # one that diverged hides the rest
        ceiling = max(value for value in values if value <= 3 * abs(values[len(values) // 2]))
    room = 0.05 * (ceiling - values[0])
    return _calm(
        figure,
        460,
        xaxis={"title": "evaluation", "range": [0.8, evaluations + 0.2], "dtick": -(-evaluations // 20)},
        yaxis={"title": criterion.name, "range": [values[0] - room, ceiling + room]},
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
    )


def training_and_validation(curve: Curve, turn: int | None) -> go.Figure:
    """Training and validation loss of one trial over its steps, with the evaluation where overfitting began."""
    figure = go.Figure()
    if curve.points:
        stretch = -(-len(curve.points) // POINTS)
        parts = [curve.points[start : start + stretch] for start in range(0, len(curve.points), stretch)]
        figure.add_scatter(
            x=[part[-1][0] for part in parts],
            y=[sum(loss for _, loss in part) / len(part) for part in parts],
            mode="lines",
            line={"color": FAINT, "width": 1},
            name="training",
        )
    for name, losses, color in (("training, mean", curve.training, GOOD), ("validation", curve.validation, FULL)):
        if losses:
            figure.add_scatter(
                x=[curve.steps.get(number, number) for number in losses],
                y=list(losses.values()),
                text=[f"evaluation {number}" for number in losses],
                mode="lines+markers",
                line={"color": color},
                name=name,
            )
    if turn is not None:
        figure.add_vline(x=curve.steps.get(turn, turn), line={"color": BAD, "dash": "dash"})
    return _calm(
        figure,
        280,
        xaxis_title="step" if curve.steps else "evaluation",
        yaxis_title="loss",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
    )


def best_by_trials(study: optuna.Study, what: str) -> go.Figure:
    """The study has the complete trials with their best value of `what`."""
    figure = visualization.plot_optimization_history(study, target_name=f"best {what} of a trial")
    return _calm(figure, 320, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"})


def best_by_hours(entries: Sequence[Entry], what: str) -> go.Figure:
    """The best of all complete trials over the training time of all trials, in the order of their end."""
    hours, lowest = 0.0, None
    x: list[float] = []
    y: list[float] = []
    for entry in sorted(entries, key=lambda entry: entry.trial.datetime_complete or datetime.max):
        if not entry.state.is_finished():
            break
        hours += entry.cost.seconds / 3600
        if entry.state is TrialState.COMPLETE and entry.best:
            lowest = min(entry.best[1], lowest) if lowest is not None else entry.best[1]
        if lowest is not None:
            x.append(hours)
            y.append(entry.criterion.turned(lowest))
    figure = go.Figure(go.Scatter(x=x, y=y, mode="lines", line={"shape": "hv", "color": FULL}))
    return _calm(figure, 320, xaxis_title="hours of training, all trials together", yaxis_title=f"best {what} so far")


def best_by_cost(study: optuna.Study, cost: str, what: str) -> go.Figure:
    """The study has two values of each complete trial: its cost, and its best value of `what`."""
    figure = visualization.plot_pareto_front(study, target_names=[cost, f"best {what}"])
    figure.update_traces(marker_showscale=False, marker_size=9)
    figure.update_traces(marker_color=FAINT, selector=0)
    figure.update_traces(marker_color=BAD, selector=1)
    return _calm(figure, 320)


def _calm(figure: go.Figure, height: int, **layout: Any) -> go.Figure:
    """The figure without what the page says around it, and without gestures that would keep a phone from scrolling."""
    figure.update_xaxes(automargin=True, exponentformat="e", zeroline=False)
    figure.update_yaxes(automargin=True)
    figure.update_layout(
        title=None,
        height=height,
        width=None,
        margin={"l": 50, "r": 20, "t": 30, "b": 45},
        dragmode=False,
        **layout,
    )
    return figure
