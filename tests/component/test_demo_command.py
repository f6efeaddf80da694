from __future__ import annotations

import argparse
import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from relay.demo.audit import Result
from relay.demo.command import MAX_SESSIONS, SESSIONS, add_arguments, perform
from relay.demo.display import LINE_SECONDS, LineDisplay, Progress, draw, open_display, print_result
from relay.demo.player import Player
from relay.demo.session import load_recordings, recut
from tests.component.test_demo_session import recorded

RESULT = Result(
    exactly_once=True,
    problems=[],
    sessions=17,
    recorded_batches=124,
    events_accepted=12_564,
    events_delivered=12_564,
    events_lost=0,
    events_duplicated=0,
    events_foreign=0,
    events_misordered=0,
    client_requests=835,
    upstream_requests=86,
    rate_limited=0,
    bytes_in_wire=5_204_564,
    bytes_in_json=33_627_268,
    bytes_out=4_906_178,
    bytes_out_json=33_153_978,
    budget_minutes_direct=8.35,
    budget_minutes_relay=0.86,
    seconds=18.2,
    data_readers=10,
    data_answers=10,
    data_upstream_requests=1,
    newest_issue="The cart jumps while it loads",
)

PROGRESS = Progress(
    seconds=0.0,
    batches=835,
    batches_sent=100,
    events=12_564,
    events_accepted=2_000,
    events_delivered=1_000,
    upstream_requests=20,
    budget=100,
    budget_used=20,
    relay_url="http://127.0.0.1:1",
    admin_url="http://127.0.0.1:2",
)


class RecordingDisplay:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[Progress] = []

    def show(self, progress: Progress) -> None:
        """Keep it."""
        self.shown.append(progress)


def parse(*words: str) -> argparse.Namespace:
    """Parse a command line."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def printed(result: Result) -> str:
    """Return what is printed of a result."""
    stream = io.StringIO()
    print_result(result, 10.0, stream)
    return stream.getvalue()


def test_the_default_is_every_recording_once() -> None:
    """Without options each recording is played once."""
    assert parse().sessions == SESSIONS == len(load_recordings())


@pytest.mark.parametrize(
    "words",
    [
        *(("--sessions", text) for text in ("0", "-1", "1.5", "x", str(MAX_SESSIONS + 1))),
        *((option, text) for option in ("--speed", "--timeout") for text in ("0", "-1", "nan", "inf", "x")),
    ],
)
def test_options_out_of_bounds_are_usage(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be played is a mistake on the command line, which the parser explains."""
    with pytest.raises(SystemExit):
        parse(*words)
    assert f"argument {words[0]}: {words[1]!r} is not a number" in capsys.readouterr().err


async def test_a_short_session_adds_up(tmp_path: Path) -> None:
    """A session of its own, through real sockets and a real spool, is upstream exactly once."""
    session = recut([recorded("w1", [(1, 10)] * 50), recorded("w2", [(2, 10)] * 5, flush="final")])
    display = RecordingDisplay()
    result = await perform(Player([session], 3, speed=1.0), str(tmp_path), 300, display)
    assert (result.exactly_once, result.problems) == (True, [])
    assert (result.sessions, result.events_accepted, result.events_delivered) == (3, 165, 165)
    # Of each session one batch a window, since the final is there before the wait for company is over.
    assert (result.client_requests, result.upstream_requests) == (12, 6)
    assert display.shown[-1].events_delivered == 165
    assert (result.data_readers, result.data_answers, result.data_upstream_requests) == (10, 10, 1)
    assert result.newest_issue.startswith("The ")


async def test_time_that_is_up_ends_it_with_what_is_missing(tmp_path: Path) -> None:
    """A demo that cannot end in time says what was not sent."""
    session = recut([recorded("w", [(1, 10), (2_000_000, 10)])])
    result = await perform(Player([session], 1, speed=1.0), str(tmp_path), 0.2, RecordingDisplay())
    assert not result.exactly_once
    assert result.problems == ["1 of 1 client batches were not accepted in time"]
    assert (result.events_accepted, result.events_delivered, result.events_lost) == (0, 0, 0)


def test_a_good_result_fits_one_screen() -> None:
    """Table, verdict and next steps have 80 columns and 24 lines, and the figures are the result's."""
    text = printed(RESULT)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert len(text.splitlines()) <= 24
    for figure in ("12,564 accepted", "12,564 delivered", "835", "86", "8.35", "0.86", "5,204,564", "124 batches"):
        assert figure in text
    assert "It adds up: all 12,564 events are upstream exactly once" in text
    assert "make run" in text


def test_only_haste_needs_an_explanation() -> None:
    """At the recorded pace there is no word of how much the relay's wait spans."""
    stream = io.StringIO()
    print_result(RESULT, 1.0, stream)
    assert stream.getvalue().startswith("17 recorded sessions, as fast as recorded, in 18 s.")
    assert "At this speed" not in stream.getvalue()
    assert "span 50 s of a" in printed(RESULT)


def test_a_bad_result_names_every_problem() -> None:
    """Where it does not add up, the verdict is no and each reason stands on a line of its own, as it is."""
    problems = ["3 events are lost", "the last answer was [bold]503[/bold]"]
    text = printed(msgspec.structs.replace(RESULT, exactly_once=False, problems=problems))
    assert "It does not add up:\n- 3 events are lost\n- the last answer was [bold]503[/bold]\n" in text
    assert "It adds up" not in text


def test_lines_are_few() -> None:
    """Where there is no terminal, progress is a plain line now and then."""
    stream = io.StringIO()
    with open_display(stream) as display:
        assert isinstance(display, LineDisplay)
        for tenth in range(60):
            display.show(msgspec.structs.replace(PROGRESS, seconds=tenth / 10))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6 / LINE_SECONDS
    assert lines[0] == (
        "   0 s  100 of 835 client batches, 2,000 events accepted, "
        "1,000 delivered in 20 requests (20 of 100 this minute)"
    )


@pytest.mark.parametrize(
    ("sent", "used", "words"),
    [(100, 20, "the sessions play"), (835, 20, "delivers the rest"), (100, 100, "the key's minute is spent")],
)
def test_the_bars_say_what_is_going_on(sent: int, used: int, words: str) -> None:
    """On a terminal there are four bars, where to look, and what is being waited for; no line is wrapped."""
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(draw(msgspec.structs.replace(PROGRESS, batches_sent=sent, budget_used=used)))
    text = console.export_text()
    assert len(text.splitlines()) == 7
    assert words in text
    assert "http://127.0.0.1:2" in text
