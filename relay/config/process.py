"""The sections of the process: its log and its end."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from relay.config.section import Section


class Log(Section, frozen=True):
    """What is written to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(
            description=(
                "ERROR needs an operator, WARNING recovered by itself, INFO is lifecycle. Nothing is logged per event."
            ),
        ),
    ] = "info"
    format: Annotated[
        Literal["logfmt", "json"],
        Meta(description='"logfmt" reads well on a terminal, "json" suits collectors.'),
    ] = "logfmt"


class Shutdown(Section, frozen=True):
    """How the process ends."""

    deadline_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=3_600,
            description=(
                "From SIGTERM to exit at the latest, whatever hangs; below the 30 s after which orchestrators kill."
            ),
        ),
    ] = 20.0
