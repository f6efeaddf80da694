from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon import Site, open_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Give a directory to start a sandbox and relays in; all of them end with the test."""
    with open_site(tmp_path) as opened:
        yield opened
