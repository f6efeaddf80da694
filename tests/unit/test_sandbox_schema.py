from __future__ import annotations

import copy
from typing import Any

import pytest

from relay.sandbox.schema import MAX_ISSUES, BatchSchema, load_description, translate_nullable


def make_batch() -> dict[str, Any]:
    """Return a valid batch with every published field."""
    return {
        "session": {"id": "s", "windowId": "w", "startedAt": 1, "lastActivityAt": 2.5, "url": ""},
        "user": {"id": "u", "anonymousId": "a", "properties": {"email": "a@example.com"}},
        "page": {"url": "", "referrer": "r", "viewport": {"width": 1, "height": 2}},
        "replay": {"events": [{"timestamp": 1, "type": 2, "data": {}}], "sequence": 0},
        "metadata": {"userAgent": "x", "language": "en"},
        "flush": "final",
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return a valid batch in which one member, named by a dotted path, has another value; `...` removes it."""
    batch = make_batch()
    *parents, last = path.split(".")
    target: Any = batch
    for name in parents:
        target = target[int(name)] if name.isdigit() else target[name]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return batch


@pytest.fixture(scope="module")
def schema() -> BatchSchema:
    """The compiled schema."""
    return BatchSchema(load_description())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("flush", ...),
        ("flush", "normal"),
        ("metadata", ...),
        ("metadata", None),
        ("metadata.userAgent", None),
        ("metadata.language", ...),
        ("user.id", None),
        ("user.id", ...),
        ("user.properties", None),
        ("user.properties", {"deep": [{"any": 1}]}),
        ("page.referrer", None),
        ("page.viewport", None),
        ("page.viewport", ...),
        ("page.viewport.depth", 3),
        ("replay.sequence", 3.0),
        ("replay.sequence", 2**60),
        ("replay.events.0.data", None),
        ("replay.events.0.data", "text"),
        ("replay.events.0.type", 2.0),
        ("replay.events.0.type", -1),
        ("replay.events.0.timestamp", 1.5),
        ("replay.events.0.delay", 3),
        ("session.id", "\ud83d"),
        ("session.extra", []),
        ("extra", {}),
    ],
)
def test_what_the_description_allows_is_valid(schema: BatchSchema, path: str, value: Any) -> None:
    """Nullable, optional and unknown members pass, and numbers are JavaScript's."""
    assert schema.issues(changed(path, value)) == []


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("session", ..., "invalid_type"),
        ("session", None, "invalid_type"),
        ("session.id", ..., "invalid_type"),
        ("session.id", "", "too_small"),
        ("session.id", 1, "invalid_type"),
        ("session.windowId", "", "too_small"),
        ("session.startedAt", "1", "invalid_type"),
        ("session.startedAt", float("inf"), "invalid_type"),
        ("session.lastActivityAt", None, "invalid_type"),
        ("session.url", None, "invalid_type"),
        ("user", ..., "invalid_type"),
        ("user.anonymousId", "", "too_small"),
        ("user.properties", [], "invalid_type"),
        ("page", [], "invalid_type"),
        ("page.url", ..., "invalid_type"),
        ("page.viewport.width", ..., "invalid_type"),
        ("page.viewport.height", "2", "invalid_type"),
        ("replay.events", ..., "invalid_type"),
        ("replay.events", [], "too_small"),
        ("replay.events", {}, "invalid_type"),
        ("replay.events.0.type", 2.5, "invalid_type"),
        ("replay.events.0.type", True, "invalid_type"),
        ("replay.events.0.timestamp", None, "invalid_type"),
        ("replay.events.0.data", ..., "invalid_type"),
        ("replay.sequence", -1, "too_small"),
        ("replay.sequence", 0.5, "invalid_type"),
        ("replay.sequence", float("inf"), "invalid_type"),
        ("metadata", "x", "invalid_type"),
        ("metadata.language", 1, "invalid_type"),
        ("flush", "last", "invalid_value"),
        ("flush", None, "invalid_value"),
    ],
)
def test_what_the_description_forbids_is_named(schema: BatchSchema, path: str, value: Any, code: str) -> None:
    """Each mistake gives an issue with zod's code at the member's path."""
    named = [int(name) if name.isdigit() else name for name in path.split(".")]
    assert (code, named) in [(issue["code"], issue["path"]) for issue in schema.issues(changed(path, value))]


@pytest.mark.parametrize("value", [None, [], "text", 1, True])
def test_what_is_no_object_is_no_batch(schema: BatchSchema, value: Any) -> None:
    """Any JSON value may arrive; only an object can be a batch."""
    assert [issue["path"] for issue in schema.issues(value)] == [[]]


def test_opaque_parts_may_be_nested_as_deeply_as_they_can_be_read(schema: BatchSchema) -> None:
    """A deep DOM in `data` is none of the schema's business."""
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    assert schema.issues(changed("replay.events.0.data", deep)) == []


def test_answers_stay_short_and_repeat_nothing(schema: BatchSchema) -> None:
    """Issues are bounded in number, and messages do not carry what was recorded."""
    issues = schema.issues(changed("replay.events", ["secret"] * 500))
    assert len(issues) == MAX_ISSUES
    assert "secret" not in str(issues)


def test_nullable_is_translated_and_nothing_else() -> None:
    """Translation adds null to the type where OpenAPI says so, leaving the description itself alone."""
    schema = {"a": [{"type": "string", "nullable": True, "minLength": 1}], "b": {"nullable": False, "type": "x"}}
    original = copy.deepcopy(schema)
    assert translate_nullable(schema) == {
        "a": [{"type": ["string", "null"], "minLength": 1}],
        "b": {"type": "x"},
    }
    assert schema == original


@pytest.mark.parametrize("member", ["session", "flush", "\ud83d"])
def test_lone_surrogates_in_wrong_places_are_issues(member: str) -> None:
    """Text that is no UTF-8, where it is refused, is refused like any other text."""
    assert BatchSchema(load_description()).issues({member: "\ud83d"})


@pytest.mark.parametrize("level", ["", "session", "user", "page.viewport", "replay", "replay.events.0", "metadata"])
def test_members_that_nobody_knows_may_bear_any_name(schema: BatchSchema, level: str) -> None:
    """A name that is no UTF-8 is an unknown member like another, at every level."""
    assert schema.issues(changed(f"{level}.\ud83d".removeprefix("."), 1)) == []
