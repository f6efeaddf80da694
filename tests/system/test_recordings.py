from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trio
import zstandard

from tests.system.daemon import Site
from tests.system.laws import assert_accounted
from tests.system.traffic import Batch, read_batch

pytestmark = pytest.mark.slow

RECORDINGS = Path(__file__).parents[2] / "relay" / "demo" / "recordings"


def read_recording(path: Path) -> list[Batch]:
    """Return a recorded session's client batches, in order."""
    lines = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines()
    return [read_batch(line) for line in lines]


async def test_recordings_arrive(site: Site) -> None:
    """Every recorded session arrives byte for byte within a minute or so, in fewer requests than the key has in one."""
    recordings = [read_recording(path) for path in sorted(RECORDINGS.glob("*.jsonl.zst"))]
    batches = [batch for recording in recordings for batch in recording]
    assert (len(recordings), len(batches)) == (17, 124)
    await site.start_sandbox("--requests-per-minute", "100")
    await site.start_relay({"budget": {"requests_per_minute": 100}})

    async def play(recording: list[Batch]) -> None:
        async with site.sdk() as sdk:
            for batch in recording:
                await sdk.post(batch)

    async with trio.open_nursery() as nursery:
        for recording in recordings:
            nursery.start_soon(play, recording)
    await assert_accounted(site, seconds=90)  # the second half of a budget is paced over its minute
    report = await site.sandbox.report()
    assert Counter(report["responses"]) == {"200": report["requests"]}
    assert report["requests"] < len(batches)
