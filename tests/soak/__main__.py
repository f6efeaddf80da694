"""Soak the relay.

    python -m tests.soak [--seconds 3600] [--seed N] [--plot FILE.png]

Exit status 0 where every law held at every look and nothing grew, 1 otherwise. What processes wrote is kept where a
law did not hold.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import trio

from tests.soak.soak import Found, Soak
from tests.soak.weather import small_disk
from tests.system.daemon import Site


def main() -> int:
    """Run a soak and say what it found."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Sessions among faults, for hours.")
    parser.add_argument("--seconds", type=float, default=3_600.0, help="how long (3600)")
    parser.add_argument("--seed", type=int, default=1, help="of all chance (1)")
    parser.add_argument("--plot", type=Path, help="PNG file; needs the extra `bench`")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="lucent-relay-soak-"))
    found, problem = trio.run(_soak, directory, options.seed, options.seconds)
    _report(found)
    if options.plot:
        from tests.soak.plots import draw  # only plots need matplotlib

        draw(found, options.plot)
    grown = [growth for growth in found.growth() if not growth.is_flat]
    if not problem:
        shutil.rmtree(directory)
        print("every law held at every look" if not grown else "it grew: " + ", ".join(each.what for each in grown))
        return 1 if grown else 0
    print(f"a law does not hold: {problem}\nlogs are kept in {directory}")
    return 1


async def _soak(directory: Path, seed: int, seconds: float) -> tuple[Found, str]:
    """Run a soak; returns what it found, and what does not hold, empty where everything does."""
    async with small_disk(directory / "spool") as is_small:
        if not is_small:
            print("only root may mount a small disk: it is not filled in this run")
        site = Site(directory)
        soak = Soak(site, seed, seconds, has_small_disk=is_small)
        problems: list[str] = []
        try:
            try:
                await soak.run()
            finally:
                await site.aclose(is_shown=False)
        except* AssertionError as group:
            problems += (str(error) for error in _leaves(group))
    return soak.found, "; ".join(problems)


def _leaves(group: BaseExceptionGroup[AssertionError]) -> Iterator[BaseException]:
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)


def _report(found: Found) -> None:
    print(
        f"{found.seconds:.0f} s, {found.rounds} rounds, {found.batches} client batches, {found.events} events delivered"
        " once each"
    )
    struck = Counter(each.name for each in found.struck)
    print("strikes: " + ", ".join(f"{name} {number}" for name, number in sorted(struck.items())))
    answers = sorted(seconds for _, seconds in found.answers)
    if answers:
        p50, p99 = answers[len(answers) // 2], answers[len(answers) * 99 // 100]
        print(f"answers: p50 {p50:.3f} s, p99 {p99:.3f} s, longest {answers[-1]:.1f} s")
    if found.samples:
        print(f"resident at most {max(sample.resident_bytes for sample in found.samples) / 1e6:.0f} MB")
    for growth in found.growth():
        print(f"{growth.what}: {growth.early:g} early, {growth.late:g} late, may be {growth.bound:g}")


if __name__ == "__main__":
    sys.exit(main())
