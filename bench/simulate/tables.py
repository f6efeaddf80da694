"""Tables as README.md has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.simulate.figures import Delays
from bench.simulate.study import Run


def print_runs(title: str, runs: Iterable[Run]) -> None:
    """Print what came of runs, the relay's beside its rivals'."""
    print(f"{title}\n")
    print_table(
        (
            *("traffic", "sessions", "requests/optimum", "events/min", "fullness", "delivered", "lost", "429"),
            *("all p50/p95/max s", "finals", "snapshots", "direct", "one for one"),
        ),
        (
            (
                run.kind,
                str(run.sessions),
                f"{run.ratio:.3f}",
                f"{run.relay.delivered / run.relay.seconds * 60:,.0f}",
                f"{run.relay.fullness:.0%}",
                f"{run.relay.delivered_share:.1%}",
                str(run.relay.lost),
                str(run.relay.limited),
                *(three(each) for each in (run.relay.all, run.relay.finals, run.relay.snapshots)),
                f"{run.direct.delivered_share:.1%}",
                f"{run.one_for_one.delivered_share:.1%}",
            )
            for run in runs
        ),
    )


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, as README.md has it."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def three(found: Delays) -> str:
    """Return a median, a 95th percentile and a maximum in seconds."""
    return f"{found.p50:.0f}/{found.p95:.0f}/{found.max:.0f}"
