"""The options of `relay.config` as values: what each is called, may be, is by default, and why.

Rules:
1. Everything is read from the type annotations in `relay.config`; nothing is said twice.
2. A secret is shown as asterisks, and no value is shown with the credentials of a URL in it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import msgspec
from msgspec import inspect

from relay.config import Config
from relay.protocol.fingerprint import redact
from relay.settings.notation import write_value

MASK = "********"
"""What is shown of a secret; its length says nothing about the secret's."""

MAX_INTEGER = 2**63 - 1
"""Largest integer of TOML 1.0 and of SQLite."""

MAX_SHOWN = 100
"""Characters of a value in a message; a pasted file must not fill the screen."""

Bound: TypeAlias = tuple[str, float, Callable[[float, float], bool]]
"""A number's bound: the sign, the limit, and the comparison that a value must pass."""

COMPARISONS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("ge", ">=", operator.ge),
    ("gt", ">", operator.gt),
    ("le", "<=", operator.le),
    ("lt", "<", operator.lt),
)
"""msgspec's name of a bound, its sign, and the comparison that a value must pass."""

CREDENTIALS = re.compile(r"(?<=//).*(?=@)|(?<=\?).+(?=\")")
"""User and password of a URL, greedily, because a password may hold `/` or `@` where it should not; and the query
of anything in quotes."""


class Option(msgspec.Struct, frozen=True):
    """One option."""

    section: str
    """Name of its section."""
    name: str
    """Name within the section."""
    type: inspect.Type
    """Type and bounds."""
    default: Any
    """Value where no source names the option."""
    reason: str
    """What the option does, and why the default is what it is."""
    secret: bool
    """True where the value must not be shown."""

    @property
    def dotted(self) -> str:
        """The name as messages, `--set` and documents write it: `section.name`."""
        return f"{self.section}.{self.name}"

    @property
    def is_text(self) -> bool:
        """True where a value from the environment or `--set` needs no quotes."""
        return isinstance(self.type, inspect.StrType | inspect.LiteralType)

    @property
    def kind(self) -> str:
        """What the option may be, in words: `integer >= 1 and <= 64`."""
        return _kind(self.type)

    def bounds(self) -> list[Bound]:
        """Return a number's bounds; none where it has none, or is no number."""
        return _bounds(self.type)

    def problem(self, value: Any) -> str | None:
        """Say what is wrong with a value, as `must be …`; None where nothing is."""
        return _problem(self.type, value)

    def mask(self, value: Any) -> str:
        """Return a value in TOML notation, or asterisks where it is a secret. An empty secret is none."""
        return write_value(MASK if self.secret and value else value)

    def show(self, value: Any) -> str:
        """Return a value as it may stand in a message: masked, without credentials, not too long."""
        text = redact(CREDENTIALS.sub(MASK, self.mask(value)))
        return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _kind(what: inspect.Type) -> str:
    match what:
        case inspect.LiteralType():
            return " or ".join(map(write_value, what.values))
        case inspect.UnionType():
            return " or ".join(map(_kind, what.types))
        case inspect.StrType():
            return "text, not empty" if what.min_length else "text"
        case inspect.VarTupleType():
            return f"list of {_kind(what.item_type)}"
        case inspect.DictType():
            return f"table of {_kind(what.value_type)}"
    noun = "integer" if isinstance(what, inspect.IntType) else "number"
    limits = " and ".join(f"{sign} {write_value(limit)}" for sign, limit, _ in _bounds(what))
    return f"{noun} {limits}".rstrip()


def _bounds(what: inspect.Type) -> list[Bound]:
    if isinstance(what, inspect.UnionType):
        return [bound for member in what.types for bound in _bounds(member)]
    limits = ((sign, getattr(what, name, None), holds) for name, sign, holds in COMPARISONS)
    return [(sign, limit, holds) for sign, limit, holds in limits if limit is not None]


def _problem(what: inspect.Type, value: Any) -> str | None:
    match what:
        case inspect.LiteralType():
            return None if isinstance(value, str) and value in what.values else f"must be {_kind(what)}"
        case inspect.UnionType():  # of a number and words
            number, words = what.types
            if not isinstance(value, int | float):
                return None if _problem(words, value) is None else f"must be {_kind(what)}"
            return _problem(number, value)
        case inspect.StrType():
            return _text_problem(value, what.min_length or 0)
        case inspect.VarTupleType():
            if not isinstance(value, list):
                return 'must be a list: ["…", "…"]'
            return next(
                (f"each member: {problem}" for one in value if (problem := _problem(what.item_type, one))), None
            )
        case inspect.DictType():
            if not isinstance(value, dict):
                return 'must be a table: { name = ["…", "…"] }'
            problems = (_problem(what.value_type, one) for one in value.values())
            return next((f"each name: {problem}" for problem in problems if problem), None)
    return _number_problem(what, value)


def _text_problem(value: Any, min_length: int) -> str | None:
    if not isinstance(value, str):
        return "must be text in quotes"
    if not value.isprintable():
        # No address, URL, path or key needs them; a line end pasted along is the usual one.
        return "must not contain control or invisible characters"
    return None if len(value) >= min_length else "must not be empty"


def _number_problem(what: inspect.Type, value: Any) -> str | None:
    is_integer = isinstance(what, inspect.IntType)
    # bool is an int to Python, but `true` requests a minute is a slip.
    if isinstance(value, bool) or not isinstance(value, int if is_integer else int | float):
        return "must be an integer" if is_integer else "must be a number"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    for sign, limit, holds in _bounds(what):
        if not holds(value, limit):
            return f"must be {sign} {write_value(limit)}"
    return f"must be <= {write_value(MAX_INTEGER)}" if value > MAX_INTEGER else None


def sections() -> dict[str, type[msgspec.Struct]]:
    """Return every section's class by name, in the order of declaration."""
    return {field.name: type(field.default) for field in msgspec.structs.fields(Config)}


def options() -> dict[str, Option]:
    """Return every option by its dotted name, in the order of declaration."""
    found = {}
    for section, owner in sections().items():
        for field in cast(inspect.StructType, inspect.type_info(owner)).fields:
            meta = cast(inspect.Metadata, field.type)
            option = Option(
                section=section,
                name=field.name,
                type=meta.type,
                default=field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory(),
                reason=(meta.extra_json_schema or {})["description"],
                secret=bool((meta.extra or {}).get("secret")),
            )
            found[option.dotted] = option
    return found
