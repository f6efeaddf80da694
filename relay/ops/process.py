"""What the process itself costs."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import msgspec
import structlog

from relay.config import Config

_OTHER_FILES = 256
"""What is open beside connections of clients and to upstream: spool, log, listeners, the admin listener's connections,
name look-ups, and up to 128 connections that are being told that they are too many."""

log = structlog.get_logger()


class ProcessStatistics(msgspec.Struct, frozen=True):
    """The process as the operating system sees it."""

    resident_bytes: int
    """Memory; 0 where the system has no /proc to tell."""
    open_files: int
    """File descriptors; 0 likewise."""
    started_at: float
    """Wall clock of the start."""


def process_statistics(started_at: float) -> ProcessStatistics:
    """Read the process's memory and descriptors."""
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    except OSError:
        resident_pages = open_files = 0
    return ProcessStatistics(resident_pages * os.sysconf("SC_PAGE_SIZE"), open_files, started_at)


def allow_open_files(config: Config) -> Config:
    """Let the process have as many open files as the configuration may need, or the configuration need fewer.

    Without a descriptor left, nothing works: no probe of the supervisor's is answered, no connection to upstream made.
    So where the system's hard limit is too low, `listen.max_connections` gives way, and the log says so.

    Returns:
        The configuration to run with.
    """
    others = config.forward.max_in_flight + config.upstream.max_idle_connections + _OTHER_FILES
    allowed = _raise_limit(config.listen.max_connections + others)
    max_connections = min(config.listen.max_connections, max(1, allowed - others))
    if max_connections == config.listen.max_connections:
        return config
    log.warning(
        "fewer connections than configured: raise the limit of open files",
        max_connections=max_connections,
        configured=config.listen.max_connections,
        open_files=allowed,
    )
    listen = msgspec.structs.replace(config.listen, max_connections=max_connections)
    return msgspec.structs.replace(config, listen=listen)


def _raise_limit(wanted: int) -> int:
    """Raise the soft limit of open files as far as wanted and allowed; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):  # macOS has a lower limit of its own beside an unlimited hard one
        return soft
    return raised
