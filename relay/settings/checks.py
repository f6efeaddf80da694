"""What options must be to one another and to the world, beyond the type and bounds of each.

Rules:
1. A finding names the options it is about and holds no value; the loader adds values and origins, masked.
2. A problem refuses the configuration; a warning is for something that is allowed and seldom meant.
3. Nothing here listens, connects or writes. Only `upstream.ca_file` is opened, because a relay that cannot
   trust its upstream should say so at the start, and `data_api.token_file` looked at: it may come later.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from relay.config import Batch, Config
from relay.protocol.endpoint import parse_address
from relay.protocol.fields import is_token
from relay.protocol.limit import INITIAL_LIMIT
from relay.settings.options import MASK

DEFAULT_PORTS = {"http": 80, "https": 443}
"""Ports of URLs that name none (RFC 9110, 4.2)."""

REPLAY_PATH = "/api/sdk/replay"
"""The ingest API's one endpoint, which documents of the SDK show as part of the URL."""

MIN_CLIENT_TOKEN = 16
"""Characters of a token that the relay gives out: 16 random ones cannot be guessed."""

KEY = re.compile(r"[!-~]{1,256}")
"""What the intake takes for a key: a header's value that has no blanks (RFC 9110, 5.5)."""


class Finding(msgspec.Struct, frozen=True):
    """Something about one option, or about one option as seen from another."""

    option: str
    """Dotted name of the option that is wrong."""
    text: str
    """What it must be, as `must …`; for a warning, what follows from it."""
    other: str = ""
    """Dotted name of the option it is compared with; empty where there is none."""


def find_problems(config: Config) -> Iterator[Finding]:
    """Yield what makes a configuration unusable though each option is within its own bounds."""
    yield from _address_problems(config)
    yield from _url_problems(config)
    yield from _file_problems(config)
    yield from _key_problems(config)
    yield from _data_problems(config)
    yield from _order_problems(config)


def _address_problems(config: Config) -> Iterator[Finding]:
    ports = []
    for option, text in (("listen.relay", config.listen.relay), ("listen.admin", config.listen.admin)):
        try:
            ports.append(parse_address(text)[1])
        except ValueError as problem:
            yield Finding(option, str(problem))
    if len(ports) == 2 and ports[0] == ports[1] != 0:
        yield Finding("listen.admin", "must have another port than", "listen.relay")


def _url_problems(config: Config) -> Iterator[Finding]:
    for option, url in (
        ("upstream.ingest_url", config.upstream.ingest_url),
        ("upstream.data_url", config.upstream.data_url),
    ):
        problem = url_problem(url)
        if problem is not None:
            yield Finding(option, problem)
        elif _is_own_address(url, config.listen.relay):
            yield Finding(option, "must not be the relay itself, which listens there:", "listen.relay")
    if config.upstream.ingest_url.rstrip("/").endswith(REPLAY_PATH):
        yield Finding("upstream.ingest_url", f"must end before {REPLAY_PATH}, which the relay adds")


