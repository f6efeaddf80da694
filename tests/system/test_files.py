"""File descriptors: every connection is one, and the system gives only so many."""

from __future__ import annotations

import resource
from contextlib import AsyncExitStack

import pytest
import trio

from tests.system.daemon import Relay, Site
from tests.system.laws import assert_accounted
from tests.system.traffic import make_batch
from tests.system.wire import Connection, ask, connect

pytestmark = pytest.mark.slow

CONNECTIONS = 700
"""More than `FEW` files allow."""

FEW = 512
"""Open files; with the defaults some 300 of them are for other things than clients."""

FAILURES_A_SECOND = 12
"""Of accepting: the listener pauses for 0.1 s after each."""


async def connect_all(stack: AsyncExitStack, relay: Relay, count: int) -> list[Connection]:
    """Return open connections, which end with the stack."""
    return [await stack.enter_async_context(await connect(relay.url)) for _ in range(count)]


async def test_the_limit_of_open_files_is_raised(site: Site) -> None:
    """A relay that was started with few open files allows itself as many as its connections need."""
    await site.start_sandbox()
    relay = await site.start_relay(files=(FEW, None))
    async with AsyncExitStack() as stack:
        await connect_all(stack, relay, CONNECTIONS)
        await relay.until("all", lambda status: status["listener"]["open_connections"] == CONNECTIONS)
        await site.post(make_batch("s1", 0, is_final=True))
    assert resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)[0] > 10_000
    await assert_accounted(site)


async def test_connections_leave_files_for_everything_else(site: Site) -> None:
    """Where the system allows few files, clients too many are told 503, and upstream and operators are not starved."""
    await site.start_sandbox()
    relay = await site.start_relay(files=(FEW, FEW))
    warning = await relay.logged("fewer connections than configured: raise the limit of open files")
    async with AsyncExitStack() as stack:
        await connect_all(stack, relay, warning["max_connections"])
        await relay.until("all", lambda status: status["listener"]["open_connections"] == warning["max_connections"])
        refused = await ask(relay.url)
        assert (refused.status, "retry-after" in refused.headers) == (503, True)
        assert (await ask(f"{relay.admin}/livez")).status == 200
    await relay.until("these to be gone", lambda status: status["listener"]["open_connections"] == 0)
    await site.post(make_batch("s1", 0, is_final=True))
    await assert_accounted(site)
    assert (await relay.status())["listener"]["accept_errors_total"] == 0


async def test_no_file_left_is_survived(site: Site) -> None:
    """Without a descriptor left the relay neither ends nor spins; it serves whom it has, and everybody afterwards."""
    await site.start_sandbox()
    relay = await site.start_relay()
    _, hard = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
    async with site.sdk() as early:
        await early.post(make_batch("s1", 0))
        open_files = (await relay.status())["process"]["open_files"]
        resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (open_files, hard))
        async with AsyncExitStack() as stack:
            await connect_all(stack, relay, 50)  # as far as the kernel is concerned
            await relay.until("a failure", lambda status: status["listener"]["accept_errors_total"])
            began = trio.current_time()  # before the first count, as the end is behind the last
            failing = await relay.status()
            await early.post(make_batch("s1", 1))
            await relay.logged("accept failed")
            later = await relay.until(
                "more failures",
                lambda status: (
                    status["listener"]["accept_errors_total"] > failing["listener"]["accept_errors_total"] + 10
                ),
            )
            failures = later["listener"]["accept_errors_total"] - failing["listener"]["accept_errors_total"]
            assert failures <= FAILURES_A_SECOND * (trio.current_time() - began) + 2
        resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (hard, hard))
    await site.post(make_batch("s2", 0, is_final=True))
    await site.post(make_batch("s1", 2, is_final=True))
    await assert_accounted(site)
