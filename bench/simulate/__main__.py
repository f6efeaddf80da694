"""The schedule on virtual time.

    python -m bench.simulate [--kind KIND|all] [--sessions N] [--seconds S] [--seed N] [--requests-per-minute N]
                             [--outage FROM-UNTIL] [--refused-share X] [--plots DIRECTORY] [--json]

Without `--sessions` every kind of traffic is run at several loads, and three tables are printed: at saturation, at
nine tenths of what the optimum can carry, and how many sessions a key carries. With `--sessions` it is one trace of
each kind. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.simulate.study import BUSY_LOAD, SATURATED_LOAD, Run, Study
from bench.simulate.traffic import KINDS
from bench.simulate.upstream import Weather
from relay.config import Budget, Config

_ALL = (*(kind.name for kind in KINDS), "mix")

_LOADS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, BUSY_LOAD, 1.0, 1.1, SATURATED_LOAD)
"""Of the plots."""


def main() -> None:
    """Run the study that the command line asks for."""
    options = _options(sys.argv[1:])
    weather = Weather(options.requests_per_minute, outages=tuple(options.outage), refused_share=options.refused_share)
    config = Config(budget=Budget(requests_per_minute=options.requests_per_minute))
    study = Study(options.seconds, weather, config, options.seed)
    kinds = _ALL if options.kind == "all" else (options.kind,)
    if options.sessions:
        runs = [study.run(kind, options.sessions) for kind in kinds]
        if options.json:
            print(msgspec.json.encode(runs).decode())
        else:
            _print_runs(f"{options.sessions} sessions", runs)
        return
    _study(study, kinds, options)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description="The schedule on virtual time.")
    parser.add_argument("--kind", choices=(*_ALL, "all"), default="all", help="kind of traffic (all)")
    parser.add_argument("--sessions", type=int, help="concurrent sessions of a single run; without: a whole study")
    parser.add_argument("--seconds", type=float, default=3_600.0, help="length of a trace (3600)")
    parser.add_argument("--seed", type=int, default=1, help="of all chance (1)")
    parser.add_argument("--requests-per-minute", type=int, default=100, help="upstream's limit (100)")
    parser.add_argument("--outage", type=_span, action="append", default=[], help="seconds, FROM-UNTIL; repeatable")
    parser.add_argument("--refused-share", type=float, default=0.0, help="requests answered 429 without reason (0)")
    parser.add_argument("--plots", type=Path, help="directory for PNG files; needs the extra `bench`")
    parser.add_argument("--json", action="store_true", help="print one JSON array of runs instead of tables")
    return parser.parse_args(words)


def _span(text: str) -> tuple[float, float]:
    since, until = text.split("-")
    return float(since), float(until)


def _study(study: Study, kinds: Sequence[str], options: argparse.Namespace) -> None:
    loads = _LOADS if options.plots else (BUSY_LOAD, 1.0, SATURATED_LOAD)
    demands = {kind: study.demand(kind) for kind in kinds}
    allowance = options.requests_per_minute
    runs = {
        kind: {load: study.run(kind, demand.sessions_at(load, allowance)) for load in loads}
        for kind, demand in demands.items()
    }
    if options.plots:
        from bench.simulate.plots import draw  # only plots need matplotlib

        options.plots.mkdir(parents=True, exist_ok=True)
        busy = {kind: demand.sessions_at(BUSY_LOAD, allowance) for kind, demand in demands.items()}
        draw({kind: list(found.values()) for kind, found in runs.items()}, busy, options.plots)
    if options.json:
        print(msgspec.json.encode([run for found in runs.values() for run in found.values()]).decode())
        return
    print(f"sessions that one key of {allowance} requests a minute carries\n")
    _print_table(
        ("traffic", "batches/min", "optimum/min", "direct", "relay", "gain"),
        (
            (
                kind,
                f"{demand.client_batches_per_minute:.1f}",
                f"{demand.optimum_per_minute:.2f}",
                str(direct),
                str(demand.sessions_at(BUSY_LOAD, allowance)),
                f"{demand.sessions_at(BUSY_LOAD, allowance) / max(1, direct):.1f}",
            )
            for kind, demand in demands.items()
            for direct in [study.most_direct_sessions(kind)]
        ),
    )
    for load in (BUSY_LOAD, 1.0, SATURATED_LOAD):
        print()
        _print_runs(f"the optimum needs {load:.0%} of the allowance", [found[load] for found in runs.values()])


def _print_runs(title: str, runs: Iterable[Run]) -> None:
    print(f"{title}\n")
    _print_table(
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
                *(
                    f"{d.p50:.0f}/{d.p95:.0f}/{d.max:.0f}"
                    for d in (run.relay.all, run.relay.finals, run.relay.snapshots)
                ),
                f"{run.direct.delivered_share:.1%}",
                f"{run.one_for_one.delivered_share:.1%}",
            )
            for run in runs
        ),
    )


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, as README.md has it."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
