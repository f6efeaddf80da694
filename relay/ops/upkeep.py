"""`lucent-relay spool`: look for damage in the spool, save what can be saved, and handle dead letters."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from relay.clock import wall_clock
from relay.config import Config
from relay.ops import letters
from relay.ops.letters import Failure
from relay.spool.salvage import salvage
from relay.spool.verify import verify
from relay.spool.visit import reading


def add_arguments(parser: argparse.ArgumentParser, add_source: Callable[[argparse.ArgumentParser], None]) -> None:
    """Declare the command's own commands.

    Args:
        parser: Of `spool`.
        add_source: Declares where the configuration comes from.
    """
    parts = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    letters.add_arguments(parts, add_source)
    for name, summary in (
        ("verify", "Look for damage, beside a running relay too; changes nothing."),
        ("salvage", "Save what can be read of a damaged spool into a new one; the relay must be stopped."),
    ):
        declared = parts.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        declared.set_defaults(action=name)
        add_source(declared)


def run(arguments: argparse.Namespace, config: Config) -> Iterator[str] | Failure:
    """Carry out the command; returns what to print, or why it cannot be done."""
    match arguments.action:
        case "verify":
            return verify_spool(config)
        case "salvage":
            return iter(salvage_spool(config))
        case _:
            return letters.run(arguments, config)


def verify_spool(config: Config) -> Iterator[str] | Failure:
    """Return that nothing is wrong, or what is."""
    with reading(config.spool.directory) as reader:
        found = verify(reader, wall_clock())
    looked_at = f"{found.segments} segments with {found.events} events looked at"
    if found.findings:
        return Failure(f"the spool is damaged, {looked_at}", found.findings)
    return iter([f"nothing is wrong: {looked_at}"])


def salvage_spool(config: Config) -> list[str]:
    """Replace the spool by what can be read of it; returns what came of that."""
    stamp = datetime.fromtimestamp(wall_clock(), UTC).strftime("%Y%m%dT%H%M%SZ")
    saved = salvage(Path(config.spool.directory), stamp, wall_clock())
    lines = [f"{saved.events} events saved, {saved.damaged} of them found damaged before"]
    if saved.missing:
        lines.append(f"{saved.missing} events could not be read; they count as purged")
    if not saved.has_counters:
        lines.append("the counters could not be read: the account begins anew with what was saved")
    return [*lines, f"the damaged database is now {saved.aside}: keep it as long as anything may be missed"]
