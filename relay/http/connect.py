"""From a base URL to a byte stream: URL rules, DNS, TCP, TLS.

Rules:
1. A base URL is `http` or `https`, a host, perhaps a port and a path prefix. Anything else in it is refused
   when the program starts, and never echoed: a user name, a password or a query may be a secret.
2. TLS is never negotiable downwards: certificates and host names are always checked, TLS 1.2 is the least.
3. Proxies are not supported, so proxy variables in the environment are not read.

It sets no timeout (the caller's `connect_seconds` covers all of it) and knows nothing of HTTP.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from urllib.parse import urlsplit

import msgspec
import trio

from relay.errors import ConfigError

DEFAULT_PORTS = {"http": 80, "https": 443}
"""The schemes we speak, each with the port that a URL leaves out (RFC 9110, 4.2)."""

_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)"  # RFC 1035, 2.3.4
    r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"  # a label; container networks have `_` in names, RFC 952 has not
    r"(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*\Z"
)

_PRINTABLE = re.compile(r"[!-~]*\Z")

# What OpenSSL says of a chain that ends nowhere we trust: self-signed leaf, self-signed root, missing issuer,
# unverifiable leaf (X509_V_ERR_*, x509_vfy.h).
_UNKNOWN_AUTHORITY = frozenset({18, 19, 20, 21})


class Origin(msgspec.Struct, frozen=True):
    """Where connections go."""

    scheme: str
    """`http` or `https`."""
    host: str
    """Lower-case DNS name or IP address; IPv6 without brackets."""
    port: int
    """TCP port, 1 to 65535."""

    @property
    def authority(self) -> str:
        """The `Host` header's value: the port is left out where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


def parse_base_url(url: str) -> tuple[Origin, str]:
    """Split a base URL into its origin and its path prefix.

    Args:
        url: `https://host[:port][/prefix]`, or the same with `http`.

    Returns:
        The origin, and the prefix without a trailing slash (so `""` for `/`).

    Raises:
        ConfigError: The URL is none of that; the message says which part is wrong, without repeating secrets.
    """
    # Checked first, because urlsplit drops tabs and line ends silently.
    if not _PRINTABLE.match(url):
        raise _unusable(
            "has a blank, a control character or a non-ASCII letter; write such a host as xn--, a path with %"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        # The text can quote the authority, and with it a password.
        raise _unusable("has a malformed host or a port outside 1 to 65535") from (None if "@" in url else error)
    if parts.scheme not in DEFAULT_PORTS:
        raise _unusable(f"has the scheme {parts.scheme!r}; it must be http or https")
    if "@" in parts.netloc:
        raise _unusable("has a user name or password; credentials go into the request's headers")
    if "?" in url or "#" in url:
        raise _unusable("has a query or a fragment; it must end with the path")
    host = parts.hostname or ""
    if not host:
        raise _unusable("has no host")
    if not (_is_ipv6_address(host) if "[" in parts.netloc else _HOST_NAME.match(host)):
        raise _unusable(f"has the host {host!r}, which is neither a DNS name nor an IP address")
    if port == 0:
        raise _unusable("has port 0; it must be 1 to 65535")
    origin = Origin(parts.scheme, host, DEFAULT_PORTS[parts.scheme] if port is None else port)
    return origin, parts.path.rstrip("/")


def tls_context(ca_file: str) -> ssl.SSLContext:
    """Return the TLS settings for upstream: the system's trust store, and `ca_file` if not empty.

    Raises:
        ConfigError: `ca_file` cannot be read or holds no PEM certificate.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except ssl.SSLError as error:
            raise ConfigError([f"upstream.ca_file {ca_file!r} holds no PEM certificate"]) from error
        except OSError as error:
            raise ConfigError([f"upstream.ca_file {ca_file!r} cannot be read: {error.strerror}"]) from error
    return context


async def open_stream(origin: Origin, tls: ssl.SSLContext | None) -> trio.abc.Stream:
    """Connect to an origin: DNS, TCP (all addresses, happy eyeballs), and TLS where `tls` is given.

    Nagle's algorithm is off: trio sets TCP_NODELAY on every stream.

    Raises:
        OSError: No address, or none that can be reached.
        trio.BrokenResourceError: TLS failed; the cause says why.

    Cancellation: Leaves nothing open.
    """
    stream = await trio.open_tcp_stream(origin.host, origin.port)
    if tls is None:
        return stream
    # https_compatible: servers close without a close_notify, and whether an answer is complete is told by its
    # own framing. Only a body that ends with the connection could be cut unnoticed; no verdict hangs on one.
    secure = trio.SSLStream(stream, tls, server_hostname=origin.host, https_compatible=True)
    try:
        await secure.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return secure


def describe_connect_failure(error: BaseException) -> str:
    """Return the cause of a failed connection attempt in words for an operator."""
    cause = error.__cause__
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "; name its authority's PEM file in upstream.ca_file"
        return f"certificate refused: {error.verify_message.rstrip('.')}" + (
            hint if error.verify_code in _UNKNOWN_AUTHORITY else ""
        )
    if isinstance(error, ssl.SSLError):
        return f"TLS handshake failed: {error.reason or error.strerror or error}"
    if isinstance(error, socket.gaierror):
        return f"host name not resolved: {error.strerror}"
    if isinstance(error, trio.BrokenResourceError) and cause is not None:
        return describe_connect_failure(cause)
    if isinstance(error, OSError) and isinstance(cause, BaseExceptionGroup):
        # trio's summary of all addresses; a dead network says the same for each, hence the set.
        return "; ".join(sorted({describe_connect_failure(each) for each in cause.exceptions}))
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) or type(error).__name__


def _unusable(what: str) -> ConfigError:
    return ConfigError([f"the upstream's base URL {what}"])


def _is_ipv6_address(host: str) -> bool:
    try:
        # A zone (`%eth0`) would name an interface of this machine; certificates and Host cannot carry it.
        return "%" not in host and ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
