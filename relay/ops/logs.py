"""Logs: structured lines on standard error.

Rules:
1. A line has the time, the level, the name of the event, then `key=value`; as logfmt, or as one JSON object.
2. Nothing that looks like a key or token is written; its fingerprint is.
3. A warning or error that repeats is written a few times in a while, then counted; the count is on the next line.
4. Logging never fails: a standard error that cannot be written to loses lines, not batches.

Records of the standard library's logging, which libraries use, come out the same way.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, WrappedLogger

from relay.clock import wall_clock
from relay.config import Log
from relay.protocol.fingerprint import redact

MAX_REPEATS = 5
"""Lines of one event within a period that are written: enough to see that it repeats, and with which values."""

PERIOD_SECONDS = 10.0
"""After it a repeated event may be written again: six summaries a minute show whether trouble lasts."""

MAX_REPEATED_EVENTS = 256
"""Events whose repeats are counted at a time. Names are literals in the code, which has far fewer."""

HEAD = ("timestamp", "level", "event")
"""What a line begins with."""


def configure_logging(settings: Log, stream: TextIO | None = None) -> None:
    """Make structlog, and the standard library's logging, write as the settings say.

    Args:
        settings: Level and format.
        stream: Where lines go; None for standard error.

    Concurrency:
        Lines may be logged from any thread afterwards.
    """
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            RepeatFilter(wall_clock),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            mask_secrets,
            render_json if settings.format == "json" else render_logfmt,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=LineLogger.factory(sys.stderr if stream is None else stream),
        # A module's logger is made once and must follow when a test configures anew.
        cache_logger_on_first_use=False,
    )
    # Libraries' own lifecycle chatter is not the relay's; what they warn of is.
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[LibraryHandler()], force=True)


class LineLogger:
    """Writes finished lines to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    @classmethod
    def factory(cls, stream: TextIO) -> Callable[..., LineLogger]:
        """Return what structlog asks for a logger: always the same one."""
        logger = cls(stream)
        return lambda *_: logger

    def msg(self, line: str) -> None:
        """Write one line. A stream that is closed or full loses it: there is nobody left to tell."""
        try:
            with self._lock:
                self._stream.write(f"{line}\n")
                self._stream.flush()
        except (OSError, ValueError):
            pass

    debug = info = warning = error = critical = msg


class LibraryHandler(logging.Handler):
    """Hands the standard library's records to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record."""
        log = structlog.get_logger()
        # The level of a library may be any number; below the named ones is a matter of taste.
        level = min(record.levelno // 10 * 10, logging.CRITICAL) or logging.DEBUG
        log.log(level, "library message", logger=record.name, message=record.getMessage(), exc_info=record.exc_info)


class Repeats(msgspec.Struct):
    """How often an event came lately."""

    since: float
    """When its period began."""
    count: int = 0
    """Times in this period."""
    suppressed: int = 0
    """Times that were not written since it last was."""


class RepeatFilter:
    """Lets a warning or error through a few times in a period, and counts the rest.

    Repeats are told by level and name alone: the values of a thousand failing sessions all differ.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._repeats: OrderedDict[tuple[str, str], Repeats] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, _logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        """Return the event, with `suppressed` where some before it were not written.

        Raises:
            structlog.DropEvent: This one is not written either.
        """
        if method in ("debug", "info"):
            return event
        with self._lock:
            suppressed = self._count((method, str(event.get("event"))))
        if suppressed is None:
            raise structlog.DropEvent
        if suppressed:
            event["suppressed"] = suppressed
        return event

    def _count(self, key: tuple[str, str]) -> int | None:
        """Count one event; return how many before it were not written, or None where it is not to be either."""
        now = self._now()
        repeats = self._repeats.setdefault(key, Repeats(now))
        self._repeats.move_to_end(key)
        if len(self._repeats) > MAX_REPEATED_EVENTS:
            self._repeats.popitem(last=False)
        # A clock that was set back would otherwise suppress until it has caught up.
        if not 0 <= now - repeats.since < PERIOD_SECONDS:
            repeats.since, repeats.count = now, 0
        repeats.count += 1
        if repeats.count > MAX_REPEATS:
            repeats.suppressed += 1
            return None
        suppressed, repeats.suppressed = repeats.suppressed, 0
        return suppressed


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Return the event with every key and token in it, however deep, replaced by its fingerprint."""
    return {key: _masked(value) for key, value in event.items()}


def _masked(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return str(value)  # JSON has no number for it
        case None | bool() | int() | float():
            return value
        case str():
            return redact(value)
        case bytes() | bytearray():
            return redact(value.decode("utf-8", "backslashreplace"))
        case Mapping():
            return {redact(str(key)): _masked(member) for key, member in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_masked(member) for member in value]
        case _:
            return redact(str(value))


def render_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """Return the event as one line of JSON; a traceback is the member `exception`."""
    ordered = {**{key: event[key] for key in HEAD if key in event}, **event}
    # The standard library's encoder, unlike orjson, has a form for every integer and for broken UTF-8.
    return json.dumps(ordered)


def render_logfmt(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """Return the event as one line of logfmt; a traceback follows on lines of its own."""
    traceback = event.pop("exception", None)
    ordered = {**{key: event[key] for key in HEAD if key in event}, **event}
    line = " ".join(f"{key}={_logfmt_value(value)}" for key, value in ordered.items())
    return line if traceback is None else f"{line}\n{traceback}"


def _logfmt_value(value: Any) -> str:
    """Return a value, in quotes where it would not stand alone; what a client sent cannot break the line."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case list() | dict():
            return _logfmt_value(json.dumps(value))
        case _:
            text = str(value)
    if text and text.isprintable() and not set(text) & set(' "=\\'):
        return text
    quoted = "".join(_escaped(character) for character in text)
    return f'"{quoted}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else character.encode("unicode_escape").decode()
