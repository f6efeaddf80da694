"""How a start fails: by its own exit status, with a message that says what to do, and no traceback."""

from __future__ import annotations

import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.system.daemon import Site

pytestmark = pytest.mark.slow

ANYWHERE = ["--set", "listen.relay=127.0.0.1:0", "--set", "listen.admin=127.0.0.1:0"]

CANNOT_LISTEN, SPOOL, CONFIGURATION = 71, 73, 78


async def assert_refused(site: Site, status: int, *messages: str, words: list[str]) -> None:
    """Assert that `run` ends by a status and says something."""
    ended = await site.run("run", *words)
    said = ended.stderr.decode()
    assert (ended.returncode, ended.stdout) == (status, b""), said
    assert "Traceback" not in said
    for message in messages:
        assert message in said


@pytest.mark.parametrize("option", ["listen.relay", "listen.admin"])
async def test_address_in_use(site: Site, option: str) -> None:
    """An address that is taken is named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        await assert_refused(
            site,
            CANNOT_LISTEN,
            f"cannot listen on {address}",
            "already in use",
            words=[*ANYWHERE, "--set", f"{option}={address}"],
        )


async def test_spool_is_in_use(site: Site) -> None:
    """A spool directory has one relay; a second is told which, and does not disturb it."""
    relay = await site.start_relay()
    await assert_refused(site, SPOOL, "spool", "in use", f"process {relay.pid}", words=ANYWHERE)
    assert (await relay.status())["ready"]


async def test_spool_is_of_another_version(site: Site) -> None:
    """A spool that another version wrote is left as it is, to the byte."""
    relay = await site.start_relay()
    await relay.stop()
    database = site.directory / "spool" / "spool.sqlite3"
    change(database, "PRAGMA user_version = 999")
    before = database.read_bytes()
    await assert_refused(site, SPOOL, "schema version 999", "spool.directory", words=ANYWHERE)
    assert database.read_bytes() == before


def change(database: Path, statement: str) -> None:
    """Do something to a database that the relay would not."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(statement)


async def test_spool_is_not_a_directory(site: Site) -> None:
    """A file where the directory should be is named, and left as it is."""
    (site.directory / "file").write_text("not a directory")
    await assert_refused(site, SPOOL, "file", words=[*ANYWHERE, "--set", "spool.directory=file"])
    assert (site.directory / "file").read_text() == "not a directory"


@pytest.mark.parametrize("is_database", [True, False], ids=["database", "file"])
async def test_spool_is_not_a_spool(site: Site, is_database: bool) -> None:
    """What another program keeps under the database's name is left as it is, to the byte."""
    (site.directory / "spool").mkdir()
    path = site.directory / "spool" / "spool.sqlite3"
    if is_database:
        change(path, "CREATE TABLE ours (id INTEGER PRIMARY KEY)")
    else:
        path.write_bytes(b"no database" * 100)
    before = path.read_bytes()
    await assert_refused(site, SPOOL, str(path.relative_to(site.directory)), "spool.directory", words=ANYWHERE)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--set", "batch.max_event=1"], ["batch.max_event"]),
        (["--set", "batch.max_events=0", "--set", "log.level=loud"], ["batch.max_events", "log.level"]),
        (["--config", "absent.toml"], ["absent.toml"]),
        (["--set", "upstream.ca_file=absent.pem"], ["absent.pem"]),
        (["--set", "upstream.ingest_url=ftp://upstream"], ["upstream.ingest_url"]),
    ],
    ids=["unknown option", "two values", "no file", "no authorities", "no address"],
)
async def test_configuration_is_wrong(site: Site, words: list[str], messages: list[str]) -> None:
    """Each mistake is named by its option or file, and nothing is left behind on disk."""
    await assert_refused(site, CONFIGURATION, *messages, words=[*ANYWHERE, *words])
    assert not (site.directory / "spool").exists()


async def test_starts_are_alike(site: Site) -> None:
    """A relay that was stopped can be started again at once, on the same addresses and spool."""
    first = await site.start_relay()
    await first.stop()
    again = {"relay": first.url.removeprefix("http://"), "admin": first.admin.removeprefix("http://")}
    second = await site.start_relay({"listen": again})
    assert (second.url, second.admin) == (first.url, first.admin)
