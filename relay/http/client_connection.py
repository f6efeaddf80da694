"""One connection to an origin and the exchange under way on it: HTTP/1.1 by h11 over a trio stream. The owner of h11.

Rules:
1. Foreign errors (trio, h11) end here: callers see `UpstreamError` and its kinds.
2. Every wait has a deadline, and the message of a timeout names the option that set it.

Not here: which connection a request takes, and what becomes of it afterwards (`relay.http.client`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import h11
import trio

from relay.errors import ExchangeFailed, ExchangeTimedOut, ReplyInvalid, Unanswered
from relay.http.connect import Origin

if TYPE_CHECKING:
    from relay.config import Upstream

RECEIVE_BYTES = 16_384
"""One read: a full TLS record (RFC 8446, 5.1), and so as large as decryption returns at once."""

STREAM_BYTES = 65_536
"""One read of a streamed body: 100 MB take 0.06 s of CPU time so, 0.17 s by 16 KiB, and 0.16 s by 256 KiB."""

MAX_HEAD_BYTES = 16_384
"""Status line and headers of an answer, each chunk header, the trailer. The limit of h11, Node and IIS."""

MAX_INFORMATIONAL = 8
"""1xx answers before the final one. A server has use for one each of 100 and 103, and for a few of 102."""

EARLY_ANSWER_SECONDS = 5.0
"""How long to look for an answer after the server has stopped taking the request. Such an answer was sent
before the break, so it is at most a few TCP retransmissions (0.2, 0.4, 0.8 … s) away."""

PROBE_CHECKPOINTS = 8
"""Scheduler passes that a pooled connection gets to show that it is dead. Measured: TCP needs 2, TLS 3 with a
close_notify and 5 without, trio's memory stream 5. All eight take 75 µs."""

MAX_QUOTED_CHARACTERS = 200
"""Of a broken answer in an error message; enough to recognise a proxy's error page."""

OWN_HEADERS = frozenset({b"host", b"content-length", b"transfer-encoding", b"upgrade"})
"""Not a caller's to set: with them two ends could disagree on where a request ends or who it is for."""

HeaderPairs: TypeAlias = Sequence[tuple[bytes, bytes]]
"""Header names, lower-case, and values."""

Message: TypeAlias = h11.Request
"""The head of a request."""

Head: TypeAlias = h11.Response
"""The head of a final answer."""


def compose(origin: Origin, method: str, target: str, own: HeaderPairs, headers: HeaderPairs) -> Message:
    """Return a request's head.

    Args:
        origin: Of the connection.
        method: Upper-case token.
        target: Path and query, with a leading slash.
        own: The client's headers.
        headers: The caller's, after them.

    Raises:
        ValueError: Method, target or a header is not for HTTP; the message does not quote it, as it may be a key.
    """
    if method == "CONNECT":
        raise ValueError("a request by CONNECT has another kind of target")
    if any(name.lower() in OWN_HEADERS for name, _ in headers):
        raise ValueError("a request's framing, host and protocol are the client's own business")
    try:
        host = (b"host", origin.authority.encode())
        return h11.Request(method=method, target=target, headers=[host, *own, *headers])
    except (h11.LocalProtocolError, UnicodeError):
        # Without the cause, because h11 quotes the offending value, and that may be a key.
        raise ValueError("the method, the target or a header cannot be written as HTTP/1.1") from None


