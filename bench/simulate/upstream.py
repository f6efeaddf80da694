"""The strict upstream: an exact sliding window, outages and refusals, in virtual time."""

from __future__ import annotations

import random

import msgspec

from relay.sandbox.limiter import RequestWindow


class Weather(msgspec.Struct, frozen=True):
    """What upstream and the network are like."""

    requests_per_minute: int = 100
    """Upstream's limit; also the relay's budget."""
    latency_seconds: tuple[float, float] = (0.1, 0.4)
    """Shortest and longest exchange; upstream counts the request at half time."""
    outages: tuple[tuple[float, float], ...] = ()
    """From and until when nothing is answered but 503."""
    refused_share: float = 0.0
    """Requests answered 429 for no reason of ours."""


REFUSED_RETRY_SECONDS = 5.0
"""`Retry-After` of a 429 without a reason of ours; one with a reason says when the window has room."""


class Reply(msgspec.Struct, frozen=True):
    """An answer."""

    status: int
    retry_after: float = 0.0
    """Seconds, where the status is 429."""


class Upstream:
    """Answers requests and counts them.

    Args:
        weather: What it is like.
        chance: Of latencies and refusals.
    """

    def __init__(self, weather: Weather, chance: random.Random) -> None:
        self.limited = 0
        """429s that the sender brought upon itself."""
        self._weather = weather
        self._chance = chance
        self._window = RequestWindow(weather.requests_per_minute)

    def latency_seconds(self) -> float:
        """Return how long the next exchange takes."""
        return self._chance.uniform(*self._weather.latency_seconds)

    def answer(self, at: float) -> Reply:
        """Return the answer to a request that arrives at `at`, not before any that was asked for earlier."""
        if any(since <= at < until for since, until in self._weather.outages):
            return Reply(503)
        if self._chance.random() < self._weather.refused_share:
            return Reply(429, REFUSED_RETRY_SECONDS)
        wait = self._window.admit(at)
        if wait:
            self.limited += 1
            return Reply(429, wait)
        return Reply(200)
