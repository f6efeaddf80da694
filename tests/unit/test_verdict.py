from __future__ import annotations

from email.utils import formatdate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.protocol.verdict import CLASS_VERDICTS, STATUS_VERDICTS, Verdict, classify, parse_retry_after

NOW = 784_111_777.0
"""Sun, 06 Nov 1994 08:49:37 GMT, the moment of RFC 9110's examples."""

NAMED = {
    Verdict.DELIVERED: (200, 201, 202, 204, 206, 299),
    Verdict.RETRY: (408, 425, 500, 501, 502, 503, 504, 507, 511, 520, 599),
    Verdict.LIMITED: (429,),
    Verdict.POISON: (400, 422),
    Verdict.TOO_LARGE: (413,),
    Verdict.HOLD: (401, 403),
    Verdict.OUTAGE: (100, 199, 301, 302, 304, 308, 404, 405, 406, 409, 410, 411, 415, 418, 428, 431, 451, 499),
}


@pytest.mark.parametrize(
    ("verdict", "status"), [(verdict, status) for verdict, all_ in NAMED.items() for status in all_]
)
def test_statuses_mean_what_the_table_says(verdict: Verdict, status: int) -> None:
    """The statuses that upstream and what stands before it are known to give."""
    assert classify(status) is verdict


@pytest.mark.parametrize("status", range(100, 600))
def test_every_status_has_its_class_or_a_reason_of_its_own(status: int) -> None:
    """2xx is delivered, 5xx is tried again, and of the rest only the named ones are more than an outage."""
    by_class = {2: Verdict.DELIVERED, 5: Verdict.RETRY}.get(status // 100, Verdict.OUTAGE)
    named = {named: verdict for verdict in NAMED for named in NAMED[verdict]}
    assert classify(status) is named.get(status, by_class)


@given(st.integers())
def test_only_2xx_delivers(status: int) -> None:
    """No number outside it, however odd, makes events count as delivered."""
    assert (classify(status) is Verdict.DELIVERED) == (200 <= status <= 299)


def test_what_loses_a_batch_its_place_is_4xx() -> None:
    """A proxy's trouble can never make a batch poison, too large or held."""
    assert all(400 <= status <= 499 for status in STATUS_VERDICTS)
    assert not set(CLASS_VERDICTS.values()) & {Verdict.POISON, Verdict.TOO_LARGE, Verdict.HOLD}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0", 0.0),
        (b"60", 60.0),
        (b" 60\t", 60.0),
        (b"00000000000060", 60.0),
        (b"3601", 3_600.0),
        (b"9" * 10_000, 3_600.0),
        (b"Sun, 06 Nov 1994 08:50:37 GMT", 60.0),
        (b"Sunday, 06-Nov-94 08:50:37 GMT", 60.0),
        (b"Sun Nov  6 08:50:37 1994", 60.0),
        (b"Sun, 06 Nov 1994 08:49:36 GMT", 0.0),
        (b"Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        (b"Fri, 31 Dec 9999 23:59:59 GMT", 3_600.0),
        (b"Sun, 06 Nov 1994 09:50:37 +0100", 60.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: bytes, seconds: float) -> None:
    """Both forms and all three date formats are read, a past date is now, and a long wait is clamped."""
    assert parse_retry_after(value, NOW, 3_600.0) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b" ", b"-1", b"1.5", b"+5", b"1e3", b"0x10", b"10, 20", b"soon", b"inf", b"nan", b"\xb2", b"\xd9\xa1"),
        *(b"Sun, 06 Nov 99999 08:49:37 GMT", b"Nov", b",", b"06 Nov", b"::", b"\x00"),
    ],
)
def test_what_is_neither_is_absent(value: bytes) -> None:
    """Garbage leaves the decision to the backoff."""
    assert parse_retry_after(value, NOW, 3_600.0) is None


@given(st.integers(-(10**5), 10**6))
def test_a_date_is_relative_to_the_wall_clock(offset: int) -> None:
    """A date so many seconds away is a wait of so many seconds, within the bounds."""
    value = formatdate(NOW + offset, usegmt=True).encode()
    assert parse_retry_after(value, NOW, 3_600.0) == min(max(offset, 0), 3_600)


WORDS = st.sampled_from(
    ["Sun,", "06", "Nov", "1994", "08:49:37", "GMT", "+9999999", "-0000", "-", ",", ":", "", " ", "9" * 30]
)


@given(
    st.binary()
    | st.lists(WORDS | st.text("0123456789:,+- ", max_size=5), max_size=9).map(lambda found: " ".join(found).encode())
)
@example(b"0 0 0 0:0:0 -")
def test_any_header_is_a_wait_within_bounds_or_none(value: bytes) -> None:
    """No value that upstream or a proxy may send is an error."""
    seconds = parse_retry_after(value, NOW, 3_600.0)
    assert seconds is None or 0 <= seconds <= 3_600
