"""`POST /api/sdk/replay`: bytes in, segments on disk, then 200.

Rules:
1. Whatever can be refused on headers is refused before the body is read.
2. 200 is said when the commit that covers the batch has returned, and not before.
3. A bad batch is answered in upstream's shape and leaves no trace in the spool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import trio

from relay.config import Config
from relay.errors import RefusedBatch, SpoolUnavailable, TooLarge
from relay.http.message import HeaderList, Request, Response, error_response, json_response
from relay.http.router import Route
from relay.intake.keys import KeyPolicy
from relay.protocol.codings import SegmentDeflater, inflate
from relay.protocol.cut import Limits
from relay.protocol.replay import ClientBatch, decode_batch
from relay.protocol.reuse import Earlier, Known, Stored, find_known
from relay.spool.segments import make_new_batch
from relay.spool.spool import Spool
from relay.spool.values import NewBatch
from relay.telemetry import Histogram

REPLAY_PATH = "/api/sdk/replay"
"""As upstream's, so that an SDK's `ingestBaseUrl` may point here."""

_CORS: HeaderList = ((b"access-control-allow-origin", b"*"),)

_PREFLIGHT: HeaderList = (
    (b"access-control-allow-methods", b"POST, OPTIONS"),
    (b"access-control-allow-headers", b"Content-Type, Content-Encoding, X-Lucent-Api-Key"),
    (b"access-control-max-age", b"86400"),
    (b"vary", b"Access-Control-Request-Private-Network"),
)
"""The contract's, cached for a day: browsers cap it lower by themselves, and every preflight saved is a round trip."""

_PRIVATE_NETWORK = (b"access-control-allow-private-network", b"true")
"""A public page may post to a relay on a private address, if it asks (Private Network Access, 3.1)."""

_OK = json_response(200, {"ok": True})

_INLINE_DECODED_BYTES = 1_048_576
"""Decoding, checking and compressing this much takes about 3 ms; a small body may inflate to far more."""

