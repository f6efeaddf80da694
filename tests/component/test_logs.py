from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from relay.config import Log
from relay.ops.logs import (
    MAX_REPEATED_EVENTS,
    MAX_REPEATS,
    PERIOD_SECONDS,
    RepeatFilter,
    configure_logging,
    mask_secrets,
    render_json,
    render_logfmt,
)
from relay.protocol.fingerprint import fingerprint

KEY = "luc_pk_4f9a2b7c"


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Leave the process's logging as it was."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.level, root.handlers = level, handlers
    structlog.reset_defaults()


@pytest.fixture
def logged() -> Callable[..., Callable[[], list[str]]]:
    """Configure logging to memory, and return what reads the lines."""

    def configure(**settings: Any) -> Callable[[], list[str]]:
        stream = io.StringIO()
        configure_logging(Log(**settings), stream)
        return lambda: stream.getvalue().splitlines()

    return configure


def test_logfmt_line(logged: Callable[..., Callable[[], list[str]]]) -> None:
    """A line is time in UTC, level, event and values, quoted where they would not stand alone."""
    lines = logged()
    structlog.get_logger().info("relay started", port=8787, url="http://a/?b=c", ok=True, none=None, path="a\nb")
    (line,) = lines()
    stamp, rest = line.split(" ", 1)
    assert stamp.startswith("timestamp=2")
    assert stamp.endswith("Z")
    assert rest == r'level=info event="relay started" port=8787 url="http://a/?b=c" ok=true none= path="a\nb"'


def test_json_line(logged: Callable[..., Callable[[], list[str]]]) -> None:
    """With format json a line is one object with the same members."""
    lines = logged(format="json")
    structlog.get_logger().warning("spool full", used_bytes=5, nested={"keys": [KEY, b"x"]})
    (line,) = lines()
    value = orjson.loads(line)
    assert list(value)[:3] == ["timestamp", "level", "event"]
    assert (value["level"], value["event"], value["used_bytes"]) == ("warning", "spool full", 5)
    assert value["nested"] == {"keys": [fingerprint(KEY), "x"]}


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_level_filters(level: str, expected: int, logged: Callable[..., Callable[[], list[str]]]) -> None:
    """What is below the configured level is not written."""
    lines = logged(level=level)
    log = structlog.get_logger()
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)("happened")
    assert len(lines()) == expected


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_traceback_is_kept_and_masked(form: str, logged: Callable[..., Callable[[], list[str]]]) -> None:
    """An exception is a field of JSON or follows the line of logfmt, without the keys in its message."""
    lines = logged(format=form)
    try:
        raise ValueError(KEY)
    except ValueError:
        structlog.get_logger().exception("attempt failed", key=KEY)
    text = "\n".join(lines())
    assert KEY not in text
    assert f"ValueError: {fingerprint(KEY)}" in text
    assert len(lines()) == 1 if form == "json" else lines()[-1].startswith("ValueError")


def test_library_records_come_out_alike(logged: Callable[..., Callable[[], list[str]]]) -> None:
    """Warnings of libraries that use the standard logging are lines like ours; their chatter is not."""
    lines = logged(level="debug")
    logging.getLogger("some.library").warning("refused %s", KEY)
    logging.getLogger("some.library").info("chatter")
    (line,) = lines()
    assert 'level=warning event="library message" logger=some.library' in line
    assert f'message="refused {fingerprint(KEY)}"' in line


def test_broken_stream_loses_lines_only() -> None:
    """A standard error that cannot be written to never fails whoever logs."""

    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            """Refuse, as a full disk does."""
            raise OSError(28, "No space left on device")

    configure_logging(Log(), Full())
    structlog.get_logger().error("still alive")
    closed = io.StringIO()
    closed.close()
    configure_logging(Log(), closed)
    structlog.get_logger().error("still alive")


# --- repeats -------------------------------------------------------------------------------------------------


class FakeClock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """Return what time it is."""
        return self.now


def passes(repeats: RepeatFilter, method: str = "warning", event: str = "retry") -> dict[str, Any] | None:
    """Log once; return what is written, None where nothing is."""
    try:
        return dict(repeats(None, method, {"event": event}))
    except structlog.DropEvent:
        return None


def test_repeats_are_counted_and_then_told() -> None:
    """After five lines of one event in ten seconds the rest is counted, and the next line has the count."""
    clock = FakeClock()
    repeats = RepeatFilter(clock)
    written = [passes(repeats) for _ in range(MAX_REPEATS + 7)]
    assert written == [{"event": "retry"}] * MAX_REPEATS + [None] * 7
    assert passes(repeats, event="other") == {"event": "other"}
    assert passes(repeats, method="error") == {"event": "retry"}
    clock.now += PERIOD_SECONDS
    assert passes(repeats) == {"event": "retry", "suppressed": 7}
    assert passes(repeats) == {"event": "retry"}


def test_lifecycle_is_never_suppressed() -> None:
    """Levels below warning are always written."""
    repeats = RepeatFilter(FakeClock())
    assert all(passes(repeats, method=method) for method in ("debug", "info") for _ in range(50))


def test_clock_set_back_ends_the_period() -> None:
    """Suppression does not last until a clock that was set back has caught up."""
    clock = FakeClock()
    repeats = RepeatFilter(clock)
    written = [passes(repeats) for _ in range(MAX_REPEATS + 1)]
    clock.now -= 500
    assert written[-1] is None
    assert passes(repeats) == {"event": "retry", "suppressed": 1}


def test_remembered_events_are_bounded() -> None:
    """However many different events there are, the memory of them does not grow."""
    repeats = RepeatFilter(FakeClock())
    for number in range(MAX_REPEATED_EVENTS * 2):
        passes(repeats, event=f"event {number}")
    assert len(repeats._repeats) == MAX_REPEATED_EVENTS


# --- rendering -----------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from("abc"), values))
def test_any_value_is_one_line_without_keys(fields: dict[str, Any]) -> None:
    """Whatever values an event has, both formats make one printable line of it, and no key survives."""
    event = {"event": f"with {KEY}", "key": [KEY.encode()], **fields}
    for render in (render_logfmt, render_json):
        line = render(None, "info", mask_secrets(None, "info", event))
        assert KEY not in line
        assert len(line.splitlines()) == 1
        assert "\x1b" not in line
