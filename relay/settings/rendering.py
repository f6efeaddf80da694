"""A configuration as TOML: the annotated file of defaults, and what `print-config` says."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from relay.config import Config
from relay.settings.notation import write_value
from relay.settings.options import Option, options, sections

WIDTH = 110
"""Columns of a comment; the line length of the code."""


def render_defaults() -> str:
    """Return TOML with every option at its default and the reason above it: the file `config/relay.toml`."""
    blocks = [
        _comment("The configuration of lucent-relay: every option, its default, and why.")
        + _comment("What is left out has the value given here. `lucent-relay check-config` finds mistakes.")
    ]
    for section, owner in sections().items():
        lines = f"{_comment((owner.__doc__ or '').strip())}[{section}]\n"
        for option in _options_of(section):
            lines += f"{_comment(option.reason)}{option.name} = {write_value(option.default)}\n"
        blocks.append(lines)
    return "\n".join(blocks)


def render_effective(config: Config, origins: Mapping[str, str]) -> str:
    """Return TOML with every option's value and where it came from; secrets are masked.

    Args:
        config: The values.
        origins: Where each came from, by dotted name.
    """
    blocks = []
    for section in sections():
        settings: Any = getattr(config, section)
        pairs = [
            (f"{option.name} = {option.mask(getattr(settings, option.name))}", origins[option.dotted])
            for option in _options_of(section)
        ]
        width = max(len(pair) for pair, _ in pairs)
        blocks.append(f"[{section}]\n" + "".join(f"{pair:<{width}}  # {origin}\n" for pair, origin in pairs))
    return "\n".join(blocks)


def _options_of(section: str) -> list[Option]:
    return [option for option in options().values() if option.section == section]


def _comment(text: str) -> str:
    """Return text as wrapped comment lines."""
    lines = textwrap.wrap(text, WIDTH - len("# "), break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)
