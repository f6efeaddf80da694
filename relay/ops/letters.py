"""`lucent-relay spool dead-letters`: look at what upstream refused for good, keep it, send it again, or drop it.

Looking reads the database, whether or not a relay runs. Changing is the running relay's to do, asked on its admin
listener; where none runs it is done here, under the directory's lock.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import msgspec

from relay.config import Config
from relay.errors import SpoolLocked
from relay.ops.inquiry import Unreachable, order
from relay.protocol.codings import zstd_compress
from relay.spool.dead_letters import read_content, read_letter, read_letters
from relay.spool.values import LAST_ID, DeadLetter
from relay.spool.visit import move_dead_letters, reading

_FRAME_BYTES = 4_194_304
"""Of an export, compressed at a time."""

_ANSWER_CHARACTERS = 60
"""Of upstream's answer, in the list."""

_COLUMNS = ("id", "died", "key", "session", "events", "bytes", "status", "answer")


class Failure(msgspec.Struct, frozen=True):
    """What was asked for cannot be done."""

    reason: str
    """What to tell the operator."""
    lines: tuple[str, ...] = ()
    """What was found all the same."""


def add_arguments(
    parts: argparse._SubParsersAction[argparse.ArgumentParser], add_source: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Declare the command's own commands.

    Args:
        parts: Of `spool`.
        add_source: Declares where the configuration comes from.
    """
    summary = "List, export, send again or drop what upstream refused for good."
    letters = parts.add_parser("dead-letters", help=summary, description=summary)
    actions = letters.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)

    def declare(name: str, summary: str) -> argparse.ArgumentParser:
        declared = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_source(declared)
        return declared

    listing = declare("list", "List them, the oldest first.")
    listing.add_argument("--json", action="store_true", help="print one JSON object a line")
    declare("show", "Print one with its batch, as JSON.").add_argument("id", type=_letter_id)
    export = declare("export", "Write all of them, with their batches and upstream's answers, as zstd JSONL.")
    export.add_argument("file", help="a new file, or - for standard output")
    for name, summary in (("resend", "Send them to upstream again."), ("purge", "Drop them for good.")):
        which = declare(name, summary).add_mutually_exclusive_group(required=True)
        which.add_argument("ids", metavar="ID", type=_letter_id, nargs="*", default=[])
        which.add_argument("--all", action="store_true", help="all of them")


def _letter_id(word: str) -> int:
    letter_id = int(word)
    if not 0 <= letter_id <= LAST_ID:
        raise argparse.ArgumentTypeError(f"no dead letter can have the id {word}")
    return letter_id


def run(arguments: argparse.Namespace, config: Config) -> Iterator[str] | Failure:
    """Carry out the command; returns what to print, or why it cannot be done."""
    match arguments.action:
        case "list":
            return list_letters(config, as_json=arguments.json)
        case "show":
            return show_letter(config, arguments.id)
        case "export":
            return export_letters(config, arguments.file)
        case action:
            return move_letters(config, action, None if arguments.all else arguments.ids)


def list_letters(config: Config, *, as_json: bool) -> Iterator[str]:
    """Yield the lines of the list."""
    with reading(config.spool.directory) as reader:
        letters = list(read_letters(reader))
    if as_json:
        yield from (msgspec.json.encode(letter).decode() for letter in letters)
        return
    rows = [_COLUMNS, *map(_row, letters)] if letters else []
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))] if rows else []
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"{len(letters)} dead letters, {sum(letter.events for letter in letters)} events"


def _row(letter: DeadLetter) -> tuple[str, ...]:
    died = datetime.fromtimestamp(letter.died_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    answer = _printable(letter.answer)[:_ANSWER_CHARACTERS]
    counts = (str(letter.events), str(letter.bytes), str(letter.status))
    return (str(letter.id), died, letter.key, _printable(letter.session), *counts, answer)


def _printable(text: str) -> str:
    """Return a text that comes from outside without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def show_letter(config: Config, letter_id: int) -> Iterator[str] | Failure:
    """Return a dead letter's record, as `export_letters` writes it."""
    with reading(config.spool.directory) as reader:
        letter = read_letter(reader, letter_id)
        content = None if letter is None else read_content(reader, letter)
    if letter is None or content is None:
        return Failure(f"there is no dead letter {letter_id}")
    return iter([_record(letter, content).decode("utf-8", "replace")])


def _record(letter: DeadLetter, content: bytes) -> bytes:
    """Return what there is to say of a dead letter and, byte for byte, its batch as one JSON object."""
    name = b"deflated" if letter.is_damaged else b"batch"
    return b'%b,"%b":%b}' % (msgspec.json.encode(letter)[:-1], name, content)


def export_letters(config: Config, name: str) -> Iterator[str] | Failure:
    """Write all dead letters, one record a line, to a file that nobody else may read."""
    if name == "-":
        _export(config, sys.stdout.buffer)
        return iter(())
    path = Path(name)
    try:
        target = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
    except OSError as error:
        return Failure(f"{path} cannot be made: {error.strerror}")
    try:
        with closing(target):
            count = _export(config, target)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        return Failure(f"{path} cannot be written: {error.strerror}")
    return iter([f"{count} dead letters exported to {path}"])


def _export(config: Config, target: IO[bytes]) -> int:
    count = 0
    lines = bytearray()
    with reading(config.spool.directory) as reader:
        for letter in read_letters(reader):
            content = read_content(reader, letter)
            if content is None:  # it has gone meanwhile
                continue
            lines += _record(letter, content).replace(b"\n", b" ") + b"\n"  # between tokens: JSON's strings have none
            count += 1
            if len(lines) >= _FRAME_BYTES:
                target.write(zstd_compress(bytes(lines)))
                lines.clear()
    target.write(zstd_compress(bytes(lines)))
    return count


def move_letters(config: Config, action: str, ids: list[int] | None) -> Iterator[str] | Failure:
    """Send dead letters again, or drop them: by the relay that runs, or here."""
    try:
        moved = move_dead_letters(config.spool, "resend" if action == "resend" else "purge", ids)
        letters, events = moved.letters, moved.events
    except SpoolLocked:
        outcome = order(config.listen.admin, f"/dead-letters/{action}", {"ids": ids})
        if isinstance(outcome, Unreachable):
            return Failure(f"a relay has the spool open, but does not answer: {outcome.reason}")
        if outcome.status != 200:
            return Failure(f"the relay refuses: {outcome.value.get('error', outcome.status)}")
        letters, events = outcome.value["letters"], outcome.value["events"]
    if ids is not None and letters < len(set(ids)):
        return Failure(f"{letters} of {len(set(ids))} moved: the others are no dead letters, no longer, or damaged")
    return iter([f"{letters} dead letters, {events} events {'to be sent again' if action == 'resend' else 'purged'}"])
