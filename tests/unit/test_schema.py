from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from relay.errors import InvalidBatch
from relay.protocol import schema
from relay.protocol.replay import decode_batch
from relay.protocol.schema import MAX_ISSUES, MAX_SAFE_INTEGER, MAX_SEQUENCE
from relay.sandbox.schema import BatchSchema, load_description
from tests.unit.batches import changed, encode, make_batch, spelled

MAX_ENVELOPE_BYTES = 262_144


def issues_of(body: bytes) -> list[dict[str, Any]]:
    """Return the issues with which a body is refused; none where it is accepted."""
    try:
        decode_batch(body, MAX_ENVELOPE_BYTES)
    except InvalidBatch as refusal:
        return refusal.details
    return []


ANYTHING: tuple[Any, ...] = (None, True, 1, "text", [], {})
"""A value of each kind."""

ACCEPTED: list[tuple[str, Any]] = [
    *((path, ...) for path in ("metadata", "metadata.userAgent", "metadata.language", "flush")),
    *((path, ...) for path in ("user.id", "user.properties", "page.referrer", "page.viewport")),
    *((path, None) for path in ("metadata", "metadata.userAgent", "metadata.language")),
    *((path, None) for path in ("user.id", "user.properties", "page.referrer", "page.viewport")),
    *(("replay.events.0.data", data) for data in (*ANYTHING, 0, "", False, "\ud83d")),
    *(("replay.events.0.type", number) for number in (-1, 0, 2.0, MAX_SAFE_INTEGER, -MAX_SAFE_INTEGER)),
    *(("replay.events.0.timestamp", number) for number in (-1, 0.5, 1e300, 2**70)),
    *(("replay.sequence", number) for number in (0, 3.0, MAX_SEQUENCE, float(MAX_SEQUENCE))),
    *((f"session.{name}", number) for name in ("startedAt", "lastActivityAt") for number in (-1, 0, 1e-300, 2**60)),
    *((path, "") for path in ("session.url", "page.url", "page.referrer", "user.id", "metadata.userAgent")),
    *((path, "\ud83d") for path in ("session.id", "session.windowId", "session.url", "user.anonymousId")),
    *((path, {"any": [1]}) for path in ("extra", "session.extra", "user.extra", "page.extra", "replay.extra")),
    *((path, {"any": [1]}) for path in ("metadata.extra", "page.viewport.extra", "replay.events.0.extra")),
    ("page.viewport", {"width": -1.5, "height": 0}),
    ("flush", "normal"),
    ("user.properties", {"deep": [{"any": "\ud83d"}]}),
]


@pytest.mark.parametrize(("path", "value"), ACCEPTED)
def test_what_is_published_is_accepted(path: str, value: Any) -> None:
    """Optional, nullable and unknown members pass, and so does every number that JavaScript calls right."""
    assert issues_of(encode(changed(path, value))) == []


OBJECTS = ("session", "user", "page", "replay", "page.viewport", "metadata", "user.properties", "replay.events.1")
STRINGS = (
    *("session.id", "session.windowId", "session.url", "user.anonymousId", "user.id", "page.url"),
    *("page.referrer", "metadata.userAgent", "metadata.language"),
)
NUMBERS = (
    "session.startedAt",
    "session.lastActivityAt",
    "page.viewport.width",
    "page.viewport.height",
    "replay.events.1.timestamp",
)
INTEGERS = ("replay.sequence", "replay.events.1.type")
NULLABLE = (
    *("user.id", "user.properties", "page.referrer", "page.viewport", "metadata"),
    *("metadata.userAgent", "metadata.language"),
)
OPTIONAL = (*NULLABLE, "flush")

JAVASCRIPT = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


def wrong_kinds() -> list[tuple[str, Any, str]]:
    """Return (path, value, expected): each member with a value of every kind that it may not have."""
    expected = dict.fromkeys(OBJECTS, "object") | dict.fromkeys(STRINGS, "string") | {"replay.events": "array"}
    expected |= dict.fromkeys((*NUMBERS, *INTEGERS), "number")
    return [
        (path, value, kind)
        for path, kind in expected.items()
        for value in ANYTHING
        if JAVASCRIPT[type(value)] != kind and not (value is None and path in NULLABLE)
    ]


