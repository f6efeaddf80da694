"""Plots of a study: one small panel for each kind of traffic, over the number of sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.simulate.study import BUSY_LOAD, Run

_COLUMNS = 3
_PANEL_INCHES = (3.2, 2.4)
_DOTS_PER_INCH = 80
"""Small files: a plot of six panels takes about 60 KB."""

_RELAY, _ONE_FOR_ONE, _DIRECT = "#1b6ca8", "#c98a1b", "#b03a3a"

_MIN_SECONDS = 1.0
"""Lowest delay that is drawn; below it nobody minds."""


def draw(runs: Mapping[str, Sequence[Run]], busy_sessions: Mapping[str, int], directory: Path) -> list[Path]:
    """Draw the three plots.

    Args:
        runs: By kind, in order of their sessions.
        busy_sessions: By kind, where the optimum needs nine tenths of the allowance; marked by a line.
        directory: Where the PNG files go.

    Returns:
        The files.
    """
    plots: tuple[tuple[str, str, Callable[[Axes, Sequence[Run]], None]], ...] = (
        ("delivered", "events upstream and fit for replay by the end", _draw_delivered),
        ("delay", "seconds until upstream has an event", _draw_delays),
        ("fullness", "mean fullness of an upstream batch", _draw_fullness),
    )
    files = []
    for name, title, draw_panel in plots:
        file = directory / f"{name}.png"
        _draw(file, title, runs, busy_sessions, draw_panel)
        files.append(file)
    return files


def _draw(
    file: Path,
    title: str,
    runs: Mapping[str, Sequence[Run]],
    busy_sessions: Mapping[str, int],
    draw_panel: Callable[[Axes, Sequence[Run]], None],
) -> None:
    mpl.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3})
    rows = -(-len(runs) // _COLUMNS)
    columns = min(_COLUMNS, len(runs))
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    for index, (kind, found) in enumerate(runs.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(kind)
        axes.axvline(busy_sessions[kind], color="grey", linestyle=":", label=f"optimum needs {BUSY_LOAD:.0%}")
        draw_panel(axes, found)
        axes.set_xlim(left=0)
        if index // _COLUMNS == rows - 1:
            axes.set_xlabel("sessions under one key")
        if not index:
            axes.legend(fontsize=6)
    figure.savefig(file, dpi=_DOTS_PER_INCH)


def _draw_delivered(axes: Axes, runs: Sequence[Run]) -> None:
    sessions = [run.sessions for run in runs]
    axes.plot(sessions, [run.relay.delivered_share for run in runs], color=_RELAY, label="relay")
    axes.plot(sessions, [run.one_for_one.delivered_share for run in runs], color=_ONE_FOR_ONE, label="one for one")
    axes.plot(sessions, [run.direct.delivered_share for run in runs], color=_DIRECT, label="direct")
    axes.set_ylim(0, 1.03)


def _draw_delays(axes: Axes, runs: Sequence[Run]) -> None:
    sessions = [run.sessions for run in runs]
    for style, quantile in ((":", "p50"), ("-", "p95"), ("--", "max")):
        found = [max(_MIN_SECONDS, getattr(run.relay.all, quantile)) for run in runs]
        axes.plot(sessions, found, style, color=_RELAY, label=f"relay {quantile}")
    queued = [max(_MIN_SECONDS, run.one_for_one.all.p95) for run in runs]
    axes.plot(sessions, queued, color=_ONE_FOR_ONE, label="one for one p95")
    axes.set_yscale("log")


def _draw_fullness(axes: Axes, runs: Sequence[Run]) -> None:
    sessions = [run.sessions for run in runs]
    axes.plot(sessions, [run.relay.fullness for run in runs], color=_RELAY, label="relay")
    axes.plot(sessions, [run.one_for_one.fullness for run in runs], color=_DIRECT, label="direct, one for one")
    axes.set_ylim(0, 1.03)
