"""The two options that widen a batch, with the whole forwarder: what merges, when, and what comes of a refusal."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from relay.http.client import Reply
from relay.protocol.cut import Merge
from tests.accounting import assert_accounted
from tests.component.batches import make_event
from tests.component.fake_upstream import OK, Arrival, FakeUpstream, Forwarding, forwarding, make_config, say_yes


def pages(upstream: FakeUpstream) -> list[tuple[str, int]]:
    """Return the page and the number of events of each request."""
    return [(arrival.batch.envelope["page"]["url"], len(arrival.batch.events)) for arrival in upstream.arrivals]


async def browse(it: Forwarding, session: str, visited: str, *, first: int = 0) -> None:
    """Accept a client batch of one event for each page."""
    for sequence, page in enumerate(visited, first):
        await it.accept(session, "w", sequence, page=page, events=[make_event(f"{session}/{sequence}/{page}")])


@pytest.mark.parametrize(
    ("merge", "sent"),
    [
        ("strict", [("a", 2), ("b", 1), ("a", 1)]),
        ("page", [("a", 4)]),
        ("page-when-scarce", [("a", 2), ("b", 1), ("a", 1)]),
    ],
)
async def test_pages_merge_where_the_option_says_so(
    tmp_path: Path, autojump_clock: MockClock, merge: Merge, sent: list[tuple[str, int]]
) -> None:
    """The batch bears the last page, every event its bytes and its number; another user parts it all the same."""
    upstream = FakeUpstream()
    async with forwarding(tmp_path, upstream, make_config(merge=merge)) as it:
        await browse(it, "s", "aaba")
        await it.accept("s", "w", 4, page="a", user="other", events=[make_event("other")])
        await it.drained()
        assert pages(upstream) == [*sent, ("a", 1)]
        assert upstream.events() == it.accepted
        assert upstream.arrivals[-1].batch.sequence == 4 * 16_384
        assert it.forwarder.statistics().batches_of_several_pages == (merge == "page")


async def test_pages_merge_while_requests_are_scarce(tmp_path: Path, autojump_clock: MockClock) -> None:
    """With half of the slots free each page has its batch; from then on they share, until slots are free again."""
    upstream = FakeUpstream()
    config = make_config(merge="page-when-scarce", requests_per_minute=8)
    async with forwarding(tmp_path, upstream, config) as it:
        for session in "stu":
            await browse(it, session, "abcd")
        await it.drained()
        strict, merged = pages(upstream)[:4], pages(upstream)[4:]
        assert [count for _, count in strict] == [1] * 4
        assert sum(count for _, count in merged) == 8
        assert len(merged) <= 4
        assert it.forwarder.statistics().batches_of_several_pages >= 2
        await trio.sleep(120)
        await browse(it, "v", "ab")
        await it.drained()
        assert pages(upstream)[-2:] == [("a", 1), ("b", 1)]
        it.assert_each_once()


@pytest.mark.parametrize("status", [400, 413])
async def test_a_refused_batch_of_several_pages_is_taken_apart(
    tmp_path: Path, autojump_clock: MockClock, status: int
) -> None:
    """Each part bears the page of its own last segment, and one bad event takes no other with it."""
    bad = make_event("s/3/d")

    async def answer(arrival: Arrival) -> Reply:
        return Reply(status, {}, b"no") if bad in arrival.batch.events else OK

    upstream = FakeUpstream(answer)
    async with forwarding(tmp_path, upstream, make_config(merge="page")) as it:
        await browse(it, "s", "abcde")
        await it.accept("s", "w", 5, page="f", events=[make_event("last")], flush="final")
        await it.drained()
        for arrival in upstream.arrivals:
            last = arrival.batch.events[-1]
            page = "f" if last == make_event("last") else last.split(b"/")[2][:1].decode()
            assert arrival.batch.envelope["page"]["url"] == page
        assert upstream.events() == [event for event in it.accepted if event != bad]
        assert [batch.is_final for batch in upstream.order] == [False] * (len(upstream.order) - 1) + [True]
        assert_accounted(await it.spool.account(), accepted=6, delivered=5, dead_lettered=1)
        # Sent again, the dead letter is pending with the page it came with.
        upstream.answer = say_yes
        await it.spool.resend_dead_letters(None)
        await it.drained()
        assert pages(upstream)[-1] == ("d", 1)
        assert_accounted(await it.spool.account(), accepted=6, delivered=6)


@pytest.mark.parametrize(("before", "after"), [("page", "strict"), ("strict", "page")])
async def test_what_was_cut_stays_cut_when_the_option_changes(
    tmp_path: Path, autojump_clock: MockClock, before: Merge, after: Merge
) -> None:
    """A batch in flight at a restart is sent again byte for byte; what was only pending goes by the new option."""
    upstream = FakeUpstream(hang)
    with trio.move_on_after(20):
        async with forwarding(tmp_path, upstream, make_config(merge=before)) as it:
            await browse(it, "s", "ab")
            await trio.sleep(10)
            await browse(it, "s", "cd", first=2)
            await trio.sleep_forever()
    [cut] = upstream.arrivals
    upstream.answer = say_yes
    async with forwarding(tmp_path, upstream, make_config(merge=after)) as it:
        await it.drained()
        assert_accounted(await it.spool.account(), accepted=4, delivered=4)
    first, again, *rest = upstream.arrivals
    assert again.body == first.body == cut.body
    by_option = {"page": [("b", 2), ("c", 1), ("d", 1)], "strict": [("a", 1), ("d", 3)]}
    assert pages(upstream)[1:] == by_option[before]
    assert [arrival.batch.sequence for arrival in rest] == sorted(arrival.batch.sequence for arrival in rest)


async def hang(_: Arrival) -> Reply:
    """Never answer."""
    await trio.sleep_forever()
    raise AssertionError


@pytest.mark.parametrize("measure", ["json", "compressed"])
async def test_a_limit_on_the_gzip_body_is_filled(tmp_path: Path, autojump_clock: MockClock, measure: str) -> None:
    """Events that deflate by half need half the requests, each full but the last, and none is over the limit."""
    chance = Random(1)
    limit = 65_536
    texts = [chance.randbytes(4_000).hex() for _ in range(60)]
    upstream = FakeUpstream(max_bytes=limit * (16 if measure == "compressed" else 1))
    config = make_config(measure=measure, max_bytes=limit)
    async with forwarding(tmp_path, upstream, config) as it:
        for sequence in range(12):
            events = [make_event(text, 8_192) for text in texts[sequence * 5 : sequence * 5 + 5]]
            await it.accept("s", "w", sequence, events=events)
        await it.drained()
        assert upstream.events() == it.accepted
        sizes = [len(arrival.body) if measure == "compressed" else arrival.batch.size for arrival in upstream.arrivals]
        assert max(sizes) <= limit
        largest_event = 8_300 if measure == "json" else 4_800
        assert all(size > limit - largest_event for size in sizes[:-1])
        assert len(sizes) == {"json": 9, "compressed": 4}[measure]
