from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Raw

from relay.protocol.node_json import is_utf8, protect, restore, restore_text, split_events, walk_items
from tests.unit.node import ask_node

# -- JSON texts, bytes and not values, so that every spelling occurs

PIECES = st.sampled_from(
    [
        *(b"a", b" ", b"0", b"[", b"}", b",", b":", b"u", b"d83d", "é".encode(), "😀".encode()),
        *(rb"\\", rb"\"", rb"\n", rb"\/", rb"\u0041", rb"\u0000", rb"\uD83D\uDE00", rb"\ud83d\ude00"),
        *(rb"\ud83d", rb"\uDE00", rb"\ud800", rb"\uDBFF", rb"\udc00", rb"\udfff"),
        *(rb"\ufdd0", rb"\uFDEF", rb"\ue000", rb"\uE03f", rb"\ue040", rb"\ufdcf", rb"\ufdf0", rb"\ufeff"),
        *(text.encode() for text in ("\ufdd0", "\ufdef", "\ue000", "\ue03f", "\ue040", "\ufdcf", "\ufeff")),
        *(b"\xff", b"\xed\xa0\xbd", b"\xef\xb7", b"\xc3", b"\xf0\x9f"),
    ]
)
STRINGS = st.lists(PIECES, max_size=6).map(lambda pieces: b'"%b"' % b"".join(pieces))
NUMBERS = st.sampled_from(
    [b"0", b"-0", b"3.0", b"1e2", b"1E+2", b"1e999", b"-1.5e-300", b"123456789012345678901234567890"]
)
BLANKS = st.sampled_from([b"", b"", b" ", b"\r\n\t"])


