"""RFC 9111, case by case."""

from __future__ import annotations

import pytest

from relay.protocol.caching import (
    Kept,
    cache_status,
    is_same_selection,
    is_selected,
    is_usable,
    is_usable_stale,
    keep,
    parse_wish,
    renewed_headers,
)
from relay.protocol.fields import Fields

DATE = "date: Thu, 01 Jan 1970 00:01:40 GMT"


def fields(*lines: str) -> Fields:
    """Return header lines as fields."""
    pairs = (line.partition(": ") for line in lines)
    return tuple((name.encode(), value.encode()) for name, _, value in pairs)


def kept_of(*lines: str, request: Fields = (), took: float = 0.0, cache_seconds: float = 10.0) -> Kept | None:
    """Return a 200 of some headers as it is kept at 100, having been asked for `took` seconds before."""
    return keep(request, 200, fields(*lines), b"body", sent_at=100.0 - took, now=100.0, cache_seconds=cache_seconds)


TAG = 'etag: "a"'
MODIFIED = "last-modified: Thu, 01 Jan 1970 00:00:00 GMT"

STORING: dict[str, tuple[tuple[str, ...], tuple[str, ...], int, bool]] = {
    # case: request, answer, status, whether it is kept
    "nothing said: heuristically, by option (4.2.2)": ((), (), 200, True),
    "no-store of the answer (5.2.2.5)": ((), ("cache-control: no-store",), 200, False),
    "no-store of the request (5.2.1.5)": (("cache-control: no-store",), ("cache-control: max-age=60",), 200, False),
    "private, in a private cache (5.2.2.7)": ((), ("cache-control: private, max-age=60",), 200, True),
    "authorization, in a private cache (3.5)": (("authorization: x",), ("cache-control: max-age=60",), 200, True),
    "vary on everything (4.1)": ((), ("vary: *", "cache-control: max-age=60"), 200, False),
    "a status that is not final knowledge": ((), ("cache-control: max-age=60",), 404, False),
    "part of an answer (3.3)": ((), ("cache-control: max-age=60",), 206, False),
    "a cookie": ((), ("set-cookie: a=b", "cache-control: max-age=60"), 200, False),
    "no-cache with a validator (5.2.2.4)": ((), ("cache-control: no-cache", TAG), 200, True),
    "no-cache without one: never of use": ((), ("cache-control: no-cache",), 200, False),
    "stale from the start, with a validator": ((), ("cache-control: max-age=0", MODIFIED), 200, True),
    "stale from the start, without one": ((), ("cache-control: max-age=0",), 200, False),
    "directives in another case": ((), ("cache-control: NO-STORE",), 200, False),
    "directives over several lines": ((), ("cache-control: max-age=60", "cache-control: no-store"), 200, False),
    "a directive's name within quotes": ((), ('cache-control: max-age=60, x="no-store, y"',), 200, True),
}


@pytest.mark.parametrize(("request_", "answer", "status", "expected"), STORING.values(), ids=STORING.keys())
def test_what_is_kept(request_: tuple[str, ...], answer: tuple[str, ...], status: int, expected: bool) -> None:
    """An answer is kept where a private cache may, and where it is of any use (RFC 9111, 3)."""
    kept = keep(fields(*request_), status, fields(*answer), b"", sent_at=0.0, now=0.0, cache_seconds=10.0)
    assert (kept is not None) is expected


LIFETIMES: dict[str, tuple[tuple[str, ...], float]] = {
    "max-age": (("cache-control: max-age=60",), 60),
    "max-age before expires (5.3)": (("cache-control: max-age=60", DATE, "expires: " + DATE[6:]), 60),
    "max-age in quotes (5.2)": (('cache-control: max-age="60"',), 60),
    "the first of two (4.2.1)": (("cache-control: max-age=5, max-age=60",), 5),
    "s-maxage is for shared caches (5.2.2.10)": (("cache-control: s-maxage=60, max-age=5",), 5),
    "expires less date": ((DATE, "expires: Thu, 01 Jan 1970 00:02:40 GMT"), 60),
    "expires before date": ((DATE, "expires: Thu, 01 Jan 1970 00:00:00 GMT", TAG), 0),
    "expires that is no date (5.3)": ((DATE, "expires: 0", TAG), 0),
    "expires without a date": (("expires: Thu, 01 Jan 1970 00:02:40 GMT", TAG), 0),
    "max-age that is no number (4.2.1)": (("cache-control: max-age=soon", TAG), 0),
    "max-age below nothing": (("cache-control: max-age=-1", TAG), 0),
    "nothing said": ((), 10),
    "only private": (("cache-control: private",), 10),
    "more than a clock holds (1.2.2)": (("cache-control: max-age=99999999999999999999",), 2**31),
}


