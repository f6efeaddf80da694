"""Whose token is used for whom."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio
from structlog.testing import capture_logs

from relay.config import DataApi
from relay.data_api.credentials import REREAD_SECONDS, Credentials
from relay.protocol.fields import is_token
from tests.component.data_proxy import ISSUE, ISSUES, answer, get, patch, proxying

FILE = "/secrets/lucent"
OWN = "luc_api_the_relays_own"
GIVEN = "handed-out-by-the-relay"
HOLDING: dict[str, Any] = {"token": OWN, "client_tokens": (GIVEN, "another-one-handed-out")}


def sent(request: bytes) -> bytes:
    """Return the credential that upstream was sent; empty for none."""
    return request.partition(b"\r\nauthorization: ")[2].partition(b"\r\n")[0]


WHO: dict[str, tuple[str, str, bytes]] = {
    # case: option anonymous, Authorization of the client, what upstream is sent
    "a token of Lucent's": ("pass-through", "Bearer luc_api_a", b"Bearer luc_api_a"),
    "another scheme": ("pass-through", "Basic eDp5", b"Basic eDp5"),
    "a token of the relay's": ("pass-through", f"Bearer {GIVEN}", b"Bearer " + OWN.encode()),
    "the same, in another case and with blanks": ("pass-through", f"bEARER  {GIVEN} ", b"Bearer " + OWN.encode()),
    "nearly a token of the relay's": ("pass-through", f"Bearer {GIVEN}x", f"Bearer {GIVEN}x".encode()),
    "a token of the relay's by another scheme": ("pass-through", f"Basic {GIVEN}", b"Bearer " + OWN.encode()),
    "a token of the relay's without a scheme": ("pass-through", GIVEN, b"Bearer " + OWN.encode()),
    "a token of the relay's behind a tab": ("pass-through", f"Bearer\t{GIVEN}", b"Bearer " + OWN.encode()),
    "a token of the relay's, twice": (
        "pass-through",
        f"Bearer {GIVEN}\r\nAuthorization: Bearer {GIVEN}",
        b"Bearer " + OWN.encode(),
    ),
    "a token of the relay's beside another": (
        "pass-through",
        f"Bearer luc_api_a\r\nAuthorization: Bearer {GIVEN}",
        b"Bearer " + OWN.encode(),
    ),
    "nobody": ("pass-through", "", b""),
    "nobody, where the operator says so": ("serve-with-the-relays-token", "", b"Bearer " + OWN.encode()),
    "somebody, where nobody is served": ("serve-with-the-relays-token", "Bearer luc_api_a", b"Bearer luc_api_a"),
}


@pytest.mark.parametrize(("anonymous", "authorization", "expected"), WHO.values(), ids=WHO.keys())
async def test_by_which_token_upstream_is_asked(anonymous: str, authorization: str, expected: bytes) -> None:
    """A client's own credential passes; the relay's token is for clients of the relay's, and by option for nobody's."""
    lines = [f"Authorization: {authorization}"] if authorization else []
    async with proxying(lambda _: answer(), anonymous=anonymous, **HOLDING) as it:
        await it.ask(get(ISSUES, *lines, by=""))
        assert sent(it.asked[0]) == expected
        await it.ask(get(ISSUE, *lines, by="", method="PATCH", body=b"{}"))
        assert sent(it.asked[1]) == expected


async def test_a_credential_cannot_be_shed_on_the_way() -> None:
    """A client that calls its Authorization a field of the connection is not taken for nobody."""
    async with proxying(lambda _: answer(), anonymous="serve-with-the-relays-token", **HOLDING) as it:
        await it.ask(get(ISSUES, "Connection: authorization", by="luc_api_a"))
        assert sent(it.asked[0]) == b"Bearer luc_api_a"


async def test_clients_of_the_relays_share_its_answers() -> None:
    """Whoever is served with the relay's token shares its budget and what is kept for it."""
    async with proxying(lambda _: answer(), **HOLDING) as it:
        await it.ask(get(by=GIVEN))
        await it.ask(get(by="another-one-handed-out"))
        await it.ask(get(by=OWN))
        assert len(it.asked) == 1


async def test_a_token_is_one_however_its_scheme_is_written() -> None:
    """The scheme's case and blanks make no other token: they get no budget of their own, and share what is kept."""
    async with proxying(lambda _: answer(b"", "Cache-Control: max-age=60"), reads_per_minute=1) as it:
        for authorization in ("Bearer luc_api_a", "bearer luc_api_a", "BEARER   luc_api_a"):
            assert (await it.ask(get(ISSUES, f"Authorization: {authorization}", by="")))[0] == 200
            assert len(it.asked) == 1
        assert (await it.ask(get(ISSUE, "Authorization: bearer luc_api_a", by="")))[0] == 429
        others = ("Bearer luc_api_A", "luc_api_a", "LUC_API_A", "Basic luc_api_a", "basic luc_api_a", "Bearerluc_api_a")
        for number, authorization in enumerate(others, 2):
            assert (await it.ask(get(ISSUES, f"Authorization: {authorization}", by="")))[0] == 200
            assert len(it.asked) == number


