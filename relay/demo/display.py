"""What the demo shows: progress on standard error while it runs, the table on standard output at its end.

Rules:
1. Standard output has the result and nothing else.
2. On a terminal progress is redrawn in place and vanishes at the end; elsewhere it is a plain line now and then.
3. However the demo ends, the terminal is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from relay.config import Batch
from relay.demo.audit import Result
from relay.demo.session import MAX_EVENTS

LINE_SECONDS = 2.0
"""Between two plain lines: ten for a whole demo."""

BAR_CHARACTERS = 32
"""Leaves room for the numbers in 80 columns."""

NEXT_STEPS = (
    "Next: make run (or lucent-relay run) starts a relay in front of Lucent;",
    "README.md goes on under Five minutes with the sandbox.",
)
"""Where to go from here."""


class Progress(msgspec.Struct, frozen=True):
    """How far the demo is."""

    seconds: float
    """Since it began."""
    batches: int
    """Client batches there are to send."""
    batches_sent: int
    """Those that were answered."""
    events: int
    """Events there are to send."""
    events_accepted: int
    """Answered 200."""
    events_delivered: int
    """In the sandbox."""
    upstream_requests: int
    """Requests to the sandbox."""
    budget: int
    """Requests a minute of the key."""
    budget_used: int
    """Slots of the budget that are occupied now."""
    relay_url: str
    """Where the relay listens."""
    admin_url: str
    """Where it says how it is."""

    @property
    def phase(self) -> str:
        """What is going on, in words."""
        if self.budget_used >= self.budget and self.events_delivered < self.events_accepted:
            return "the key's minute is spent: the relay goes on accepting, and waits"
        if self.batches_sent < self.batches:
            return "the sessions play"
        return "all sessions are sent; the relay delivers the rest"


class Display(Protocol):
    """Shows progress."""

    def show(self, progress: Progress) -> None:
        """Show it, or not: as often as this display likes."""


class LineDisplay:
    """A line now and then, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next_at = 0.0

    def show(self, progress: Progress) -> None:
        """Write a line if the last one is old."""
        if progress.seconds < self._next_at:
            return
        self._next_at = progress.seconds + LINE_SECONDS
        self._stream.write(
            f"{progress.seconds:4.0f} s  {progress.batches_sent:,} of {progress.batches:,} client batches, "
            f"{progress.events_accepted:,} events accepted, {progress.events_delivered:,} delivered in "
            f"{progress.upstream_requests:,} requests ({progress.budget_used} of {progress.budget} this minute)\n"
        )
        self._stream.flush()


class LiveDisplay:
    """Bars that move."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def show(self, progress: Progress) -> None:
        """Draw anew."""
        self._live.update(draw(progress), refresh=True)


@contextmanager
def open_display(stream: TextIO) -> Iterator[Display]:
    """Show progress on a stream, in the way that suits it, until the end of the block."""
    console = Console(file=stream, highlight=False)
    if not console.is_interactive:
        yield LineDisplay(stream)
        return
    # Without a thread of its own: what is drawn is state of trio's thread.
    with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False) as live:
        yield LiveDisplay(live)


def draw(progress: Progress) -> Group:
    """Return progress as bars."""
    rows = (
        ("client batches sent", progress.batches_sent, progress.batches),
        ("events accepted", progress.events_accepted, progress.events),
        ("events delivered", progress.events_delivered, progress.events),
        ("of the key's minute", progress.budget_used, progress.budget),
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(width=BAR_CHARACTERS)
    grid.add_column(justify="right")
    for label, value, total in rows:
        grid.add_row(label, ProgressBar(total, min(value, total), BAR_CHARACTERS), f"{value:,} of {total:,}")
    grid.add_row("upstream requests", "", f"{progress.upstream_requests:,}")
    return Group(
        grid,
        Text(f"{progress.seconds:.0f} s: {progress.phase}", style="bold"),
        Text(f"relay on {progress.relay_url}, its state on {progress.admin_url}", style="dim"),
    )


def print_result(result: Result, speed: float, stream: TextIO) -> None:
    """Print what was played, the figures, the verdict, and what to do next."""
    console = Console(file=stream, highlight=False)
    times = "" if speed == 1 else f"{speed:g} times "
    console.print(
        f"{result.sessions:,} recorded sessions, {times}as fast as recorded, in {result.seconds:.0f} s. The "
        f"clients send at most {MAX_EVENTS} events a batch; the SDK, which flushes every 10 s, made "
        f"{result.recorded_batches:,} batches of the same."
    )
    if speed > 1:
        linger = Batch().linger_seconds
        console.print(
            f"At this speed the {linger:g} s that the relay waits for a batch to fill span {linger * speed:g} s of a "
            "session; with --speed 1 it merges less."
        )
    console.print()
    console.print(_figures(result))
    console.print()
    if result.exactly_once:
        console.print(
            f"It adds up: all {result.events_accepted:,} events are upstream exactly once, in order, unchanged.",
            style="green",
        )
    else:
        console.print("It does not add up:", style="bold red")
        for problem in result.problems:
            console.print(f"- {problem}", markup=False)
    console.print()
    for line in NEXT_STEPS:
        console.print(line)


def _figures(result: Result) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("clients to relay", justify="right")
    table.add_column("relay to upstream", justify="right")
    for label, clients, upstream in (
        ("requests", f"{result.client_requests:,}", f"{result.upstream_requests:,}"),
        (
            "minutes of a key's budget",
            f"{result.budget_minutes_direct:.2f} if sent directly",
            f"{result.budget_minutes_relay:.2f}",
        ),
        ("bytes, gzip", f"{result.bytes_in_wire:,}", f"{result.bytes_out:,}"),
        ("bytes, JSON", f"{result.bytes_in_json:,}", f"{result.bytes_out_json:,}"),
        ("events", f"{result.events_accepted:,} accepted", f"{result.events_delivered:,} delivered"),
        ("  lost", "", f"{result.events_lost:,}"),
        ("  duplicated", "", f"{result.events_duplicated:,}"),
        ("  out of order", "", f"{result.events_misordered:,}"),
        ("answered 429, too many requests", "", f"{result.rate_limited:,}"),
        (
            "reads of a page of issues",
            f"{result.data_answers} of {result.data_readers}",
            f"{result.data_upstream_requests}",
        ),
    ):
        table.add_row(label, clients, upstream)
    return table