def lists_of(items: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Return arrays, with blanks about their commas."""
    return st.tuples(BLANKS, st.lists(items, max_size=4), BLANKS).map(
        lambda parts: b"[%b%b]" % (parts[0], (parts[2] + b"," + parts[0]).join(parts[1]))
    )


def objects_of(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Return objects, repeated names among them."""
    members = st.tuples(STRINGS, BLANKS, values).map(
        lambda parts: b"%b%b:%b%b" % (parts[0], parts[1], parts[1], parts[2])
    )
    return st.lists(members, max_size=4).map(lambda found: b"{%b}" % b",".join(found))


VALUES = st.recursive(
    STRINGS | NUMBERS | st.sampled_from([b"null", b"true", b"false"]),
    lambda inner: lists_of(inner) | objects_of(inner),
    max_leaves=12,
)


def read(text: bytes) -> Any:
    """Return what upstream makes of a text, by a parser that is not ours; objects as lists of pairs."""
    return json.loads(text.decode("utf-8", "replace").removeprefix("\ufeff"), object_pairs_hook=list)


# -- protecting and restoring


@given(VALUES, st.sampled_from([b"", b"\xef\xbb\xbf"]))
@example(rb'"\\ud83d"', b"")
@example(rb'"\\\ud83d"', b"")
@example(rb'"\ud83d\ud83d\ude00\ude00"', b"")
@example(rb'{"\ud800":1,"\ufdd0\ue000":2}', b"")
@example('"\ufdd0\ue000"'.encode(), b"")
def test_what_is_protected_can_be_parsed_and_restored(text: bytes, mark: bytes) -> None:
    """The parser reads every protected text, and restoring gives what the client meant, name for name."""
    protected = protect(mark + text)
    assert bytes(msgspec.json.decode(protected, type=Raw)) == protected
    assert read(restore(protected)) == read(mark + text)
    assert is_utf8(restore(protected))


@given(st.lists(VALUES, max_size=5))
def test_each_slice_restores_by_itself(texts: list[bytes]) -> None:
    """Values cut out of a protected array are restored without their neighbours."""
    slices = msgspec.json.decode(protect(b"[%b]" % b",".join(texts)), type=list[Raw])
    assert [read(restore(bytes(piece))) for piece in slices] == [read(text) for text in texts]


@given(st.lists(PIECES.filter(lambda piece: b"\\u" not in piece and is_utf8(piece)), max_size=20))
def test_bytes_that_need_no_protection_are_kept(pieces: list[bytes]) -> None:
    """Text without surrogates comes back as the very bytes it was, raw noncharacters included."""
    text = b'"%b"' % b"".join(pieces)
    assert restore(protect(text)) == text


@given(st.lists(STRINGS, unique_by=lambda text: read(text), min_size=2, max_size=6))
@example([rb'"\ud800"', rb'"\ufdd0\ue000"', rb'"\ufdd0\ue040"', rb'"\ufdd0"'])
def test_names_that_differ_stay_different(names: list[bytes]) -> None:
    """No two names of an object become one by being protected."""
    text = b"{%b}" % b",".join(b"%b:0" % name for name in names)
    assert len(msgspec.json.decode(protect(text), type=dict[str, Raw])) == len(names)


@given(STRINGS.filter(is_utf8))
def test_a_text_reads_the_same_on_both_paths(text: bytes) -> None:
    """A string without lone surrogates, decoded after protection, equals the string decoded without it."""
    try:
        plain = msgspec.json.decode(text, type=str)
    except msgspec.DecodeError:
        return
    assert restore_text(msgspec.json.decode(protect(text), type=str)) == plain


@pytest.mark.parametrize("text", [b'"\\\xef\xb7\x90"', b'"\\\xef\xb7\x90\xee\x80\x80"', rb'"\u12"', rb'"\ud8"', b'"\\'])
def test_protecting_makes_nothing_valid_that_was_not(text: bytes) -> None:
    """A backslash before a noncharacter, or half an escape, is as wrong as it was."""
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(protect(text), type=Raw)


def test_a_body_of_escapes_costs_no_call_for_each() -> None:
    """Only surrogates and noncharacters are looked at in Python; a megabyte of other escapes passes through."""
    text = rb'"%b"' % (rb"\n\\" * 200_000)
    assert protect(text) == text


# -- single events


@given(st.lists(VALUES, min_size=1, max_size=6), BLANKS)
def test_a_run_splits_into_its_events_byte_for_byte(events: list[bytes], blank: bytes) -> None:
    """Whatever spelling a client chose, the event that leaves is the event that came."""
    events = [event.decode("utf-8", "replace").encode() for event in events]
    assert split_events((blank + b"," + blank).join(events)) == events
    assert list(walk_items((blank + b"," + blank).join(events))) == events


@pytest.mark.parametrize("depth", [10, 900, 990, 1_000, 100_000])
def test_a_run_splits_however_deep_its_events_are(depth: int) -> None:
    """An event that was accepted can be cut out again, from any depth of the stack."""
    event = b'{"data":%b"\\ud83d]"%b}' % (b"[" * depth, b"]" * depth)
    assert split_events(b"%b,1,%b" % (event, event)) == [event, b"1", event]


@pytest.mark.parametrize("run", [b"{", b"[[]", b'{"a":[}', b"[,"])
def test_what_is_no_run_is_refused(run: bytes) -> None:
    """A run with unpaired brackets, which only a rotten disk could hold, is an error and not a guess."""
    with pytest.raises(ValueError, match="do not pair up"):
        split_events(run)


# -- Node itself

TEMPLATES = [
    b'{"a":[1,-2.5e3,"x\\n\\u0041\\ud83d\\ude00",null,true,false,{}],"b":{"c":"\xc3\xa9"}}',
    b'["\\ud83d","\\\\ud83d","\\ude00\\ud83d",{"\\udc00":0,"\\udc00":1}]',
    b" [ 0 , 1.0 , 1e2 , 1E-2 , 1e999 ] ",
    b'"plain"',
    '{"\ufdd0":"\ufdef\ue000","\ue040":"\\ufdd0\\ue000"}'.encode(),
]
CULPRITS = [
    *(bytes([byte]) for byte in b'"\\{}[],:0123456789-+.eEutfn/ \t\r\n\x00\x08\x0b\x0c\x1f\x7f\xa0\xff'),
    *(
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"\xc2\xa0",
        b"\xef\xb7\x90",
        b"\xed\xa0\x80",
        b"\xc0\x80",
        b"\xf4\x90\x80\x80",
    ),
    *(b"NaN", b"Infinity", b"-Infinity", b"undefined", b"0x1", b"01", b"1.", b".5", b"1e", b"-", b"'", b"/**/", b"//"),
    *(
        rb"\ud83d",
        rb"\uDE00",
        rb"\u",
        rb"\u12",
        rb"\x41",
        rb"\'",
        rb"\0",
        rb"\ufdd0",
        b",,",
        b",]",
        b",}",
        b"__proto__",
    ),
]


def edge_bodies(count: int) -> list[bytes]:
    """Return bodies that are nearly JSON: templates with a few bytes put in, taken out or exchanged."""
    chance = random.Random(2026)
    bodies = [*TEMPLATES, *CULPRITS, b"", b"[" * 200 + b"]" * 200]
    bodies += [b"[%b]" % culprit for culprit in CULPRITS] + [b'"%b"' % culprit for culprit in CULPRITS]
    while len(bodies) < count:
        body = chance.choice(TEMPLATES)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            start = chance.randrange(len(body) + 1)
            end = min(len(body), start + chance.choice((0, 0, 1, 2, 6)))
            body = body[:start] + chance.choice([b"", *CULPRITS]) + body[end:]
        bodies.append(body)
    return bodies


def test_we_accept_what_node_accepts_and_mean_the_same() -> None:
    """On thousands of texts about the edge of JSON, JSON.parse and we agree on which are JSON, and on their values."""
    bodies = edge_bodies(6_000)
    restored: list[bytes | None] = []
    for body in bodies:
        protected = protect(body)
        try:
            msgspec.json.decode(protected, type=Raw)
            restored.append(restore(protected))
        except msgspec.DecodeError:
            restored.append(None)
    parse = "(input) => JSON.stringify(JSON.parse(new TextDecoder().decode(input)))"
    theirs = ask_node(parse, bodies)
    ours = ask_node(parse, [b"" if text is None else text for text in restored])
    assert [
        (body, text) for body, text, want, got in zip(bodies, restored, theirs, ours, strict=True) if want != got
    ] == []
    assert 1_000 < sum(want is None for want in theirs) < 5_500


def test_depth_is_the_one_thing_that_node_takes_and_we_do_not() -> None:
    """Values deeper than the parser's recursion limit are refused, though Node reads them; half the limit is read."""
    deep, fair = (b"[" * depth + b"]" * depth for depth in (5_000, 500))
    assert ask_node("(input) => Array.isArray(JSON.parse(input.toString()))", [deep, fair]) == [True, True]
    assert msgspec.json.decode(protect(fair), type=Raw)
    with pytest.raises(RecursionError):
        msgspec.json.decode(protect(deep), type=Raw)
