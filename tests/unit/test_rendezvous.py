from __future__ import annotations

from collections import Counter
from math import sqrt
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.rendezvous import rank

KEYS = st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), min_size=1, unique=True)
SESSIONS = [f"session-{number}" for number in range(6_000)]


@given(KEYS, st.text(), st.randoms())
def test_rank_depends_on_nothing_but_the_set(keys: list[str], session: str, random: Random) -> None:
    """Every key is ranked once, and the order in which a pool is written does not matter."""
    shuffled = random.sample(keys, len(keys))
    assert rank(session, keys) == rank(session, shuffled)
    assert sorted(rank(session, keys)) == sorted(keys)


@given(KEYS, st.text(), st.data())
def test_sessions_of_other_keys_stay(keys: list[str], session: str, data: st.DataObject) -> None:
    """Whatever key leaves a pool or joins it, the order of the others for a session is as it was."""
    gone = data.draw(st.sampled_from(keys))
    rest = [key for key in keys if key != gone]
    assert tuple(key for key in rank(session, keys) if key != gone) == (rank(session, rest) if rest else ())


def test_share_of_each_key_is_even() -> None:
    """Sessions spread over a pool as dice would: within four standard deviations of an even share."""
    for size in (2, 3, 7):
        counts = Counter(rank(session, [f"luc_pk_{number}" for number in range(size)])[0] for session in SESSIONS)
        share = 1 / size
        allowed = 4 * sqrt(len(SESSIONS) * share * (1 - share))
        assert all(abs(counts[f"luc_pk_{number}"] - len(SESSIONS) * share) < allowed for number in range(size)), counts


def test_key_that_joins_takes_its_share() -> None:
    """A fourth key takes a quarter of the sessions, evenly from the three, and none moves between those."""
    before, after = ["luc_pk_a", "luc_pk_b", "luc_pk_c"], ["luc_pk_a", "luc_pk_b", "luc_pk_c", "luc_pk_d"]
    moved = Counter(rank(session, before)[0] for session in SESSIONS if rank(session, after)[0] == "luc_pk_d")
    assert abs(moved.total() - len(SESSIONS) / 4) < 150
    assert all(abs(count - moved.total() / 3) < 100 for count in moved.values())


def test_assignment_is_the_same_in_every_process() -> None:
    """The answer does not change between releases: a session in the spool would change its key."""
    keys = ["luc_pk_1", "luc_pk_2", "luc_pk_3"]
    assert "".join(rank(f"s{number}", keys)[0][-1] for number in range(12)) == "113333133133"
