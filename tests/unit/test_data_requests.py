"""What is certain to be refused, and what only might be."""

from __future__ import annotations

import pytest

from relay.protocol.data_requests import MAX_LIMITS, STATUSES, find_fault, is_one_segment
from relay.sandbox.schema import load_description

ISSUE = "/api/v1/issues/87b3a6b6-5af5-438b-a39c-eff148a68ccb"
BAD_STATUS = "status must be one of unresolved, ticket_created, transient, resolved"

FAULTS: dict[str, tuple[str, str, bytes, bytes, str | None]] = {
    # case: method, path, query, body, fault
    "the least": ("GET", "/api/v1/issues", b"limit=1", b"", None),
    "the most": ("GET", "/api/v1/issues", b"limit=200&status=resolved", b"", None),
    "too many issues": ("GET", "/api/v1/issues", b"limit=201", b"", "Invalid limit: it must be 1 to 200"),
    "too many insights": ("GET", "/api/v1/insights", b"limit=101", b"", "Invalid limit: it must be 1 to 100"),
    "none": ("HEAD", "/api/v1/signals", b"limit=0", b"", "Invalid limit: it must be 1 to 200"),
    "fewer than none": ("GET", "/api/v1/signals", b"limit=-1", b"", "Invalid limit: it must be 1 to 200"),
    "a limit that upstream may read somehow": ("GET", "/api/v1/signals", b"limit=1e9", b"", None),
    "two limits": ("GET", "/api/v1/signals", b"limit=0&limit=5", b"", None),
    "unknown parameters": ("GET", "/api/v1/signals", b"x=1&status=odd", b"", None),
    "a cursor": ("GET", "/api/v1/issues", b"cursor=%00%FF", b"", None),
    "an unknown status": (
        *("GET", "/api/v1/issues", b"status=open", b""),
        "Invalid status: it must be one of unresolved, ticket_created, transient, resolved",
    ),
    "a UUID": ("GET", ISSUE, b"limit=0", b"", None),
    "a UUID in capitals": ("GET", "/api/v1/issues/87B3A6B6-5AF5-438B-A39C-EFF148A68CCB", b"", b"", None),
    "a UUID, encoded": ("GET", ISSUE.replace("-", "%2D"), b"", b"", None),
    "a number": ("GET", "/api/v1/issues/17", b"", b"", "Invalid issue id: it must be a UUID"),
    "a change": ("PATCH", ISSUE, b"", b'{"status":"resolved","x":1}', None),
    "a change to what is unknown": ("PATCH", ISSUE, b"", b'{"status":"open"}', f"Invalid request body: {BAD_STATUS}"),
    "a change of nothing": ("PATCH", ISSUE, b"", b"[]", f"Invalid request body: {BAD_STATUS}"),
    "a change to a list": ("PATCH", ISSUE, b"", b'{"status":["a"]}', f"Invalid request body: {BAD_STATUS}"),
    "a huge number beside": ("PATCH", ISSUE, b"", b'{"status":"resolved","x":%b}' % (b"1" * 5_000), None),
    "broken UTF-8 beside": ("PATCH", ISSUE, b"", b'{"status":"resolved","x":"\xff"}', None),
    "a byte order mark": ("PATCH", ISSUE, b"", b'\xef\xbb\xbf{"status":"resolved"}', None),
    "more depth than can be looked at": ("PATCH", ISSUE, b"", b'{"x":%b' % (b"[" * 50_000), None),
    "no JSON": ("PATCH", ISSUE, b"", b"{", "Invalid request body: it must be JSON"),
    "no text": ("PATCH", ISSUE, b"", b"\xff", "Invalid request body: it must be JSON"),
}


@pytest.mark.parametrize(("method", "path", "query", "body", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_what_is_certain_to_be_refused(method: str, path: str, query: bytes, body: bytes, fault: str | None) -> None:
    """Only what the published description rules out is a fault."""
    assert find_fault(method, path, query, body) == fault


def test_bounds_are_the_published_ones() -> None:
    """Each list has the limit, and an issue the statuses, of the published description."""
    components = load_description()["components"]
    names = {"/api/v1/issues": "LimitIssues", "/api/v1/signals": "LimitSignals", "/api/v1/insights": "LimitInsights"}
    assert {path: components["parameters"][name]["schema"]["maximum"] for path, name in names.items()} == MAX_LIMITS
    assert tuple(components["schemas"]["IssueStatus"]["enum"]) == STATUSES


@pytest.mark.parametrize("segment", ["a", "a.b", "...a", "%20", "%E2%82%AC", "a%2520b", "~"])
def test_what_is_one_segment(segment: str) -> None:
    """Ordinary ids stay one segment, however they are decoded."""
    assert is_one_segment(segment)


@pytest.mark.parametrize(
    "segment", [".", "..", "%2E", "%2e.", "a%2fb", "%5c", "%00", "%0d%0a", "a%252fb", "%252e%252E"]
)
def test_what_could_become_another_path(segment: str) -> None:
    """What a server could decode into a slash, a step up or a control character is no id."""
    assert not is_one_segment(segment)
