from __future__ import annotations

import pytest

from tests.soak.soak import MAX_ANSWER_GROWTH, MAX_GROWTH, Found, Sample, Soak
from tests.system.daemon import Site

SECONDS = 600.0


def make_found(**slopes: float) -> Found:
    """Return what a soak finds where figures begin at 100 MB, or 0.1 s, and grow by so much a second."""

    def value(what: str, at: float) -> float:
        return 1e8 + slopes.get(what, 0.0) * at

    def sample(at: int) -> Sample:
        resident_bytes, open_files, used_bytes = (int(value(what, at)) for what in MAX_GROWTH)
        return Sample(at, resident_bytes, open_files, used_bytes, 0)

    seconds = range(int(SECONDS))
    return Found(
        seconds=SECONDS,
        quiet_from=SECONDS / 2,
        samples=[sample(at) for at in seconds],
        answers=[(at, 0.1 + slopes.get("answer_seconds", 0.0) * at) for at in seconds],
    )


def test_flat() -> None:
    """What stays as it is, is flat."""
    assert [growth.what for growth in make_found().growth() if not growth.is_flat] == []


@pytest.mark.parametrize(("what", "bound"), [*MAX_GROWTH.items(), ("answer_seconds", MAX_ANSWER_GROWTH)])
def test_growth_is_noticed(what: str, bound: float) -> None:
    """What grows by more than its bound between the first and last third of the quiet half is named, and it alone."""
    slope = 1.1 * bound / (SECONDS / 3)
    assert [growth.what for growth in make_found(**{what: slope}).growth() if not growth.is_flat] == [what]


class Promising(Soak):
    """A soak whose clients were promised an event more than they sent."""

    async def _settle(self) -> None:
        self._site.sent.events += 1
        await super()._settle()


@pytest.mark.slow
async def test_loss_is_noticed(site: Site) -> None:
    """A soak whose clients were promised more than arrives fails."""
    soak = Promising(site, seed=1, seconds=3, has_small_disk=False)
    with pytest.RaisesGroup(pytest.RaisesExc(AssertionError, match="'accepted'"), flatten_subgroups=True):
        await soak.run()
