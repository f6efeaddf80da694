"""A soak: sessions come and go for hours among faults of every kind, and the laws hold at every look.

It is played in rounds of about a minute. In each, clients play new sessions while one strike after the other is drawn
from the seed. Then the world is healed, the spool drains, and every event of the round must be upstream, once, byte
for byte, in its order. In the first half the relay is killed and restarted too. In the second it is left alone, so
that what grows can be seen to grow.

Rules:
1. All chance follows from the seed. What a strike meets depends on the machine, so a run is not repeated to the byte.
2. The account is looked at every second, in whatever state the strike has left things.
3. What a round leaves in memory of ours is forgotten with it: the soak watches the relay's growth, not its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from statistics import quantiles
from typing import Any

import msgspec
import trio

from tests.soak import weather
from tests.soak.weather import Strike
from tests.system.daemon import Site
from tests.system.laws import assert_content, assert_unspoiled
from tests.system.traffic import Sent, make_batch
from tests.system.wire import Lost, ask

ROUND_SECONDS = 60.0
"""Short enough that what a round sent fits into memory, long enough for a dozen strikes."""

CLIENTS = 8
"""Sessions at a time, each with two windows; together about 40 batches a second."""

PAUSE_SECONDS = 0.4
"""A client's longest pause between batches."""

SAMPLE_SECONDS = 1.0
"""Interval of looking at the relay."""

DRAIN_SECONDS = 120.0
"""Patience at the end of a round; it takes seconds."""

MAX_GROWTH = {"resident_bytes": 16_777_216, "open_files": 8, "used_bytes": 16_777_216}
"""Memory and disk breathe with the load by a few MiB; a leak of 1 KiB a batch would be 70 MiB in half an hour."""

MAX_ANSWER_GROWTH = 0.05
"""Seconds; a relay that slows down with age would show far more."""

SETTINGS: dict[str, dict[str, Any]] = {
    "spool": {"directory": "spool", "min_free_bytes": 0, "dedupe_seconds": 60},
    "listen": {"header_seconds": 5.0, "write_seconds": 5.0},
}
"""The least floor, so that a full disk is met; marks that are forgotten within the hour, so that the disk can be flat;
clients' deadlines short enough to pass within a round."""


class Sample(msgspec.Struct, frozen=True):
    """The relay at one moment."""

    at: float
    """Seconds since the soak began."""
    resident_bytes: int
    open_files: int
    used_bytes: int
    """Of the spool's database."""
    spooled: int
    """Events."""


class Struck(msgspec.Struct, frozen=True):
    """A strike that happened."""

    name: str
    since: float
    until: float


class Growth(msgspec.Struct, frozen=True):
    """A figure at the beginning and at the end of the half in which the relay was left alone.

    It is a part's lower quartile, what the figure falls back to between strikes: that is where a leak shows.
    """

    what: str
    early: float
    """In that half's first third; so what a process fills once, such as its caches, is not taken for growth."""
    late: float
    """In its last third."""
    bound: float
    """What `late` may be."""

    @property
    def is_flat(self) -> bool:
        """Whether it stayed within its bound."""
        return self.late <= self.bound


class Found(msgspec.Struct):
    """What a soak found."""

    seconds: float = 0.0
    rounds: int = 0
    events: int = 0
    """Delivered, each of them once."""
    batches: int = 0
    samples: list[Sample] = []
    struck: list[Struck] = []
    answers: list[tuple[float, float]] = []
    """(seconds since the beginning, seconds to the 200) of the client that is watched."""
    quiet_from: float = 0.0
    """From when on the relay was left alone."""

    def growth(self) -> list[Growth]:
        """Return what could have grown, by how much, and by how much it may."""
        third = (self.seconds - self.quiet_from) / 3
        parts = [(since, since + third) for since in (self.quiet_from, self.seconds - third)]

        def compare(what: str, values: Sequence[tuple[float, float]], bound: float) -> Growth:
            early, late = ([value for at, value in values if since <= at <= until] for since, until in parts)
            return Growth(what, _lower_quartile(early), _lower_quartile(late), _lower_quartile(early) + bound)

        grown = [
            compare(what, [(sample.at, getattr(sample, what)) for sample in self.samples], bound)
            for what, bound in MAX_GROWTH.items()
        ]
        return [*grown, compare("answer_seconds", self.answers, MAX_ANSWER_GROWTH)]


