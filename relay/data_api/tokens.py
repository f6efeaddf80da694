"""What is known of each token: how much of its budget is left.

Rules:
1. A token is known by a keyed hash of the credential that upstream sees; the credential itself is not kept.
2. Which are known is bounded; the least recently used is forgotten first. What it costs is our own count of a minute.
3. Only a token that upstream has taken is named in figures, by its fingerprint: invented ones would fill them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from relay.config import DataApi
from relay.protocol.rate import Rate


class Token:
    """One token.

    Attributes:
        name: Its fingerprint.
        reads: What it may read.
        writes: What it may change.
        is_taken: Upstream has taken it once: it has answered a request of it 2xx or 3xx.
        is_refused: Upstream answered it 401 last.
    """

    def __init__(self, name: str, settings: DataApi) -> None:
        self.name = name
        self.reads = Rate(settings.reads_per_minute)
        self.writes = Rate(settings.writes_per_minute)
        self.is_taken = False
        self.is_refused = False

    def rate(self, method: str) -> Rate:
        """Return the budget that a request of a method is taken from."""
        return self.writes if method == "PATCH" else self.reads


class Tokens:
    """The tokens used of late.

    Args:
        settings: The configuration's section.
    """

    def __init__(self, settings: DataApi) -> None:
        self._settings = settings
        self._tokens: OrderedDict[bytes, Token] = OrderedDict()

    def __iter__(self) -> Iterator[Token]:
        return iter(self._tokens.values())

    def get(self, partition: bytes) -> Token | None:
        """Return a token that is known, without using it."""
        return self._tokens.get(partition)

    def find(self, partition: bytes, name: str) -> Token:
        """Return a token, known or new.

        Args:
            partition: Its keyed hash.
            name: Its fingerprint.
        """
        token = self._tokens.get(partition)
        if token is None:
            token = self._tokens[partition] = Token(name, self._settings)
            if len(self._tokens) > self._settings.max_tokens:
                self._tokens.popitem(last=False)
        self._tokens.move_to_end(partition)
        return token
