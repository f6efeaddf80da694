from __future__ import annotations

import gzip
import shutil
import subprocess
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.protocol.assemble import Piece, assemble
from relay.protocol.codings import SegmentDeflater, crc32
from tests.node import ask_node

TEXTS = st.binary(max_size=2_000) | st.sampled_from([b"", b"x" * 511, b"x" * 512, bytes(range(256)) * 600])


def make_piece(run: bytes, deflater: SegmentDeflater | None = None) -> Piece:
    """Return a run as the spool keeps it."""
    return Piece((deflater or SegmentDeflater()).deflate(run), crc32(run), len(run))


@given(TEXTS, st.lists(TEXTS, max_size=8), TEXTS)
@example(b"", [], b"")
@example(b"{" * 70_000, [b"", b"", b"1"], b"}" * 70_000)
def test_the_body_is_the_pieces_with_commas(prefix: bytes, runs: list[bytes], suffix: bytes) -> None:
    """The gzip holds prefix, runs joined by commas, and suffix, as one member with a checksum and size that hold."""
    deflater = SegmentDeflater()
    body = assemble(prefix, [make_piece(run, deflater) for run in runs], suffix)
    text = prefix + b",".join(runs) + suffix
    assert gzip.decompress(body) == text
    decoder = zlib.decompressobj(wbits=31)
    assert decoder.decompress(body) == text
    assert decoder.eof
    assert not decoder.unused_data


@given(TEXTS, st.lists(TEXTS, max_size=4), TEXTS)
def test_the_same_pieces_give_the_same_bytes(prefix: bytes, runs: list[bytes], suffix: bytes) -> None:
    """A retry after a crash repeats the first send, to the byte: no time, no name, no state."""
    pieces = [make_piece(run) for run in runs]
    assert assemble(prefix, pieces, suffix) == assemble(prefix, list(pieces), suffix)


def bodies() -> tuple[list[bytes], list[bytes]]:
    """Return gzip bodies of every kind of piece, and their texts."""
    prefixes = [b"", b'{"events":[', b"p" * 5_000, b"q" * 70_000]
    runs = [[], [b"1"], [b"1", b"2" * 10_000, b"3"], [bytes(range(256)) * 1_000] * 3, [b"4"] * 500]
    cases = [(prefix, run, suffix) for prefix in prefixes for run in runs for suffix in (b"", b"]}}", b"s" * 70_000)]
    gzips = [assemble(prefix, [make_piece(item) for item in run], suffix) for prefix, run, suffix in cases]
    return gzips, [prefix + b",".join(run) + suffix for prefix, run, suffix in cases]


def test_node_inflates_it() -> None:
    """Upstream's own runtime reads every kind of body, to the same text."""
    gzips, texts = bodies()
    judge = '(input) => require("crypto").createHash("md5").update(require("zlib").gunzipSync(input)).digest("hex")'
    expected = ask_node('(input) => require("crypto").createHash("md5").update(input).digest("hex")', texts)
    assert ask_node(judge, gzips) == expected


def test_gzip_finds_nothing_wrong() -> None:
    """The strictest reader of the format, `gzip -t`, passes every kind of body."""
    executable = shutil.which("gzip")
    if executable is None:
        pytest.skip("gzip is not on PATH")
    for body in bodies()[0]:
        subprocess.run([executable, "-t"], input=body, check=True, capture_output=True, timeout=60)


def test_a_rotten_segment_is_found_by_whoever_reads_it() -> None:
    """The checksum comes from the events as they were accepted, so damage on the disk cannot pass as events."""
    piece = make_piece(b"1,2,3")
    rotten = Piece(make_piece(b"1,2,4").deflated, piece.crc, piece.events_bytes)
    with pytest.raises(gzip.BadGzipFile, match="CRC"):
        gzip.decompress(assemble(b"[", [rotten], b"]"))