def url_problem(url: str) -> str | None:
    """Say what keeps a text from being the base URL of an upstream, as `must …`; None where nothing does."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "must be a URL with a port from 1 to 65535 and any IPv6 address in brackets"
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        return 'must be a URL that begins with "http://" or "https://" and names a host'
    if port == 0:
        return "must have a port from 1 to 65535"
    if "@" in parts.netloc:
        return "must not hold a user or password; keys travel in headers"
    if "?" in url or "#" in url:
        return "must end with its path, without a query or fragment"
    if not url.isascii() or " " in url:
        return "must be ASCII without blanks; write host names in their xn-- form"
    return None


def _is_own_address(url: str, listen: str) -> bool:
    """Say whether a valid URL leads to the listener at `listen`: the relay would feed itself for ever."""
    try:
        host, port = parse_address(listen)
    except ValueError:
        return False
    parts = urlsplit(url)
    target = parts.hostname or ""
    if port != (parts.port or DEFAULT_PORTS[parts.scheme]):
        return False
    return target == host.lower() or (is_loopback(target) and (is_loopback(host) or is_wildcard(host)))


def _file_problems(config: Config) -> Iterator[Finding]:
    for option, path in (
        ("spool.directory", config.spool.directory),
        ("upstream.ca_file", config.upstream.ca_file),
    ):
        if path.startswith("~"):
            yield Finding(option, 'must be written out; "~" is for shells')
    ca_file = config.upstream.ca_file
    if ca_file and not ca_file.startswith("~"):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=ca_file)
        except ssl.SSLError:
            yield Finding("upstream.ca_file", "must hold certificates in PEM format")
        except OSError as problem:
            yield Finding("upstream.ca_file", f"must be a file that can be read: {problem.strerror}")


def _key_problems(config: Config) -> Iterator[Finding]:
    keys = config.keys
    pooled = [key for pool in keys.pools.values() for key in pool]
    for option, values in (
        ("keys.default", [keys.default] if keys.default else []),
        ("keys.listed", keys.listed),
        ("keys.pools", [*keys.pools, *pooled]),
    ):
        if MASK in values:
            yield Finding(option, "must be the key itself; print-config writes asterisks instead of it")
        elif not all(KEY.fullmatch(value) for value in values):
            yield Finding(option, "must be visible ASCII without blanks, as it becomes a header")
    if not all(keys.pools.values()):
        yield Finding("keys.pools", "must have an upstream key for every client key")
    if any(len(set(pool)) < len(pool) for pool in keys.pools.values()):
        yield Finding("keys.pools", "must not name a key twice in a pool; all have equal shares")
    if len(set(pooled)) > keys.max_keys:
        yield Finding("keys.pools", "must not have more upstream keys than", "keys.max_keys")


def _data_problems(config: Config) -> Iterator[Finding]:
    data = config.data_api
    has_token = bool(data.token or data.token_file)
    for option, tokens in (
        ("data_api.token", [data.token] if data.token else []),
        ("data_api.client_tokens", data.client_tokens),
    ):
        if MASK in tokens:
            yield Finding(option, "must be the token itself; print-config writes asterisks instead of it")
        elif not all(is_token(token.encode(errors="surrogatepass")) for token in tokens):
            yield Finding(option, "must be visible ASCII without blanks, as it becomes a header")
    if any(len(token) < MIN_CLIENT_TOKEN for token in data.client_tokens):
        yield Finding("data_api.client_tokens", f"must have {MIN_CLIENT_TOKEN} characters or more, so none is guessed")
    if any(token.startswith("luc_") for token in data.client_tokens):
        yield Finding("data_api.client_tokens", 'must not begin with "luc_": these are Lucent\'s, and pass as they are')
    if data.token and data.token_file:
        yield Finding("data_api.token_file", "must not be given beside", "data_api.token")
    if data.token_file.startswith("~"):
        yield Finding("data_api.token_file", 'must be written out; "~" is for shells')
    if data.client_tokens and not has_token:
        yield Finding(
            "data_api.client_tokens", "must have a token to be served with; there is none in", "data_api.token"
        )
    if data.anonymous == "serve-with-the-relays-token" and not has_token:
        yield Finding("data_api.anonymous", "must have a token to serve with; there is none in", "data_api.token")


def _order_problems(config: Config) -> Iterator[Finding]:
    """Yield the pairs of options that are in the wrong order."""
    intake, upstream, forward = config.intake, config.upstream, config.forward
    for option, max_body_bytes in (
        ("intake.max_body_bytes", intake.max_body_bytes),
        ("data_api.max_body_bytes", config.data_api.max_body_bytes),
    ):
        if max_body_bytes > config.listen.max_buffered_bytes:
            yield Finding(option, "one body must fit into what is buffered: must be <=", "listen.max_buffered_bytes")
    if intake.max_body_bytes > intake.max_decoded_bytes:
        yield Finding(
            "intake.max_body_bytes",
            "a plain body is as large decoded: must be <=",
            "intake.max_decoded_bytes",
        )
    if intake.max_envelope_bytes > config.batch.max_bytes // 2:
        yield Finding("intake.max_envelope_bytes", "events need room beside it: must be <= half of", "batch.max_bytes")
    if upstream.first_byte_seconds > upstream.response_seconds:
        yield Finding("upstream.first_byte_seconds", "must be <=", "upstream.response_seconds")
    if forward.backoff_base_seconds > forward.backoff_max_seconds:
        yield Finding("forward.backoff_base_seconds", "must be <=", "forward.backoff_max_seconds")


def find_warnings(config: Config) -> Iterator[Finding]:
    """Yield what is allowed and seldom meant. The configuration has no problems."""
    for option, text, who in (
        ("listen.relay", config.listen.relay, "other machines can send batches and spend the keys' budgets"),
        ("listen.admin", config.listen.admin, "other machines can read the relay's status and metrics"),
    ):
        if not is_loopback(parse_address(text)[0]):
            yield Finding(option, f"is not a loopback address: {who}")
    for option, url in (
        ("upstream.ingest_url", config.upstream.ingest_url),
        ("upstream.data_url", config.upstream.data_url),
    ):
        parts = urlsplit(url)
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            yield Finding(option, "is not encrypted: keys and recordings travel in the clear")
    if config.spool.durability == "os":
        yield Finding("spool.durability", "a power cut or a crash of the machine loses accepted events")
    if config.spool.overflow == "shed-sessions":
        yield Finding("spool.overflow", "loses accepted sessions, the oldest first, when the spool is full")
    if config.spool.max_bytes < config.intake.max_decoded_bytes:
        yield Finding("spool.max_bytes", "a batch of the largest size may never fit: is <", "intake.max_decoded_bytes")
    limit = config.budget.requests_per_minute
    if limit == 0:
        yield Finding("budget.requests_per_minute", "is unlimited; upstream answers 429 above its own limit")
    elif limit != "auto" and limit > INITIAL_LIMIT:
        yield Finding("budget.requests_per_minute", "is above upstream's published limit")
    if config.batch.max_events > Batch().max_events:
        yield Finding("batch.max_events", "is above upstream's published limit")
    if config.batch.max_bytes > Batch().max_bytes:
        yield Finding("batch.max_bytes", "is above upstream's published limit")
    if config.batch.measure == "compressed":
        yield Finding("batch.measure", "assumes that upstream measures after gzip, which nobody has confirmed")
    if config.batch.merge != "strict":
        yield Finding(
            "batch.merge",
            "assumes that upstream takes a session's pages from its events; those of a batch bear the last page alone",
        )
    yield from _key_warnings(config)
    yield from _data_warnings(config)


def _data_warnings(config: Config) -> Iterator[Finding]:
    data = config.data_api
    if data.anonymous == "serve-with-the-relays-token":
        yield Finding(
            "data_api.anonymous",
            "everybody who reaches this address reads and changes your Lucent data without a token:",
            "listen.relay",
        )
    if (data.token or data.token_file) and not data.client_tokens and data.anonymous == "pass-through":
        yield Finding("data_api.token", "has no effect, since nobody is served with it: see", "data_api.client_tokens")
    if data.token_file:
        try:
            mode = Path(data.token_file).stat().st_mode
        except OSError as problem:
            yield Finding("data_api.token_file", f"cannot be read at present: {problem.strerror}")
        else:
            if mode & 0o077:
                yield Finding("data_api.token_file", "can be read or written by others than its owner")
    if data.client_tokens and not is_loopback(parse_address(config.listen.relay)[0]):
        yield Finding("data_api.client_tokens", "travel in the clear unless TLS is in front of", "listen.relay")
    if data.reads_per_minute > type(data)().reads_per_minute:
        yield Finding("data_api.reads_per_minute", "is above upstream's published limit")
    if data.writes_per_minute > type(data)().writes_per_minute:
        yield Finding("data_api.writes_per_minute", "is above upstream's published limit")
    if data.window_bytes > data.cache_max_bytes // 4:
        yield Finding("data_api.cache_max_bytes", "large answers are not kept: is < 4 times", "data_api.window_bytes")


def _key_warnings(config: Config) -> Iterator[Finding]:
    keys = config.keys
    pooled = [key for pool in keys.pools.values() for key in pool]
    for option, values in (("keys.default", [keys.default]), ("keys.pools", pooled)):
        if not all(key.startswith("luc_pk_") for key in values if key):
            yield Finding(option, 'does not begin with "luc_pk_" as ingest keys do')
    if keys.accept == "any" and keys.listed:
        yield Finding("keys.listed", "has no effect, since others are taken too:", "keys.accept")
    if keys.accept == "listed" and not (keys.listed or keys.pools or keys.default):
        yield Finding("keys.accept", "refuses every client, since there is nothing in", "keys.listed")


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches `host`: an address without brackets, or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_wildcard(host: str) -> bool:
    """Say whether a listener at `host` is reached by every address of the machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
