"""Small file systems, for what happens when they are full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
"""Marks a test that uses `mounted`. Root in a container often may not either: that is found when it tries."""


@contextmanager
def mounted(path: Path, size_bytes: int) -> Iterator[Path]:
    """Give a file system of a size, in a directory that is made for it."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
    if ended.returncode and "permission denied" in ended.stderr:
        pytest.skip(f"nobody may mount a file system here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def free_bytes(path: Path) -> int:
    """Return what is free on a path's file system."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def fill_up(path: Path) -> None:
    """Make a file of all that is free on its file system."""
    with path.open("wb") as others:
        os.posix_fallocate(others.fileno(), 0, free_bytes(path.parent))
