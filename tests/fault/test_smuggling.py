"""Request smuggling: bytes that could be read in two ways are read in none."""

from __future__ import annotations

import pytest
import trio.testing

from relay.config import Listen
from tests.component.memory_listener import serving
from tests.unit.malformed import CHUNKED, HOST, MALFORMED, OTHER_CODINGS, POST

GOOD = b"GET /out HTTP/1.1\r\n" + HOST + b"\r\n"
SMUGGLED = POST + b"Content-Length: 7\r\n\r\nsmuggle" + GOOD

TOO_MUCH = {
    "headers without end": (b"GET /out HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 150_000, 431),
    "too many headers": (b"GET /out HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 101 + b"\r\n", 431),
    "target without end": (b"GET /" + b"a" * 150_000, 431),
    "Content-Length over the limit": (POST + b"Content-Length: 18446744073709551615\r\n\r\nabc", 413),
    "chunk over the limit": (CHUNKED + b"ffffffffffffffff\r\n" + b"x" * 1_001, 413),
    "chunk size without end": (CHUNKED + b"0" * 70_000, 400),
    "chunk extension without end": (CHUNKED + b"1;" + b"x" * 70_000, 400),
    "trailers without end": (CHUNKED + b"0\r\nX: " + b"y" * 70_000, 400),
    "too many trailers": (CHUNKED + b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
}

CASES = {
    **{name: (data, 400) for name, data in MALFORMED.items()},
    **{f"Transfer-Encoding: {name}": (data, 501) for name, data in OTHER_CODINGS.items()},
    **TOO_MUCH,
}


@pytest.mark.parametrize("is_trickling", [False, True], ids=["at once", "in pieces"])
@pytest.mark.parametrize(("data", "status"), CASES.values(), ids=CASES.keys())
async def test_nothing_behind_bad_framing_is_a_request(
    data: bytes, status: int, is_trickling: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """A good request, then a bad one with more behind it: two answers, a refusal the last, and one handler asked."""
    stream = GOOD + data + SMUGGLED
    size = 997 if is_trickling else len(stream)
    async with serving(Listen()) as it:
        client = it.connect()
        for start in range(0, len(stream), size):
            await client.send(stream[start : start + size])
        assert (await client.read())[0] == 200
        answered, headers, _ = await client.read()
        assert (answered, headers[b"connection"]) == (status, b"close")
        assert await client.read_to_end() == b""
        assert [request.path for request in it.recorder.requests] == ["/out"]
        await client.aclose()
