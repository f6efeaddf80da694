"""What is written from the code and held against it: tables of the manuals, and config/relay.toml.

`make tables` brings them up to date.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from relay.cli import build_parser
from relay.exit_codes import ExitCode
from relay.settings.options import options
from relay.settings.rendering import render_defaults
from relay.telemetry import METRICS, PREFIX
from tests.contract.exceptions import EXCEPTIONS

CHECKOUT = Path(__file__).parents[2]
README = CHECKOUT / "README.md"
INSIDES = CHECKOUT / "relay" / "README.md"
OPERATIONS = CHECKOUT / "config" / "README.md"
CONFIGURATION = CHECKOUT / "config" / "relay.toml"


def option_table() -> str:
    """Return the table of all options."""
    rows = ((f"`{name}`", o.kind, f"`{o.mask(o.default)}`", o.reason) for name, o in options().items())
    return table(("option", "is", "default", "why"), rows)


def exit_code_table() -> str:
    """Return the table of all exit codes."""
    return table(("status", "meaning"), ((str(int(code)), code.meaning) for code in ExitCode))


def command_table() -> str:
    """Return the table of all commands."""
    (commands,) = (action for action in build_parser([])._actions if isinstance(action, argparse._SubParsersAction))
    rows = ((f"`lucent-relay {choice.dest}`", str(choice.help)) for choice in commands._choices_actions)
    return table(("command", "does"), rows)


def metric_table() -> str:
    """Return the table of all metrics."""
    rows = ((f"`{PREFIX}{m.name}`", m.kind, f"`{m.label}`" if m.label else "", m.help) for m in METRICS)
    return table(("metric", "kind", "label", "meaning"), rows)


def exception_table() -> str:
    """Return the table of all that the relay refuses and upstream does not."""
    rows = ((row.what, str(row.refusal.status), row.because) for row in EXCEPTIONS)
    return table(("what a client might send", "answer", "why"), rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "commands": (README, command_table),
    "options": (README, option_table),
    "exit-codes": (README, exit_code_table),
    "metrics": (OPERATIONS, metric_table),
    "exceptions": (INSIDES, exception_table),
}
"""What stands between `<!-- name -->` and `<!-- /name -->`, and in which manual."""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def section(text: str, name: str) -> str | None:
    """Return what stands between a table's markers; None without them."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    return found[1] if found else None


def update(manual: Path, name: str, current: str) -> None:
    """Write a table into its manual."""
    text = manual.read_text(encoding="utf-8")
    old = f"<!-- {name} -->\n{section(text, name)}<!-- /{name} -->"
    manual.write_text(text.replace(old, f"<!-- {name} -->\n{current}<!-- /{name} -->"), encoding="utf-8")


if __name__ == "__main__":
    CONFIGURATION.write_text(render_defaults(), encoding="utf-8")
    for table_name, (document, render) in TABLES.items():
        update(document, table_name, render())
