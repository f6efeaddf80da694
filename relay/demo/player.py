"""Plays recorded sessions to a relay, as their browsers would: in real sequence, faster than life, all at once.

Rules:
1. A session sends one batch at a time, in order, and comes again with the same batch until it has an answer: that
   is how SDKs behave, and what makes "sent" a promise the relay has to keep.
2. A batch is in the ledger from before its first byte is sent.
3. All sessions share keep-alive connections, a few unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import trio

from relay.demo.audit import Played, WindowId
from relay.demo.session import Recording, SmallBatch, encode_batch, event_identities
from relay.errors import UpstreamError
from relay.forward.exchange import Client
from relay.protocol.codings import gzip_bytes
from relay.sandbox.service import REPLAY_PATH

KEY = "luc_pk_demo"
"""Any key that begins as ingest keys do is good for the sandbox."""

CONNECTIONS = 6
"""What a browser opens to one origin over HTTP/1.1."""

RETRY_SECONDS = 1.0
"""Before a client comes again. The relay asks for 5 s, a quarter of the demo."""

_COME_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""Answers after which an SDK sends the same batch again."""


class Player:
    """Some sessions, and how far they are.

    Args:
        recordings: What there is to play; at least one.
        sessions: How many to play. Beyond the recordings they are played again, under other session ids.
        speed: How many times as fast as recorded.
        connections: How many batches may be under way at a time.
    """

    def __init__(
        self, recordings: Sequence[Recording], sessions: int, speed: float, connections: int = CONNECTIONS
    ) -> None:
        self._sessions = list(choose_sessions(recordings, sessions))
        self._speed = speed
        self._slots = trio.CapacityLimiter(connections)
        self._accepted = self._refused = self._requests = self._events = self._wire_bytes = self._json_bytes = 0
        self._trouble = ""
        self.sessions_done = 0
        """Sessions that were sent to their end."""
        self.batches = sum(len(recording.batches) for _, recording in self._sessions)
        """Client batches there are to send."""
        self.events = sum(recording.event_count for _, recording in self._sessions)
        """Events in them."""
        self.ledger: dict[WindowId, list[bytes]] = {}
        """What was sent, by window, in order."""

    @property
    def is_done(self) -> bool:
        """Whether every session was sent to its end."""
        return self.sessions_done == len(self._sessions)

    def played(self) -> Played:
        """Return the figures so far."""
        return Played(
            sessions=len(self._sessions),
            batches=self.batches,
            batches_accepted=self._accepted,
            batches_refused=self._refused,
            requests=self._requests,
            events_accepted=self._events,
            wire_bytes=self._wire_bytes,
            json_bytes=self._json_bytes,
            recorded_batches=sum(recording.recorded_batches for _, recording in self._sessions),
            trouble=self._trouble,
        )

    async def run(self, client: Client) -> None:
        """Play all sessions to the relay that a client is for."""
        started_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            for session_id, recording in self._sessions:
                nursery.start_soon(self._play, client, session_id, recording, started_at)

    async def _play(self, client: Client, session_id: str, recording: Recording, started_at: float) -> None:
        for sequence, batch in enumerate(recording.batches):
            await trio.sleep_until(started_at + batch.due_seconds / self._speed)
            async with self._slots:
                await self._send(client, session_id, sequence, batch)
        self.sessions_done += 1

    async def _send(self, client: Client, session_id: str, sequence: int, batch: SmallBatch) -> None:
        """Send a batch until it is answered for good."""
        text = encode_batch(batch, session_id, sequence)
        body = gzip_bytes(text)
        headers = (
            (b"content-type", b"application/json"),
            (b"content-encoding", b"gzip"),
            (b"x-lucent-api-key", KEY.encode()),
        )
        self.ledger.setdefault((session_id, batch.window_id), []).extend(event_identities(batch, session_id))
        while True:
            self._requests += 1
            self._wire_bytes += len(body)
            self._json_bytes += len(text)
            try:
                reply = await client.request("POST", REPLAY_PATH, headers, body)
            except UpstreamError as error:
                self._trouble = f"last: {error}"
                await trio.sleep(RETRY_SECONDS)
                continue
            if reply.status == 200:
                self._accepted += 1
                self._events += len(batch.events)
                return
            self._trouble = f"last: {reply.status} {reply.body[:200].decode('utf-8', 'replace')}"
            if reply.status not in _COME_AGAIN:
                self._refused += 1
                return
            await trio.sleep(RETRY_SECONDS)


def choose_sessions(recordings: Sequence[Recording], count: int) -> Iterator[tuple[str, Recording]]:
    """Yield session ids and what is played under them: each recording once, then all over again."""
    for number in range(count):
        lap, index = divmod(number, len(recordings))
        recording = recordings[index]
        yield (f"{recording.session_id}-{lap}" if lap else recording.session_id), recording
