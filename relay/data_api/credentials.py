"""Who asks, and by which token Lucent is asked for them.

Rules:
1. A client's own `Authorization` passes as it is. One of the relay's `client_tokens` never leaves the relay, however it
   is written there (twice, or without its scheme), and stands for the relay's token. They are compared by hash, all of
   them and in constant time.
2. Who sends none gets the relay's token only where `data_api.anonymous` says so in as many words.
3. A token is known elsewhere by a hash under a key of this process, and in figures by its fingerprint.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog
import trio

from relay.config import DataApi
from relay.protocol.fields import MAX_TOKEN_BYTES, is_token
from relay.protocol.fingerprint import fingerprint

log = structlog.get_logger()

REREAD_SECONDS = 1.0
"""How old what was read of `token_file` may be when it is used."""

MAX_WORDS = 16
"""Of an `Authorization`, in which the relay's tokens are looked for: a header sent a few times, or a Digest's dozen.
Each costs a hash and a comparison a token: a header full of them would cost as much as a thousand requests."""

_WORD_END = re.compile(rb"[\s,]+")

ReadFile = Callable[[Path], Awaitable[bytes]]
"""Returns what a file begins with; raises OSError."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks, as upstream and the rest of the relay see them."""

    authorization: bytes
    """What upstream is sent; empty for nothing."""
    partition: bytes
    """Keyed hash of it: whose answers and budget these are. Empty for nobody's."""
    name: str
    """Fingerprint of the token; empty for none."""


class Credentials:
    """Identifies callers.

    Args:
        settings: The configuration's section.
        salt: Key of the hashes; 16 random bytes.
        monotonic: Seconds.
        read_file: Reads the token file.
    """

    def __init__(self, settings: DataApi, salt: bytes, monotonic: Callable[[], float], read_file: ReadFile) -> None:
        self._salt = salt
        self._client_tokens = [self._hash(token.encode()) for token in settings.client_tokens]
        self._serves_anonymous = settings.anonymous == "serve-with-the-relays-token"
        self._monotonic = monotonic
        self._read_file = read_file
        self._path = Path(settings.token_file) if settings.token_file else None
        self._token = settings.token.encode()
        self._read_at = float("-inf")
        self._reading: trio.Event | None = None
        self.problem = ""
        """Why the token file cannot be used, where it cannot."""
        self.own_partition = b""
        """Of the relay's token, once it was used."""

    async def identify(self, authorization: bytes) -> Caller | None:
        """Return who asks; None where they are to be served with the relay's token, and it has none at present.

        Args:
            authorization: The request's header, empty without one.
        """
        own = not authorization and self._serves_anonymous
        if self._client_tokens:
            sent = [self._hash(word) for word in _WORD_END.split(authorization, MAX_WORDS)[:MAX_WORDS]]
            own |= sum(hmac.compare_digest(word, token) for token in self._client_tokens for word in sent) > 0
        if own:
            await self._reread()
            if not self._token:
                return None
            authorization = b"Bearer " + self._token
            self.own_partition = self._partition_of(authorization)
        if not authorization:
            return Caller(b"", b"", "")
        return Caller(authorization, self._partition_of(authorization), fingerprint(authorization.rpartition(b" ")[2]))

    def _partition_of(self, authorization: bytes) -> bytes:
        """Return the hash of a credential, of a bearer token however scheme and blanks are written (RFC 9110, 11.1)."""
        scheme, blank, token = authorization.partition(b" ")
        is_bearer = blank and scheme.lower() == b"bearer"
        return self._hash(b"Bearer " + token.strip() if is_bearer else authorization)

    def _hash(self, secret: bytes) -> bytes:
        return hashlib.blake2b(secret, key=self._salt, digest_size=16).digest()

    async def _reread(self) -> None:
        """Read the token file, unless that was done just now. A token that was read stays until there is another."""
        now = self._monotonic()
        if self._path is None:
            return
        if now < self._read_at + REREAD_SECONDS:
            if self._reading is not None and not self._token:  # somebody else does that, and there is no other
                await self._reading.wait()
            return
        self._read_at = now
        self._reading = reading = trio.Event()
        try:
            token = (await self._read_file(self._path)).strip()
            problem = "" if is_token(token) else "holds no token, which is visible ASCII without blanks"
        except OSError as error:
            token, problem = b"", f"cannot be read: {error.strerror}"
        finally:
            self._reading = None
            reading.set()
        if problem and problem != self.problem:
            log.error("token file of the data API is of no use", path=str(self._path), reason=problem)
        self.problem = problem
        if not problem and token != self._token:
            self._token = token
            log.info("token of the data API read", token=fingerprint(token))


async def read_token_file(path: Path) -> bytes:
    """Return what a file begins with; in a thread, since a file may be on a network.

    Raises:
        OSError: It cannot be read.
    """

    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(MAX_TOKEN_BYTES + 1)

    return await trio.to_thread.run_sync(read)
