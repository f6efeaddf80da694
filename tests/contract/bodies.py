"""Bodies about the edge of what a batch may be: valid ones, each with something wrong, odd or merely unusual in it.

They are bytes put together from bytes, so that every spelling occurs. The same seed gives the same bodies.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from tests.unit.batches import encode, make_batch, spelled

NUMBERS = [
    *b"0 -0 -0.0 1 -1 3.0 1e2 1E+2 10e-1 2.5 1e-400 -1e-400 0e999 1e400 -1e400 1e308".split(),
    *b"9007199254740991.0 9007199254740991.5 9007199254740992e0 549755813887 549755813887.0".split(),
    *(b"%d" % (edge + step) for edge in (2**31, 2**53, 2**63, 2**64, -(2**53), -(2**63)) for step in (-1, 0, 1)),
    *(b"1" * 400, b"0." + b"0" * 400 + b"1", b"1." + b"0" * 99),
]
TEXTS = [
    *rb'"" "a" "normal" "final" "Final" "fin\u0061l" "1" "true" "\u0000" "\/\b\f\n\r\t\"\\"'.split(),
    *rb'"\ud83d" "\uDE00" "\ud83d\ude00" "\ude00\ud83d" "\\ud83d" "\\\ud83d" "\ufdd0" "\uFDEF\ue000" "\ufeff"'.split(),
    *(encode(text) for text in ("\ufdd0", "\ufdd0\ue000", "\ufdd0\ue040", "\ufeff", "\u2028", "\x7f", "é😀", " ")),
    *(b'"\xff"', b'"\xed\xa0\xbd"', b'"\xed\xa0\xbd\xed\xb8\x80"', b'"\xc0\x80"', b'"\xc3"', b'"\xf0\x9f\x98"'),
    *(
        b'"\xf4\x90\x80\x80"',
        b'"\xe0\x80\x80"',
        b'"\xf8\x88\x80\x80\x80"',
        b'"\xef\xb7"',
        b'"\xe1\x80\xe2\xf0\x91\x92"',
    ),
]
VALUES = [
    *b'null true false [] {} [null] {"a":1} {"a":1,"a":2} {"b":1,"1":2,"0":3} {"":{"":[]}} {"length":1,"0":1}'.split(),
    *b'{"__proto__":{"id":"p"}} {"__proto__":null,"__proto__":[1]} {"constructor":1,"toString":null}'.split(),
    *b'{"width":1,"height":2} {"events":[]} {"events":["\xef\xb7\x90"]}'.split(),
    *(b"[ ]", b"[" * 200 + b"]" * 200, b'{"a":' * 200 + b"1" + b"}" * 200),
]
NO_JSON = [
    *b"01 -01 1. .5 1e 1e+ - +1 0x1 1_0 1n NaN -Infinity 1.e1 undefined nul True \xd9\xa1".split(),
    *rb""" "\x41" "\'" "\0" "\u" "\u12" "\u123g" "\U0041" "\ud83d\u" "\ud8" " "\" 'a' "a""b" \u006eull """.split(),
    *b'[,] [1,] {,} {"a":1,} {a:1} {"a"} {"a":} {1:2} [1} [ } /**/ 1/**/'.split(),
    *(
        b"",
        b'"a\nb"',
        b'"\t"',
        b'"\x00"',
        b'"\x1f"',
        b'"\\\xef\xb7\x90\xee\x80\x80"',
        b"//\n1",
        b"[1 2]",
        b'{"a":1 "b":2}',
    ),
]
NAMES = [
    *rb'"id" "\u0069d" "ID" "" "__proto__" "constructor" "0" "\ud83d" "session" "user" "page" "replay"'.split(),
    *rb'"metadata" "flush" "events" "\u0065vents" "sequence" "windowId" "lastActivityAt" "url" "data" "type"'.split(),
    *(b'"timestamp"', '"\ufdd0"'.encode(), b'"\xff"', b'"id "', b'"events":[1],"x"', b"id", b"1", b"null"),
]
CULPRITS = [
    *(bytes([byte]) for byte in b'"\\{}[],:0123456789-+.eEutfn/ \t\r\n\x00\x08\x0b\x0c\x1f\x7f\x80\xa0\xc3\xef\xff'),
    *(character.encode() for character in "\ufeff\u2028\u2029\xa0\u1680\u3000\u0085\ufdd0\ue040"),
    *rb'\ud83d \uDE00 \u \ufdd0 \\ ,, ,] ,} "":0, NaN // /**/ 1e999'.split(),
]
ENDS = [
    b"\xef\xbb\xbf",
    b"\xef\xbb\xbf\xef\xbb\xbf",
    b" ",
    b"\r\n\t",
    b"\x00",
    b"\xc2\xa0",
    b"\xff\xfe",
    b"{}",
    b"]",
    b",",
]

