"""Addresses of this machine, for what happens where nobody listens, and where a family of addresses is missing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refusing_address() -> Iterator[str]:
    """Give an address where connections are refused for as long as this lasts: bound, so that nobody else gets it."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def has_v6_loopback() -> bool:
    """Return whether this machine has `::1`; containers often have not, whatever Python was built with."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
