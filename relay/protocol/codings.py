"""Content codings and deflate segments: the only owner of ISA-L, zlib and zstandard.

Rules:
1. Inflating never yields more than the caller's cap; what would is refused, not truncated.
2. The first bytes decide before the header does: proxies inflate a body and leave `gzip` in place, or gzip it
   without saying so. JSON can start with neither magic, so the sniff cannot be wrong.
3. A *segment* is raw deflate ended by a full flush: byte-aligned, without a final block, without references to
   earlier bytes. Segments and stored blocks therefore concatenate into one valid deflate stream.

ISA-L deflates recordings at 900 MB/s where zlib's level 1 manages 80; zlib serves where ISA-L has no wheel.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import zstandard

from relay.errors import InvalidBatch, TooLarge, UnsupportedCoding

try:
    from isal import isal_zlib
except ImportError:  # no wheel for this machine
    _deflate: Any = zlib  # the same calls, slower
else:
    _deflate = isal_zlib

GZIP_MAGIC = b"\x1f\x8b"
"""RFC 1952, 2.3.1."""

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
"""RFC 8878, 3.1.1."""

ZSTD_MAX_WINDOW_BYTES = 8 * 1024 * 1024
"""RFC 9659 forbids larger windows in HTTP; the decoder would have to reserve them."""

_ZSTD_MAX_HEADER_BYTES = 18
"""The magic and the longest frame header (RFC 8878, 3.1.1.1)."""

_ZSTD_RUN_BLOCK = 1
"""The block type that stores one byte and how often it is repeated (RFC 8878, 3.1.1.2.2)."""

_GZIP_WINDOW_BITS = zlib.MAX_WBITS + 16
"""How zlib is told to expect gzip's header and trailer."""

_GZIP_RESERVED_FLAGS = 0xE0
"""Must be zero in the byte behind magic and method (RFC 1952, 2.3.1.2): zlib refuses them, ISA-L would not look."""

_FEED_BYTES = 16_384
"""What a gzip member after the first is fed, twice as much with every step. A decoder copies what it does not use, so
that a body of a million empty members, each fed all the rest, would take minutes."""

_BEFORE_OBJECT = b"\xef\xbb\xbf \t\r\n"
"""What may stand before JSON: a byte order mark and blanks."""

CODINGS = ("identity", "gzip", "x-gzip", "deflate", "zstd")
"""What `Content-Encoding` may name; x-gzip is the alias of RFC 9110, 8.4.1.3."""

_SEGMENT_LEVEL = 1
"""ISA-L's level 1: ratio 6.1 at 890 MB/s; level 0 loses a fifth of the ratio for little speed."""

_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
"""Deflate, no flags, no time (so equal batches are equal bytes), unknown system."""

_STORED_MAX_BYTES = 65_535
"""A stored block's length is 16 bits (RFC 1951, 3.2.4)."""

_CRC32_POLYNOMIAL = 0xEDB88320
"""CRC-32/IEEE as gzip uses it, bits reversed (RFC 1952, 8)."""


def inflate(body: bytes, coding: str, max_bytes: int) -> bytes:
    """Return a request body without its content coding.

    Args:
        body: As it came over the wire.
        coding: The `Content-Encoding` value; empty where there was none.
        max_bytes: Largest decoded size.

    Raises:
        UnsupportedCoding: The header names a coding we do not read, or several.
        InvalidBatch: The compressed data is damaged or cut short.
        TooLarge: More than `max_bytes` would come out.
    """
    name = coding.strip().lower() or "identity"
    if name not in CODINGS:
        raise UnsupportedCoding(f"Unsupported Content-Encoding {coding[:64]!r}: use one of {', '.join(CODINGS)}")
    if body.startswith(GZIP_MAGIC):
        decoded = _inflate_stream(body, _GZIP_WINDOW_BITS, max_bytes)
    elif body.startswith(ZSTD_MAGIC):
        decoded = _inflate_zstd(body, max_bytes)
    elif name == "deflate":
        decoded = _inflate_deflate(body, max_bytes)
    else:
        decoded = body
    if len(decoded) > max_bytes:
        raise _too_large(max_bytes)
    return decoded


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"Body exceeds {max_bytes} bytes once decoded: send fewer events in a batch")


