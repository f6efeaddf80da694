"""What a request head may say beyond what llhttp sees to (RFC 9112, 2.3, 3.2 and 6.1).

Rules:
1. A head that is not to be trusted is `Malformed`, which carries the answer; nothing is repaired.
"""

from __future__ import annotations

import re

from relay.http.message import Response, error_response

_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://[^/?#@]+(?=[/?#]|\Z)", re.IGNORECASE)
"""Up to the path. A user name before the host is how phishing looks, not how clients ask (RFC 9110, 4.2.4)."""


class Refused(Exception):
    """The request being read is answered as it stands, and is the connection's last.

    Attributes:
        response: The answer.
    """

    def __init__(self, response: Response) -> None:
        self.response = response
        super().__init__()


class Malformed(Refused):
    """The framing of the request cannot be trusted, or its head is over a limit. The client's fault."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(error_response(status, f"Malformed HTTP request: {message}"))


def check_version_and_host(version: str, host: bytes | None) -> None:
    """Refuse other versions than 1.0 and 1.1, and a Host that is missing in 1.1 or is none."""
    if version not in {"1.1", "1.0"}:
        raise Malformed(f"version {version}")
    if host is None:
        if version == "1.1":
            raise Malformed("no Host header")
    elif _HOST.fullmatch(host) is None:
        raise Malformed("invalid Host header")


def check_transfer_coding(coding: bytes, version: str) -> None:
    """Refuse all transfer codings but `chunked` alone, and any in HTTP/1.0."""
    if version == "1.0":
        raise Malformed("Transfer-Encoding in HTTP/1.0")
    if coding.lower() != b"chunked":
        raise Malformed("the only Transfer-Encoding is chunked", 501)


def origin_form(method: bytes, target: bytes) -> bytes:
    """Return path and query of a request target in absolute form; `*` stays as it is."""
    if target == b"*" and method == b"OPTIONS":
        return target
    authority = _ABSOLUTE.match(target)
    if authority is None:  # the authority form of CONNECT, too
        raise Malformed("unsupported request target")
    rest = target[authority.end() :]
    return rest if rest[:1] == b"/" else b"/" + rest


def render_without_upgrade(method: bytes, target: bytes, version: str, headers: dict[bytes, bytes]) -> bytes:
    """Return the bytes of a request head without its upgrade, as the connection's last."""
    kept = {**headers, b"connection": b"close"}
    kept.pop(b"upgrade", None)
    lines = [b"%b %b HTTP/%b" % (method, target, version.encode())]
    lines += [b"%b: %b" % header for header in kept.items()]
    return b"\r\n".join(lines) + b"\r\n\r\n"
