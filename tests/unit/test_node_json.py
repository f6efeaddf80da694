from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Raw

from relay.protocol.node_json import is_utf8, protect, restore, restore_text, split_events, walk_items
from tests.unit.json_texts import BLANKS, PIECES, STRINGS, VALUES


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
