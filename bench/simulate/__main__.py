"""The schedule on virtual time.

    python -m bench.simulate [loads|options|outages] [--kind KIND|all] [--sessions N] [--seconds S] [--seed N]
                             [--requests-per-minute N] [--outage FROM-UNTIL] [--refused-share X]
                             [--merge strict|page|page-when-scarce] [--measure json|compressed]
                             [--plots DIRECTORY] [--json]

`loads` runs every kind of traffic at several loads and prints how many sessions a key carries, and what comes of them
at nine tenths of what the optimum can carry, at all of it, and beyond. With `--sessions` it is one trace of each kind.
`options` compares the options that widen a batch, `outages` shows what comes behind an outage. README.md says what the
figures mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import msgspec

from bench.simulate.outages import print_outages, run_outages
from bench.simulate.study import BUSY_LOAD, SATURATED_LOAD, Study
from bench.simulate.tables import print_runs, print_table
from bench.simulate.traffic import KINDS
from bench.simulate.upstream import Weather
from bench.simulate.widening import compare_options, print_options
from relay.config import Batch, Budget, Config
from relay.protocol.cut import Measure, Merge

T = TypeVar("T")

_ALL = (*(kind.name for kind in KINDS), "mix")

_LOADS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, BUSY_LOAD, 1.0, 1.1, SATURATED_LOAD)
"""Of the plots."""


def main() -> None:
    """Run the study that the command line asks for."""
    options = _options(sys.argv[1:])
    weather = Weather(options.requests_per_minute, outages=tuple(options.outage), refused_share=options.refused_share)
    kinds = _ALL if options.kind == "all" else (options.kind,)
    budget = Budget(requests_per_minute=options.requests_per_minute)
    if options.study == "options":
        compared = compare_options(kinds, options.seconds, weather, budget, options.seed)
        _show(compared, print_options, as_json=options.json)
        return
    if options.study == "outages":
        found = run_outages(kinds, options.seconds, options.requests_per_minute, options.seed)
        _show(found, print_outages, as_json=options.json)
        return
    config = Config(batch=Batch(merge=options.merge, measure=options.measure), budget=budget)
    study = Study(options.seconds, weather, config, options.seed)
    if options.sessions:
        runs = [study.run(kind, options.sessions) for kind in kinds]
        _show(runs, lambda runs: print_runs(f"{options.sessions} sessions", runs), as_json=options.json)
        return
    _study(study, kinds, options)


def _show(found: T, print_tables: Callable[[T], None], *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        print_tables(found)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description="The schedule on virtual time.")
    parser.add_argument("study", nargs="?", choices=("loads", "options", "outages"), default="loads")
    parser.add_argument("--kind", choices=(*_ALL, "all"), default="all", help="kind of traffic (all)")
    parser.add_argument("--sessions", type=int, help="concurrent sessions of a single run; without: a whole study")
    parser.add_argument("--seconds", type=float, default=3_600.0, help="length of a trace (3600)")
    parser.add_argument("--seed", type=int, default=1, help="of all chance (1)")
    parser.add_argument("--requests-per-minute", type=int, default=100, help="upstream's limit (100)")
    parser.add_argument("--outage", type=_span, action="append", default=[], help="seconds, FROM-UNTIL; repeatable")
    parser.add_argument("--refused-share", type=float, default=0.0, help="requests answered 429 without reason (0)")
    parser.add_argument("--merge", choices=get_args(Merge), default="strict", help="batch.merge (strict)")
    parser.add_argument("--measure", choices=get_args(Measure), default="json", help="batch.measure (json)")
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
    print_table(
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
        print_runs(f"the optimum needs {load:.0%} of the allowance", [found[load] for found in runs.values()])


if __name__ == "__main__":
    main()
