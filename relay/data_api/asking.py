"""A client's request as upstream and the cache see it, and what passes of both sides' headers.

Rules:
1. End-to-end fields pass as they are, in their order; fields of one connection do not (RFC 9110, 7.6.1). `host` and
   framing are the upstream connection's own, `authorization` is what `relay.data_api.credentials` says.
2. Both sides are told of the relay by `via`.
"""

from __future__ import annotations

import msgspec

from relay.data_api.credentials import Caller
from relay.data_api.tokens import Token
from relay.http.message import Request
from relay.protocol.caching import CACHE_NAME, CONDITIONS, UNSHARED, Kept, Wish, parse_wish
from relay.protocol.fields import Fields, end_to_end, find_field, without

VIA = (b"via", b"1.1 " + CACHE_NAME)
"""Protocol and pseudonym (RFC 9110, 7.6.3)."""

_OWN = frozenset({b"host", b"content-length", b"expect", b"authorization", b"via"})

_FIRST_COUNTS = frozenset({b"x-forwarded-host", b"x-forwarded-proto"})
"""What the client asked for, which the first proxy knows; the other fields are lists, to which each proxy adds."""

_SELECTING = (b"accept", b"accept-encoding", b"accept-language", *sorted(CONDITIONS))
"""Fields by which requests for one target are told apart before upstream's `vary` is known."""


class Ask(msgspec.Struct):
    """One request to upstream, as a client asks for it."""

    method: str
    """GET, HEAD or PATCH."""
    path: str
    """Without the query."""
    target: str
    """Path and query."""
    fields: Fields
    """Header fields that upstream is sent."""
    body: bytes
    """Of a PATCH."""
    caller: Caller
    """Who asks."""
    token: Token | None
    """Whose budget it takes; None where there is no credential."""
    wish: Wish
    """What is asked of the cache."""

    @property
    def is_apart(self) -> bool:
        """Whether the answer is this client's alone: neither kept nor shared."""
        is_special = any(name in UNSHARED for name, _ in self.fields)
        return self.method == "PATCH" or self.token is None or self.wish.is_store_forbidden or is_special

    @property
    def key(self) -> tuple[object, ...]:
        """What identical requests have in common."""
        selecting = (find_field(self.fields, name) for name in _SELECTING)
        return (self.caller.partition, self.method, self.target, *selecting)

    def checking(self, kept: Kept) -> Ask:
        """Return the request that asks whether a kept answer still holds, in place of what the client has itself."""
        return msgspec.structs.replace(self, fields=(*without(self.fields, CONDITIONS), *kept.validators()))


def make_ask(request: Request, caller: Caller, token: Token | None, forwarded: str) -> Ask:
    """Return a client's request as upstream is asked it.

    Args:
        request: The client's.
        caller: Who it is.
        token: Whose budget it takes.
        forwarded: `data_api.forwarded`.
    """
    passed = without(end_to_end(request.headers.items()), _OWN)
    authorization = ((b"authorization", caller.authorization),) if caller.authorization else ()
    via = request.header(b"via")
    fields = (*passed, *authorization, (b"via", via + b", " + VIA[1]) if via else VIA)
    return Ask(
        method=request.method,
        path=request.path,
        target=request.path + ("?" + request.query.decode("latin-1") if request.query else ""),
        fields=_with_forwarded(fields, request, forwarded),
        body=request.body if request.method == "PATCH" else b"",
        caller=caller,
        token=token,
        wish=parse_wish(passed),
    )


def _with_forwarded(fields: Fields, request: Request, forwarded: str) -> Fields:
    """Return the fields with who asked, behind what earlier proxies said (RFC 7239, 4)."""
    own: Fields
    peer, host = request.peer.encode() or b"unknown", request.header(b"host")
    if forwarded == "forwarded":
        quoted = b'"[%b]"' % peer if b":" in peer else peer
        own = ((b"forwarded", b'for=%b;host="%b";proto=http' % (quoted, host)),)
    elif forwarded == "x-forwarded":
        own = ((b"x-forwarded-for", peer), (b"x-forwarded-host", host), (b"x-forwarded-proto", b"http"))
    else:
        return fields
    merged = []
    for name, value in own:
        earlier = find_field(fields, name)
        if earlier is None:
            merged.append((name, value))
        else:
            merged.append((name, earlier if name in _FIRST_COUNTS else earlier + b", " + value))
    return (*without(fields, frozenset(name for name, _ in own)), *merged)
