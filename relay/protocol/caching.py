"""What a private cache may keep, and when it may answer from it (RFC 9111), as functions of fields and `now`.

Private, because what is kept for one token is never served to another. So Authorization, `private` and `s-maxage` mean
nothing here.

Rules:
1. Only a whole 200 to a GET is kept; what upstream or the client forbids to keep is not.
2. An answer is fresh for as long as upstream says, or for the operator's `cache_seconds` where it says nothing.
3. A stale answer is asked about by its validators. It is served as it is only where the client says so, or where
   upstream cannot be asked and it is allowed: by the operator, or by upstream's `stale-if-error` (RFC 5861); never
   against upstream's `must-revalidate` or `no-cache`.
4. Ages are taken by our clock from when the request was sent, plus the `age` that upstream gives (RFC 9111, 4.2.3).
"""

from __future__ import annotations

from math import inf

import msgspec

from relay.protocol.fields import (
    Fields,
    find_field,
    list_members,
    parse_date,
    parse_directives,
    parse_seconds,
    seconds_of,
    without,
)

CACHE_NAME = b"lucent-relay"
"""How the relay is called in `Cache-Status` and `Via`."""

ENTRY_OVERHEAD_BYTES = 2_048
"""What an entry costs beside its text: objects, keys, links; measured 1.7 KiB with ten header lines."""

CONDITIONS = frozenset({b"if-none-match", b"if-modified-since"})
"""A client's own validators, which the cache answers where it can."""

UNSHARED = frozenset({b"range", b"if-range", b"if-match", b"if-unmodified-since"})
"""Fields that make a request a case of its own: it passes by the cache."""

_CREDENTIAL = b"authorization"
"""A cache for one token alone has no need of it to tell answers apart, and shall not hold it."""

_KEPT_ON_304 = frozenset({b"content-length", b"content-type", b"content-encoding", b"content-range"})
"""Fields of a kept answer that a 304 does not change."""

