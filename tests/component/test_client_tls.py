from __future__ import annotations

import datetime
import socket
import ssl
import struct
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio
import trustme

from relay.config import Upstream
from relay.errors import ConfigError, ConnectFailed
from relay.http.client import HttpClient, Reply
from relay.http.connect import describe_connect_failure, tls_context
from tests.component.fake_origin import OK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

Handler: TypeAlias = "Callable[[trio.abc.Stream], Awaitable[None]]"

OK_REPLY = Reply(200, {b"content-length": b"11"}, b'{"ok":true}')


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return a certificate authority of our own."""
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of that authority's PEM file."""
    path = str(tmp_path_factory.mktemp("authority") / "ca.pem")
    authority.cert_pem.write_to_path(path)
    return path


async def answer(stream: trio.abc.Stream) -> None:
    """Answer every request; ours are small enough to come in one piece."""
    async for _ in stream:
        await stream.send_all(OK)


@asynccontextmanager
async def listening(
    handler: Handler, certificate: trustme.LeafCert | None, *, close_notify: bool = False
) -> AsyncIterator[str]:
    """Serve on a loopback port, with TLS if a certificate is given; yield the base URL."""

    async def serve_one(stream: trio.abc.Stream) -> None:
        # A client that refuses our certificate, or leaves, is what some tests are about.
        with suppress(trio.BrokenResourceError):
            async with stream:
                await handler(stream)

    async with trio.open_nursery() as nursery:
        if certificate is None:
            scheme = "http"
            [listener] = await nursery.start(partial(trio.serve_tcp, serve_one, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
        else:
            scheme = "https"
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            certificate.configure_cert(context)
            serve = partial(
                trio.serve_ssl_over_tcp,
                serve_one,
                0,
                context,
                host="127.0.0.1",
                https_compatible=not close_notify,
            )
            [listener] = await nursery.start(serve)
            port = listener.transport_listener.socket.getsockname()[1]
        yield f"{scheme}://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


async def post(client: HttpClient, body: bytes = b"{}") -> Reply:
    """Send a batch, within a time that only a hang can exceed."""
    with trio.fail_after(30):
        return await client.request("POST", "/api/sdk/replay", [], body)


async def test_a_further_authority_is_trusted(authority: trustme.CA, ca_file: str) -> None:
    """With ca_file a self-hosted ingest is reached over TLS 1.3, by name and by address, and kept alive."""
    async with listening(answer, authority.issue_cert("localhost", "127.0.0.1")) as url:
        for base_url in (url, url.replace("127.0.0.1", "localhost")):
            client = HttpClient(base_url, Upstream(ca_file=ca_file))
            assert await post(client) == OK_REPLY
            assert await post(client) == OK_REPLY
            assert client.statistics().reused_total == 1
            [connection] = client._idle
            stream = connection.stream
            assert isinstance(stream, trio.SSLStream)
            assert stream.version() == "TLSv1.3"
            assert stream.transport_stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            await client.aclose()


@pytest.mark.parametrize(
    ("names", "days", "from_elsewhere", "message"),
    [
        (["localhost"], 1, False, "not valid for '127.0.0.1'"),
        (["127.0.0.2"], 1, False, "not valid for '127.0.0.1'"),
        (["127.0.0.1"], -1, False, "certificate has expired"),
        (["127.0.0.1"], 1, True, "name its authority's PEM file in upstream.ca_file"),
    ],
    ids=["another name", "another address", "expired", "unknown authority"],
)
async def test_a_wrong_certificate_is_refused_before_anything_is_sent(
    authority: trustme.CA,
    ca_file: str,
    names: list[str],
    days: int,
    from_elsewhere: bool,
    message: str,
) -> None:
    """A certificate that is expired, for another host or of an unknown authority is a failure that says so."""
    issuer = trustme.CA() if from_elsewhere else authority
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    certificate = issuer.issue_cert(*names, not_before=until - datetime.timedelta(days=9), not_after=until)
    received: list[bytes | bytearray] = []

    async def record(stream: trio.abc.Stream) -> None:
        received.append(await stream.receive_some())

    async with listening(record, certificate) as url:
        client = HttpClient(url, Upstream(ca_file=ca_file))
        with pytest.raises(ConnectFailed, match=f"^{url}: certificate refused: ") as caught:
            await post(client)
        assert message in str(caught.value)
        assert client.statistics().connect_failures_total == 1
    assert received == []


async def test_a_server_without_tls_is_named_so(ca_file: str) -> None:
    """Speaking https to a plain HTTP port is a failed handshake, not a hang."""
    async with listening(answer, None) as url:
        client = HttpClient(url.replace("http:", "https:"), Upstream(ca_file=ca_file))
        with pytest.raises(ConnectFailed, match="TLS handshake failed: "):
            await post(client)


async def test_a_server_that_hangs_up_during_the_handshake_is_a_failure_to_connect(ca_file: str) -> None:
    """An end of the connection in place of a certificate is told from a refused certificate."""

    async def hang_up(stream: trio.abc.Stream) -> None:
        await stream.receive_some()

    async with listening(hang_up, None) as url:
        client = HttpClient(url.replace("http:", "https:"), Upstream(ca_file=ca_file))
        with pytest.raises(ConnectFailed, match="TLS handshake failed: "):
            await post(client)


async def test_a_closed_port_is_a_failure_to_connect() -> None:
    """A refused connection says so, with the address that was tried."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        client = HttpClient(f"http://127.0.0.1:{port}", Upstream())
        with pytest.raises(ConnectFailed, match=rf"^http://127\.0\.0\.1:{port}: .*refused"):
            await post(client)


def one_answer_then(end: Callable[[trio.abc.Stream], None], ended: trio.Event) -> Handler:
    """Return a handler that answers the first request ever and ends that connection; further ones live on."""

    async def handler(stream: trio.abc.Stream) -> None:
        if ended.is_set():
            await answer(stream)
            return
        await stream.receive_some()
        await stream.send_all(OK)
        end(stream)
        await stream.aclose()
        ended.set()

    return handler


def quietly(stream: trio.abc.Stream) -> None:
    """End with a FIN."""


def abruptly(stream: trio.abc.Stream) -> None:
    """End with a RST: that is what closing without lingering sends."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    assert isinstance(transport, trio.SocketStream)
    transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def readable(stream: trio.abc.Stream) -> None:
    """Return once the other side's end has arrived, or whatever it said before that."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    assert isinstance(transport, trio.SocketStream)
    with trio.fail_after(30):
        await trio.lowlevel.wait_readable(transport.socket.fileno())


@pytest.mark.parametrize("end", [quietly, abruptly])
@pytest.mark.parametrize(("tls", "close_notify"), [(False, False), (True, False), (True, True)])
async def test_a_socket_closed_while_idle_is_found_before_it_is_used(
    authority: trustme.CA,
    ca_file: str,
    tls: bool,
    close_notify: bool,
    end: Callable[[trio.abc.Stream], None],
) -> None:
    """A keep-alive connection that the server has closed, in whatever way, is noticed without sending on it."""
    certificate = authority.issue_cert("127.0.0.1") if tls else None
    ended = trio.Event()
    async with listening(one_answer_then(end, ended), certificate, close_notify=close_notify) as url:
        client = HttpClient(url, Upstream(ca_file=ca_file))
        assert await post(client) == OK_REPLY
        await ended.wait()
        [connection] = client._idle
        await readable(connection.stream)
        assert await post(client) == OK_REPLY
        statistics = client.statistics()
        assert (statistics.stale_total, statistics.resent_total) == (1, 0)
        assert await post(client) == OK_REPLY
        assert client.statistics().connections_opened_total == 2
        await client.aclose()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_an_early_answer_survives_a_real_broken_pipe(
    authority: trustme.CA,
    ca_file: str,
    tls: bool,
) -> None:
    """A server that answers 413 and closes with most of the body unread, so that the kernel resets, is heard."""

    async def refuse(stream: trio.abc.Stream) -> None:
        await stream.receive_some(1_000)
        await stream.send_all(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\n\r\nbig")

    certificate = authority.issue_cert("127.0.0.1") if tls else None
    async with listening(refuse, certificate) as url:
        client = HttpClient(url, Upstream(ca_file=ca_file))
        # Larger than the socket buffers of both ends, which grow to 4 and 6 MiB.
        assert (await post(client, bytes(20_000_000))).status == 413
        assert client.statistics().idle_connections == 0


def test_tls_is_never_negotiable_downwards(ca_file: str) -> None:
    """Certificates and names are checked whatever is configured, and TLS 1.2 is the least."""
    for context in (tls_context(""), tls_context(ca_file)):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_further_authority_does_not_replace_the_system(ca_file: str) -> None:
    """ca_file adds to the system's trust store."""
    system, both = tls_context(""), tls_context(ca_file)
    assert both.cert_store_stats()["x509_ca"] == system.cert_store_stats()["x509_ca"] + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no PEM certificate"),
        (b"\x00\xff garbage", "holds no PEM certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds no PEM certificate"),
    ],
    ids=["missing", "empty", "garbage", "broken PEM"],
)
def test_a_ca_file_that_cannot_be_used_is_a_configuration_error(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    """The client is not made, and the message names the option, the file and the reason."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"upstream.ca_file '{path}' {message}"):
        HttpClient("https://a.example", Upstream(ca_file=str(path)))


def test_a_ca_file_that_is_a_directory_is_a_configuration_error(tmp_path: Path) -> None:
    """A directory is told from a file without certificates."""
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        tls_context(str(tmp_path))


def chained(error: BaseException, cause: BaseException) -> BaseException:
    """Return `error` as if raised from `cause`."""
    error.__cause__ = cause
    return error


REFUSED = OSError(111, "Error connecting to ('::1', 1): Connection refused")
UNREACHABLE = OSError(101, "Error connecting to ('192.0.2.1', 1): Network is unreachable")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "host name not resolved: Name or service not known",
        ),
        (
            chained(OSError("all failed"), ExceptionGroup("", [REFUSED, UNREACHABLE, REFUSED])),
            f"{UNREACHABLE.strerror}; {REFUSED.strerror}",
        ),
        (OSError("no results found"), "no results found"),
        (
            chained(trio.BrokenResourceError(), ConnectionResetError(104, "Connection reset by peer")),
            "Connection reset by peer",
        ),
        (trio.BrokenResourceError("gone"), "gone"),
        (trio.BrokenResourceError(), "BrokenResourceError"),
    ],
)
def test_a_failure_to_connect_is_told_in_an_operators_words(error: BaseException, words: str) -> None:
    """The message is the cause, once, without the wrappers it came in."""
    assert describe_connect_failure(error) == words
