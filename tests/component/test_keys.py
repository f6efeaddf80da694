"""Client keys and the upstream keys they stand for, from the intake to upstream."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from relay.config import Config, Keys
from relay.http.client import Reply
from relay.http.message import Request, Response
from relay.intake.intake import REPLAY_PATH, Intake
from relay.protocol.rendezvous import rank
from tests.component.batches import make_body
from tests.component.fake_upstream import OK, Arrival, FakeUpstream, Forwarding, forwarding, make_config
from tests.component.spooling import wall_clock

CLIENT, OTHER = "luc_pk_client", "luc_pk_other"
POOL = ("luc_pk_1", "luc_pk_2", "luc_pk_3")


class Relaying:
    """An intake and a forwarder on one spool."""

    def __init__(self, it: Forwarding, config: Config) -> None:
        self.it = it
        self.intake = Intake(config, it.spool, wall_clock, trio.current_time, it.forwarder.is_refused)

    async def post(self, key: str, session: str, sequence: int = 0, *, flush: str = "") -> Response:
        """Ask as a listener does."""
        request = Request("POST", REPLAY_PATH, b"", {b"x-lucent-api-key": key.encode()} if key else {})
        refusal = self.intake.admit(request)
        if refusal is not None:
            return refusal
        request.body = make_body(session, "w", sequence, flush=flush)
        return await self.intake.post(request)

    def keys_of(self) -> dict[str, set[str]]:
        """Return the upstream keys under which each session's batches came."""
        found = defaultdict(set)
        for arrival in self.it.upstream.arrivals:
            found[arrival.batch.session].add(arrival.key)
        return dict(found)


@asynccontextmanager
async def relaying(directory: Path, upstream: FakeUpstream, keys: Keys, **forward: Any) -> AsyncIterator[Relaying]:
    """Run both."""
    config = msgspec.structs.replace(make_config(**forward), keys=keys)
    async with forwarding(directory, upstream, config) as it:
        yield Relaying(it, config)


