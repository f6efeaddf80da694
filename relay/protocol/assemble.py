"""Assembling an upstream body from segments, without compressing or inflating anything.

    gzip header · stored(prefix) · segment · stored(",") · segment · … · stored-final(suffix) · trailer

Segments end on a byte with a full flush and stored blocks are byte-aligned, so the pieces concatenate into one
deflate stream (RFC 1951); the trailer's CRC is combined from the segments' own.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from relay.protocol.codings import SegmentDeflater, crc32, crc32_combine, gzip_member, stored_blocks

_COMMA = stored_blocks(b",")
_COMMA_CRC = crc32(b",")

COMMA_BYTES = len(_COMMA)
"""What stands between two segments."""

_STORE_PREFIX_BYTES = 512
"""A shorter prefix is stored: deflating it would save less than a packet and cost a compressor."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A segment as it stands in the spool."""

    deflated: bytes
    """See `codings`, rule 3."""
    crc: int
    """CRC-32 of the uncompressed run."""
    events_bytes: int
    """Its uncompressed length."""


def assemble(prefix: bytes, pieces: Sequence[Piece], suffix: bytes) -> bytes:
    """Return the gzip body `prefix + ",".join(runs) + suffix`.

    The same arguments give the same bytes, so a retry after a crash repeats the first send.
    """
    is_short = len(prefix) < _STORE_PREFIX_BYTES
    stream = [stored_blocks(prefix) if is_short else SegmentDeflater().deflate(prefix)]
    crc = crc32(prefix)
    length = len(prefix)
    for index, piece in enumerate(pieces):
        if index:
            stream.append(_COMMA)
            crc = crc32_combine(crc, _COMMA_CRC, 1)
            length += 1
        stream.append(piece.deflated)
        crc = crc32_combine(crc, piece.crc, piece.events_bytes)
        length += piece.events_bytes
    stream.append(stored_blocks(suffix, final=True))
    crc = crc32_combine(crc, crc32(suffix), len(suffix))
    return gzip_member(stream, crc, length + len(suffix))


def frame_bytes(prefix: bytes, suffix: bytes) -> int:
    """Return how many bytes `assemble` adds to the segments and the commas between them, exactly."""
    return len(assemble(prefix, (), suffix))
