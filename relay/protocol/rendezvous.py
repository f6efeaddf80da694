"""Which upstream key of a pool a session belongs to: rendezvous hashing (Thaler and Ravishankar, 1998).

Every key bids for every session with a hash of both, and the highest bid wins. So each key gets its share, whoever
computes it gets the same answer, and a key that joins a pool of n takes 1/(n+1) of the sessions and moves no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

_BID_BYTES = 8
"""Two of a thousand keys bid the same for a session once in 10**13."""


def rank(session_id: str, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the keys by their bids for a session, highest first, whatever their order was."""
    if len(keys) == 1:
        return tuple(keys)
    # The hash is keyed by the session's digest, so that no pair of texts can be written as another pair.
    session = blake2b(session_id.encode("utf-8", "surrogatepass")).digest()

    def bid(key: str) -> bytes:
        return blake2b(key.encode(), key=session, digest_size=_BID_BYTES).digest()

    return tuple(sorted(keys, key=bid, reverse=True))