async def test_pool_shares_the_sessions_of_a_key(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A client key's sessions are spread over its pool, each session under one key; other clients keep their own."""
    async with relaying(tmp_path, FakeUpstream(), Keys(pools={CLIENT: POOL})) as relay:
        for sequence in range(2):
            for number in range(60):
                assert (await relay.post(CLIENT, f"s{number}", sequence)).status == 200
            await relay.it.drained()
        assert (await relay.post(OTHER, "alone")).status == 200
        await relay.it.drained()
        keys = relay.keys_of()
        assert keys.pop("alone") == {OTHER}
        assert all(len(used) == 1 for used in keys.values())
        shares = Counter(key for used in keys.values() for key in used)
        assert set(shares) == set(POOL)
        assert min(shares.values()) > 10


async def test_each_key_of_a_pool_has_its_own_budget(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A pool of three spends three times what a key may, and no key more than its own."""
    async with relaying(tmp_path, FakeUpstream(), Keys(pools={CLIENT: POOL}), requests_per_minute=10) as relay:
        for number in range(60):
            await relay.post(CLIENT, f"s{number}", flush="final")
        assert await relay.it.drained() < 3 * 61
        assert all(relay.it.upstream.peak_requests(key) <= 10 for key in POOL)


async def test_session_stays_when_its_pool_changes(tmp_path: Path, autojump_clock: MockClock) -> None:
    """After keys join or change places, known sessions stay, a repeated batch is recognised, and new ones spread."""
    upstream = FakeUpstream()
    async with relaying(tmp_path, upstream, Keys(pools={CLIENT: POOL[:1]})) as relay:
        for number in range(20):
            await relay.post(CLIENT, f"s{number}")
        await relay.it.drained()
    async with relaying(tmp_path, upstream, Keys(pools={CLIENT: POOL[::-1]})) as relay:
        for number in range(20):
            await relay.post(CLIENT, f"s{number}")
        assert relay.intake.statistics().batches_repeated == 20
        for number in range(40):
            await relay.post(CLIENT, f"s{number}", 1)
        await relay.it.drained()
        keys = relay.keys_of()
    assert all(keys[f"s{number}"] == {POOL[0]} for number in range(20))
    assert all(keys[f"s{number}"] == {rank(f"s{number}", POOL)[0]} for number in range(20, 40))


async def test_pending_events_stay_with_a_key_that_left(tmp_path: Path, autojump_clock: MockClock) -> None:
    """What is spooled under a key is sent under it, though the session's next batches go under another."""
    upstream = FakeUpstream()
    old, new = Keys(pools={CLIENT: POOL[:1]}), Keys(pools={CLIENT: POOL[1:2]})
    async with relaying(tmp_path, upstream, old, linger_seconds=3_600) as relay:
        await relay.post(CLIENT, "s", 0)
    async with relaying(tmp_path, upstream, new) as relay:
        await relay.post(CLIENT, "s", 1)
        await relay.it.drained()
    assert {(arrival.key, arrival.batch.sequence) for arrival in upstream.arrivals} == {
        (POOL[0], 0),
        (POOL[1], 16_384),
    }


@pytest.mark.parametrize(
    ("key", "status"), [(CLIENT, 200), (OTHER, 200), ("", 200), ("luc_pk_stranger", 401), (POOL[0], 401)]
)
async def test_only_listed_keys_are_accepted(tmp_path: Path, autojump_clock: MockClock, key: str, status: int) -> None:
    """Listed keys, those with a pool, and clients without one where there is a default; others get upstream's 401."""
    keys = Keys(accept="listed", listed=(OTHER,), pools={CLIENT: POOL}, default="luc_pk_default")
    async with relaying(tmp_path, FakeUpstream(), keys) as relay:
        answer = await relay.post(key, "s")
        assert answer.status == status
        if status == 401:
            assert json.loads(answer.body) == {"error": "Invalid or revoked API key"}
            assert relay.intake.statistics().refused_by_status == {401: 1}
        await relay.it.drained()


async def test_listed_without_default_asks_for_a_key(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Where no default is set, a client without a key is told that it is missing, not that it is wrong."""
    async with relaying(tmp_path, FakeUpstream(), Keys(accept="listed", listed=(OTHER,))) as relay:
        assert json.loads((await relay.post("", "s")).body) == {"error": "Missing API key"}


async def test_default_key_may_have_a_pool(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Clients without a key get the default key, and with it its pool."""
    async with relaying(tmp_path, FakeUpstream(), Keys(default=CLIENT, pools={CLIENT: POOL})) as relay:
        for number in range(20):
            await relay.post("", f"s{number}")
        await relay.it.drained()
        assert {arrival.key for arrival in relay.it.upstream.arrivals} == set(POOL)


async def test_clients_of_a_refused_key_are_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Once it is known to be bad they get upstream's 401; what was taken before waits, and goes out when it is good."""

    async def answer(arrival: Arrival) -> Reply:
        return Reply(403, {}, b"") if trio.current_time() < 200 and arrival.key == CLIENT else OK

    async with relaying(tmp_path, FakeUpstream(answer), Keys(), hold_seconds=60) as relay:
        assert (await relay.post(CLIENT, "s", flush="final")).status == 200
        await trio.sleep(5)
        assert (await relay.post(CLIENT, "t", flush="final")).status == 200, "once may be a hiccup"
        await trio.sleep(15)
        refusal = await relay.post(CLIENT, "u")
        assert (refusal.status, json.loads(refusal.body)) == (401, {"error": "Invalid or revoked API key"})
        assert (await relay.post(OTHER, "v")).status == 200
        await relay.it.drained()
        assert {batch.session for batch in relay.it.upstream.order} == {"s", "t", "v"}
        assert (await relay.post(CLIENT, "u")).status == 200


async def test_pool_with_one_good_key_is_not_refused(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The sessions of a bad key wait in the spool, while those of the others flow."""

    async def answer(arrival: Arrival) -> Reply:
        return OK if arrival.key == POOL[0] else Reply(401, {}, b"")

    async with relaying(tmp_path, FakeUpstream(answer), Keys(pools={CLIENT: POOL})) as relay:
        for number in range(30):
            assert (await relay.post(CLIENT, f"s{number}", flush="final")).status == 200
        await trio.sleep(60)
        assert all(map(relay.it.forwarder.is_refused, POOL[1:]))
        for number in range(30, 60):
            assert (await relay.post(CLIENT, f"s{number}", flush="final")).status == 200
