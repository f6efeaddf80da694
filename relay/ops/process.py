"""What the process itself costs."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


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
