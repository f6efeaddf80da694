"""What comes behind an outage, and what refusals without a reason cost."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bench.simulate.study import Run, Study
from bench.simulate.tables import print_table, three
from bench.simulate.upstream import Weather
from relay.config import Budget, Config

_LOADS = (0.3, 0.6, 0.9)
"""An ordinary day, and one that leaves a tenth of the allowance to catch up with."""

_BEGINS = 3_600.0
"""When an outage begins: the sessions are in the midst of their lives, and the budget is as it mostly is."""

_REFUSED_SHARE = 0.01


class Stormy(msgspec.Struct, frozen=True):
    """One kind of traffic in one kind of weather."""

    load: float
    """What the optimum needs of the allowance, in fair weather."""
    weather: str
    """For people."""
    run: Run


def run_outages(kinds: Sequence[str], seconds: float, requests_per_minute: int, seed: int) -> list[Stormy]:
    """Run kinds of traffic through outages and refusals."""
    weathers = {
        "out for 10 min": Weather(requests_per_minute, outages=((_BEGINS, _BEGINS + 600.0),)),
        "out for 1 h": Weather(requests_per_minute, outages=((_BEGINS, _BEGINS + 3_600.0),)),
        f"429 to {_REFUSED_SHARE:.0%}": Weather(requests_per_minute, refused_share=_REFUSED_SHARE),
    }
    config = Config(budget=Budget(requests_per_minute=requests_per_minute))
    found = []
    for kind in kinds:
        for name, weather in weathers.items():
            study = Study(seconds, weather, config, seed)
            demand = study.demand(kind)
            found += [
                Stormy(load, name, study.run(kind, demand.sessions_at(load, requests_per_minute))) for load in _LOADS
            ]
    return found


def print_outages(found: Sequence[Stormy]) -> None:
    """Print what was waiting, how long it took to be gone, and what became of live traffic meanwhile."""
    print_table(
        (
            *("traffic", "load", "sessions", "weather", "backlog", "drained after min", "its sessions p50/p95/max s"),
            *("new sessions", "all", "lost", "429", "direct loses"),
        ),
        (
            (
                *(each.run.kind, f"{each.load:.0%}", str(each.run.sessions), each.weather),
                *_drain(each.run),
                three(each.run.relay.all),
                str(each.run.relay.lost),
                str(each.run.relay.limited),
                f"{1 - each.run.direct.delivered_share:.1%}",
            )
            for each in found
        ),
    )


def _drain(run: Run) -> tuple[str, ...]:
    if not run.relay.drains:
        return ("",) * 4
    (drain,) = run.relay.drains
    return f"{drain.backlog:,}", f"{drain.seconds / 60:.0f}", three(drain.waiting), three(drain.live)
