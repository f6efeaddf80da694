"""The faults of a soak: what can go wrong around a relay, one strike at a time, each healed when it is over.

A strike is an async function of a site and a source of chance. It does its harm, lets it last, and takes it back
however it ends, so that whatever comes after meets a healthy world.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.system.daemon import Site
from tests.system.traffic import KEY, TARGET

Strike = Callable[[Site, random.Random], Awaitable[None]]

_DISK_BYTES = 134_217_728
"""Of the file system that a spool is given to have it filled: 64 MiB of log, and as much again."""

_HEAD = f"POST {TARGET} HTTP/1.1\r\nHost: relay\r\nX-Lucent-Api-Key: {KEY}\r\n".encode()

_IDLERS = 300
"""Connections that say nothing; with the listener's default of 10 000 they must not matter to anybody."""

_BOMB = zlib.compress(bytes(100_000_000), 9, wbits=31)
"""100 KB that inflate to 100 MB."""

_NONSENSE = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    _HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    _HEAD + b"Content-Length: -1\r\n\r\n",
    _HEAD + b"X-Folded: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
    _HEAD + b"Content-Length: 2\r\n\r\n{}",
    _HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00",
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n",
)
"""What no SDK sends."""

# -- upstream


async def outage(site: Site, chance: random.Random) -> None:
    """Upstream hangs up on everybody."""
    await _upstream(site, chance.uniform(1, 6), outages=[[0, 1_000_000_000]])


async def errors(site: Site, chance: random.Random) -> None:
    """Upstream answers many batches with an error, and wishes for pauses."""
    await _upstream(site, chance.uniform(2, 6), error_rate=0.5, error_status=[500, 502, 503, 429, 408])


async def lost_answers(site: Site, chance: random.Random) -> None:
    """Connections break before a batch is stored, and after, when it is stored without an answer."""
    await _upstream(site, chance.uniform(2, 6), drop_before_rate=0.2, drop_after_rate=0.3)


async def slow_upstream(site: Site, chance: random.Random) -> None:
    """Upstream takes its time."""
    await _upstream(site, chance.uniform(2, 6), latency_seconds=0.3, latency_jitter_seconds=0.7)


async def elsewhere(site: Site, chance: random.Random) -> None:
    """Something that is not the ingest API answers."""
    await _upstream(site, chance.uniform(1, 3), outages=[[0, 1_000_000_000]], outage_status=404)


async def stumbles(site: Site, chance: random.Random) -> None:
    """Upstream stumbles over whatever two sessions send, and takes the others'."""
    sessions = sorted({session for session, _ in site.sent.windows})
    await _upstream(site, chance.uniform(3, 10), fail_sessions=chance.sample(sessions, min(2, len(sessions))))


async def _upstream(site: Site, seconds: float, **faults: object) -> None:
    await site.sandbox.fault(**faults)
    try:
        await trio.sleep(seconds)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
            await site.sandbox.fault()


# -- clients


async def idlers(site: Site, chance: random.Random) -> None:
    """Hundreds of clients connect and say nothing, or begin a head and never end it."""
    streams = []
    try:
        for number in range(_IDLERS):
            stream = await trio.open_tcp_stream(*site.relay.address)
            streams.append(stream)
            if number % 3 == 0:
                await stream.send_all(_HEAD)
        await trio.sleep(chance.uniform(1, 4))
    except OSError:
        pass  # the relay is being restarted
    finally:
        _hang_up(*streams)


async def aborted_uploads(site: Site, chance: random.Random) -> None:
    """Clients promise bodies, send a part of each and vanish."""
    for _ in range(40):
        size = chance.randint(1_000, 4_000_000)
        await _send(site, _HEAD + b"Content-Length: %d\r\n\r\n" % size + bytes(chance.randrange(size)))


async def bombs(site: Site, chance: random.Random) -> None:
    """Bodies inflate to far more than may be."""
    del chance
    for _ in range(10):
        head = _HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(_BOMB)
        await _send(site, head + _BOMB, waits=True)


async def nonsense(site: Site, chance: random.Random) -> None:
    """Clients talk what is no HTTP, no gzip, no batch."""
    for _ in range(100):
        await _send(site, chance.choice(_NONSENSE), waits=True)


async def deaf_readers(site: Site, chance: random.Random) -> None:
    """Clients ask and ask, and never read an answer."""
    streams = []
    try:
        for _ in range(10):
            stream = await trio.open_tcp_stream(*site.relay.address)
            streams.append(stream)
            with trio.move_on_after(0.3):
                await stream.send_all((_HEAD + b"Content-Length: 2\r\n\r\n{}") * 5_000)
        await trio.sleep(chance.uniform(1, 3))
    except (OSError, trio.BrokenResourceError):
        pass
    finally:
        _hang_up(*streams)


async def _send(site: Site, data: bytes, *, waits: bool = False) -> None:
    """Send bytes on a connection of their own, perhaps wait for what comes back, and be gone."""
    try:
        stream = await trio.open_tcp_stream(*site.relay.address)
    except OSError:
        return
    try:
        with trio.move_on_after(5):
            await stream.send_all(data)
            if waits:
                await stream.receive_some()
    except trio.BrokenResourceError:
        pass
    finally:
        _hang_up(stream)


def _hang_up(*streams: trio.SocketStream) -> None:
    """Close connections, all of them also where the strike is cancelled."""
    for stream in streams:
        stream.socket.close()


# -- the process


async def kill(site: Site, chance: random.Random) -> None:
    """The relay is killed in the midst of everything."""
    await trio.sleep(chance.uniform(0, 2))
    site.relay.kill()
    await trio.sleep(chance.uniform(0, 1))
    await site.start_relay()


async def restart(site: Site, chance: random.Random) -> None:
    """The relay is stopped in order and started anew."""
    await trio.sleep(chance.uniform(0, 2))
    await site.relay.stop()
    await site.start_relay()


# -- the disk


async def full_disk(site: Site, chance: random.Random) -> None:
    """Somebody else fills the file system to its last byte, while upstream is down and when it is back."""
    filler = site.directory / "spool" / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            try:
                for size in (1_048_576, 4_096, 1):  # to the very last byte
                    while file.write(bytes(size)) == size:
                        pass
            except OSError:
                pass
        await outage(site, chance)
        await trio.sleep(chance.uniform(1, 4))
    finally:
        filler.unlink(missing_ok=True)


@asynccontextmanager
async def small_disk(directory: Path) -> AsyncIterator[bool]:
    """Mount a small file system at a directory, where we may; gives whether we may."""
    await trio.Path(directory).mkdir(mode=0o700, exist_ok=True)
    options = f"size={_DISK_BYTES},mode=0700"
    mounted = await trio.run_process(
        ["mount", "-t", "tmpfs", "-o", options, "lucent-relay-soak", str(directory)], capture_stderr=True, check=False
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                await trio.run_process(["umount", str(directory)])


OF_UPSTREAM: Sequence[Strike] = (outage, errors, lost_answers, slow_upstream, elsewhere, stumbles)
OF_CLIENTS: Sequence[Strike] = (idlers, aborted_uploads, bombs, nonsense, deaf_readers)
OF_PROCESS: Sequence[Strike] = (kill, restart)
OF_DISK: Sequence[Strike] = (full_disk,)
