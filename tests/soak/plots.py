"""The plot of a soak: what could have grown, over time, with the strikes as shades."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tests.soak.soak import Found

_INCHES = (11.0, 9.0)
_DOTS_PER_INCH = 90
_MIB = 1_048_576


def draw(found: Found, file: Path) -> None:
    """Draw memory, descriptors, disk, backlog and the watched client's answers into a PNG file."""
    mpl.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3})
    figure = Figure(figsize=_INCHES, layout="constrained")
    panels = figure.subplots(5, 1, sharex=True)
    at = [sample.at for sample in found.samples]
    for axes, title, values in zip(
        panels,
        ("resident MiB", "open files", "spool MiB in use", "events spooled"),
        (
            [sample.resident_bytes / _MIB for sample in found.samples],
            [sample.open_files for sample in found.samples],
            [sample.used_bytes / _MIB for sample in found.samples],
            [sample.spooled for sample in found.samples],
        ),
        strict=False,
    ):
        axes.plot(at, values, ".", markersize=2)
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    panels[-1].plot([since for since, _ in found.answers], [taken for _, taken in found.answers], ".", markersize=2)
    panels[-1].set_yscale("log")
    panels[-1].set_ylabel("seconds to a 200")
    panels[-1].set_xlabel("seconds; from the dotted line on the relay is left alone")
    colors = {name: f"C{number % 10}" for number, name in enumerate(sorted({each.name for each in found.struck}))}
    for axes in panels:
        axes.axvline(found.quiet_from, color="grey", linestyle=":")
        for struck in found.struck:
            axes.axvspan(struck.since, struck.until, color=colors[struck.name], alpha=0.15, linewidth=0)
    shades = [Patch(color=color, alpha=0.3, label=name.replace("_", " ")) for name, color in colors.items()]
    figure.legend(handles=shades, loc="outside upper center", ncols=6)
    figure.savefig(file, dpi=_DOTS_PER_INCH)