def _inflate_stream(body: bytes, window_bits: int, max_bytes: int) -> bytes:
    """Inflate one stream, or all members of gzip (RFC 1952, 2.2); bytes behind are ignored, as Node ignores them."""
    view = memoryview(body)
    parts = []
    room = max_bytes
    at = 0
    feed_bytes = len(body)
    while True:
        if window_bits == _GZIP_WINDOW_BITS and int.from_bytes(body[at + 3 : at + 4]) & _GZIP_RESERVED_FLAGS:
            raise InvalidBatch("Body is not valid compressed data: unknown gzip flags")
        decoder = _deflate.decompressobj(wbits=window_bits)
        while not decoder.eof:
            piece = view[at : at + feed_bytes]
            if not piece:
                raise InvalidBatch("Body is not valid compressed data: it ends early")
            try:
                parts.append(decoder.decompress(piece, room + 1))
            except _deflate.error as error:
                raise InvalidBatch(f"Body is not valid compressed data: {error}") from error
            room -= len(parts[-1])
            if room < 0:
                raise _too_large(max_bytes)
            at += len(piece)
            feed_bytes *= 2
        at -= len(decoder.unused_data)
        if window_bits != _GZIP_WINDOW_BITS or not body.startswith(GZIP_MAGIC, at):
            return b"".join(parts)
        feed_bytes = _FEED_BYTES


def _inflate_zstd(body: bytes, max_bytes: int) -> bytes:
    try:
        _check_frames(body)
        decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES)
        with decoder.stream_reader(body, read_across_frames=True) as reader:
            decoded = reader.read(max_bytes + 1)
    except zstandard.ZstdError as error:
        raise InvalidBatch(f"Body is not valid compressed data: {error}") from error
    if len(decoded) > max_bytes:
        raise _too_large(max_bytes)
    return decoded


def _check_frames(body: bytes) -> None:
    """Refuse zstd data that is cut short, which the stream reader does not: walk from block to block (RFC 8878, 3.1.1).

    Raises:
        InvalidBatch: The data ends before its last frame does.
        zstandard.ZstdError: A frame's header is none.
    """
    at = 0
    while at < len(body):
        header = body[at : at + _ZSTD_MAX_HEADER_BYTES]
        has_checksum = zstandard.get_frame_parameters(header).has_checksum
        at += zstandard.frame_header_size(header)
        is_last = 0
        while not is_last and at < len(body):
            block = int.from_bytes(body[at : at + 3], "little")
            is_last, kind, size = block & 1, block >> 1 & 3, block >> 3
            at += 3 + (1 if kind == _ZSTD_RUN_BLOCK else size)
        at += 4 * has_checksum
        if not is_last or at > len(body):
            raise InvalidBatch("Body is not valid compressed data: it ends early")


def _inflate_deflate(body: bytes, max_bytes: int) -> bytes:
    """Inflate a `deflate` body: zlib format by the standard, raw from senders that misread it, or inflated already.

    Raw deflate of JSON never begins with `{`, which would be a block of fixed codes whose first byte is beyond ASCII,
    nor with a byte order mark, whose first block would be of the reserved type.
    """
    if body.lstrip(_BEFORE_OBJECT).startswith(b"{"):
        return body
    has_zlib_header = len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return _inflate_stream(body, zlib.MAX_WBITS if has_zlib_header else -zlib.MAX_WBITS, max_bytes)


class SegmentDeflater:
    """Turns runs of events into segments.

    One compressor serves all segments, since a full flush makes each independent of what came before.
    Not for two threads at once.
    """

    def __init__(self) -> None:
        self._compressor: Any = _deflate.compressobj(_SEGMENT_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)

    def deflate(self, data: bytes | memoryview) -> bytes:
        """Return `data` as a segment (rule 3)."""
        return self._compressor.compress(data) + self._compressor.flush(zlib.Z_FULL_FLUSH)  # type: ignore[no-any-return]