_ACK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds of the acknowledgement histogram: one commit is 1 to 30 ms, a struggling disk seconds."""


class IntakeStatistics(msgspec.Struct, frozen=True):
    """Counters since the start of the process."""

    batches_accepted: int
    """Client batches stored and answered 200."""
    batches_repeated: int
    """Client batches recognised as stored before, and answered 200."""
    events_accepted: int
    """Events of the accepted ones; of a batch that reused a sequence, the new ones."""
    batches_reused: dict[str, int]
    """Accepted batches that bore the sequence of another one: `grown`, where they began like it, or `other`."""
    finals_late: int
    """Batches that said only when repeated that they end their session, when they were on their way upstream."""
    wire_bytes: int
    """Bodies of the accepted ones as received."""
    decoded_bytes: int
    """Their JSON."""
    segments: int
    """Runs they were cut into."""
    segment_bytes: int
    """These, compressed."""
    refused_by_status: dict[int, int]
    """Batches refused by this handler."""
    ack_seconds: Histogram
    """Accepted and repeated batches by time from complete body to durable."""


class Intake:
    """The handler and its counters.

    Args:
        config: Sections intake, keys, batch and listen.
        spool: Where batches go.
        wall_clock: Seconds since the epoch.
        monotonic: Seconds, for the acknowledgement's duration.
        is_refused: Whether upstream is known to refuse a key.
    """

    def __init__(
        self,
        config: Config,
        spool: Spool,
        wall_clock: Callable[[], float],
        monotonic: Callable[[], float],
        is_refused: Callable[[str], bool] = lambda _key: False,
    ) -> None:
        self._settings = config.intake
        self._keys = KeyPolicy(config.keys)
        # By JSON, whatever `batch.measure` says: how far a run deflates is known only once it is a segment. Segments
        # merge at the seal anyway, and one of at most this size is quickly inflated where it has to be split.
        self._limits = Limits(config.batch.max_events, config.batch.max_bytes)
        self._spool = spool
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._is_refused = is_refused
        self._deflater = SegmentDeflater()
        self._decodes = trio.CapacityLimiter(config.intake.max_decodes)
        self._accepted = self._repeated = self._events = self._wire_bytes = self._decoded_bytes = 0
        self._segments = self._segment_bytes = 0
        self._reused = {"grown": 0, "other": 0}
        self._finals_late = 0
        self._refused: dict[int, int] = {}
        self._ack_seconds = Histogram(_ACK_SECONDS)

    def route(self) -> Route:
        """Return the route to serve."""
        return Route(
            REPLAY_PATH,
            {"POST": self.post, "OPTIONS": self.options},
            admit=self.admit,
            max_body_bytes=self._settings.max_body_bytes,
            headers=_CORS,
        )

    def statistics(self) -> IntakeStatistics:
        """Return the counters."""
        return IntakeStatistics(
            batches_accepted=self._accepted,
            batches_repeated=self._repeated,
            events_accepted=self._events,
            batches_reused=dict(self._reused),
            finals_late=self._finals_late,
            wire_bytes=self._wire_bytes,
            decoded_bytes=self._decoded_bytes,
            segments=self._segments,
            segment_bytes=self._segment_bytes,
            refused_by_status=dict(self._refused),
            ack_seconds=self._ack_seconds.copy(),
        )

    async def options(self, request: Request) -> Response:
        """Answer a browser's preflight; it needs no key."""
        headers = _PREFLIGHT
        if request.header(b"access-control-request-private-network") == b"true":
            headers = (*headers, _PRIVATE_NETWORK)
        return Response(204, headers=headers)

    def admit(self, request: Request) -> Response | None:
        """Refuse on headers what need not be read: no key that is taken, or no room (rule 1).

        A key counts as refused where upstream refuses all keys that it stands for. With one left its batches are taken,
        and those for another wait in the spool.
        """
        key = self._keys.client_key(request)
        if key and not all(map(self._is_refused, self._keys.pool(key))):
            refusal = self._spool.refusal
            return self._unavailable(refusal) if refusal else None
        return self._refuse(401, "Missing API key" if key == "" else "Invalid or revoked API key")

    async def post(self, request: Request) -> Response:
        """Store one client batch."""
        began = self._monotonic()
        key = self._keys.client_key(request) or ""
        try:
            batch, size = await self._decode(key, request)
        except RefusedBatch as refusal:
            return self._refuse(refusal.status, str(refusal), refusal)
        try:
            appended = await self._spool.append(batch)
            while appended.outcome == "differs":
                compare = partial(self._prepare_rest, key, request, appended.earlier)
                batch = await self._spool.read_stored(compare)
                appended = await self._spool.append(batch)
        except SpoolUnavailable as error:
            return self._unavailable(str(error))
        if appended.outcome == "too_many_keys":
            return self._unavailable("the relay holds batches of as many keys as it may (keys.max_keys)")
        if appended.outcome == "numbers_used_up":
            return self._refuse(
                413,
                f"Sequence {batch.sequence} has no room for this batch, and the session has used the highest there is: "
                "send it with a lower sequence that is not in use",
            )
        self._finals_late += appended.final == "too late"
        self._count(batch, size, len(request.body), began, is_new=appended.outcome == "stored")
        return _OK

    async def _decode(self, key: str, request: Request) -> tuple[NewBatch, int]:
        """Prepare a small batch here, and one that is large, before or after inflating, in a thread."""
        if len(request.body) <= self._settings.thread_bytes:
            max_bytes = min(_INLINE_DECODED_BYTES, self._settings.max_decoded_bytes)
            try:
                return self._prepare(key, request, max_bytes, self._deflater)
            except TooLarge:
                pass  # with the full allowance, and where it delays nobody
        prepared = await trio.to_thread.run_sync(self._prepare_large, key, request, limiter=self._decodes)
        if isinstance(prepared, RefusedBatch):
            raise prepared
        return prepared

    def _prepare_large(self, key: str, request: Request) -> tuple[NewBatch, int] | RefusedBatch:
        """Do as `_prepare`; a refusal is returned, and without what led to it.

        Raised across the threads it would come to hold itself, and by its traceback the decoded body, until a rare
        collection of garbage: ten bodies that are too large cost 640 MB in that way.
        """
        try:
            return self._prepare(key, request, self._settings.max_decoded_bytes, SegmentDeflater())
        except RefusedBatch as refusal:
            return type(refusal)(str(refusal), refusal.details)

    def _prepare(
        self, key: str, request: Request, max_decoded_bytes: int, deflater: SegmentDeflater
    ) -> tuple[NewBatch, int]:
        """Decode, validate, cut and compress; returns the batch and the size of its JSON. Runs in any thread."""
        decoded, size = self._read(request, max_decoded_bytes)
        return self._cut(key, decoded, deflater), size

    def _prepare_rest(self, key: str, request: Request, earlier: Sequence[Earlier], stored: Stored) -> NewBatch:
        """Prepare what is new in a batch whose sequence was used before (`protocol/reuse.py`). Runs in any thread."""
        decoded, _ = self._read(request, self._settings.max_decoded_bytes)
        return self._cut(key, decoded, SegmentDeflater(), find_known(decoded, earlier, stored))

    def _read(self, request: Request, max_decoded_bytes: int) -> tuple[ClientBatch, int]:
        """Inflate, decode and validate; returns the batch and the size of its JSON."""
        coding = request.header(b"content-encoding").decode("latin-1")
        body = inflate(request.body, coding, max_decoded_bytes)
        return decode_batch(body, self._settings.max_envelope_bytes), len(body)

    def _cut(self, key: str, decoded: ClientBatch, deflater: SegmentDeflater, known: Known | None = None) -> NewBatch:
        keys = self._keys.upstream_keys(key, decoded.session_id)
        return make_new_batch(decoded, self._limits, deflater, keys, self._wall_clock(), known)

    def _count(self, batch: NewBatch, decoded_bytes: int, wire_bytes: int, began: float, *, is_new: bool) -> None:
        self._ack_seconds.observe(self._monotonic() - began)
        if not is_new:
            self._repeated += 1
            return
        self._accepted += 1
        if batch.known is not None:
            self._reused["grown" if batch.known.event_count else "other"] += 1
        self._events += batch.event_count
        self._wire_bytes += wire_bytes
        self._decoded_bytes += decoded_bytes
        self._segments += len(batch.segments)
        self._segment_bytes += sum(len(segment.deflated) for segment in batch.segments)

    def _refuse(self, status: int, message: str, refusal: RefusedBatch | None = None) -> Response:
        self._refused[status] = self._refused.get(status, 0) + 1
        return error_response(status, message, refusal.details if refusal else None)

    def _unavailable(self, reason: str) -> Response:
        """Say come again; the reason is for the operator's eyes on the client's side."""
        self._refused[503] = self._refused.get(503, 0) + 1
        retry_after = str(self._settings.retry_after_seconds).encode()
        return error_response(503, f"Cannot accept batches now: {reason}", headers=((b"retry-after", retry_after),))
