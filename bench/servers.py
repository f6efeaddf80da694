"""The servers under test, each a process of its own on a core of its own, and what the system says of them.

As a command, `python -m bench.servers`, it is the no-op: the relay's own listener and limits before a handler that
answers `{"ok":true}` once the body is there. It prints its address as its one line.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

from relay.config import Config, Listen
from relay.http.listener import HttpListener, open_listeners
from relay.http.message import Request, Response, json_response
from relay.http.router import Route, Router
from relay.intake.intake import REPLAY_PATH

_OK = json_response(200, {"ok": True})

_CLOSED_PORT = "http://127.0.0.1:9"
"""`discard`, which nobody serves: every connection is refused at once."""

_STOP_SECONDS = 30.0
"""More than the relay's own deadline."""


class Usage(msgspec.Struct, frozen=True):
    """What a process has used, as Linux counts it; zeros elsewhere."""

    cpu_seconds: float
    """User and system time since it began."""
    resident_bytes: int
    """Memory of its own now, shared libraries included."""
    peak_resident_bytes: int
    """The most that it ever was."""
    read_bytes: int
    """What it has read from files and sockets, cached or not."""


class Server(msgspec.Struct, frozen=True):
    """A running process."""

    pid: int
    """Its id."""
    address: tuple[str, int]
    """Where it listens."""
    admin: str = ""
    """Where its admin listener does, if it has one."""

    def usage(self) -> Usage:
        """Return what it has used."""
        folder = Path("/proc") / str(self.pid)
        if not folder.is_dir():
            return Usage(0.0, 0, 0, 0)
        # The second field, the name, may hold spaces; after its bracket, utime and stime are the 12th and 13th.
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        memory = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", (folder / "status").read_text(), re.MULTILINE))
        [read] = re.findall(r"^rchar: (\d+)", (folder / "io").read_text(), re.MULTILINE)
        return Usage(
            ticks / os.sysconf("SC_CLK_TCK"), int(memory["VmRSS"]) * 1024, int(memory["VmHWM"]) * 1024, int(read)
        )


class Cores(msgspec.Struct, frozen=True):
    """Who runs where."""

    server: int | None
    """Core of the servers under test; None where there is no second core, or the system cannot keep to one."""
    load: int | None
    """Core of the load and of the sink."""


def choose_cores() -> Cores:
    """Return the first core that we may use for the servers, and the last for the load."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return Cores(allowed[0], allowed[-1]) if len(allowed) > 1 else Cores(None, None)


def pin(core: int | None) -> None:
    """Keep this process and its children to one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


@contextlib.contextmanager
def _spawned(words: list[str], core: int | None, pattern: str) -> Iterator[Server]:
    """Run a Python module, and wait until what it says names its address, and that of its admin listener if any."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: pin(core),
    )
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            found = re.search(pattern, "".join(said), re.DOTALL)
            if found is not None:
                break
        else:
            raise ChildProcessError(f"{words[0]} did not start:\n{''.join(said)}")
        # What else it says is dropped, so that a full pipe never holds it up.
        threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()
        yield Server(process.pid, (found[1], int(found[2])), *found.groups()[2:])
    finally:
        process.terminate()
        process.wait(_STOP_SECONDS)


@contextlib.contextmanager
def noop_server(core: int | None) -> Iterator[Server]:
    """Run the no-op."""
    with _spawned(["bench.servers"], core, r"http://([\d.]+):(\d+)") as server:
        yield server


@contextlib.contextmanager
def sandbox_server(core: int | None, requests_per_minute: int) -> Iterator[str]:
    """Run the sandbox, with 0 as an upstream that takes everything; yields its URL."""
    words = ["relay", "sandbox", "--listen", "127.0.0.1:0", "--requests-per-minute", str(requests_per_minute)]
    with _spawned(words, core, r"http://([\d.]+):(\d+)") as server:
        yield "http://{}:{}".format(*server.address)


@contextlib.contextmanager
def data_origin(core: int | None) -> Iterator[Server]:
    """Run the origin of the data API's benchmark."""
    with _spawned(["bench.data_origin"], core, r"http://([\d.]+):(\d+)") as server:
        yield server


@contextlib.contextmanager
def relay_server(
    core: int | None,
    spool: Path,
    durability: str,
    upstream: str | None,
    requests_per_minute: int = 100,
    **further: object,
) -> Iterator[Server]:
    """Run the relay.

    Args:
        core: Where it runs.
        spool: Directory of its spool.
        durability: `fsync` or `os`.
        upstream: The ingest API; None for one that is down.
        requests_per_minute: A key's budget.
        further: Options, as `section__option=value`.
    """
    options = {
        "listen.relay": "127.0.0.1:0",
        "listen.admin": "127.0.0.1:0",
        "upstream.ingest_url": upstream or _CLOSED_PORT,
        "spool.directory": spool,
        "spool.durability": durability,
        "budget.requests_per_minute": requests_per_minute,
        **{name.replace("__", "."): value for name, value in further.items()},
    }
    words = ["relay", "run"]
    for name, value in options.items():
        words += ["--set", f"{name}={value}"]
    pattern = r'relay listening" urls=http://([\d.]+):(\d+)\n.*admin listening" urls=http://(\S+)'
    with _spawned(words, core, pattern) as server:
        yield server


async def _serve_noop() -> None:
    async def answer(_: Request) -> Response:
        return _OK

    route = Route(REPLAY_PATH, {"POST": answer}, max_body_bytes=Config().intake.max_body_bytes)
    listeners = await open_listeners("127.0.0.1:0")
    print("http://{}:{}".format(*listeners[0].socket.getsockname()[:2]), flush=True)
    await HttpListener(Router([route]), Listen()).run(listeners)


if __name__ == "__main__":
    trio.run(_serve_noop)
