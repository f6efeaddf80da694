"""Listen addresses: `host:port` as operators write it."""

from __future__ import annotations

import ipaddress
import re

HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?")
"""A host name or IPv4 address (RFC 1123, 2.1), without a trailing dot."""

MAX_PORT = 65_535
"""Ports are 16 bits."""


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[IPv6]:port`.

    Args:
        text: The address. Port 0 asks the system for a free one.

    Returns:
        The host without brackets, and the port, 0 to 65535.

    Raises:
        ValueError: The text is no such address; the message says what is expected, not what was given.
    """
    if "://" in text:
        raise ValueError('must be "host:port", without "http://"')
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        raise ValueError('must be "host:port" or "[IPv6]:port"')
    if len(port) > len(str(MAX_PORT)) or int(port) > MAX_PORT:
        raise ValueError(f"port must be >= 0 and <= {MAX_PORT}")
    if not host:
        raise ValueError('must name a host, such as "127.0.0.1" for this machine or "0.0.0.0" for all networks')
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ipaddress.AddressValueError:
            raise ValueError("must have an IPv6 address within the brackets") from None
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError('must have its IPv6 address in brackets, as in "[::1]:8787"')
    if not HOST.fullmatch(host) or (host.rpartition(".")[2].isdigit() and not is_ipv4(host)):
        raise ValueError('must be "host:port" with a host name or an IPv4 address')
    return host, int(port)


def is_ipv4(host: str) -> bool:
    """Say whether `host` is an IPv4 address in its usual notation."""
    try:
        ipaddress.IPv4Address(host)
    except ipaddress.AddressValueError:
        return False
    return True
