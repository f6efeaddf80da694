from __future__ import annotations

from tests.system.conftest import site

__all__ = ["site"]
