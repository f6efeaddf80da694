"""Where the spool's blocking calls run: in threads of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import outcome
import trio

Run: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a blocking call to its end, in a thread, or inline under a virtual clock. May be cancelled only before that."""


async def run_in_thread(call: Callable[[], Any]) -> Any:
    """Run a blocking call in a worker thread, to its end; not cancelled.

    Not through `trio.to_thread`: its common places can all be taken, by DNS look-ups that hang for instance, and a
    commit must not wait for those. The writer and one reader are all that ever run here. It also names its threads for
    each call, which for a commit of 32 small batches cost a fiftieth of everything.
    """
    task = trio.lowlevel.current_task()
    token = trio.lowlevel.current_trio_token()

    def deliver(result: outcome.Outcome[Any]) -> None:
        token.run_sync_soon(trio.lowlevel.reschedule, task, result)

    trio.lowlevel.start_thread_soon(call, deliver)
    return await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