_OF_ONE_ANSWER = frozenset(
    {b"age", b"retry-after", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"}
)
"""Fields that are not kept: they are true of the moment in which upstream answered."""


class Wish(msgspec.Struct, frozen=True):
    """What a request's Cache-Control asks."""

    is_store_forbidden: bool
    """`no-store`: nothing is kept, nothing kept is used."""
    is_fresh_wanted: bool
    """`no-cache`: nothing kept is used without asking upstream."""
    max_age: float
    """Oldest answer wanted, in seconds."""
    min_fresh: float
    """For how long an answer must stay fresh, in seconds."""
    max_stale: float
    """How long an answer may have been stale, in seconds; 0 where it may not."""
    is_only_if_kept: bool
    """`only-if-cached`: upstream is not to be asked."""


def parse_wish(fields: Fields) -> Wish:
    """Return what a request asks of a cache (RFC 9111, 5.2.1 and 5.4)."""
    value = find_field(fields, b"cache-control")
    if value is None:  # Pragma counts only without it
        value = b"no-cache" if b"no-cache" in list_members(find_field(fields, b"pragma")) else b""
    directives = parse_directives(value)
    max_stale = seconds_of(directives, b"max-stale", otherwise=0.0)
    return Wish(
        is_store_forbidden=b"no-store" in directives,
        is_fresh_wanted=b"no-cache" in directives,
        max_age=seconds_of(directives, b"max-age", otherwise=inf),
        min_fresh=seconds_of(directives, b"min-fresh", otherwise=0.0),
        max_stale=inf if directives.get(b"max-stale") == b"" else max_stale,
        is_only_if_kept=b"only-if-cached" in directives,
    )


class Kept(msgspec.Struct, frozen=True):
    """An answer that is kept."""

    headers: Fields
    """Of the 200, end-to-end, without what was true of its moment."""
    body: bytes
    """Whole."""
    selected_by: Fields
    """The request's fields that `vary` names; absent ones have an empty value. Never a credential in the clear."""
    asked_at: float
    """When it was asked for."""
    at: float
    """When its age was taken."""
    initial_age: float
    """Its age then, in seconds."""
    lifetime: float
    """For how long it is fresh, in seconds of age."""
    is_checked_always: bool
    """`no-cache`: never served without asking upstream."""
    is_strict: bool
    """`must-revalidate`: never served stale."""
    stale_if_error: float
    """How long after it is stale upstream allows it while there is an error, in seconds."""

    @property
    def size(self) -> int:
        """What it costs, in bytes."""
        lines = sum(len(name) + len(value) for name, value in (*self.headers, *self.selected_by))
        return len(self.body) + lines + ENTRY_OVERHEAD_BYTES

    def age(self, now: float) -> float:
        """Return its age in seconds."""
        return self.initial_age + now - self.at

    def fresh_seconds(self, now: float) -> float:
        """Return for how long it is fresh still; negative since when it is stale."""
        return self.lifetime - self.age(now)

    def validators(self) -> Fields:
        """Return the fields that ask upstream whether it still holds; none where there is nothing to ask by."""
        tag = find_field(self.headers, b"etag")
        date = find_field(self.headers, b"last-modified")
        if tag is not None:
            return ((b"if-none-match", tag),)
        return ((b"if-modified-since", date),) if date is not None else ()


def keep(
    request: Fields, status: int, headers: Fields, body: bytes, *, sent_at: float, now: float, cache_seconds: float
) -> Kept | None:
    """Return an answer to a GET as it is kept; None where it may not be, or is of no use.

    Args:
        request: The request's fields as upstream saw them.
        status: Of the answer.
        headers: Of the answer, end-to-end.
        body: Whole.
        sent_at: When the request was sent.
        now: When the answer was complete.
        cache_seconds: How long an answer is fresh that does not say.
    """
    directives = parse_directives(find_field(headers, b"cache-control"))
    varies_by = list_members(find_field(headers, b"vary"))
    is_forbidden = b"no-store" in directives or b"*" in varies_by or parse_wish(request).is_store_forbidden
    if status != 200 or is_forbidden or find_field(headers, b"set-cookie") is not None:
        return None
    lifetime = _lifetime(headers, cache_seconds)
    kept = Kept(
        headers=without(headers, _OF_ONE_ANSWER),
        body=body,
        selected_by=tuple((name, find_field(request, name) or b"") for name in varies_by if name != _CREDENTIAL),
        asked_at=sent_at,
        at=now,
        initial_age=(parse_seconds(find_field(headers, b"age")) or 0) + now - sent_at,
        lifetime=lifetime,
        is_checked_always=b"no-cache" in directives,
        is_strict=b"must-revalidate" in directives,
        stale_if_error=seconds_of(directives, b"stale-if-error", otherwise=0.0),
    )
    is_servable = lifetime > 0 and not kept.is_checked_always
    return kept if is_servable or kept.validators() else None


def _lifetime(headers: Fields, cache_seconds: float) -> float:
    """Return how long an answer is fresh (RFC 9111, 4.2.1)."""
    directives = parse_directives(find_field(headers, b"cache-control"))
    expires = find_field(headers, b"expires")
    if b"max-age" in directives or expires is None:
        return seconds_of(directives, b"max-age", otherwise=cache_seconds)
    expires_at, date = parse_date(expires), parse_date(find_field(headers, b"date"))
    return max(0.0, expires_at - date) if expires_at is not None and date is not None else 0.0


def renewed_headers(kept: Kept, headers: Fields) -> Fields:
    """Return the headers of a kept answer with what upstream's 304 says of it (RFC 9111, 3.2 and 4.3.4).

    Args:
        kept: What upstream was asked about.
        headers: Of the 304, end-to-end.
    """
    news = without(headers, _KEPT_ON_304)
    said = frozenset(name for name, _ in news)
    return (*without(kept.headers, said), *news)


def is_selected(kept: Kept, request: Fields) -> bool:
    """Return whether a kept answer is one to this request, by its `vary`."""
    return all((find_field(request, name) or b"") == value for name, value in kept.selected_by)


def is_same_selection(headers: Fields, one: Fields, other: Fields) -> bool:
    """Return whether an answer to one request would do for another, by its `vary`."""
    names = list_members(find_field(headers, b"vary"))
    return b"*" not in names and all(find_field(one, name) == find_field(other, name) for name in names)


def is_usable(kept: Kept, wish: Wish, now: float) -> bool:
    """Return whether a kept answer may be served without asking upstream (RFC 9111, 4.2)."""
    if wish.is_fresh_wanted or kept.is_checked_always or kept.age(now) > wish.max_age:
        return False
    fresh_seconds = kept.fresh_seconds(now)
    if fresh_seconds > 0:
        return fresh_seconds >= wish.min_fresh
    return not kept.is_strict and -fresh_seconds < wish.max_stale


def is_usable_stale(kept: Kept, wish: Wish, now: float, stale_seconds: float) -> bool:
    """Return whether a kept answer may be served because upstream cannot be asked (RFC 9111, 4.2.4)."""
    if wish.is_fresh_wanted or kept.is_checked_always or kept.is_strict or kept.age(now) > wish.max_age:
        return False
    return -kept.fresh_seconds(now) < max(stale_seconds, kept.stale_if_error)


def cache_status(
    *,
    fwd: str = "",
    fwd_status: int = 0,
    fresh_seconds: float | None = None,
    is_stored: bool = False,
    is_collapsed: bool = False,
    detail: str = "",
) -> tuple[bytes, bytes]:
    """Return the `Cache-Status` field of an answer (RFC 9211).

    Args:
        fwd: Why upstream was asked; empty where it was not.
        fwd_status: What it answered; 0 where it did not.
        fresh_seconds: Of a kept answer; None where none is served.
        is_stored: The answer is kept, or will be once it is whole.
        is_collapsed: It is another request's answer, too.
        detail: A token that says more.
    """
    members = [
        f"fwd={fwd}" if fwd else "hit" if fresh_seconds is not None else "",
        f"fwd-status={fwd_status}" if fwd_status else "",
        f"ttl={int(fresh_seconds // 1)}" if fresh_seconds is not None else "",
        "stored" if is_stored else "",
        "collapsed" if is_collapsed else "",
        f"detail={detail}" if detail else "",
    ]
    return b"cache-status", b"; ".join([CACHE_NAME, *(member.encode() for member in members if member)])
