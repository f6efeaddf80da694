"""Which batches are stuck: properties, from histories of what upstream took and failed."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.failures import Failures

BATCHES = (1, 2, 3)


@given(st.lists(st.tuples(st.sampled_from(BATCHES), st.sampled_from(["taken", "failed", "of key"])), max_size=60))
def test_stuck_is_what_fails_while_others_are_taken(history: list[tuple[int, str]]) -> None:
    """A batch is stuck after a third failure before which, since its failure before, something was taken."""
    failures = Failures()
    in_a_row: dict[int, list[tuple[int, str]]] = {batch: [] for batch in BATCHES}
    taken = 0
    for batch, what in history:
        if what == "taken":
            failures.note_taken()
            failures.forget(batch)
            in_a_row[batch], taken = [], taken + 1
        else:
            in_a_row[batch].append((taken, what))
            assert failures.note_failure(batch, is_of_key=what == "of key") == len(in_a_row[batch])
        told = {
            batch: sum(before < now and what == "failed" for (before, _), (now, what) in pairwise(row))
            for batch, row in in_a_row.items()
        }
        assert {batch for batch in BATCHES if failures.is_stuck(batch)} == {
            batch for batch, number in told.items() if number >= 3
        }
        assert failures.stuck == sum(number >= 3 for number in told.values())


def test_an_outage_makes_nothing_stuck() -> None:
    """However long everything fails, nothing is told apart."""
    failures = Failures()
    failures.note_taken()
    for _ in range(1_000):
        for batch in BATCHES:
            failures.note_failure(batch, is_of_key=False)
    failures.note_taken()
    assert failures.stuck == 0
