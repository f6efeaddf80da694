"""lucent-relay: a durable ingest relay for rrweb session replays."""

__version__ = "0.1.0"
