"""The published schema of a replay batch, twice: as types for the fast path, as a list of issues for the answer.

The fast path says yes only where the schema does. Where it says no, `find_issues` decides, by JavaScript's notion
of numbers (`3.0` and `1e2` are integers, `1e999` is none), and names what is wrong as zod would.

Issues look at one JSON value's first byte and length; event payloads are never built, so that a hostile body costs
no more memory than its slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw

from relay.protocol.node_json import walk_items

MAX_SAFE_INTEGER = 2**53 - 1
"""Integers beyond it are none to JavaScript, so upstream refuses them."""

MAX_BATCH_EVENTS = 16_384
"""Events of one client batch: an address leaves 14 bits for the index of an event in its batch."""

MAX_SEQUENCE = (MAX_SAFE_INTEGER + 1) // MAX_BATCH_EVENTS - 1
"""Largest client sequence whose addresses are safe integers: 2**39 - 1."""

MAX_ISSUES = 10
"""Issues named in an answer; a batch that is wrong once tends to be wrong in every event."""

_MAX_SLICED_BYTES = 4_194_304
"""Slicing an array into its items takes up to 32 times its bytes (`[0,0,…]`), so a larger one is walked instead."""

ABSENT = Raw(b"")
"""An optional member that is not there; null is there."""

Sequence = Annotated[int, Meta(ge=0, le=MAX_SEQUENCE)]
NonEmpty = Annotated[str, Meta(min_length=1)]


class Session(msgspec.Struct):
    """`session`, its known members."""

    id: NonEmpty
    windowId: NonEmpty  # noqa: N815 - the contract's spelling
    startedAt: float  # noqa: N815
    lastActivityAt: float  # noqa: N815
    url: str


class User(msgspec.Struct):
    """`user`, its known members."""

    anonymousId: NonEmpty  # noqa: N815
    id: str | None = None
    properties: dict[str, Raw] | None = None


class Viewport(msgspec.Struct):
    """`page.viewport`."""

    width: float
    height: float


class Page(msgspec.Struct):
    """`page`, its known members."""

    url: str
    referrer: str | None = None
    viewport: Viewport | None = None


class Metadata(msgspec.Struct):
    """`metadata`, its known members."""

    userAgent: str | None = None  # noqa: N815
    language: str | None = None


class Replay(msgspec.Struct):
    """`replay`, its known members."""

    events: Raw
    sequence: Sequence


class PlainReplay(Replay, forbid_unknown_fields=True):
    """`replay` with no other members than the known ones."""


class Batch(msgspec.Struct):
    """A batch, its known members."""

    session: Raw
    user: Raw
    page: Raw
    replay: Replay
    metadata: Raw = ABSENT
    flush: Literal["normal", "final"] = "normal"


class PlainBatch(Batch, forbid_unknown_fields=True):
    """A batch with no other members than the known ones, as the SDK sends it."""

    replay: PlainReplay


class Event(msgspec.Struct, gc=False):
    """An event's required members; `data` may be anything but absent."""

    timestamp: float
    type: Annotated[int, Meta(ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)]
    data: Raw


Members = Mapping[str, Raw]
Path = tuple[str | int, ...]
Issue = dict[str, Any]

_MEMBERS = msgspec.json.Decoder(dict[str, Raw])
_ITEMS = msgspec.json.Decoder(list[Raw])
_STRING = msgspec.json.Decoder(str)

_KINDS = {ord('"'): "string", ord("{"): "object", ord("["): "array", ord("t"): "boolean", ord("f"): "boolean"}
_KINDS |= {ord("n"): "null"} | dict.fromkeys(b"-0123456789", "number")


def members(value: Raw | bytes) -> dict[str, Raw]:
    """Return an object's members by name; of a repeated name the last, as in JavaScript."""
    return _MEMBERS.decode(value)


def events(value: Raw) -> list[Raw]:
    """Return the items of `replay.events`, but at most one more than a batch may have."""
    if len(value) <= _MAX_SLICED_BYTES:
        return _ITEMS.decode(value)[: MAX_BATCH_EVENTS + 1]
    return [Raw(item) for item in islice(walk_items(bytes(value)[1:-1]), MAX_BATCH_EVENTS + 1) if item]


def string(value: Raw) -> str:
    """Return a string's characters."""
    return _STRING.decode(value)


def number(value: Raw) -> float:
    """Return a number as JavaScript reads it, infinite where it is too large."""
    return float(bytes(value))


def kind(value: Raw | None) -> str:
    """Return JavaScript's name for a value's type; `undefined` for a member that is not there."""
    if value is None:
        return "undefined"
    return _KINDS[memoryview(value)[0]]


def find_issues(batch: Raw) -> list[Issue]:
    """Return what makes a JSON value no replay batch: at most `MAX_ISSUES`, empty where it is one."""
    issues: list[Issue] = []
    for issue in _check_batch(batch):
        issues.append(issue)
        if len(issues) == MAX_ISSUES:
            break
    return issues


