"""A good client beside whatever a benchmark does to the relay: one request after the other, at its own pace.

It runs in a thread of its own and measures from the moment at which a request was due. So a relay that stops for a
second is seen by every request of that second, not by one (coordinated omission).
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from bench.bodies import Body

_PATIENCE_SECONDS = 30.0
"""What a client gives the relay; beyond it the request has failed."""


class Seen(msgspec.Struct, frozen=True):
    """What the client saw in a while."""

    answers_by_status: dict[str, int]
    """Answers by status; `none` where there was none."""
    latencies: list[float]
    """Seconds from when a request was due to its answer, sorted."""

    def latency(self, share: float) -> float:
        """Return a percentile of the latencies, such as 0.99; 0 where nothing was answered."""
        return self.latencies[int(share * (len(self.latencies) - 1))] if self.latencies else 0.0

    @property
    def failed(self) -> int:
        """Requests that were not answered 200."""
        return sum(count for status, count in self.answers_by_status.items() if status != "200")


class SteadyClient:
    """Posts while its block runs.

    Args:
        address: Of the relay.
        next_body: Gives each request's body.
        interval_seconds: Between two requests.
    """

    def __init__(self, address: tuple[str, int], next_body: Callable[[], Body], interval_seconds: float) -> None:
        self._address = address
        self._next_body = next_body
        self._interval = interval_seconds
        self._statuses: Counter[str] = Counter()
        self._latencies: list[float] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def take(self) -> Seen:
        """Return what was seen since the last call."""
        statuses, self._statuses = self._statuses, Counter()
        latencies, self._latencies = self._latencies, []
        return Seen(dict(statuses), sorted(latencies))

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the request in hand."""
        self._stopping.set()
        self._thread.join(2 * _PATIENCE_SECONDS)

    def _run(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=_PATIENCE_SECONDS)
        headers = {"Content-Encoding": "gzip", "X-Lucent-Api-Key": "luc_pk_benchmark"}
        due_at = time.perf_counter()
        while not self._stopping.wait(max(0.0, due_at - time.perf_counter())):
            try:
                connection.request("POST", "/api/sdk/replay", self._next_body().gzip, headers)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                status = "none"
            else:
                status = str(answer.status)
                self._latencies.append(time.perf_counter() - due_at)
            self._statuses[status] += 1
            due_at += self._interval