class Connection:
    """One connection: its stream, its HTTP state, and the exchange under way."""

    def __init__(self, stream: trio.abc.Stream, name: str, settings: Upstream) -> None:
        self.stream = stream
        # When the connection joined the pool, by trio's clock.
        self.idle_since = 0.0
        # Whether a byte of the present answer has arrived.
        self.heard = False
        self._name = name
        self._settings = settings
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        # When the present request had been sent to the last byte, or why it could not be.
        self._sent_at: float | None = None
        self._send_error: trio.BrokenResourceError | None = None
        # The one deadline of the exchange. It moves on from phase to phase, and `_limit` says which it is.
        self._patience = trio.CancelScope()
        self._limit = ""

    def is_reusable(self) -> bool:
        """Return whether another request may follow: this one is complete, and so is its answer."""
        return (
            self._sent_at is not None
            and self._http.our_state is h11.DONE
            and self._http.their_state is h11.DONE
            and self._http.trailing_data == (b"", False)
        )

    async def is_quiet(self) -> bool:
        """Return whether an idle connection has stayed silent, as it must: no byte, no end, no error.

        A receive that would block is given up after a few scheduler passes; trio's streams lose nothing by
        that. So it works on every stream (socket, TLS, memory) and waits for nothing.
        """
        quiet = True

        async def listen() -> None:
            nonlocal quiet
            with suppress(trio.BrokenResourceError):
                await self.stream.receive_some(1)
            quiet = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            for _ in range(PROBE_CHECKPOINTS):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        return quiet

    async def exchange(self, message: Message, body: bytes) -> tuple[Head, bytes]:
        """Send a request and, at the same time, read its answer: it may come early and be all there is.

        Over TLS, an early answer of several records can still be lost where the server closes without reading on:
        trio's TLS stream ends as a whole with its sending side. Then the exchange has failed, and a retry decides.

        Raises:
            ExchangeFailed, ExchangeTimedOut, ReplyInvalid: As `HttpClient.request`.
        """
        wire = self._next_request(message, body)
        outcome: tuple[Head, bytes] | ExchangeFailed | ReplyInvalid | None = None
        with trio.CancelScope() as self._patience:
            self._wait_for("write_seconds", self._settings.write_seconds)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, wire)
                try:
                    outcome = await self._receive()
                except (ExchangeFailed, ReplyInvalid) as error:
                    # Raised below, because the nursery would wrap it in a group.
                    outcome = error
                nursery.cancel_scope.cancel()
        if isinstance(outcome, tuple):
            return outcome
        if outcome is not None:
            raise outcome
        if self._send_error is not None:
            raise self._broken() from self._send_error
        raise ExchangeTimedOut(f"{self._name}: {self._limit} passed {self._progress()}")

    async def begin(self, message: Message, body: bytes) -> Head:
        """Send a request, and read the head of its answer.

        Raises:
            ExchangeFailed, ExchangeTimedOut, ReplyInvalid: As `HttpClient.stream`.
        """
        wire = self._next_request(message, body)
        with trio.CancelScope() as self._patience:
            self._wait_for("write_seconds", self._settings.write_seconds)
            await self._send(wire)
            return await self._receive_head()
        raise ExchangeTimedOut(f"{self._name}: {self._limit} passed {self._progress()}")

    async def receive_piece(self, stall_seconds: float) -> bytes:
        """Return the next piece of a streamed body, empty at its end.

        Raises:
            ExchangeFailed, ExchangeTimedOut, ReplyInvalid: As `StreamedReply.receive`.
        """
        with trio.move_on_after(stall_seconds):
            event = await self._next_event(STREAM_BYTES)
            return bytes(event.data) if isinstance(event, h11.Data) else b""
        raise ExchangeTimedOut(f"{self._name}: nothing for {stall_seconds:g} s {self._progress()}")

    def _next_request(self, message: Message, body: bytes) -> bytes:
        """Begin an exchange; returns its request as bytes."""
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        self.heard = False
        self._sent_at = self._send_error = None
        return b"".join(self._http.send(event) for event in (message, h11.Data(body), h11.EndOfMessage()))

    async def _send(self, wire: bytes) -> None:
        try:
            await self.stream.send_all(wire)
        except trio.BrokenResourceError as error:
            self._send_error = error
            self._wait_for("", EARLY_ANSWER_SECONDS)
        else:
            self._sent_at = trio.current_time()
            self._wait_for_answer(self._sent_at)

    async def _receive(self) -> tuple[Head, bytes]:
        head = await self._receive_head()
        body = bytearray()
        limit = self._settings.max_response_bytes
        while isinstance(event := await self._next_event(), h11.Data):
            body += event.data
            if len(body) > limit:
                raise ReplyInvalid(f"{self._name}: the answer is over max_response_bytes = {limit}")
        if self._sent_at is None:
            # Both ends can be done while the sending task has yet to run its last step.
            await trio.lowlevel.checkpoint()
        return head, bytes(body)

    async def _receive_head(self) -> Head:
        """Return the head of the final answer."""
        for _ in range(MAX_INFORMATIONAL + 1):
            event = await self._next_event()
            if isinstance(event, h11.Response):
                return event
        raise ReplyInvalid(f"{self._name}: more than {MAX_INFORMATIONAL} informational answers")

    async def _next_event(self, max_bytes: int = RECEIVE_BYTES) -> h11.Event:
        """Return the next part of the answer, receiving as needed. Foreign errors of an exchange end here."""
        ended = False
        try:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Event):
                    return event
                data = await self.stream.receive_some(max_bytes)
                ended = not data
                if data and not self.heard:
                    self.heard = True
                    if self._sent_at is not None:
                        self._wait_for_answer(self._sent_at)
                self._http.receive_data(bytes(data))
        except trio.BrokenResourceError as error:
            raise self._broken() from error
        except h11.RemoteProtocolError as error:
            if ended:
                raise self._broken() from error
            raise ReplyInvalid(f"{self._name}: not HTTP: {str(error)[:MAX_QUOTED_CHARACTERS]}") from error

    def _wait_for_answer(self, sent_at: float) -> None:
        """Set the deadline of an answer whose request is sent."""
        first_byte, response = self._settings.first_byte_seconds, self._settings.response_seconds
        if self.heard or response <= first_byte:
            self._wait_for("response_seconds", response, sent_at)
        else:
            self._wait_for("first_byte_seconds", first_byte, sent_at)

    def _wait_for(self, option: str, seconds: float, since: float | None = None) -> None:
        self._limit = f"{option} = {seconds:g}"
        self._patience.deadline = (trio.current_time() if since is None else since) + seconds

    def _broken(self) -> ExchangeFailed:
        kind = ExchangeFailed if self.heard else Unanswered
        return kind(f"{self._name}: the connection ended {self._progress()}")

    def _progress(self) -> str:
        """Return how far the exchange got, for messages."""
        if self.heard:
            return "in the middle of the answer"
        return "before the request was sent" if self._sent_at is None else "before a byte of the answer"