def _wrong(path: Path, expected: str, value: Raw | None) -> Issue:
    received = kind(value)
    message = f"Invalid input: expected {expected}, received {received}"
    return {"code": "invalid_type", "expected": expected, "path": list(path), "message": message}


def _check_batch(value: Raw) -> Iterator[Issue]:
    if kind(value) != "object":
        yield _wrong((), "object", value)
        return
    batch = members(value)
    yield from _check_object(batch, ("session",), _SESSION_MEMBERS)
    yield from _check_object(batch, ("user",), _USER_MEMBERS)
    yield from _check_object(batch, ("page",), _PAGE_MEMBERS)
    yield from _check_object(batch, ("replay",), _REPLAY_MEMBERS)
    if kind(batch.get("metadata")) not in ("undefined", "null"):
        yield from _check_object(batch, ("metadata",), _METADATA_MEMBERS)
    flush = batch.get("flush")
    if flush is not None and (kind(flush) != "string" or string(flush) not in ("normal", "final")):
        yield {
            "code": "invalid_value",
            "values": ["normal", "final"],
            "path": ["flush"],
            "message": 'Invalid option: expected one of "normal"|"final"',
        }


def _check_object(parent: Members, path: Path, rules: Mapping[str, str]) -> Iterator[Issue]:
    """Check an object that must be there, and its members, each by the rule that bears its name."""
    value = parent.get(str(path[-1]))
    if value is None or kind(value) != "object":
        yield _wrong(path, "object", value)
        return
    found = members(value)
    for name, rule in rules.items():
        yield from _check_member(found.get(name), (*path, name), rule)


def _check_member(value: Raw | None, path: Path, rule: str) -> Iterator[Issue]:
    if rule.endswith("?"):
        if kind(value) in ("undefined", "null"):
            return
        rule = rule[:-1]
    if rule == "viewport":
        yield from _check_object({"viewport": value} if value is not None else {}, path, _VIEWPORT_MEMBERS)
    elif rule == "events":
        yield from _check_events(value, path)
    elif rule in ("integer", "sequence"):
        yield from _check_integer(value, path, rule)
    elif rule == "data":
        if value is None:
            yield _wrong(path, "nonoptional", value)
    elif kind(value) != rule.removesuffix("+"):
        yield _wrong(path, rule.removesuffix("+"), value)
    elif rule == "number" and value is not None and abs(number(value)) == float("inf"):
        yield _wrong(path, "number", value) | {"message": "Invalid input: expected number, received Infinity"}
    elif rule == "string+" and value is not None and not string(value):
        yield {
            "code": "too_small",
            "origin": "string",
            "minimum": 1,
            "inclusive": True,
            "path": list(path),
            "message": "Too small: expected string to have >=1 characters",
        }


def _check_integer(value: Raw | None, path: Path, rule: str) -> Iterator[Issue]:
    if value is None or kind(value) != "number":
        yield _wrong(path, "number", value)
        return
    found = number(value)
    if not found.is_integer():
        yield _wrong(path, "int", value)
        return
    low, high = (0, MAX_SEQUENCE) if rule == "sequence" else (-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
    if found < low:
        code, bound, relation = "too_small", low, ">="
    elif found > high:
        code, bound, relation = "too_big", high, "<="
    else:
        return
    yield {
        "code": code,
        "origin": "number",
        "minimum" if code == "too_small" else "maximum": bound,
        "inclusive": True,
        "path": list(path),
        "message": f"Too {code[4:]}: expected number to be {relation}{bound}",
    }


def _check_events(value: Raw | None, path: Path) -> Iterator[Issue]:
    if value is None or kind(value) != "array":
        yield _wrong(path, "array", value)
        return
    found = events(value)
    if not found:
        yield {
            "code": "too_small",
            "origin": "array",
            "minimum": 1,
            "inclusive": True,
            "path": list(path),
            "message": "Too small: expected array to have >=1 items",
        }
    for index, event in enumerate(found):
        where = (*path, index)
        if kind(event) != "object":
            yield _wrong(where, "object", event)
            continue
        event_members = members(event)
        for name, rule in _EVENT_MEMBERS.items():
            yield from _check_member(event_members.get(name), (*where, name), rule)


# A rule is a JSON type; `+` asks for at least one character, `?` lets the member be absent or null.
_SESSION_MEMBERS = {
    "id": "string+",
    "windowId": "string+",
    "startedAt": "number",
    "lastActivityAt": "number",
    "url": "string",
}
_USER_MEMBERS = {"anonymousId": "string+", "id": "string?", "properties": "object?"}
_PAGE_MEMBERS = {"url": "string", "referrer": "string?", "viewport": "viewport?"}
_VIEWPORT_MEMBERS = {"width": "number", "height": "number"}
_METADATA_MEMBERS = {"userAgent": "string?", "language": "string?"}
_REPLAY_MEMBERS = {"events": "events", "sequence": "sequence"}
_EVENT_MEMBERS = {"timestamp": "number", "type": "integer", "data": "data"}
