"""Settings of all tiers: Hypothesis without its clocks, and repeatable in CI.

No test asserts a duration, and a busy machine is no failure; so Hypothesis neither times an example nor finds fault
with how long it took to make. In CI every run draws the same examples: new ones are looked for at a desk, where
somebody can look at what they find.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "relay", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("relay")