class Soak:
    """One soak.

    Args:
        site: Empty; its spool's directory may be a small disk of its own.
        seed: Of all chance.
        seconds: How long.
        has_small_disk: Whether the spool's file system may be filled.
    """

    def __init__(self, site: Site, seed: int, seconds: float, *, has_small_disk: bool) -> None:
        self._site = site
        self._chance = random.Random(seed)
        self._seconds = seconds
        self._has_small_disk = has_small_disk
        self._accepted_before = 0
        self.found = Found()

    async def run(self) -> Found:
        """Play round after round.

        Raises:
            AssertionError: A law does not hold.
        """
        site, found = self._site, self.found
        await site.start_sandbox("--seed", str(self._chance.randrange(2**31)))
        await site.start_relay(SETTINGS)
        self._began_at = trio.current_time()
        found.quiet_from = self._seconds / 2
        for number in count():
            left = self._seconds - self._now()
            if left <= 0:
                break
            await self._play_round(number, min(ROUND_SECONDS, left))
            found.rounds += 1
        found.seconds = self._now()
        return found

    def _now(self) -> float:
        return trio.current_time() - self._began_at

    async def _play_round(self, number: int, seconds: float) -> None:
        site = self._site
        site.sent = Sent()
        is_over = trio.Event()
        async with trio.open_nursery() as watching:
            watching.start_soon(self._watch)
            async with trio.open_nursery() as clients:
                for client in range(CLIENTS):
                    name = f"r{number}c{client}"
                    chance = random.Random(self._chance.random())
                    clients.start_soon(site.play_session, name, chance, is_over, PAUSE_SECONDS)
                clients.start_soon(self._play_watched, f"r{number}p", is_over)
                with trio.move_on_after(seconds):
                    while True:
                        await self._strike(self._strikes())
                        await trio.sleep(self._chance.uniform(0, 2))
                if site.relay.is_running:  # and if it is only just starting, it is waited for
                    await site.relay.started()
                else:  # the strike that would have started it was cut short
                    await site.start_relay()
                is_over.set()
                clients.cancel_scope.deadline = trio.current_time() + DRAIN_SECONDS
            assert not clients.cancel_scope.cancelled_caught, "the relay does not take what clients keep sending"
            await self._settle()
            watching.cancel_scope.cancel()

    def _strikes(self) -> Sequence[Strike]:
        kinds = [weather.OF_UPSTREAM, weather.OF_CLIENTS]
        if self._now() < self.found.quiet_from:
            kinds.append(weather.OF_PROCESS)
        if self._has_small_disk:
            kinds.append(weather.OF_DISK)
        return self._chance.choice(kinds)

    async def _strike(self, strikes: Sequence[Strike]) -> None:
        strike = self._chance.choice(strikes)
        since = self._now()
        try:
            await strike(self._site, self._chance)
        finally:
            self.found.struck.append(Struck(strike.__name__, since, self._now()))

    # -- clients

    async def _play_watched(self, name: str, is_over: trio.Event) -> None:
        """Be an SDK whose patience is measured: every answer's time, from the first attempt on."""
        async with self._site.sdk() as sdk:
            for sequence in count():
                is_final = is_over.is_set()
                since = self._now()
                await sdk.post(make_batch(name, sequence, is_final=is_final))
                self.found.answers.append((since, self._now() - since))
                if is_final:
                    return
                with trio.move_on_after(0.2):
                    await is_over.wait()

    # -- watching

    async def _watch(self) -> None:
        """Hold the account against law 2 again and again (rule 2)."""
        while True:
            await trio.sleep(SAMPLE_SECONDS)
            try:
                answer = await ask(f"{self._site.relay.admin}/status")  # on a connection of its own, which may break
            except Lost:  # between two relays
                continue
            status = answer.json()
            if answer.status != 200 or "account" not in status:  # the disk refuses even to be read
                continue
            account = status["account"]
            gone = account["delivered"] + account["dead_lettered"] + account["purged"] + account["shed"]
            assert account["is_balanced"], account
            assert account["accepted"] == gone + account["spooled"], account
            process = status["process"]
            self.found.samples.append(
                Sample(
                    self._now(),
                    process["resident_bytes"],
                    process["open_files"],
                    status["spool"]["used_bytes"],
                    account["spooled"],
                )
            )

    async def _settle(self) -> None:
        """Let the spool drain, and find every event of the round upstream."""
        site = self._site
        await site.sandbox.fault()
        status = await site.relay.drained(DRAIN_SECONDS)
        account = status["account"]
        assert account["accepted"] - self._accepted_before == site.sent.events, (account, site.sent.events)
        assert (account["dead_lettered"], account["purged"], account["shed"]) == (0, 0, 0), account
        report = await site.sandbox.report()
        assert_unspoiled(report)
        assert report["events"] == site.sent.events, report
        await assert_content(site.sandbox, site.sent, is_complete=True)
        self._accepted_before = account["accepted"]
        self.found.events += site.sent.events
        self.found.batches += site.sent.batches
        answer = await ask(f"{site.sandbox.url}/sandbox/reset", "POST")
        assert answer.status == 200, answer


def _lower_quartile(values: Sequence[float]) -> float:
    return quantiles(values, n=4)[0] if len(values) > 1 else 0.0
