"""The client and DNS: names that do not resolve, resolve late, or resolve to what is dead."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from relay.config import Upstream
from relay.errors import ConnectFailed
from relay.http.client import HttpClient
from tests.component.fake_origin import OK
from tests.loopback import refusing_address

HOST = "ingest.example"


class Resolver(trio.abc.HostnameResolver):
    """Answers look-ups by the next of a list, and by the last one for ever."""

    def __init__(self, *answers: Callable[[], Any]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def getaddrinfo(self, host: bytes | None, *_: Any, **_further: Any) -> Any:
        """Look a name up."""
        assert host == HOST.encode()
        self.asked += 1
        await trio.lowlevel.checkpoint()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        found = answer()
        return await found if hasattr(found, "__await__") else found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        """Not asked."""
        raise AssertionError


def addresses(*ports: int) -> Callable[[], Any]:
    """Return an answer of loopback addresses."""
    return lambda: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]


def unresolved(number: int) -> Callable[[], Any]:
    """Return a failure as the system's resolver has it."""

    def fail() -> Any:
        raise socket.gaierror(number, "the test says so")

    return fail


async def answer(stream: trio.SocketStream) -> None:
    """Say yes once."""
    await stream.receive_some()
    await stream.send_all(OK)


async def post(client: HttpClient) -> int:
    """Send a batch."""
    return (await client.request("POST", "/api/sdk/replay", [], b"{}")).status


@pytest.mark.parametrize("number", [socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_FAIL])
async def test_a_name_that_does_not_resolve_is_looked_up_again(nursery: trio.Nursery, number: int) -> None:
    """Any failure of DNS is a failure to connect, which is safe to retry; the next attempt asks DNS anew."""
    listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    resolver = Resolver(unresolved(number), list, unresolved(number), addresses(port))
    trio.socket.set_custom_hostname_resolver(resolver)
    client = HttpClient(f"http://{HOST}:{port}", Upstream())
    for message in ("host name not resolved: the test says so", "no results found", "not resolved"):
        with pytest.raises(ConnectFailed, match=message):
            await post(client)
    assert await post(client) == 200
    assert resolver.asked == 4
    await client.aclose()
    nursery.cancel_scope.cancel()


async def test_an_address_that_is_dead_is_passed_over(nursery: trio.Nursery) -> None:
    """Of several addresses one that answers is enough."""
    listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
    port = listeners[0].socket.getsockname()[1]
    with refusing_address() as nobody:
        trio.socket.set_custom_hostname_resolver(Resolver(addresses(int(nobody.rpartition(":")[2]), port)))
        client = HttpClient(f"http://{HOST}:{port}", Upstream())
        assert await post(client) == 200
        await client.aclose()
    nursery.cancel_scope.cancel()


async def test_a_resolver_that_hangs_costs_the_time_to_connect(autojump_clock: trio.testing.MockClock) -> None:
    """DNS is part of `connect_seconds`."""
    trio.socket.set_custom_hostname_resolver(Resolver(trio.sleep_forever))
    client = HttpClient(f"http://{HOST}", Upstream(connect_seconds=10))
    with pytest.raises(ConnectFailed, match="no connection within connect_seconds = 10"):
        await post(client)
    assert trio.current_time() == pytest.approx(10)