@pytest.mark.parametrize(("path", "value", "expected"), wrong_kinds())
def test_a_value_of_another_kind_is_named(path: str, value: Any, expected: str) -> None:
    """The issue bears zod's code, the member's path, and what was found in JavaScript's words: true is no number."""
    received = JAVASCRIPT[type(value)]
    assert issues_of(encode(changed(path, value))) == [
        {
            "code": "invalid_type",
            "expected": expected,
            "path": [int(name) if name.isdigit() else name for name in path.split(".")],
            "message": f"Invalid input: expected {expected}, received {received}",
        }
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *((path, "object") for path in OBJECTS if path not in OPTIONAL and not path.endswith("1")),
        *((path, "string") for path in STRINGS if path not in OPTIONAL),
        *((path, "number") for path in (*NUMBERS, *INTEGERS)),
        ("replay.events", "array"),
        ("replay.events.1.data", "nonoptional"),
    ],
)
def test_a_missing_member_is_named(path: str, expected: str) -> None:
    """What must be there and is not is undefined, as zod calls it."""
    [issue] = issues_of(encode(changed(path, ...)))
    assert issue["code"] == "invalid_type"
    assert issue["path"] == [int(name) if name.isdigit() else name for name in path.split(".")]
    assert issue["message"] == f"Invalid input: expected {expected}, received undefined"


@pytest.mark.parametrize("path", ["session.id", "session.windowId", "user.anonymousId"])
def test_a_name_has_a_character(path: str) -> None:
    """The three identifiers may not be empty."""
    [issue] = issues_of(encode(changed(path, "")))
    assert (issue["code"], issue["path"], issue["minimum"]) == ("too_small", path.split("."), 1)
    assert issue["message"] == "Too small: expected string to have >=1 characters"


def test_a_batch_has_an_event() -> None:
    """An empty list of events, with blanks in it or without, is too small."""
    for text in (b"[]", b"[ \n]"):
        [issue] = issues_of(spelled("replay.events", text))
        assert (issue["code"], issue["path"], issue["origin"]) == ("too_small", ["replay", "events"], "array")
        assert issue["message"] == "Too small: expected array to have >=1 items"


@pytest.mark.parametrize("value", ["last", "", "Final", None, 1, ["final"]])
def test_flush_is_one_of_two_words(value: Any) -> None:
    """Anything but `normal` and `final`, null included, is no option."""
    [issue] = issues_of(encode(changed("flush", value)))
    assert (issue["code"], issue["path"], issue["values"]) == ("invalid_value", ["flush"], ["normal", "final"])
    assert issue["message"] == 'Invalid option: expected one of "normal"|"final"'


@pytest.mark.parametrize("text", [b"3.0", b"3e0", b"30E-1", b"0.3e+1", b"3.0000000000000000000000000001"])
def test_an_integer_may_be_spelled_like_a_fraction(text: bytes) -> None:
    """To JavaScript all of these are 3, so a type and a sequence may be written so."""
    assert issues_of(spelled("replay.events.0.type", text)) == []
    assert decode_batch(spelled("replay.sequence", text), MAX_ENVELOPE_BYTES).sequence == 3


@pytest.mark.parametrize(
    ("path", "text", "code", "message"),
    [
        ("replay.sequence", b"-1", "too_small", "Too small: expected number to be >=0"),
        ("replay.sequence", b"-3.0", "too_small", "Too small: expected number to be >=0"),
        ("replay.sequence", b"549755813888", "too_big", "Too big: expected number to be <=549755813887"),
        ("replay.sequence", b"1e300", "too_big", "Too big: expected number to be <=549755813887"),
        ("replay.sequence", b"9" * 400, "invalid_type", "Invalid input: expected int, received number"),
        ("replay.sequence", b"0.5", "invalid_type", "Invalid input: expected int, received number"),
        (
            "replay.events.1.type",
            b"9007199254740992",
            "too_big",
            f"Too big: expected number to be <={MAX_SAFE_INTEGER}",
        ),
        (
            "replay.events.1.type",
            b"-9007199254740992",
            "too_small",
            f"Too small: expected number to be >={-MAX_SAFE_INTEGER}",
        ),
        ("replay.events.1.type", b"1e999", "invalid_type", "Invalid input: expected int, received number"),
        ("replay.events.1.type", b"2.5", "invalid_type", "Invalid input: expected int, received number"),
        *(
            (path, text, "invalid_type", "Invalid input: expected number, received Infinity")
            for path in NUMBERS
            for text in (b"1e999", b"-1e999", b"1" * 400)
        ),
    ],
)
def test_a_number_out_of_range_is_named(path: str, text: bytes, code: str, message: str) -> None:
    """What JavaScript would read as too large, infinite or no integer is refused with the bound."""
    [issue] = issues_of(spelled(path, text))
    assert (issue["code"], issue["message"]) == (code, message)