def inflate_segment(segment: bytes, length: int) -> bytes:
    """Return a segment's bytes.

    Args:
        segment: From `SegmentDeflater.deflate`.
        length: The number of bytes it holds.

    Raises:
        ValueError: It is damaged, or holds another number of bytes.
    """
    decoder = _deflate.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        data: bytes = decoder.decompress(segment, length + 1)
    except _deflate.error as error:
        raise ValueError(f"segment is damaged: {error}") from error
    if len(data) != length:
        raise ValueError(f"segment holds {len(data)} bytes, not {length}")
    return data


def crc32(data: bytes | memoryview) -> int:
    """Return the CRC-32/IEEE of `data`."""
    return _deflate.crc32(data)  # type: ignore[no-any-return]


def crc32_combine(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two byte strings laid end to end, from the CRC of each and the second's length."""
    if hasattr(_deflate, "crc32_combine"):
        return _deflate.crc32_combine(first, second, second_bytes)  # type: ignore[no-any-return]
    return combine_by_matrix(first, second, second_bytes)


def _multiply(matrix: tuple[int, ...], vector: int) -> int:
    """Multiply a 32x32 matrix over GF(2), given by its columns, with a vector."""
    product = 0
    for column in matrix:
        if vector & 1:
            product ^= column
        vector >>= 1
    return product


@functools.cache
def _zero_bytes(power: int) -> tuple[int, ...]:
    """Return the matrix that carries a CRC over 2**power zero bytes."""
    if power == -3:  # one zero bit: shift, and fold the polynomial in where a one falls out
        return (_CRC32_POLYNOMIAL, *(1 << bit for bit in range(31)))
    half = _zero_bytes(power - 1)
    return tuple(_multiply(half, column) for column in half)


def combine_by_matrix(first: int, second: int, second_bytes: int) -> int:
    """Compute `crc32_combine` without a library: the first CRC is carried over as many zero bytes, then folded in."""
    power = 0
    while second_bytes:
        if second_bytes & 1:
            first = _multiply(_zero_bytes(power), first)
        second_bytes >>= 1
        power += 1
    return first ^ second


def stored_blocks(data: bytes, *, final: bool = False) -> bytes:
    """Return `data` as stored deflate blocks (RFC 1951, 3.2.4), which may follow any segment."""
    blocks = []
    for start in range(0, max(len(data), 1), _STORED_MAX_BYTES):
        piece = data[start : start + _STORED_MAX_BYTES]
        is_last = final and start + _STORED_MAX_BYTES >= len(data)
        size = len(piece)
        blocks.append(bytes((is_last, size & 0xFF, size >> 8, ~size & 0xFF, ~size >> 8 & 0xFF)) + piece)
    return b"".join(blocks)


def gzip_member(deflated: list[bytes], crc: int, length: int) -> bytes:
    """Frame concatenated deflate pieces, the last of them final, as one gzip member (RFC 1952, 2.3).

    Args:
        deflated: Segments and stored blocks in order.
        crc: CRC-32 of the uncompressed content.
        length: Its number of bytes.
    """
    trailer = crc.to_bytes(4, "little") + (length & 0xFFFFFFFF).to_bytes(4, "little")
    return b"".join((_GZIP_HEADER, *deflated, trailer))


def gzip_bytes(data: bytes | memoryview) -> bytes:
    """Compress `data` as one gzip member; for clients of the relay such as the demo and the benchmarks."""
    compressor = _deflate.compressobj(_SEGMENT_LEVEL, zlib.DEFLATED, 31)
    return compressor.compress(data) + compressor.flush()  # type: ignore[no-any-return]


def zstd_decompress(data: bytes) -> bytes:
    """Decompress a recording: a trusted zstd file of one or more frames."""
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
        return reader.read()


def zstd_compress(data: bytes) -> bytes:
    """Compress data as one zstd frame; frames may follow one another in a file."""
    return zstandard.ZstdCompressor().compress(data)
