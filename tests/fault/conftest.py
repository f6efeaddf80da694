from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.system.daemon import Site, open_site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """Give a directory to start a sandbox and relays in; all of them end with the test."""
    async with open_site(tmp_path) as opened:
        yield opened
