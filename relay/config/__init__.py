"""The options: what an operator may set, the default of each option and the reason for it.

A section is a component, an option a noun with its unit. Each option is one field of a section's class: its type
carries the bounds, its description the reason for the default. A test holds `config/relay.toml` and the table in
README.md against them.

Reading, checking and printing a configuration is `relay.settings`. msgspec holds bounds on decoding only: a section
built in code is taken at its word.
"""

from __future__ import annotations

from relay.config.clients import Intake, Keys, Listen
from relay.config.data_api import DataApi
from relay.config.delivery import Batch, Budget, Forward, Upstream
from relay.config.process import Log, Shutdown
from relay.config.section import Section
from relay.config.spool import Spool

__all__ = [
    "Batch",
    "Budget",
    "Config",
    "DataApi",
    "Forward",
    "Intake",
    "Keys",
    "Listen",
    "Log",
    "Section",
    "Shutdown",
    "Spool",
    "Upstream",
]


class Config(Section, frozen=True):
    """All sections. Every option has a default, so an empty file is a valid configuration."""

    listen: Listen = Listen()
    intake: Intake = Intake()
    keys: Keys = Keys()
    upstream: Upstream = Upstream()
    batch: Batch = Batch()
    budget: Budget = Budget()
    forward: Forward = Forward()
    data_api: DataApi = DataApi()
    spool: Spool = Spool()
    log: Log = Log()
    shutdown: Shutdown = Shutdown()
