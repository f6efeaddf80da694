from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.sandbox.faults import Faults, fault_settings


class FakeRandom:
    """Gives out prepared numbers."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        """Return the next of them."""
        return self.numbers.pop(0)


def test_by_default_nothing_goes_wrong() -> None:
    """Without settings every batch is served at once and there is no outage."""
    faults = Faults(fault_settings({}), random.Random(0))
    fates = [faults.fate() for _ in range(100)]
    assert {fate.kind for fate in fates} == {"serve"}
    assert {fate.latency_seconds for fate in fates} == {0.0}
    assert not faults.is_out(0.0)


@pytest.mark.parametrize(
    ("draw", "kind"),
    [
        (0.0, "error"),
        (0.24, "error"),
        (0.25, "drop_before"),
        (0.49, "drop_before"),
        (0.5, "drop_after"),
        (0.74, "drop_after"),
        (0.75, "serve"),
        (0.99, "serve"),
    ],
)
def test_the_rates_share_one_draw(draw: float, kind: str) -> None:
    """Each rate takes its share of [0, 1), in the order error, drop before, drop after."""
    settings = fault_settings({"error_rate": 0.25, "drop_before_rate": 0.25, "drop_after_rate": 0.25})
    assert Faults(settings, FakeRandom(draw, 0.0, 0.0)).fate().kind == kind


@pytest.mark.parametrize(("pick", "status"), [(0.0, 500), (0.34, 502), (0.99, 503)])
def test_error_statuses_are_equally_likely(pick: float, status: int) -> None:
    """The second draw picks among the statuses."""
    settings = fault_settings({"error_rate": 1, "error_status": [500, 502, 503]})
    assert Faults(settings, FakeRandom(0.5, pick, 0.0)).fate().status == status


def test_latency_is_its_base_and_a_share_of_the_jitter() -> None:
    """The third draw spreads the jitter evenly above the latency."""
    settings = fault_settings({"latency_seconds": 2, "latency_jitter_seconds": 4})
    assert Faults(settings, FakeRandom(0.5, 0.5, 0.25)).fate().latency_seconds == 3.0


def test_the_same_seed_gives_the_same_fates() -> None:
    """A run can be repeated by its seed."""
    settings = fault_settings({"error_rate": 0.3, "drop_after_rate": 0.2, "latency_jitter_seconds": 1})
    one, other = (Faults(settings, random.Random(7)) for _ in range(2))
    assert [one.fate() for _ in range(50)] == [other.fate() for _ in range(50)]


@given(st.integers(), st.integers(0, 50))
def test_a_change_of_settings_does_not_shift_the_draws(seed: int, change_at: int) -> None:
    """Which batches err does not depend on what the other options were before."""
    erring = fault_settings({"error_rate": 0.5})
    slow = fault_settings({"error_rate": 0.5, "latency_jitter_seconds": 9, "error_status": [500, 503]})
    steady, changing = (Faults(erring, random.Random(seed)) for _ in range(2))
    for number in range(60):
        if number == change_at:
            changing.settings = slow
        assert steady.fate().kind == changing.fate().kind


def test_rates_are_kept() -> None:
    """Over many batches each fault has about its share."""
    settings = fault_settings({"error_rate": 0.1, "drop_before_rate": 0.2, "drop_after_rate": 0.3})
    faults = Faults(settings, random.Random(1))
    kinds = Counter(faults.fate().kind for _ in range(10_000))
    assert {kind: round(count / 10_000, 1) for kind, count in kinds.items()} == {
        "error": 0.1,
        "drop_before": 0.2,
        "drop_after": 0.3,
        "serve": 0.4,
    }


def test_an_outage_includes_its_start_and_not_its_end() -> None:
    """Outages are half-open spans, and there may be several."""
    faults = Faults(fault_settings({"outages": [[10, 20], [30, 31]]}), random.Random(0))
    moments = [9.9, 10.0, 19.9, 20.0, 30.5, 31.0]
    assert [faults.is_out(at) for at in moments] == [False, True, True, False, True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"error_rat": 0.1}, "unknown field `error_rat`"),
        ({"error_rate": 1.1}, r"\$\.error_rate"),
        ({"error_rate": float("nan")}, r"\$\.error_rate"),
        ({"error_rate": "0.1"}, r"\$\.error_rate"),
        ({"error_rate": 0.6, "drop_after_rate": 0.5}, "add up to 1.1"),
        ({"error_status": []}, r"\$\.error_status"),
        ({"error_status": [200]}, r"\$\.error_status\[0\]"),
        ({"latency_seconds": -1}, r"\$\.latency_seconds"),
        ({"outages": [[20, 10]]}, "20:10 ends before it starts"),
        ({"outages": [[0, float("inf")]]}, r"\$\.outages"),
        ({"outage_status": 302}, "302 is neither 0 nor 400 to 599"),
    ],
)
def test_settings_out_of_bounds_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    """What cannot be played is refused, and the message names it."""
    with pytest.raises(msgspec.ValidationError, match=message):
        fault_settings(values)
