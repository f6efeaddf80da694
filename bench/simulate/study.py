"""The study: which traces are run, and what is asked of them.

For each kind of traffic, *capacity* is the number of sessions for which the optimum needs the whole allowance. Loads
are shares of it: at load 1 not even the optimum has a request to spare.
"""

from __future__ import annotations

import msgspec

from bench.simulate.figures import Outcome
from bench.simulate.forwarding import Forwarding
from bench.simulate.optimum import fewest_requests
from bench.simulate.rivals import forward_one_for_one, send_directly
from bench.simulate.traffic import Arrival, arrivals
from bench.simulate.upstream import Weather
from relay.config import Config

BUSY_LOAD = 0.9
"""Where every delay has to be bounded: a tenth of the allowance is left for runs that are not full."""

SATURATED_LOAD = 1.2
"""Where there is always more to send than may be sent."""

_SAMPLE_SESSIONS = 300
_SAMPLE_SECONDS = 3_600.0
"""Of the trace that a kind's demand is measured on: 900 sessions and more."""


class Run(msgspec.Struct, frozen=True):
    """One trace, sent in three ways."""

    kind: str
    """Of its traffic."""
    sessions: int
    """Concurrent ones."""
    client_batches: int
    """Of the trace."""
    bytes: int
    """JSON of its events."""
    optimum: int
    """The fewest requests that could deliver it."""
    relay: Outcome
    direct: Outcome
    one_for_one: Outcome

    @property
    def ratio(self) -> float:
        """Requests of the relay / optimum."""
        return self.relay.requests / self.optimum


class Demand(msgspec.Struct, frozen=True):
    """What one session of a kind asks for, in the mean."""

    kind: str
    client_batches_per_minute: float
    optimum_per_minute: float
    """Requests."""
    events_per_minute: float

    def sessions_at(self, load: float, requests_per_minute: int) -> int:
        """Return how many sessions make a load."""
        return max(1, round(load * requests_per_minute / self.optimum_per_minute))


class Study:
    """Runs traces under the same conditions.

    Args:
        seconds: Length of a trace.
        weather: Of upstream.
        config: Sections batch, budget and forward.
        seed: Of all chance.
    """

    def __init__(self, seconds: float, weather: Weather, config: Config, seed: int) -> None:
        self.seconds = seconds
        self.weather = weather
        self._config = config
        self._seed = seed
        self._limits = config.batch.limits
        self._merges_pages = config.batch.merge != "strict"

    def _optimum(self, trace: list[Arrival]) -> int:
        return fewest_requests(trace, self._limits, merges_pages=self._merges_pages)

    def demand(self, kind: str) -> Demand:
        """Measure what a session of a kind asks for."""
        trace = arrivals(kind, _SAMPLE_SESSIONS, _SAMPLE_SECONDS, self._seed)
        session_minutes = _SAMPLE_SESSIONS * _SAMPLE_SECONDS / 60
        return Demand(
            kind,
            len(trace) / session_minutes,
            self._optimum(trace) / session_minutes,
            sum(len(arrival.batch.events) for arrival in trace) / session_minutes,
        )

    def trace(self, kind: str, sessions: int) -> list[Arrival]:
        """Return a trace of the study's length."""
        return arrivals(kind, sessions, self.seconds, self._seed)

    def run(self, kind: str, sessions: int) -> Run:
        """Send a trace in three ways."""
        trace = self.trace(kind, sessions)
        return Run(
            kind,
            sessions,
            len(trace),
            sum(arrival.batch.run_bytes(0, len(arrival.batch.events)) for arrival in trace),
            self._optimum(trace),
            Forwarding(trace, self.seconds, self.weather, self._config, self._seed).run(),
            send_directly(trace, self.seconds, self.weather, self._config, self._seed),
            forward_one_for_one(trace, self.seconds, self.weather, self._config),
        )

    def most_direct_sessions(self, kind: str) -> int:
        """Return the largest number of sessions of which direct sending loses nothing in the study's time."""
        sessions = 0
        while not send_directly(self.trace(kind, sessions + 1), self.seconds, self.weather, self._config).lost:
            sessions += 1
        return sessions
