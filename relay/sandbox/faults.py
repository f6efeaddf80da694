"""Which fault hits a request: declared once, drawn from a seeded generator.

Rules:
1. Nothing here sleeps, answers or closes; a `Fate` says what is to be done.
2. Every draw takes three numbers from the generator whatever the settings are, so a change of one option does
   not shift what the others hit.
3. The three rates share one draw: a request suffers at most one of them, and their sum cannot exceed 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from collections.abc import Mapping

Rate = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Moment = Annotated[float, Meta(ge=0, le=1e9)]
Status = Annotated[int, Meta(ge=400, le=599)]


class RandomSource(Protocol):
    """The part of `random.Random` that is drawn from."""

    def random(self) -> float:
        """Return a number in [0, 1)."""


class FaultSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong, and how often. Everything is off by default.

    Bounds hold where the settings are converted (`fault_settings`), as with every msgspec Struct; what
    concerns several fields holds on construction too.
    """

    error_rate: Rate = 0.0
    """Share of batches answered with an error and not stored."""
    error_status: Annotated[tuple[Status, ...], Meta(min_length=1)] = (500,)
    """Statuses of those errors, each as likely as the others."""
    drop_before_rate: Rate = 0.0
    """Share of batches whose connection is closed before anything is stored."""
    drop_after_rate: Rate = 0.0
    """Share of batches that are stored and whose connection is then closed without an answer."""
    latency_seconds: Seconds = 0.0
    """Time between a batch's arrival and its storing."""
    latency_jitter_seconds: Seconds = 0.0
    """Up to this much is added to the latency, evenly spread."""
    outages: tuple[tuple[Moment, Moment], ...] = ()
    """`(start, end)` in seconds since the sandbox started: nothing is let in from start until before end."""
    outage_status: Annotated[int, Meta(ge=0, le=599)] = 0
    """What an outage answers; 0 closes the connection."""
    reject_keys: tuple[str, ...] = ()
    """Keys that are answered 401 although they would be accepted."""
    fail_sessions: tuple[str, ...] = ()
    """Sessions whose batches are all answered with an error, one of `error_status`, and not stored."""

    def __post_init__(self) -> None:
        """Check what concerns several fields."""
        total = self.error_rate + self.drop_before_rate + self.drop_after_rate
        if total > 1:
            raise ValueError(f"error and drop rates add up to {total:g}, more than 1")
        if 0 < self.outage_status < 400:
            raise ValueError(f"outage status {self.outage_status} is neither 0 nor 400 to 599")
        for start, end in self.outages:
            if start >= end:
                raise ValueError(f"outage {start:g}:{end:g} ends before it starts")


class Fate(msgspec.Struct, frozen=True):
    """What happens to one batch that passed the key check and the rate limit."""

    kind: Literal["serve", "error", "drop_before", "drop_after"]
    """`serve` stores and answers; the others are the rates of `FaultSettings`."""
    status: int
    """What an error answers."""
    latency_seconds: float
    """Time before the batch is looked at."""


def fault_settings(values: Mapping[str, Any]) -> FaultSettings:
    """Return settings made from JSON-like values.

    Raises:
        msgspec.ValidationError: An unknown name, or a value of the wrong type or out of bounds.
    """
    return msgspec.convert(values, FaultSettings)


class Faults:
    """Draws fates. Settings can be replaced at any time; the generator goes on."""

    def __init__(self, settings: FaultSettings, random: RandomSource) -> None:
        self.settings = settings
        """In force now."""
        self._random = random

    def is_out(self, elapsed_seconds: float) -> bool:
        """Tell whether an outage is on, `elapsed_seconds` after the sandbox started."""
        return any(start <= elapsed_seconds < end for start, end in self.settings.outages)

    def fate(self) -> Fate:
        """Draw what happens to the next batch."""
        draw, pick, spread = self._random.random(), self._random.random(), self._random.random()
        settings = self.settings
        status = settings.error_status[int(pick * len(settings.error_status))]
        latency = settings.latency_seconds + spread * settings.latency_jitter_seconds
        if draw < settings.error_rate:
            return Fate("error", status, latency)
        draw -= settings.error_rate
        if draw < settings.drop_before_rate:
            return Fate("drop_before", status, latency)
        draw -= settings.drop_before_rate
        if draw < settings.drop_after_rate:
            return Fate("drop_after", status, latency)
        return Fate("serve", status, latency)
