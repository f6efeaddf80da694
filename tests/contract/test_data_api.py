"""The data API's published description against the sandbox, and against the relay in front of it: both the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, negative_data_rejection

from relay.protocol.data_requests import is_one_segment
from relay.sandbox.schema import load_description
from tests.system.daemon import Site

pytestmark = pytest.mark.slow

TOKEN = "luc_api_test"  # noqa: S105 - nobody's
GOOD = f"Bearer {TOKEN}"
OPERATIONS = (
    ("/api/v1/issues", "GET"),
    ("/api/v1/issues/{issueId}", "GET"),
    ("/api/v1/issues/{issueId}", "PATCH"),
    ("/api/v1/signals", "GET"),
    ("/api/v1/insights", "GET"),
)

EXAMPLES = 40
"""Of each operation, right and wrong ones each; a second's worth."""

OWN = {"date", "via", "cache-status", "age", "connection", "server"}
"""What the relay adds, and what differs from one moment and connection to the next."""

NOT_MEANT = [negative_data_rejection]
"""Takes parameters that nobody has described for wrong; servers pass over them."""

SCHEMA = schemathesis.openapi.from_dict(load_description()).include(path_regex="^/api/v1/")


class Bases:
    """Where the API is asked: at the sandbox, and through the relay."""

    def __init__(self, direct: str, through: str) -> None:
        self.direct = direct
        self.through = through
        pages = {
            name: requests.get(
                f"{direct}/api/v1/{name}?limit=30", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30
            ).json()
            for name in ("issues", "signals", "insights")
        }
        self.issue_ids = [issue["id"] for issue in pages["issues"]["issues"]]
        self.cursors = {f"/api/v1/{name}": page["nextCursor"] for name, page in pages.items()}

    def make_right(self, case: Case[Any], choice: int) -> None:
        """Put in the place of made-up names those of an issue and of a page that there are."""
        if case.path_parameters and choice % 2:
            case.path_parameters["issueId"] = self.issue_ids[choice % len(self.issue_ids)]
        if case.query and "cursor" in case.query:  # any text fits its schema; which are cursors, only the server knows
            case.query["cursor"] = self.cursors[case.path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bases]:
    """Run a sandbox without limits and a relay before it that keeps nothing without asking."""
    site = Site(tmp_path_factory.mktemp("data_api"))

    async def start() -> Bases:
        sandbox = await site.start_sandbox("--reads-per-minute", "0", "--writes-per-minute", "0")
        unlimited = {"cache_seconds": 0, "reads_per_minute": 0, "writes_per_minute": 0}
        relay = await site.start_relay(
            {"upstream": {"ingest_url": sandbox.url, "data_url": sandbox.url}, "data_api": unlimited}
        )
        return Bases(sandbox.url, relay.url)

    try:
        yield trio.run(start)
    finally:
        trio.run(site.aclose)


def answer(case: Case[Any], base: str) -> Any:
    """Return what a server answers, once it was held against the description."""
    response = case.call(base_url=base)
    # It remembers the credential that it made up, and would take a good one put in its place for that.
    is_good = case.headers.get("Authorization") == GOOD
    case.validate_response(response, excluded_checks=[*NOT_MEANT, *([ignored_auth] if is_good else [])])
    return response


def assert_same(case: Case[Any], bases: Bases) -> int:
    """Assert that both answer alike, and by the description; returns the status."""
    direct, through = (answer(case, base) for base in (bases.direct, bases.through))
    if not is_one_segment(case.formatted_path.rpartition("/")[2]):
        assert through.status_code == 404  # nothing passes that upstream could take for another path
        return 404
    assert (through.status_code, through.content) == (direct.status_code, direct.content)
    theirs, ours = ({n: v for n, v in each.headers.items() if n not in OWN} for each in (direct, through))
    assert ours == theirs
    return int(direct.status_code)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_answers_are_as_described(bases: Bases, path: str, method: str, mode: GenerationMode) -> None:
    """Whatever is asked, rightly or wrongly, is answered as published, and through the relay byte for byte alike."""
    statuses = set()

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(SCHEMA[path][method].as_strategy(generation_mode=mode), st.integers(0, 99))
    def ask(case: Case[Any], choice: int) -> None:
        if mode is GenerationMode.POSITIVE:
            bases.make_right(case, choice)
        if mode is GenerationMode.POSITIVE or choice % 2:
            case.headers["Authorization"] = GOOD
        statuses.add(assert_same(case, bases))

    ask()
    expected = {200, 404} if mode is GenerationMode.POSITIVE else {200, 400, 401, 404, 405}
    assert statuses <= expected, statuses
    assert (200 if mode is GenerationMode.POSITIVE else 400) in statuses, statuses
