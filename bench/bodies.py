"""Client batches for the benchmarks: recorded events, cut to a wanted size, no two bodies alike.

Rules:
1. A slice is consecutive events of one recorded window, deflated once, by zlib at the level that browsers use.
2. A body is a slice behind a recorded envelope with a session, window, sequence and lastActivityAt of its own. So the
   relay recognises none of them as stored before. A session keeps its envelope for a while, as people stay on a page.
3. Slices come round again, thousands of requests later. A deflater remembers 32 KiB, a processor's cache little more
   than the slices of a second.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import UUID

import msgspec

import relay.demo
from relay.protocol.assemble import Piece
from relay.protocol.codings import crc32, crc32_combine, gzip_member, stored_blocks, zstd_decompress
from relay.protocol.cut import body_prefix, body_suffix, overhead_bytes
from relay.protocol.node_json import split_events
from relay.protocol.replay import Envelope, decode_batch
from relay.spool.values import NewBatch, NewSegment

SIZES = {"small": 8_192, "medium": 25_600, "large": 128_000}
"""Bytes of JSON that a body is to have: a page being read, a page being used, a first visit or a busy canvas."""

LIVE_SESSIONS = 1_000
"""Sessions at a time, which take turns."""

SESSION_BATCHES = 30
"""Batches until a session ends with a final and a new one takes its place: five minutes of the SDK's pace."""

PAGE_BATCHES = 6
"""Batches until a session's envelope changes, as it does with the page: once a minute."""

_BROWSER_LEVEL = 6
"""zlib's default, which CompressionStream takes."""

_SPREAD = 0.3
"""How far a slice may be from the wanted size, as a share of it; single events that are larger are left out."""

_MAX_SLICES = 4_000
"""A size's slices; at 25 KB they are 100 MB of JSON and 16 MB compressed."""

_SESSION = b"00000000-0000-4000-8000-00005e551011"
_WINDOW = b"00000000-0000-4000-8000-00000077d011"
"""Stand in the envelopes where each body has its own."""


class Slice(msgspec.Struct, frozen=True, gc=False):
    """Some recorded events and the envelope they came in."""

    envelope: Envelope
    """With placeholders for session and window."""
    piece: Piece
    """The events, deflated."""
    event_count: int
    """How many."""


class Body(msgspec.Struct, frozen=True, gc=False):
    """One request's body."""

    gzip: bytes
    """As it goes over the wire."""
    json_bytes: int
    """Its size inflated."""


def cut_slices(wanted_bytes: int) -> list[Slice]:
    """Cut the recordings into slices of about `wanted_bytes`, the small ones with overlaps until there are many."""
    batches = [
        (envelope, split_events(events))
        for path in sorted((Path(relay.demo.__file__).parent / "recordings").glob("*.jsonl.zst"))
        for envelope, events in _windows(zstd_decompress(path.read_bytes()).splitlines())
    ]
    slices: list[Slice] = []
    for share in (0, 1, 2, 3):  # a quarter of a slice further on at each pass, so other events share a body
        for envelope, events in batches:
            events_bytes = wanted_bytes - overhead_bytes(envelope)
            for run in _runs(events, events_bytes, events_bytes * share // 4):
                if len(slices) < _MAX_SLICES:
                    compressor = zlib.compressobj(_BROWSER_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
                    deflated = compressor.compress(run) + compressor.flush(zlib.Z_FULL_FLUSH)
                    slices.append(Slice(envelope, Piece(deflated, crc32(run), len(run)), len(split_events(run))))
    return slices


def _windows(lines: Iterable[bytes]) -> Iterator[tuple[Envelope, bytes]]:
    """Join the batches of each recorded window; yields its first envelope and all its events."""
    windows: dict[str, tuple[Envelope, list[bytes]]] = {}
    for line in lines:
        batch = decode_batch(line, len(line))
        head = batch.envelope.head.replace(batch.session_id.encode(), _SESSION)
        head = head.replace(batch.window_id.encode(), _WINDOW)
        _, runs = windows.setdefault(batch.window_id, (Envelope(head, batch.envelope.tail), []))
        runs.append(bytes(batch.events))
    for envelope, runs in windows.values():
        yield envelope, b",".join(runs)


def _runs(events: list[bytes], wanted_bytes: int, skipped_bytes: int) -> Iterator[bytes]:
    """Yield runs of consecutive events, each as near to `wanted_bytes` as its last event allows."""
    taken: list[bytes] = []
    size = -skipped_bytes
    for event in events:
        longer = size + len(event) + 1
        if taken and longer - wanted_bytes > wanted_bytes - size:
            if abs(size - wanted_bytes) <= wanted_bytes * _SPREAD:
                yield b",".join(taken)
            taken, longer = [], len(event) + 1
        size = longer
        if size > 0:
            taken.append(event)


class Sessions:
    """Renders bodies of many sessions that take turns."""

    def __init__(self, slices: list[Slice], seed: int, session_batches: int = SESSION_BATCHES) -> None:
        """Take slices in their order; `seed` keeps the sessions of one benchmark apart from those of another."""
        self._slices = slices
        self._seed = seed
        self._session_batches = session_batches
        self._count = 0

    def next_body(self) -> Body:
        """Return a body that no other call returned."""
        batch = self.next_batch()
        [run] = batch.segments
        prefix = body_prefix(batch.envelope, batch.last_activity, batch.sequence)
        suffix = body_suffix(is_final=batch.is_final)
        piece = Piece(run.deflated, run.crc, run.events_bytes)
        return Body(_compress(prefix, piece, suffix), len(prefix) + run.events_bytes + len(suffix))

    def next_batch(self, key: str = "", accepted_at: float = 0.0) -> NewBatch:
        """Return the same as the spool takes it; no other call returned it, of either kind."""
        count = self._count
        self._count = count + 1
        turn, place = divmod(count, LIVE_SESSIONS)
        generation, sequence = divmod(turn, self._session_batches)
        identity = self._seed << 64 | generation << 32 | place
        # Sessions take slices from different places, so that neighbours in time are not alike.
        source = self._slices[(count + place * 31) % len(self._slices)]
        envelope = self._slices[(place + sequence // PAGE_BATCHES) % len(self._slices)].envelope
        session_id, window_id = str(UUID(int=identity << 1)), str(UUID(int=identity << 1 | 1))
        head = envelope.head.replace(_SESSION, session_id.encode()).replace(_WINDOW, window_id.encode())
        own = Envelope(head, envelope.tail)
        run = NewSegment(0, source.event_count, source.piece.events_bytes, source.piece.crc, source.piece.deflated)
        return NewBatch(
            key,
            session_id,
            window_id,
            sequence,
            sequence == self._session_batches - 1,
            b"%d" % (1_790_000_000_000 + count),
            own,
            own.digest,
            run.event_count,
            (run,),
            accepted_at,
            run.event_count,
            run.events_bytes,
            run.crc,
        )


def _compress(prefix: bytes, events: Piece, suffix: bytes) -> bytes:
    """Return a gzip body whose envelope is stored: 300 bytes more than one stream, and inflated as fast within 5%.

    Deflated apart it would cost the relay 4 µs that no browser's body costs, for a Huffman table of its own.
    """
    crc = crc32_combine(crc32(prefix), events.crc, events.events_bytes)
    crc = crc32_combine(crc, crc32(suffix), len(suffix))
    pieces = [stored_blocks(prefix), events.deflated, stored_blocks(suffix, final=True)]
    return gzip_member(pieces, crc, len(prefix) + events.events_bytes + len(suffix))
