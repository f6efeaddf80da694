"""What is written from the code and held against it: tables of README.md, and config/relay.toml.

`make tables` brings them up to date.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from relay.cli import build_parser
from relay.exit_codes import ExitCode
from relay.settings.options import options
from relay.settings.rendering import render_defaults

CHECKOUT = Path(__file__).parents[2]
README = CHECKOUT / "README.md"
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


TABLES = {"commands": command_table, "options": option_table, "exit-codes": exit_code_table}
"""What stands between `<!-- name -->` and `<!-- /name -->`, by name."""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def section(text: str, name: str) -> str | None:
    """Return what stands between a table's markers; None without them."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    return found[1] if found else None


def updated(text: str) -> str:
    """Return the text with every table replaced by the current one."""
    for name, render in TABLES.items():
        current = section(text, name)
        if current is not None:
            text = text.replace(
                f"<!-- {name} -->\n{current}<!-- /{name} -->", f"<!-- {name} -->\n{render()}<!-- /{name} -->"
            )
    return text


if __name__ == "__main__":
    CONFIGURATION.write_text(render_defaults(), encoding="utf-8")
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