@pytest.mark.parametrize("text", [b"-0", b"-0.0", b"0e5", b"0.0000"])
def test_minus_zero_is_zero(text: bytes) -> None:
    """JavaScript's two zeros are one sequence."""
    sequence = decode_batch(spelled("replay.sequence", text), MAX_ENVELOPE_BYTES).sequence
    assert math.copysign(1, sequence) == 1
    assert sequence == 0


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"1", b"true", b" false "])
def test_what_is_no_object_is_no_batch(body: bytes) -> None:
    """Any JSON value may arrive; the issue names the whole of it."""
    [issue] = issues_of(body)
    assert (issue["code"], issue["path"], issue["expected"]) == ("invalid_type", [], "object")


@pytest.mark.parametrize(
    "body", [b"", b" ", b"{", b"nul", b"{}{}", b"\xef\xbb\xbf", b"{'a':1}", b"\x00", b"[" * 100_000]
)
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    """A syntax error, or a depth that we do not read, is one issue of the whole body."""
    [issue] = issues_of(body)
    assert (issue["code"], issue["path"]) == ("custom", [])
    assert issue["message"].startswith("Body is not JSON that can be read: ")


def test_the_first_places_are_named_and_no_more() -> None:
    """Of a batch that is wrong in every event, the answer names ten places, in order."""
    batch = make_batch()
    batch["replay"]["events"] = [{"timestamp": 1, "type": 2, "data": {}}, *({"type": "x"} for _ in range(500))]
    issues = issues_of(encode(batch))
    assert len(issues) == MAX_ISSUES
    assert [issue["path"][2:] for issue in issues[:4]] == [[1, "timestamp"], [1, "type"], [1, "data"], [2, "timestamp"]]


def test_issues_stand_in_the_order_of_the_schema() -> None:
    """Several mistakes in different parts are all named, from the session to flush."""
    body = encode({"session": {}, "user": None, "page": {"url": 1}, "replay": {"events": 1}, "metadata": 1, "flush": 1})
    paths = [".".join(map(str, issue["path"])) for issue in issues_of(body)]
    assert paths == [
        *("session.id", "session.windowId", "session.startedAt", "session.lastActivityAt", "session.url"),
        *("user", "page.url", "replay.events", "replay.sequence", "metadata"),
    ]


def test_answers_repeat_nothing_of_what_was_recorded() -> None:
    """Messages name kinds and bounds, never a value."""
    for path in (*OBJECTS, *NUMBERS, *INTEGERS, "flush", "replay.events"):
        assert "secret" not in json.dumps(issues_of(encode(changed(path, "secret"))))


def test_a_large_array_is_walked_and_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """An array too large to be sliced gives the same items and issues, and no more than a batch may hold."""
    batch = make_batch()
    batch["replay"]["events"] += ["]", {"data": "}"}, None]
    body = encode(batch)
    sliced = issues_of(body)
    monkeypatch.setattr(schema, "_MAX_SLICED_BYTES", 0)
    assert issues_of(body) == sliced != []
    assert issues_of(spelled("replay.events", b"[ ]"))[0]["code"] == "too_small"
    assert len(schema.events(Raw(b"[%b0]" % (b"0," * 20_000)))) == schema.MAX_BATCH_EVENTS + 1


# -- against the published description

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**39) + 1, 2**39 - 1)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.sampled_from(["", "normal", "final", "text"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["url", "width", "x"]), inner, max_size=2)
    ),
    max_leaves=3,
)
PATHS = st.sampled_from(
    [
        *(*OBJECTS, *STRINGS, *NUMBERS, *INTEGERS, "flush", "replay.events", "replay.events.1.data"),
        *("extra", "session.extra", "page.viewport.extra", "replay.extra", "replay.events.0.extra"),
    ]
)
PUBLISHED = BatchSchema(load_description())


@given(PATHS, VALUES | st.just(...))
def test_the_published_description_judges_alike(path: str, value: Any) -> None:
    """Whatever one member is changed to, we accept what the OpenAPI description does, and blame the same places."""
    try:
        batch = changed(path, value)
    except KeyError:  # nothing there to remove
        return
    if path == "replay.sequence" and isinstance(value, int | float) and value > MAX_SEQUENCE:
        return  # its addresses would be no safe integers
    if path in INTEGERS and isinstance(value, float) and abs(value) > MAX_SAFE_INTEGER:
        return  # upstream's own check, of which the description does not speak, bounds integers
    ours = issues_of(encode(batch))
    theirs = PUBLISHED.issues(batch)
    assert {tuple(issue["path"]) for issue in ours} == {tuple(issue["path"]) for issue in theirs}
