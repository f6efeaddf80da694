"""What the store tells the schedule of a window's runs: whether the first of them may still grow."""

from __future__ import annotations

from pathlib import Path

from relay.protocol.cut import Parting
from tests.component.batches import make_body, make_event
from tests.component.test_store import append, do, opened


def test_a_restart_knows_which_windows_have_several_envelopes(tmp_path: Path) -> None:
    """Pending windows come with what parts their segments and the last one's likeness."""
    with opened(tmp_path) as store:
        pages = {"one": ["a", "a"], "two": ["a", "b"], "back": ["a", "b", "a"]}
        for window, visited in pages.items():
            for sequence, page in enumerate(visited):
                append(store, make_body(session=window, window=window, sequence=sequence, page=page))
        found = do(store, lambda: store.leftovers.pending_windows(0, 10))
        assert [window.parting for window in found] == [Parting.NOTHING, Parting.PAGE, Parting.PAGE]
        assert len({window.likeness for window in found}) == 3  # a session is part of the envelope
        one, *_ = do(store, lambda: store.leftovers.pending_windows(0, 1))
        assert one == found[0]


def test_a_seal_says_whether_what_it_left_is_closed(tmp_path: Path) -> None:
    """Behind the first page's batch there are two pages, then one, then nothing."""
    with opened(tmp_path) as store:
        for sequence, page in enumerate("aabbbc"):
            window_id = append(store, make_body(sequence=sequence, page=page), at=float(sequence)).window_id
        loads = [do(store, lambda: store.seal(window_id, 10.0)) for _ in range(3)]
        assert [load.next_parting for load in loads] == [Parting.PAGE, Parting.NOTHING, Parting.NOTHING]
        assert [load.next_oldest_at for load in loads] == [2.0, 5.0, None]


def test_the_rest_of_a_split_segment_is_closed_by_the_page_behind_it(tmp_path: Path) -> None:
    """Where a full batch ends within a segment, the rest of it is a run as any other."""
    with opened(tmp_path) as store:
        for sequence, page in enumerate("aab"):
            events = [make_event(f"{sequence}/{number}") for number in range(300)]
            window_id = append(store, make_body(sequence=sequence, page=page, events=events)).window_id
        first, second = [do(store, lambda: store.seal(window_id, 10.0)) for _ in range(2)]
        assert (first.batch.event_count, first.next_parting) == (500, Parting.PAGE)
        assert (second.batch.event_count, second.next_parting) == (100, Parting.NOTHING)
