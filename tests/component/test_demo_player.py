from __future__ import annotations

from collections.abc import Sequence

import orjson
import pytest
import trio

from relay.demo.player import CONNECTIONS, KEY, Player
from relay.demo.session import event_identities, recut
from relay.errors import ExchangeFailed
from relay.http.client import Reply
from relay.protocol.codings import inflate
from tests.component.test_demo_session import recorded

OK = Reply(200, {}, b'{"ok":true}')


class FakeRelay:
    """Takes batches, answers as told, and records when each came."""

    def __init__(self, *answers: Reply | ExchangeFailed, seconds: float = 0) -> None:
        self.answers = list(answers)
        self.seconds = seconds
        self.batches: list[tuple[float, str, int, int]] = []
        """When, session, sequence, number of events."""
        self.at_once = self.most_at_once = 0

    async def request(self, method: str, target: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> Reply:
        """Take one batch."""
        assert (method, target) == ("POST", "/api/sdk/replay")
        assert dict(headers)[b"x-lucent-api-key"] == KEY.encode()
        batch = orjson.loads(inflate(body, "gzip", 1_000_000))
        replay = batch["replay"]
        self.batches.append((trio.current_time(), batch["session"]["id"], replay["sequence"], len(replay["events"])))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await trio.sleep(self.seconds)
        self.at_once -= 1
        answer = self.answers.pop(0) if self.answers else OK
        if isinstance(answer, ExchangeFailed):
            raise answer
        return answer


SESSION = recut([recorded("w", [(1_000 * second, 0) for second in range(1, 42)])])


async def test_a_session_is_played_in_time_and_order(autojump_clock: trio.testing.MockClock) -> None:
    """Batches come in order, each when its last event was recorded, as many times faster as asked."""
    player = Player([SESSION], 1, speed=10)
    relay = FakeRelay()
    await player.run(relay)
    assert [batch[1:] for batch in relay.batches] == [("s", 0, 20), ("s", 1, 20), ("s", 2, 1)]
    assert [at for at, *_ in relay.batches] == pytest.approx([1.9, 3.9, 4.0])
    played = player.played()
    assert player.is_done
    assert (played.batches, played.batches_accepted, played.requests, played.events_accepted) == (3, 3, 3, 41)
    assert player.ledger == {("s", "w"): [event for batch in SESSION.batches for event in event_identities(batch, "s")]}


@pytest.mark.parametrize("answer", [Reply(503, {}, b"busy"), Reply(429, {}, b""), ExchangeFailed("gone")])
async def test_a_client_comes_again(answer: Reply | ExchangeFailed, autojump_clock: trio.testing.MockClock) -> None:
    """Without an answer for good the same batch is sent again, and stands in the ledger once."""
    player = Player([SESSION], 1, speed=1_000)
    relay = FakeRelay(OK, answer, answer)
    await player.run(relay)
    assert [sequence for _, _, sequence, _ in relay.batches] == [0, 1, 1, 1, 2]
    played = player.played()
    assert (played.requests, played.batches_accepted, played.batches_refused) == (5, 3, 0)
    assert played.trouble
    assert len(player.ledger[("s", "w")]) == 41


async def test_a_refused_batch_is_counted_and_left(autojump_clock: trio.testing.MockClock) -> None:
    """A refusal for good ends the batch and not the session; the ledger keeps what is then missing."""
    player = Player([SESSION], 1, speed=1_000)
    await player.run(FakeRelay(Reply(400, {}, b"no")))
    played = player.played()
    assert (played.batches_accepted, played.batches_refused, played.events_accepted) == (2, 1, 21)
    assert played.trouble == "last: 400 no"
    assert len(player.ledger[("s", "w")]) == 41


async def test_sessions_share_few_connections(autojump_clock: trio.testing.MockClock) -> None:
    """However many sessions are played, only so many requests are under way at once."""
    player = Player([SESSION], 20, speed=1_000)
    relay = FakeRelay(seconds=1)
    await player.run(relay)
    assert relay.most_at_once == CONNECTIONS
    assert len(relay.batches) == 60
    assert len({(session, sequence) for _, session, sequence, _ in relay.batches}) == 60