async def test_a_token_file_is_read_again(autojump_clock: trio.testing.MockClock) -> None:
    """A token that is rotated in its file is used within a second; what was read last stays while the file is bad."""
    content: bytes | OSError = b"luc_api_1\n"

    def read(path: Path) -> bytes:
        assert path == Path(FILE)
        if isinstance(content, OSError):
            raise content
        return content

    used = []
    with capture_logs() as logs:
        async with proxying(
            lambda _: answer(), read_file=read, token_file=FILE, client_tokens=(GIVEN,), cache_seconds=0
        ) as it:
            for content in (b"luc_api_1\n", b"luc_api_2", OSError(2, "No such file"), b"two words", b"luc_api_3"):
                await trio.sleep(REREAD_SECONDS)
                await it.ask(get(by=GIVEN))
                used.append(sent(it.asked[-1]).decode().removeprefix("Bearer luc_api_"))
                if isinstance(content, OSError):
                    assert (
                        it.data_api.statistics().credentials_problem
                        == "data_api.token_file cannot be read: No such file"
                    )
            assert it.data_api.statistics().credentials_problem == ""
    assert used == ["1", "2", "2", "2", "3"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == [
        "token file of the data API is of no use"
    ] * 2
    assert not any("luc_api_" in str(entry) for entry in logs)


async def test_those_who_ask_while_the_token_is_first_read_wait_for_it(autojump_clock: trio.testing.MockClock) -> None:
    """At the start readers ask all at once, and none is told that there is no token because the file is being read."""

    async def read(_: Path) -> bytes:
        await trio.sleep(0.5)
        return OWN.encode()

    credentials = Credentials(DataApi(token_file=FILE, client_tokens=(GIVEN,)), b"salt", trio.current_time, read)
    callers: list[bytes] = []

    async def ask() -> None:
        caller = await credentials.identify(f"Bearer {GIVEN}".encode())
        callers.append(b"" if caller is None else caller.authorization)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
            await trio.sleep(0.1)
    assert callers == [b"Bearer " + OWN.encode()] * 3


async def test_without_its_token_the_relay_says_so() -> None:
    """A client of the relay's is told that the relay has no token, and nothing is asked as nobody."""

    def read(_: Path) -> bytes:
        raise OSError(13, "Permission denied")

    with capture_logs():
        async with proxying(lambda _: answer(), read_file=read, token_file=FILE, client_tokens=(GIVEN,)) as it:
            status, headers, body = await it.ask(get(by=GIVEN))
            assert (status, headers[b"retry-after"]) == (503, b"5")
            assert orjson.loads(body) == {"error": "The relay has no token for the data API at present"}
            assert (await it.ask(get(by="luc_api_a")))[0] == 200
            assert len(it.asked) == 1


async def test_tokens_are_in_no_figure_and_no_key() -> None:
    """Statistics name a token by its fingerprint once upstream has taken it; nothing held has it in the clear."""
    refusal, reply = answer(b"", status="401 Unauthorized"), answer(b"{}", "Vary: Authorization, Accept")
    async with proxying(lambda request: refusal if b"invented" in request else reply, **HOLDING) as it:
        await it.ask(patch(by=GIVEN))
        await it.ask(get(by="luc_api_secret"))
        for number in range(50):
            await it.ask(get(by=f"luc_api_invented{number}"))
        assert it.data_api.statistics().cache_targets == 1
        shown = str(it.data_api.statistics())
        partitions = list(it.data_api._tokens._tokens)
        held = str((partitions, it.data_api._store._variants, it.data_api._credentials._client_tokens))
        for secret in ("luc_api_secret", "luc_api_invented", OWN, GIVEN):
            assert secret not in shown + held
        assert len(it.data_api.statistics().reads_left_by_key) == 2
        assert it.data_api.statistics().refused_keys == 50


@pytest.mark.parametrize("status", ["404 Not Found", "429 Too Many Requests", "503 Service Unavailable"])
async def test_an_error_does_not_show_that_a_token_was_taken(status: str) -> None:
    """What stands before upstream answers without looking at tokens: an error names an invented one nowhere."""
    async with proxying(lambda _: answer(b"", status=status)) as it:
        await it.ask(get(by="luc_api_invented"))
        assert it.data_api.statistics().reads_left_by_key == {}


async def test_known_tokens_are_bounded() -> None:
    """Invented tokens push one another out, not memory up."""
    async with proxying(lambda _: answer(status="401 Unauthorized"), max_tokens=5) as it:
        for number in range(20):
            await it.ask(get(by=f"luc_api_{number}"))
        assert it.data_api.statistics().refused_keys == 5


def test_what_can_be_a_token() -> None:
    """A token is visible ASCII without blanks; anything else would not be a header."""
    assert is_token(base64.b64encode(b"x" * 30))
    for text in (b"", b"a b", b"a\nb", "\u00e9".encode(), b"x" * 10_000):
        assert not is_token(text)


async def test_every_client_token_is_compared() -> None:
    """How long it takes does not tell which token was nearly right: none ends the comparison."""
    tokens = tuple(f"handed-out-to-number-{number}" for number in range(20))
    compared = 0
    credentials = Credentials(DataApi(token=OWN, client_tokens=tokens), b"salt", lambda: 0.0, read_nothing)
    original = list(credentials._client_tokens)

    def each() -> Iterator[bytes]:
        nonlocal compared
        for token in original:
            compared += 1
            yield token

    for sent_token in (tokens[0], tokens[-1], "none-of-them-at-all"):
        compared = 0
        credentials._client_tokens = each()  # type: ignore[assignment]
        await credentials.identify(f"Bearer {sent_token}".encode())
        assert compared == len(tokens)


async def read_nothing(_: Path) -> bytes:
    """Read no file."""
    await trio.lowlevel.checkpoint()
    return b""


async def test_a_refused_token_of_the_relays_is_said(autojump_clock: trio.testing.MockClock) -> None:
    """Where upstream answers the relay's own token 401, an operator is told until it is taken again."""
    answers = [answer(status="401 Unauthorized"), answer()]
    async with proxying(lambda _: answers.pop(0), **HOLDING) as it:
        await it.ask(get(by=GIVEN))
        problem = it.data_api.statistics().credentials_problem
        assert problem.startswith("Lucent refuses the relay's token for the data API, key-")
        await it.ask(get(by=GIVEN))
        assert it.data_api.statistics().credentials_problem == ""
