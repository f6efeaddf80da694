"""Clients as SDKs are: batches whose every byte is known, sent again until they are answered 200, and a record of them.

`Sent` is the one side of the account; `tests.system.laws` holds it against what the sandbox has.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import trio

from tests.system.wire import Answer, Connection, Lost, connect

KEY = "luc_pk_test"
TARGET = "/api/sdk/replay"

RETRY_SECONDS = 0.02
"""A client's pause before it tries again; impatient, so that a restart is met by all of them at once."""

PATIENCE_SECONDS = 30.0
"""For a relay to take what clients keep sending, restarts included."""


def digest(data: bytes) -> str:
    """Return what the sandbox says of an event or an envelope instead of repeating it."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass(frozen=True)
class Batch:
    """One client batch, with its events' exact bytes."""

    session: str
    window: str
    sequence: int
    events: tuple[bytes, ...]
    is_final: bool
    body: bytes
    envelope: str
    """Digest of everything but events, sequence, flush and lastActivityAt."""

    def digests(self) -> list[tuple[str, str]]:
        """Return the envelope's digest and its own for each event."""
        return [(self.envelope, digest(event)) for event in self.events]


def make_events(name: str, count: int, size: int = 80) -> tuple[bytes, ...]:
    """Return events that differ from all others: each bears the name and its index, and is about `size` bytes long."""
    padding = "." * max(0, size - 60 - len(name))
    return tuple(
        b'{"timestamp":%d,"type":3,"data":{"of":"%b","n":%d,"text":"%b"}}'
        % (1_700_000_000_000 + index, name.encode(), index, padding.encode())
        for index in range(count)
    )


def make_batch(
    session: str,
    sequence: int,
    events: Sequence[bytes] | int = 3,
    *,
    window: str = "w1",
    is_final: bool = False,
    page: str = "https://shop.example/",
) -> Batch:
    """Return a batch; `events` may be the number of events to make."""
    if isinstance(events, int):
        events = make_events(f"{session}/{window}/{sequence}", events)
    envelope: dict[str, Any] = {
        "session": {"id": session, "windowId": window, "startedAt": 1, "url": "https://shop.example/"},
        "user": {"anonymousId": f"a-{session}"},
        "page": {"url": page},
        "replay": {},
    }
    head = json.dumps({**envelope, "session": {**envelope["session"], "lastActivityAt": 1_000 + sequence}})
    flush = ', "flush": "final"' if is_final else ""
    replay = b'{"sequence": %d, "events": [%b]}%b}' % (sequence, b",".join(events), flush.encode())
    body = head.encode().removesuffix(b"{}}") + replay
    return Batch(session, window, sequence, tuple(events), is_final, body, digest(canonical(envelope)))


def canonical(value: Any) -> bytes:
    """Return JSON with sorted members and no space, in ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_batch(body: bytes) -> Batch:
    """Return the batch that a body holds, its events sliced out of it by the standard library's parser."""
    text = body.decode()
    value = json.loads(text)
    session, replay = value["session"], value["replay"]
    events, start = [], text.index("[", text.index('"events"')) + 1
    decoder = json.JSONDecoder()
    for _ in replay["events"]:
        _, end = decoder.raw_decode(text, start)
        events.append(text[start:end].encode())
        start = end + 1
    value.pop("flush", None)
    del session["lastActivityAt"], replay["events"]
    sequence = replay.pop("sequence")
    is_final = json.loads(text).get("flush") == "final"
    return Batch(session["id"], session["windowId"], sequence, tuple(events), is_final, body, digest(canonical(value)))


@dataclass
class Sent:
    """What was answered 200, so what has to arrive."""

    windows: dict[tuple[str, str], dict[int, Batch]] = field(default_factory=lambda: defaultdict(dict))
    """By session and window, then by sequence."""
    events: int = 0
    """Of all batches, each counted once."""
    batches: int = 0
    _changed: trio.Event = field(default_factory=trio.Event)

    def add(self, batch: Batch) -> None:
        """Note a batch that was answered 200."""
        window = self.windows[batch.session, batch.window]
        if batch.sequence not in window:
            self.events += len(batch.events)
            self.batches += 1
        window[batch.sequence] = batch
        self._changed.set()

    async def more(self, batches: int) -> None:
        """Wait until so many batches more have been taken."""
        enough = self.batches + batches
        with trio.fail_after(PATIENCE_SECONDS):
            while self.batches < enough:
                self._changed = trio.Event()
                await self._changed.wait()


class Sdk:
    """A client that keeps a connection, and sends a batch again until it is taken.

    Args:
        address: Where the relay is now, empty before that is known; a restart moves it.
        sent: Notes what is taken.
    """

    def __init__(self, address: Callable[[], str], sent: Sent, key: str = KEY) -> None:
        self._address = address
        self._sent = sent
        self._headers = (("X-Lucent-Api-Key", key), ("Content-Encoding", "gzip"))
        self._connection: Connection | None = None

    async def post(self, batch: Batch) -> None:
        """Send a batch until it is answered 200. The caller bounds the wait."""
        body = gzip.compress(batch.body, 1)
        while True:
            try:
                answer = await self._attempt(body)
            except Lost:
                await self._hang_up()
            else:
                if answer.status == 200:
                    self._sent.add(batch)
                    return
                assert answer.status == 503, (answer.status, answer.body)
            await trio.sleep(RETRY_SECONDS)

    async def _attempt(self, body: bytes) -> Answer:
        if self._connection is None:
            self._connection = await connect(self._address())
        answer = await self._connection.request("POST", TARGET, self._headers, body)
        if self._connection.is_over:
            await self._hang_up()
        return answer

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close its connection."""
        await self._hang_up()

    async def _hang_up(self) -> None:
        if self._connection is not None:
            await trio.aclose_forcefully(self._connection.stream)
            self._connection = None