@pytest.mark.parametrize(("answer", "expected"), LIFETIMES.values(), ids=LIFETIMES.keys())
def test_how_long_it_is_fresh(answer: tuple[str, ...], expected: float) -> None:
    """Freshness is what upstream says, and the option's where it says nothing (RFC 9111, 4.2.1)."""
    kept = kept_of(*answer)
    assert kept is not None
    assert kept.lifetime == expected


AGES: dict[str, tuple[tuple[str, ...], float, float]] = {
    "none given": ((), 0, 5),
    "given by upstream's own cache": (("age: 30",), 0, 35),
    "with the time that the answer took": (("age: 30",), 2, 37),
    "that is no number": (("age: old",), 2, 7),
}


@pytest.mark.parametrize(("answer", "took", "expected"), AGES.values(), ids=AGES.keys())
def test_how_old_it_is(answer: tuple[str, ...], took: float, expected: float) -> None:
    """Age is upstream's, plus the whole exchange, plus the time here (RFC 9111, 4.2.3)."""
    kept = kept_of(*answer, "cache-control: max-age=60", took=took)
    assert kept is not None
    assert kept.age(105.0) == expected
    assert kept.fresh_seconds(105.0) == 60 - expected


USES: dict[str, tuple[str, str, float, bool]] = {
    # case: answer's cache-control, request's, age, whether it is served without asking
    "fresh": ("max-age=60", "", 59, True),
    "no longer (4.2)": ("max-age=60", "", 60, False),
    "request: no-cache (5.2.1.4)": ("max-age=60", "no-cache", 1, False),
    "request: max-age, young enough (5.2.1.1)": ("max-age=60", "max-age=5", 5, True),
    "request: max-age, too old": ("max-age=60", "max-age=5", 6, False),
    "request: max-age that is no number": ("max-age=60", "max-age=x", 1, False),
    "request: min-fresh, enough left (5.2.1.3)": ("max-age=60", "min-fresh=10", 50, True),
    "request: min-fresh, too little": ("max-age=60", "min-fresh=10", 51, False),
    "request: max-stale with a bound (5.2.1.2)": ("max-age=60", "max-stale=10", 69, True),
    "request: max-stale, beyond": ("max-age=60", "max-stale=10", 71, False),
    "request: max-stale of any age": ("max-age=60", "max-stale", 9_999, True),
    "request: max-stale against must-revalidate (5.2.2.2)": ("max-age=60, must-revalidate", "max-stale", 61, False),
    "must-revalidate while fresh": ("max-age=60, must-revalidate", "", 59, True),
    "answer: no-cache (5.2.2.4)": ("no-cache, max-age=60", "", 1, False),
    "answer: no-cache of a field, taken for all": ('no-cache="x-a", max-age=60', "", 1, False),
    "request: an extension nobody knows": ("max-age=60", "x=1", 1, True),
}


@pytest.mark.parametrize(("answer", "wish", "age", "expected"), USES.values(), ids=USES.keys())
def test_when_it_is_served(answer: str, wish: str, age: float, expected: bool) -> None:
    """A kept answer is served without asking upstream only while it is what both sides allow (RFC 9111, 4)."""
    kept = kept_of(f"cache-control: {answer}", TAG)
    assert kept is not None
    asked = parse_wish(fields(f"cache-control: {wish}") if wish else ())
    assert is_usable(kept, asked, 100.0 + age) is expected


STALE: dict[str, tuple[str, str, float, float, bool]] = {
    # case: answer's cache-control, request's, seconds stale, option, whether it is served
    "not by default": ("max-age=60", "", 1, 0, False),
    "within the option": ("max-age=60", "", 99, 100, True),
    "beyond it": ("max-age=60", "", 100, 100, False),
    "stale-if-error (RFC 5861, 4)": ("max-age=60, stale-if-error=50", "", 49, 0, True),
    "must-revalidate": ("max-age=60, must-revalidate", "", 1, 100, False),
    "no-cache of the answer": ("no-cache", "", 1, 100, False),
    "no-cache of the request": ("max-age=60", "no-cache", 1, 100, False),
    "older than the request wants": ("max-age=60", "max-age=30", 1, 100, False),
    "fresh, but not for as long as wanted": ("max-age=60", "min-fresh=60", -1, 0, True),
}


