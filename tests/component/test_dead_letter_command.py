"""`lucent-relay spool dead-letters` on a directory that no relay has open."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.cli import main
from relay.protocol.codings import zstd_decompress
from relay.protocol.fingerprint import fingerprint
from relay.spool import schema
from relay.spool.store import Store
from tests.component.batches import KEY, LIMITS, make_batch, make_body, make_event
from tests.loopback import refusing_address

Command = Callable[..., tuple[int, str, str]]
"""Runs an action; returns exit status, standard output and standard error."""

EVENTS = [make_event(f"e{number}") for number in range(3)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A spool with three dead letters of one event each, the last of which ends its session."""
    store = Store(schema.open_database(tmp_path / schema.DATABASE_NAME, "os"), LIMITS, 10)
    for number, event in enumerate(EVENTS):
        body = make_body(f"s{number}\x1b[2J", "w", 5, [event], flush="final" if number == 2 else "")
        [appended] = store.transact([lambda body=body: store.append(make_batch(body))])  # type: ignore[misc]
        [load] = store.transact([lambda appended=appended: store.seal(appended.window_id, 0.0)])  # type: ignore[misc]
        store.transact(
            [lambda load=load: store.refuse(load.batch.batch_id, "alone", 422, '{"error":"no"}', 1e9, 1 << 20)]  # type: ignore[misc]
        )
    store.close()
    return tmp_path


@pytest.fixture
def command(directory: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run an action on that spool."""

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["spool", "dead-letters", *words, "--set", f"spool.directory={directory}"])
        return int(status), *capfd.readouterr()

    return run


def counters(directory: Path) -> tuple[int, int, int]:
    """Return how many events are pending, dead and purged."""
    connection = schema.open_reader(directory / schema.DATABASE_NAME)
    try:
        pending = connection.execute("SELECT count(*) FROM segment WHERE batch_id IS NULL").get
        dead = connection.execute("SELECT count(*) FROM dead_letter").get
        return pending, dead, connection.execute("SELECT value FROM counter WHERE name = 'purged'").get
    finally:
        connection.close()


def test_list_is_for_people(command: Command) -> None:
    """A line each with what there is to say, no key in the clear, and nothing that a terminal obeys."""
    status, out, _ = command("list")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].split() == ["id", "died", "key", "session", "events", "bytes", "status", "answer"]
    assert lines[1].split()[:4] == ["1", "2001-09-09T01:46:40Z", fingerprint(KEY), "s0?[2J"]
    assert lines[1].endswith('422     {"error":"no"}')
    assert lines[-1] == "3 dead letters, 3 events"
    assert KEY not in out


def test_list_is_for_programs(command: Command) -> None:
    """`--json` prints an object a line."""
    letters = [json.loads(line) for line in command("list", "--json")[1].splitlines()]
    assert [letter["id"] for letter in letters] == [1, 2, 3]
    assert [letter["is_final"] for letter in letters] == [False, False, True]


def test_show_prints_the_batch_that_was_refused(command: Command) -> None:
    """It has upstream's answer, and the batch under the number it bore."""
    status, out, _ = command("show", "3")
    record: dict[str, Any] = json.loads(out)
    assert (status, record["status"], record["answer"]) == (0, 422, '{"error":"no"}')
    assert record["batch"]["replay"] == {"events": [json.loads(EVENTS[2])], "sequence": 5 * 16_384}
    assert record["batch"]["flush"] == "final"
    assert EVENTS[2].decode() in out


def test_export_writes_what_show_prints(command: Command, directory: Path) -> None:
    """A zstd file of one record a line, for its owner only, and never over another file."""
    target = directory / "letters.jsonl.zst"
    assert command("export", str(target))[:2] == (0, f"3 dead letters exported to {target}\n")
    lines = zstd_decompress(target.read_bytes()).splitlines(keepends=True)
    assert [line.decode() for line in lines] == [command("show", str(number))[1] for number in (1, 2, 3)]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert command("export", str(target)) == (1, "", f"{target} cannot be made: File exists\n")
    status, _, problem = command("export", str(directory / "no" / "where"))
    assert (status, problem.endswith("No such file or directory\n")) == (1, True)


def test_resend_and_purge_without_a_relay(command: Command, directory: Path) -> None:
    """They act on the directory itself, and the account stays balanced."""
    assert command("resend", "1") == (0, "1 dead letters, 1 events to be sent again\n", "")
    assert counters(directory) == (1, 2, 0)
    assert command("purge", "--all") == (0, "2 dead letters, 2 events purged\n", "")
    assert counters(directory) == (1, 0, 2)
    assert command("list")[1] == "0 dead letters, 0 events\n"


@pytest.mark.parametrize("action", ["resend", "purge"])
def test_what_is_not_there_is_said(command: Command, action: str) -> None:
    """Ids that name no dead letter are counted against the command; the others are moved."""
    assert command(action, "1", "1", "9") == (
        1,
        "",
        "1 of 2 moved: the others are no dead letters, no longer, or damaged\n",
    )
    assert command("show", "1") == (1, "", "there is no dead letter 1\n")


@pytest.mark.parametrize("action", ["resend", "purge"])
def test_which_must_be_said(command: Command, action: str) -> None:
    """Neither ids nor `--all`, and both, are mistakes on the command line."""
    for words in ([], ["1", "--all"]):
        with pytest.raises(SystemExit) as ended:
            command(action, *words)
        assert ended.value.code == 2


@pytest.mark.parametrize("action", ["show", "resend", "purge"])
@pytest.mark.parametrize("word", ["one", "9223372036854775808"])
def test_id_that_none_can_have_is_a_mistake(command: Command, directory: Path, action: str, word: str) -> None:
    """An id that is no number, or beyond all that there are, is said to be a mistake, and none of the relay's."""
    with pytest.raises(SystemExit) as ended:
        command(action, word)
    assert ended.value.code == 2
    assert counters(directory) == (0, 3, 0)


def test_locked_directory_leads_to_its_relay(command: Command, directory: Path) -> None:
    """Where the directory is in use, and nobody answers, nothing is changed and both are said."""
    lock = schema.lock_directory(directory)
    try:
        with refusing_address() as nobody:
            status, _, problem = command("purge", "--all", "--set", f"listen.admin={nobody}")
        assert status == 1
        assert problem.startswith("a relay has the spool open, but does not answer: no relay answers at ")
        assert len(command("list")[1].splitlines()) == 5, "reading goes on beside it"
    finally:
        os.close(lock)
    assert counters(directory) == (0, 3, 0)


@pytest.mark.parametrize("words", [["list"], ["show", "1"], ["export", "-"], ["purge", "--all"], ["resend", "1"]])
def test_no_spool_is_a_spool_problem(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    """Where there is none, none is made."""
    nowhere = tmp_path / "nowhere"
    assert main(["spool", "dead-letters", *words, "--set", f"spool.directory={nowhere}"]) == 73
    assert capfd.readouterr().err == f"there is no spool in {nowhere} (spool.directory)\n"
    assert not nowhere.exists()