_KEPT_BYTES = 1_000
"""Larger events of recordings stay out of what is mutated: how many bodies are tried matters more than their size."""

_KEPT_EVENTS = 3


def _paths(value: Any) -> Iterator[str]:
    names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield str(name)
        yield from (f"{name}.{path}" for path in _paths(value[name]))


PATHS = [
    *_paths(make_batch()),
    *("extra", "session.extra", "user.__proto__", "page.viewport.extra", "replay.extra", "replay.events.0.extra"),
]
"""Every place of a batch, and some that no schema knows."""


def small(body: bytes) -> dict[str, Any]:
    """Return a recorded batch with its first small events only, or with one that is smaller than any."""
    batch: dict[str, Any] = json.loads(body)
    events = [event for event in batch["replay"]["events"] if len(json.dumps(event)) <= _KEPT_BYTES][:_KEPT_EVENTS]
    batch["replay"]["events"] = events or [{"timestamp": 1, "type": 0, "data": {}}]
    return batch


def places(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Yield the parent and the name or index of every value within a value, to some depth."""
    if not depth or not isinstance(value, dict | list):
        return
    for name in value if isinstance(value, dict) else range(len(value)):
        yield value, name
        yield from places(value[name], depth - 1)


def systematic_bodies() -> Iterator[bytes]:
    """Yield a valid batch with every member in every spelling, and cut at every byte."""
    body = encode(make_batch())
    for text in (*NUMBERS, *TEXTS, *VALUES, *NO_JSON):
        yield text
        yield body + text
        for path in PATHS:
            yield spelled(path, text)
    for at in range(len(body)):
        yield body[:at]
        yield body[:at] + body[at + 1 :]
        yield body[:at] + b"\x00" + body[at:]


def mutated_bodies(templates: list[dict[str, Any]], count: int, seed: int) -> Iterator[bytes]:
    """Yield templates that were changed in one or a few ways each, of structure and of spelling."""
    chance = random.Random(seed)
    for _ in range(count):
        body = mutate_structure(copy.deepcopy(chance.choice(templates)), chance)
        if chance.random() < 0.3:
            body = _splice(body, chance)
        if chance.random() < 0.1:
            body = chance.choice(ENDS) + body
        if chance.random() < 0.1:
            body += chance.choice(ENDS)
        if chance.random() < 0.02:
            body = body[: chance.randrange(len(body) + 1)]
        yield body


def mutate_structure(batch: Any, chance: random.Random) -> bytes:
    """Return the JSON of an object or array that is changed in its members and their spelling; it is used up."""
    spellings: list[tuple[bytes, bytes]] = []

    def mark(spelling: bytes) -> str:
        """Return a text that is written as something else in the end."""
        text = f"\N{SNOWMAN}{len(spellings)}"
        spellings.append((encode(text), spelling))
        return text

    def any_value() -> bytes:
        return chance.choice(chance.choice((NUMBERS, TEXTS, VALUES, NUMBERS, TEXTS, VALUES, NO_JSON)))

    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        found = list(places(batch, chance.choice((2, 5, 20))))
        if not found:
            break
        parent, member = chance.choice(found)
        value = parent[member]
        way = chance.randrange(6)
        if way <= 1:
            parent[member] = mark(any_value())
        elif way == 2:
            del parent[member]
        elif isinstance(parent, list):
            parent.insert(member, value if way == 3 else mark(any_value()))
        elif way == 3:  # under another name
            parent[mark(chance.choice(NAMES))] = parent.pop(member)
        elif way == 4:  # beside another
            parent[mark(chance.choice(NAMES))] = mark(any_value())
        else:  # twice, the old value now first and now last
            pair = [encode(value), any_value()]
            chance.shuffle(pair)
            parent[member] = mark(pair[0] + b"," + encode(member) + b":" + pair[1])
    body = encode(batch)
    for marker, spelling in reversed(spellings):  # what was marked later may stand within what was marked before
        body = body.replace(marker, spelling)
    return body


def _splice(body: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 2))):
        start = chance.randrange(len(body) + 1)
        end = start + chance.choice((0, 0, 0, 1, 2, 6))
        body = body[:start] + chance.choice([b"", *CULPRITS]) + body[end:]
    return body
