"""Settings of the unit tier: Hypothesis without its clock, since no test here asserts a duration."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("relay", deadline=None)
settings.load_profile("relay")
