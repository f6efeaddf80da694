from __future__ import annotations

import re

import pytest

from relay.settings.options import options, sections
from relay.settings.rendering import render_defaults
from tests.repo.tables import CONFIGURATION, TABLES, section


@pytest.mark.parametrize("name", TABLES)
def test_table_is_current(name: str) -> None:
    """A table of a manual says what the code says; `make tables` brings it up to date."""
    manual, render = TABLES[name]
    assert section(manual.read_text(encoding="utf-8"), name) == render()


def test_configuration_file_is_the_defaults() -> None:
    """config/relay.toml is the rendering of the defaults."""
    assert CONFIGURATION.read_text(encoding="utf-8") == render_defaults()


def test_every_option_gives_its_reason() -> None:
    """Options and sections are described in whole sentences, and numbers have a bound."""
    for name, option in options().items():
        assert re.fullmatch(r"[A-Z`\"].*[.]", option.reason), name
        assert option.bounds() or not option.kind.startswith(("integer", "number")), name
    for name, owner in sections().items():
        assert re.fullmatch(r"[A-Z].*[.]", owner.__doc__ or ""), name


def test_options_carry_their_unit() -> None:
    """A number of seconds is a float or int named so, and no option repeats its section's name."""
    for option in options().values():
        assert not option.name.startswith(f"{option.section}_")
        assert not re.search(r"_(?:secs?|ms|minutes|kb|mb|timeout|interval)$", option.name), option.dotted
        assert not option.name.startswith(("no_", "disable", "not_")), option.dotted
