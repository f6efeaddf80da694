"""How the command ends: every exit status, and what it means to whoever started it.

From 64 up they are those of BSD's sysexits.h where one fits, so that a service manager can tell a mistake in
the configuration, which a restart cannot cure, from trouble that may pass.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """An exit status of `lucent-relay`, with its meaning."""

    meaning: str
    """For the table in README.md."""

    def __new__(cls, value: int, meaning: str) -> Self:
        """Make a member that compares as its number."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "Done, or stopped as asked."
    NEGATIVE = (
        1,
        "The verdict is no: the demo did not add up, the relay is not ready, the spool is damaged, or what was named "
        "is not there.",
    )
    USAGE = 2, "The command line is wrong."
    INTERNAL = 70, "A mistake in the relay itself; the traceback is on standard error."
    CANNOT_LISTEN = 71, "An address cannot be listened on: in use, not this machine's, or no permission."
    SPOOL = 73, "The spool cannot be opened: locked by another relay, of another version, damaged, or not writable."
    CONFIGURATION = 78, "The configuration cannot be used; each problem is on a line of standard error."
    INTERRUPTED = 130, "Ended by Ctrl-C in a command that has nothing to finish (128 + SIGINT, as shells say it)."
