from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from types import ModuleType

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from relay.errors import InvalidBatch, TooLarge, UnsupportedCoding
from relay.protocol import codings as with_isal

TEXT = b'{"session":{"id":"0d9f"},"events":[%b]}' % b",".join(b'{"type":3,"timestamp":%d}' % n for n in range(300))


def load_without_isal() -> ModuleType:
    """Return the module as it is on a machine for which ISA-L has no wheel."""
    spec = importlib.util.find_spec("relay.protocol.codings")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "isal", None)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["isal", "zlib"], scope="module")
def codings(request: pytest.FixtureRequest) -> ModuleType:
    """The module with ISA-L, and without it."""
    return with_isal if request.param == "isal" else load_without_isal()


def raw_deflate(data: bytes, level: int = 6) -> bytes:
    """Return raw deflate, by zlib."""
    compressor = zlib.compressobj(level, wbits=-15)
    return compressor.compress(data) + compressor.flush()


def zstd(data: bytes, *, write_checksum: bool = False) -> bytes:
    """Return a zstd frame that says how much it holds."""
    return zstandard.ZstdCompressor(write_checksum=write_checksum).compress(data)


def zstd_stream(data: bytes) -> bytes:
    """Return a frame that does not say how much it holds."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    return compressor.compress(data) + compressor.flush()


FORMATS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZip ", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "zlib, stored": ("deflate", lambda data: zlib.compress(data, 0)),
    "raw deflate": ("deflate", raw_deflate),
    "raw deflate, stored": ("deflate", lambda data: raw_deflate(data, 0)),
    "zstd": ("zstd", zstd),
    "zstd, checked": ("zstd", lambda data: zstd(data, write_checksum=True)),
    "zstd, unsized": ("zstd", zstd_stream),
    "plain": ("identity", bytes),
    "no header": ("", bytes),
    "plain, said to be gzip": ("gzip", bytes),
    "plain, said to be deflate": ("deflate", bytes),
    "plain, said to be zstd": ("zstd", bytes),
    "gzip, not said": ("", gzip.compress),
    "gzip, said to be zstd": ("zstd", gzip.compress),
    "gzip, said to be deflate": ("deflate", gzip.compress),
    "zstd, not said": ("identity", zstd),
    "zstd, said to be deflate": ("deflate", zstd),
}

COMPRESSED = [name for name in FORMATS if not name.startswith(("plain", "no header"))]


# -- inflating


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_coded_comes_out(codings: ModuleType, name: str) -> None:
    """Each coding is undone, and the first bytes decide where the header is wrong or missing."""
    header, compress = FORMATS[name]
    assert codings.inflate(compress(TEXT), header, len(TEXT)) == TEXT


@pytest.mark.parametrize("name", FORMATS)
def test_the_cap_is_exact(codings: ModuleType, name: str) -> None:
    """A body of just the allowed size passes; one byte more is refused and not cut off."""
    header, compress = FORMATS[name]
    assert len(codings.inflate(compress(TEXT), header, len(TEXT))) == len(TEXT)
    with pytest.raises(TooLarge, match=f"exceeds {len(TEXT) - 1} bytes"):
        codings.inflate(compress(TEXT), header, len(TEXT) - 1)


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_body_that_was_cut_short_is_refused(codings: ModuleType, name: str) -> None:
    """However much arrived, data without its end is no body; less than a magic is taken for a plain one."""
    header, compress = FORMATS[name]
    whole = compress(TEXT)
    magic_bytes = 4 if name.startswith("zstd") else 2 if "gzip" in name else 0
    for size in range(magic_bytes, len(whole)):
        with pytest.raises(InvalidBatch, match="not valid compressed data"):
            codings.inflate(whole[:size], header, len(TEXT))


@pytest.mark.parametrize("name", ["gzip", "zlib", "zstd, checked"])
def test_a_flipped_bit_is_noticed(codings: ModuleType, name: str) -> None:
    """Where a format has a checksum, no damage behind the header gets through as another text."""
    header, compress = FORMATS[name]
    whole = compress(TEXT)
    for position in range(10, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        with contextlib.suppress(InvalidBatch, TooLarge):
            assert codings.inflate(bytes(damaged), header, 10 * len(TEXT)) == TEXT


@pytest.mark.parametrize("flag", [0x20, 0x40, 0x80])
def test_a_gzip_flag_that_no_standard_knows_is_refused(codings: ModuleType, flag: int) -> None:
    """A member whose header may hold what we would misread is damaged (RFC 1952, 2.3.1.2), the first or a later one."""
    member = bytearray(gzip.compress(TEXT))
    member[3] |= flag
    for body in (bytes(member), gzip.compress(TEXT) + member):
        with pytest.raises(InvalidBatch, match="not valid compressed data"):
            codings.inflate(body, "gzip", 3 * len(TEXT))


def test_gzip_members_are_joined(codings: ModuleType) -> None:
    """A body of several members, empty ones among them, is one text."""
    pieces = [TEXT[:1], b"", TEXT[1:500], b"", b"", TEXT[500:]]
    body = b"".join(gzip.compress(piece) for piece in pieces)
    assert codings.inflate(body, "gzip", len(TEXT)) == TEXT
    with pytest.raises(TooLarge):
        codings.inflate(body, "gzip", len(TEXT) - 1)
    with pytest.raises(InvalidBatch, match="ends early"):
        codings.inflate(body + gzip.compress(b"")[:-1], "gzip", len(TEXT))


def test_large_members_behind_the_first_are_read_in_steps(codings: ModuleType) -> None:
    """A later member of many feeds comes out whole, and what follows it is found."""
    noise = b"".join(b"%x" % (n * 2654435761 % 2**32) for n in range(30_000))
    body = gzip.compress(b"{") + gzip.compress(noise) + gzip.compress(b"}")
    assert codings.inflate(body, "gzip", 1_000_000) == b"{%b}" % noise


def test_a_member_is_not_decoded_from_all_the_rest() -> None:
    """What a decoder is fed and does not use is copied, so members by the thousand are fed little at a time."""
    fed = 0

    class Counting:
        error = zlib.error

        class decompressobj:  # noqa: N801 - zlib's spelling
            def __init__(self, wbits: int) -> None:
                self._decoder = zlib.decompressobj(wbits)

            def decompress(self, data: bytes, max_length: int) -> bytes:
                nonlocal fed
                fed += len(data)
                return self._decoder.decompress(data, max_length)

            def __getattr__(self, name: str) -> object:
                return getattr(self._decoder, name)

    module = load_without_isal()
    module.__dict__["_deflate"] = Counting
    members = 5_000
    body = gzip.compress(b"") * members
    assert module.inflate(body, "gzip", 10) == b""
    assert fed <= len(body) + members * 16_384


@pytest.mark.parametrize("garbage", [b"\0", b"\0" * 512, b"trailing", b"\x1f", b"{}"])
@pytest.mark.parametrize("name", ["gzip", "zlib", "raw deflate"])
def test_bytes_behind_the_stream_are_ignored(codings: ModuleType, name: str, garbage: bytes) -> None:
    """Padding behind a stream is left alone, as Node leaves it."""
    header, compress = FORMATS[name]
    assert codings.inflate(compress(TEXT) + garbage, header, len(TEXT)) == TEXT


def test_zstd_frames_are_joined_and_nothing_else_may_follow(codings: ModuleType) -> None:
    """Frames follow each other; what is none is an error, whole or cut short."""
    frames = zstd(TEXT[:100]) + zstd(b"") + zstd_stream(TEXT[100:])
    assert codings.inflate(frames, "zstd", len(TEXT)) == TEXT
    for garbage in (b"\0", b"garbage, and more of it than a header", zstd(TEXT)[:-1]):
        with pytest.raises(InvalidBatch):
            codings.inflate(frames + garbage, "zstd", 2 * len(TEXT))


def test_zstd_blocks_of_every_kind_are_walked(codings: ModuleType) -> None:
    """Raw, run-length and compressed blocks are told apart when the end of a frame is looked for."""
    raw = bytes((0x28, 0xB5, 0x2F, 0xFD, 0x00, 0x58, 0x18, 0, 0)) + b"abc"
    run = bytes((0x23, 0x03, 0)) + b"x"
    assert codings.inflate(raw + run, "zstd", 1_000) == b"abc" + b"x" * 100
    with pytest.raises(InvalidBatch, match="ends early"):
        codings.inflate(raw, "zstd", 1_000)
    noise = zstandard.ZstdCompressor().compress(bytes(range(256)) * 2_000)
    assert codings.inflate(noise, "zstd", 512_000) == bytes(range(256)) * 2_000


@pytest.mark.parametrize(("log", "is_read"), [(22, True), (23, True), (24, False), (27, False)])
def test_a_zstd_window_over_8_mib_is_refused(codings: ModuleType, log: int, *, is_read: bool) -> None:
    """The decoder never reserves more than RFC 9659 allows."""
    parameters = zstandard.ZstdCompressionParameters(window_log=log, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    body = compressor.compress(TEXT) + compressor.flush()
    if is_read:
        assert codings.inflate(body, "zstd", len(TEXT)) == TEXT
    else:
        with pytest.raises(InvalidBatch, match="memory"):
            codings.inflate(body, "zstd", len(TEXT))


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_bomb_takes_no_more_memory_than_the_cap(codings: ModuleType, name: str) -> None:
    """A few kilobytes that hold 16 MiB are refused before they are more than the cap."""
    header, compress = FORMATS[name]
    body = compress(bytes(16_777_216))
    cap = 524_288
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            codings.inflate(body, header, cap)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * cap + (len(body) if "stored" in name else 0)


@pytest.mark.parametrize(
    "coding", ["br", "gzip, gzip", "gzip, identity", "identity,gzip", "deflate gzip", "compress", "*", "gzip;q=1"]
)
def test_a_coding_that_we_do_not_read_is_named(codings: ModuleType, coding: str) -> None:
    """Unknown and stacked codings are refused with what we do read, even where the body is plain."""
    with pytest.raises(UnsupportedCoding) as caught:
        codings.inflate(b"{}", coding, 10)
    assert repr(coding) in str(caught.value)
    assert all(name in str(caught.value) for name in codings.CODINGS)


def test_a_long_coding_is_not_repeated_at_length(codings: ModuleType) -> None:
    """The answer to a hostile header stays short."""
    with pytest.raises(UnsupportedCoding) as caught:
        codings.inflate(b"{}", "x" * 10_000, 10)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("coding", ["", "identity", "gzip", "zstd"])
def test_an_empty_body_stays_empty(codings: ModuleType, coding: str) -> None:
    """Nothing is nothing, which the JSON parser will refuse; as deflate it lacks its end."""
    assert codings.inflate(b"", coding, 10) == b""
    with pytest.raises(InvalidBatch, match="ends early"):
        codings.inflate(b"", "deflate", 10)


@pytest.mark.parametrize("before", [b"", b" ", b"\r\n\t ", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_plain_json_under_deflate_is_never_taken_for_a_stream(codings: ModuleType, before: bytes) -> None:
    """A body that a proxy inflated is found by its brace, whatever blanks and byte order mark stand before it."""
    assert codings.inflate(before + TEXT, "deflate", 10_000) == before + TEXT


@given(st.dictionaries(st.text(), st.integers() | st.text()), st.integers(0, 9))
@example({}, 9)
def test_raw_deflate_of_json_never_begins_like_json(value: dict[str, object], level: int) -> None:
    """The brace is no accident: no raw stream of a JSON object can be mistaken for one that was inflated."""
    text = json.dumps(value).encode()
    for module in (zlib, with_isal._deflate):
        compressor = module.compressobj(min(level, 3) if module is not zlib else level, zlib.DEFLATED, -15)
        stream = compressor.compress(text) + compressor.flush()
        assert not stream.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


@given(st.binary(max_size=300), st.sampled_from(with_isal.CODINGS))
@example(b"\x1f\x8b", "gzip")
@example(b"\x28\xb5\x2f\xfd", "zstd")
@example(b"\x28\xb5\x2f\xfd\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "zstd")
@example(b"\x78", "deflate")
def test_any_bytes_are_a_body_or_refused(body: bytes, coding: str) -> None:
    """Hostile bytes have two outcomes, and neither is another exception."""
    for start in (b"", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"\x78\x9c"):
        with contextlib.suppress(InvalidBatch, TooLarge):
            assert len(with_isal.inflate(start + body, coding, 1_000)) <= 1_000


# -- segments

RUNS = st.lists(st.binary(max_size=2_000) | st.sampled_from([TEXT, b"", bytes(70_000)]), max_size=6)


@given(RUNS)
def test_segments_and_stored_blocks_are_one_stream(runs: list[bytes]) -> None:
    """Pieces in any order and number inflate to their texts laid end to end, with every library."""
    for module in (with_isal, load_without_isal()):
        deflater = module.SegmentDeflater()
        pieces = [deflater.deflate(run) for run in runs]
        stored = [module.stored_blocks(run) for run in runs]
        stream = b"".join(piece for pair in zip(pieces, stored, strict=True) for piece in pair)
        text = b"".join(run + run for run in runs)
        assert zlib.decompress(stream + module.stored_blocks(b"!", final=True), -15) == text + b"!"


@given(RUNS)
def test_a_segment_stands_alone(runs: list[bytes]) -> None:
    """No segment refers to an earlier one of the same deflater, so each is read without the others."""
    deflater = with_isal.SegmentDeflater()
    for run in runs:
        segment = deflater.deflate(memoryview(run))
        assert with_isal.inflate_segment(segment, len(run)) == run


@pytest.mark.parametrize("size", [0, 1, 65_534, 65_535, 65_536, 131_070, 131_071])
def test_stored_blocks_split_at_what_16_bits_can_say(codings: ModuleType, size: int) -> None:
    """Any length is stored, in as many blocks as it needs, the last of them final if asked."""
    data = bytes(range(256)) * 512
    blocks = codings.stored_blocks(data[:size], final=True)
    assert zlib.decompress(blocks, -15) == data[:size]
    assert len(blocks) == size + 5 * max(1, -(-size // 65_535))
    open_blocks = codings.stored_blocks(data[:size])
    assert zlib.decompress(open_blocks + blocks, -15) == data[:size] * 2


@pytest.mark.parametrize("length", [0, len(TEXT) - 1, len(TEXT) + 1, 10 * len(TEXT)])
def test_a_segment_of_another_length_is_damaged(codings: ModuleType, length: int) -> None:
    """The spool knows how long each segment is, and believes nothing else."""
    segment = codings.SegmentDeflater().deflate(TEXT)
    assert codings.inflate_segment(segment, len(TEXT)) == TEXT
    with pytest.raises(ValueError, match=f"not {length}"):
        codings.inflate_segment(segment, length)


def test_a_segment_that_is_no_deflate_is_damaged(codings: ModuleType) -> None:
    """Rotten bytes are an error of the segment, not of the caller."""
    with pytest.raises(ValueError, match="segment is damaged"):
        codings.inflate_segment(b"\xff" * 50, 10)


# -- checksums and framing


@given(st.binary(max_size=5_000), st.binary(max_size=5_000))
@example(b"", b"")
@example(b"a", b"")
def test_crc_combines_as_if_it_had_seen_both(first: bytes, second: bytes) -> None:
    """The combination equals the checksum of the whole, by the library and by the matrices."""
    crcs = zlib.crc32(first), zlib.crc32(second)
    whole = zlib.crc32(first + second)
    assert with_isal.crc32(first + second) == whole
    assert with_isal.crc32_combine(*crcs, len(second)) == whole
    assert with_isal.combine_by_matrix(*crcs, len(second)) == whole
    assert load_without_isal().crc32_combine(*crcs, len(second)) == whole


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_both_ways_to_combine_agree_on_lengths_that_no_test_can_hold(first: int, second: int, length: int) -> None:
    """Library and matrices agree for terabytes too."""
    assert with_isal.combine_by_matrix(first, second, length) == with_isal.crc32_combine(first, second, length)


@given(st.binary(max_size=3_000))
def test_gzip_bytes_are_gzip(data: bytes) -> None:
    """What we compress whole, everyone reads."""
    assert gzip.decompress(with_isal.gzip_bytes(data)) == data
    assert gzip.decompress(load_without_isal().gzip_bytes(data)) == data


def test_recordings_of_several_frames_are_read_whole() -> None:
    """A recording that was appended to has a frame for each part."""
    assert with_isal.zstd_decompress(zstd(TEXT) + zstd_stream(TEXT)) == TEXT + TEXT
