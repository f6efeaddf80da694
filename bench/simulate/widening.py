"""What the options that widen a batch are worth: `batch.merge` and `batch.measure`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from bench.simulate.optimum import fewest_requests
from bench.simulate.study import BUSY_LOAD, SATURATED_LOAD, Demand, Run, Study
from bench.simulate.tables import print_table
from bench.simulate.traffic import KINDS, Arrival, visit
from bench.simulate.upstream import Weather
from relay.config import Batch, Budget, Config

OPTIONS = {
    "strict": Batch(),
    "page-when-scarce": Batch(merge="page-when-scarce"),
    "page": Batch(merge="page"),
    "compressed": Batch(measure="compressed"),
    "page, compressed": Batch(merge="page", measure="compressed"),
}
"""By the names that tables give them."""


class Widened(msgspec.Struct, frozen=True):
    """One kind of traffic under one choice of options."""

    kind: str
    options: str
    demand: Demand
    busy: Run
    """With as many sessions as need nine tenths of the allowance under these options."""
    saturated: Run
    """With more than the allowance can carry."""


def compare_options(
    kinds: Sequence[str], seconds: float, weather: Weather, budget: Budget, seed: int
) -> dict[str, list[Widened]]:
    """Run kinds of traffic under each choice of options; returns what came of it, by kind."""
    found: dict[str, list[Widened]] = {kind: [] for kind in kinds}
    for name, batch in OPTIONS.items():
        study = Study(seconds, weather, Config(batch=batch, budget=budget), seed)
        for kind in kinds:
            demand = study.demand(kind)
            busy, saturated = (
                study.run(kind, demand.sessions_at(load, weather.requests_per_minute))
                for load in (BUSY_LOAD, SATURATED_LOAD)
            )
            found[kind].append(Widened(kind, name, demand, busy, saturated))
    return found


def print_options(found: dict[str, list[Widened]]) -> None:
    """Print what each choice saves, how many sessions it carries, how near it comes to its optimum, and delays."""
    print("requests that the optimum needs for a session and minute, and what that saves\n")
    head = ("traffic", *OPTIONS)
    print_table(head, ((kind, *(_saving(each, row[0]) for each in row)) for kind, row in found.items()))
    print(f"\nsessions that a key carries at {BUSY_LOAD:.0%} of its allowance\n")
    print_table(head, ((kind, *(str(each.busy.sessions) for each in row)) for kind, row in found.items()))
    print(f"\nrequests/optimum, at {SATURATED_LOAD:.0%}\n")
    print_table(head, ((kind, *(f"{each.saturated.ratio:.3f}" for each in row)) for kind, row in found.items()))
    print(f"\np95/max s of all events, at {BUSY_LOAD:.0%}\n")
    print_table(
        head,
        (
            (kind, *(f"{each.busy.relay.all.p95:.0f}/{each.busy.relay.all.max:.0f}" for each in row))
            for kind, row in found.items()
        ),
    )
    print("\nrequests for each recording as it was recorded, with all of it at hand\n")
    print_table(("recording", "client batches", *OPTIONS), _recorded())
    runs = [run for row in found.values() for each in row for run in (each.busy, each.saturated)]
    print(f"\nlost: {sum(run.relay.lost for run in runs)}, 429: {sum(run.relay.limited for run in runs)}")


def _recorded() -> Iterator[tuple[str, ...]]:
    """Yield the requests of each recording under each choice of options, and of all of them."""
    sums = [0] * (1 + len(OPTIONS))
    for name in sorted({name for kind in KINDS for name in kind.recordings}):
        batches = visit(name, 1.0, is_continued=False).batches
        trace = [
            Arrival(batch.due_seconds, 1, (1, batch.window), sequence, batch, False, False)
            for sequence, batch in enumerate(batches)
        ]
        requests = [
            fewest_requests(trace, batch.limits, merges_pages=batch.merge != "strict") for batch in OPTIONS.values()
        ]
        row = [len(batches), *requests]
        sums = [one + other for one, other in zip(sums, row, strict=True)]
        yield (name, *map(str, row))
    yield ("all", *map(str, sums))


def _saving(one: Widened, strict: Widened) -> str:
    share = 1 - one.demand.optimum_per_minute / strict.demand.optimum_per_minute
    return f"{one.demand.optimum_per_minute:.2f}" + (f" (-{share:.0%})" if one is not strict else "")