@pytest.mark.parametrize(("answer", "wish", "stale_for", "option", "expected"), STALE.values(), ids=STALE.keys())
def test_when_it_is_served_stale(answer: str, wish: str, stale_for: float, option: float, expected: bool) -> None:
    """A stale answer replaces trouble only within the option or upstream's own word, and against nobody's (4.2.4)."""
    kept = kept_of(f"cache-control: {answer}", TAG)
    assert kept is not None
    asked = parse_wish(fields(f"cache-control: {wish}") if wish else ())
    assert is_usable_stale(kept, asked, 100.0 + 60 + stale_for, option) is expected


def test_pragma_counts_without_cache_control_only() -> None:
    """`Pragma: no-cache` is the old way to ask for a fresh answer (RFC 9111, 5.4)."""
    assert parse_wish(fields("pragma: no-cache")).is_fresh_wanted
    assert not parse_wish(fields("pragma: no-cache", "cache-control: max-age=5")).is_fresh_wanted


def test_a_condition_names_the_tag_before_the_date() -> None:
    """Upstream is asked by the entity tag where there is one, by the date otherwise (RFC 9111, 4.3.1)."""
    both, date, neither = kept_of(TAG, MODIFIED), kept_of(MODIFIED), kept_of()
    assert both is not None
    assert date is not None
    assert neither is not None
    assert both.validators() == fields('if-none-match: "a"')
    assert date.validators() == fields("if-modified-since: Thu, 01 Jan 1970 00:00:00 GMT")
    assert neither.validators() == ()


def test_a_304_brings_what_is_new_and_leaves_the_body_described() -> None:
    """A 304's fields replace those kept, all lines of a name, but for what describes the body (RFC 9111, 3.2)."""
    kept = kept_of(TAG, "x-a: 1", "x-a: 2", "x-b: 1", "content-type: a/b", "content-encoding: gzip")
    assert kept is not None
    news = fields("x-a: 3", "cache-control: max-age=7", "content-type: c/d", "content-encoding: br", "age: 4")
    assert sorted(renewed_headers(kept, news)) == sorted(
        fields(
            *(TAG, "x-b: 1", "content-type: a/b", "content-encoding: gzip"),
            *("x-a: 3", "cache-control: max-age=7", "age: 4"),
        )
    )


def test_what_was_true_of_a_moment_is_not_kept() -> None:
    """Age and the token's budget are not served again with a kept answer."""
    kept = kept_of("age: 4", "x-ratelimit-remaining: 5", "x-ratelimit-reset: 6", "x-ratelimit-limit: 7", "x-a: 1")
    assert kept is not None
    assert kept.headers == fields("x-a: 1")


def test_no_credential_is_kept() -> None:
    """An answer that varies with Authorization is kept without it; its token's answers are apart from others anyway."""
    kept = kept_of("vary: Authorization, Accept", request=fields("authorization: Bearer secret", "accept: a"))
    assert kept is not None
    assert kept.selected_by == ((b"accept", b"a"),)


def test_vary_tells_answers_apart() -> None:
    """An answer is for requests whose named fields are the same, absent ones included (RFC 9111, 4.1)."""
    asked = fields("accept-encoding: gzip", "x-a: 1")
    kept = kept_of("vary: Accept-Encoding, X-B", request=asked)
    assert kept is not None
    assert is_selected(kept, fields("accept-encoding: gzip"))
    assert not is_selected(kept, fields("accept-encoding: br"))
    assert not is_selected(kept, fields("accept-encoding: gzip", "x-b: 1"))
    assert is_same_selection(kept.headers, asked, fields("accept-encoding: gzip"))
    assert not is_same_selection(kept.headers, asked, ())
    assert not is_same_selection(fields("vary: *"), asked, asked)


def test_cache_status_says_it_as_rfc_9211_does() -> None:
    """Members come in one order, numbers are integers, and what is not the case is left out."""
    assert cache_status(detail="busy") == (b"cache-status", b"lucent-relay; detail=busy")
    assert cache_status(fresh_seconds=3.9) == (b"cache-status", b"lucent-relay; hit; ttl=3")
    assert (
        cache_status(fresh_seconds=-0.1, detail="budget-spent")[1] == b"lucent-relay; hit; ttl=-1; detail=budget-spent"
    )
    assert cache_status(fwd="miss", fwd_status=200, is_stored=True, is_collapsed=True)[1] == (
        b"lucent-relay; fwd=miss; fwd-status=200; stored; collapsed"
    )
