from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.config import Config
from relay.errors import ConfigError
from relay.protocol.endpoint import parse_address
from relay.protocol.fingerprint import fingerprint, redact
from relay.settings.checks import url_problem
from relay.settings.loading import Loaded, load, variable_name
from relay.settings.notation import read_value, write_value
from relay.settings.options import MASK, options
from relay.settings.rendering import render_defaults, render_effective


def problems(toml: str | bytes = b"", *, sets: list[str] | None = None, directory: Path, **environ: str) -> list[str]:
    """Return what is wrong with a file, environment and `--set` arguments; the file is shown as relay.toml."""
    path = directory / "relay.toml"
    path.write_bytes(toml.encode() if isinstance(toml, str) else toml)
    with pytest.raises(ConfigError) as caught:
        load(path, environ, sets or [])
    return [line.replace(str(path), "relay.toml") for line in caught.value.problems]


def with_sets(*sets: str) -> Loaded:
    """Return the configuration that `--set` arguments make."""
    return load(None, {}, sets)


# --- sources -------------------------------------------------------------------------------------------------


def test_nothing_said_is_the_defaults() -> None:
    """Without file, environment and --set every option has its default and says so."""
    loaded = load(None, {"PATH": "/bin", "LUCENT_RELAY_HOME": "/srv"}, [])
    assert loaded.config == Config()
    assert set(loaded.origins) == set(options())
    assert set(loaded.origins.values()) == {"default"}


def test_later_sources_win(tmp_path: Path) -> None:
    """Each source overrides the ones before it, and the origin names the one that won."""
    path = tmp_path / "relay.toml"
    path.write_text("[batch]\nmax_events = 1\nmax_bytes = 600_000\nlinger_seconds = 1\n")
    environ = {"LUCENT_RELAY_BATCH__MAX_EVENTS": "2", "LUCENT_RELAY_BATCH__MAX_BYTES": "700_000"}
    loaded = load(path, environ, ["batch.max_events=3", "batch.max_events=4"])
    batch = loaded.config.batch
    assert (batch.max_events, batch.max_bytes, batch.linger_seconds) == (4, 700_000, 1.0)
    assert isinstance(batch.linger_seconds, float)
    assert loaded.origins["batch.max_events"] == "--set"
    assert loaded.origins["batch.max_bytes"] == "environment LUCENT_RELAY_BATCH__MAX_BYTES"
    assert loaded.origins["batch.linger_seconds"] == f"file {path}"
    assert loaded.origins["spool.directory"] == "default"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/var/spool", "/var/spool"),
        ('"/var/spool"', "/var/spool"),
        ("'/var/spool'", "/var/spool"),
        ("[data]", "[data]"),
        ("2025", "2025"),
        ("a = b # c", "a = b # c"),
        ('"tab\\u00e9"', "tabé"),
    ],
)
def test_text_needs_no_quotes(text: str, expected: str) -> None:
    """A text option takes an argument as it stands, and without its quotes where it has them."""
    assert with_sets(f"spool.directory={text}").config.spool.directory == expected


def test_file_may_come_from_windows(tmp_path: Path) -> None:
    """A byte order mark and CRLF line ends mean nothing."""
    path = tmp_path / "relay.toml"
    path.write_bytes(b"\xef\xbb\xbf[batch]\r\nmax_events = 7\r\n")
    assert load(path, {}, []).config.batch.max_events == 7


def test_every_option_can_be_set_from_everywhere() -> None:
    """Each default, written as TOML, is accepted from the environment and by --set as itself."""
    environ = {variable_name(option): write_value(option.default) for option in options().values()}
    sets = [f"{name}={write_value(option.default)}" for name, option in options().items()]
    assert load(None, environ, []).config == Config()
    assert load(None, {}, sets).config == Config()


# --- problems ------------------------------------------------------------------------------------------------


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """Every mistake of every source is named in one go, with option, value, origin and bound."""
    toml = """
linger_seconds = 3
[budgets]
requests_per_minute = 1
[budget]
requests_per_minute = -3
requests_per_hour = 6000
[forward]
max_in_flight = true
backoff_base_seconds = nan
max_bytes = 4
[log]
level = "loud"
[spool]
directory = ""
"""
    assert problems(
        toml,
        directory=tmp_path,
        sets=["listen.relay", "batch.max_event=4", "spool.directory='x", "batch.linger_seconds=3_601"],
        LUCENT_RELAY_BATCH__MAX_EVENTS="many",
        LUCENT_RELAY_BATCH__MAX_EVENT="4",
        LUCENT_RELAY_BATCH_LINGER_SECONDS="4",
        LUCENT_RELAY_PORT="tcp://10.0.0.1:8787",
    ) == [
        "linger_seconds (file relay.toml): must stand in a section; did you mean batch.linger_seconds?",
        "[budgets] (file relay.toml): unknown section; did you mean [budget]?",
        "budget.requests_per_minute = -3 (file relay.toml): must be >= 0",
        "budget.requests_per_hour (file relay.toml): unknown option; did you mean budget.requests_per_minute?",
        "forward.max_in_flight = true (file relay.toml): must be an integer",
        "forward.backoff_base_seconds = nan (file relay.toml): must be a finite number",
        "forward.max_bytes (file relay.toml): unknown option; did you mean batch.max_bytes?",
        'log.level = "loud" (file relay.toml): must be "debug" or "error" or "info" or "warning"',
        'spool.directory = "" (file relay.toml): must not be empty',
        "LUCENT_RELAY_BATCH_LINGER_SECONDS (environment): unknown option; did you mean "
        "LUCENT_RELAY_BATCH__LINGER_SECONDS?",
        "LUCENT_RELAY_BATCH__MAX_EVENT (environment): unknown option; did you mean LUCENT_RELAY_BATCH__MAX_EVENTS?",
        'batch.max_events = "many" (environment LUCENT_RELAY_BATCH__MAX_EVENTS): must be an integer',
        "--set listen.relay: must be section.option=value",
        "batch.max_event (--set): unknown option; did you mean batch.max_events?",
        'spool.directory = "\'x" (--set): begins with a quote and must end with it',
        "batch.linger_seconds = 3_601 (--set): must be <= 3_600",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[batch]\nmax_events 5\n", "relay.toml, line 2, column 12: Expected '=' after a key in a key/value pair"),
        (b"[batch]\r\nmax_events =\r\n", "relay.toml, line 2, column 13: Invalid value"),
        (b"[batch]\nmax_events = [", "relay.toml, at the end: Invalid value"),
        (b"[batch]\n# \xff\n", "relay.toml, line 2: is not UTF-8 text"),
    ],
)
def test_broken_file_says_where(content: bytes, expected: str, tmp_path: Path) -> None:
    """A file that is no TOML is refused with line and column."""
    assert problems(content, directory=tmp_path) == [expected]


def test_absent_file_is_a_problem(tmp_path: Path) -> None:
    """A named file that cannot be read is never taken for an empty one."""
    path = tmp_path / "absent.toml"
    with pytest.raises(ConfigError) as caught:
        load(path, {}, ["batch.max_events=0"])
    assert caught.value.problems == [
        f"{path}: cannot be read: No such file or directory",
        "batch.max_events = 0 (--set): must be >= 1",
    ]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("batch.max_events=5.0", "must be an integer"),
        ("batch.max_events=", "must be an integer"),
        ("batch.max_events=[5]", "must be an integer"),
        ("batch.max_events=1\nmax_bytes=2", "must be an integer"),
        ("batch.linger_seconds=inf", "must be a finite number"),
        ("batch.linger_seconds=1979-05-27", "must be a number"),
        ("batch.linger_seconds={a=1}", "must be a number"),
        ("upstream.connect_seconds=0", "must be > 0"),
        ("spool.max_bytes=9_223_372_036_854_775_808", "must be <= 9_223_372_036_854_775_807"),
        ("spool.max_bytes=" + "9" * 5_000, "must be an integer"),
        ("spool.directory=~/spool", 'must be written out; "~" is for shells'),
        ("spool.directory=a\tb", "must not contain control or invisible characters"),
        ("spool.durability=FSYNC", 'must be "fsync" or "os"'),
        ("listen.relay=8787", 'must be "host:port" or "[IPv6]:port"'),
        ("listen.admin=127.0.0.1:8787", 'must have another port than listen.relay = "127.0.0.1:8787" (default)'),
        ("upstream.ingest_url=http://localhost:8787/", "must not be the relay itself, which listens there:"),
        (
            "upstream.ingest_url=https://a.example/api/sdk/replay",
            "must end before /api/sdk/replay, which the relay adds",
        ),
        ("upstream.data_url=app.lucenthq.com", 'must be a URL that begins with "http://" or "https://"'),
        ("upstream.ca_file=absent.pem", "must be a file that can be read: No such file or directory"),
        ("upstream.first_byte_seconds=91", "must be <= upstream.response_seconds = 90.0 (default)"),
        ("forward.backoff_base_seconds=61", "must be <= forward.backoff_max_seconds = 60.0 (default)"),
        ("intake.max_body_bytes=67_108_865", "must be <= listen.max_buffered_bytes = 67_108_864 (default)"),
        ("intake.max_decoded_bytes=65_536", "must be <= intake.max_decoded_bytes = 65_536 (--set)"),
        ("batch.max_bytes=65_536", "must be <= half of batch.max_bytes = 65_536 (--set)"),
    ],
)
def test_unusable_value_is_refused(argument: str, expected: str) -> None:
    """A value of the wrong type, out of bounds, or at odds with another option is refused, saying why."""
    with pytest.raises(ConfigError) as caught:
        with_sets(argument)
    assert expected in caught.value.problems[0]
    assert all(line.isprintable() for line in caught.value.problems)


def test_certificates_must_be_certificates(tmp_path: Path) -> None:
    """A file of trusted authorities without any is refused at the start, not at the first connection."""
    (tmp_path / "ca.pem").write_text("not a certificate\n")
    with pytest.raises(ConfigError, match="must hold certificates in PEM format"):
        with_sets(f"upstream.ca_file={tmp_path / 'ca.pem'}")


def test_refused_value_causes_no_second_problem() -> None:
    """What follows only from the default that stands in for a refused value is not reported."""
    with pytest.raises(ConfigError) as caught:
        with_sets("forward.backoff_base_seconds=100", "forward.backoff_max_seconds=-1")
    assert caught.value.problems == ["forward.backoff_max_seconds = -1 (--set): must be > 0"]


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=3), st.lists(st.text(max_size=30)))
@example({"LUCENT_RELAY_\ud800__\n": "\x1b"}, ["batch.max_events=\udcff", "=", "spool.directory='\x00'"])
def test_any_input_gives_settings_or_lines(environ: dict[str, str], sets: list[str]) -> None:
    """Whatever the environment and the arguments hold, the answer is a configuration or printable lines."""
    variables = {f"LUCENT_RELAY_{name}__{name}": text for name, text in environ.items()}
    lines = ["none"]
    try:
        load(None, {**environ, **variables}, sets)
    except ConfigError as error:
        lines = error.problems
    assert lines
    assert all(line.isprintable() for line in lines)


# --- secrets -------------------------------------------------------------------------------------------------

KEY = "luc_pk_4f9a2b7c"


@pytest.mark.parametrize(
    ("toml", "sets"),
    [
        (f'[keys]\ndefault = "{KEY} "\n', []),
        (f'[keys]\ndefault = ["{KEY}"]\n', []),
        (f'[keys]\ndefalut = "{KEY}"\n', []),
        (f'[key]\ndefault = "{KEY}"\n', []),
        (f'[upstream]\ningest_url = "https://host/?api_key={KEY}"\n', []),
        (f'[upstream]\ningest_url = "https://user:{KEY}@host"\n', []),
        (f'[upstream]\ningest_url = "https://user:{KEY}/@host"\n', []),
        ("", ['upstream.data_url=https://user:a"b luc_pk_4f9a2b7c@host']),
        ("", [KEY]),
        ("", [f"keys.default:{KEY}"]),
        ("", [f"keys.default='{KEY}"]),
        ("", [f"keys.defalut={KEY}"]),
        ("", [f"{KEY}=keys.default"]),
    ],
)
def test_no_message_holds_a_secret(toml: str, sets: list[str], tmp_path: Path) -> None:
    """A key never stands in a message, wherever it was put by mistake."""
    assert KEY not in "\n".join(problems(toml, sets=sets, directory=tmp_path))


def test_no_message_holds_a_secret_of_another_shape() -> None:
    """A secret option is masked by its declaration, not by what its value looks like."""
    with pytest.raises(ConfigError) as caught:
        with_sets("keys.default=hunter two")
    assert caught.value.problems == [
        f'keys.default = "{MASK}" (--set): must be visible ASCII without blanks, as it becomes a header'
    ]


@pytest.mark.parametrize(
    "url",
    ["https://me:hunter2@host", 'https://me:a"/hunter2@host', "https://host/?token=hunter2", "//hunter2@host?hunter2"],
)
def test_no_message_holds_the_secrets_of_a_url(url: str) -> None:
    """User, password and query of a URL are masked, whatever they look like."""
    with pytest.raises(ConfigError) as caught:
        with_sets(f"upstream.data_url={url}")
    assert "hunter2" not in str(caught.value)
    assert "host" in str(caught.value)


def test_masked_secret_is_not_taken_for_one() -> None:
    """What print-config writes in place of a key is refused when it is read back."""
    with pytest.raises(ConfigError, match="must be the key itself"):
        with_sets(f"keys.default={MASK}")


def test_printed_settings_mask_secrets_and_read_back(tmp_path: Path) -> None:
    """print-config's TOML holds every effective value and its origin, and asterisks for the key."""
    loaded = load(None, {"LUCENT_RELAY_BATCH__LINGER_SECONDS": "0.1"}, [f"keys.default={KEY}", "batch.max_events=9"])
    text = render_effective(loaded.config, loaded.origins)
    assert KEY not in text
    assert f'default = "{MASK}"  # --set\n' in text
    assert "linger_seconds = 0.1   # environment LUCENT_RELAY_BATCH__LINGER_SECONDS\n" in text
    path = tmp_path / "relay.toml"
    path.write_text(text.replace(MASK, KEY))
    assert load(path, {}, []).config == loaded.config


def test_empty_secret_is_shown_as_empty() -> None:
    """An operator can see that no default key is set."""
    loaded = with_sets()
    assert 'default = ""  ' in render_effective(loaded.config, loaded.origins)


def test_fingerprints_replace_keys_in_text() -> None:
    """Keys and tokens of every kind are replaced by names that differ, and nothing else is touched."""
    keys = ["luc_pk_a", "luc_api_b", "luc_oat_c.d", "luc_mcp_e-f"]
    text = redact(f"?api_key={keys[0]}&x=1 Bearer {keys[1]}, {keys[2]} '{keys[3]}' luc_ok lucent")
    names = [fingerprint(key) for key in keys]
    assert text == f"?api_key={names[0]}&x=1 Bearer {names[1]}, {names[2]} '{names[3]}' luc_ok lucent"
    assert len(set(names)) == 4
    assert fingerprint("luc_pk_a") == fingerprint(b"luc_pk_a") == "key-" + fingerprint("luc_pk_a")[-8:]


# --- warnings ------------------------------------------------------------------------------------------------


def test_defaults_are_not_warned_of() -> None:
    """The defaults are what is meant."""
    assert with_sets().warnings() == []


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("listen.relay=0.0.0.0:8787", "other machines can send batches"),
        ("listen.admin=[::]:8788", "other machines can read"),
        ("upstream.ingest_url=http://ingest.example", "is not encrypted"),
        ("spool.durability=os", "a power cut or a crash of the machine loses accepted events"),
        ("spool.max_bytes=1_048_576", "is < intake.max_decoded_bytes = 67_108_864 (default)"),
        ("budget.requests_per_minute=0", "is unlimited"),
        ("budget.requests_per_minute=101", "is above upstream's published limit"),
        ("batch.max_events=501", "is above upstream's published limit"),
        ("batch.max_bytes=1_048_577", "is above upstream's published limit"),
        ("batch.measure=compressed", "assumes that upstream measures after gzip, which nobody has confirmed"),
        ("batch.merge=page", "assumes that upstream takes a session's pages from its events"),
        ("batch.merge=page-when-scarce", "assumes that upstream takes a session's pages from its events"),
        ("keys.default=luc_api_x", 'does not begin with "luc_pk_"'),
    ],
)
def test_unusual_value_is_warned_of(argument: str, expected: str) -> None:
    """What is allowed and seldom meant is said once, and without secrets."""
    (warning,) = with_sets(argument).warnings()
    assert warning.startswith(f"{argument.partition('=')[0]} = ")
    assert expected in warning
    assert "luc_api_x" not in warning


@pytest.mark.parametrize(
    "argument", ["listen.relay=[::1]:0", "listen.relay=localhost:80", "upstream.data_url=http://[::1]"]
)
def test_loopback_is_not_warned_of(argument: str) -> None:
    """What stays on this machine needs neither protection nor encryption."""
    assert with_sets(argument).warnings() == []


# --- addresses and URLs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8787", ("127.0.0.1", 8787)),
        ("relay-1.example:0", ("relay-1.example", 0)),
        ("[::1]:65535", ("::1", 65_535)),
        ("[::]:00080", ("::", 80)),
    ],
)
def test_address_is_parsed(text: str, expected: tuple[str, int]) -> None:
    """host:port and [IPv6]:port give host and port."""
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8787",
        ":8787",
        "localhost",
        "localhost:",
        "localhost:http",
        "localhost:-1",
        "localhost:65536",
        "localhost:000000080",
        "localhost:٨٧٨٧",
        "::1:8787",
        "[::1]",
        "[127.0.0.1]:80",
        "[]:80",
        "256.0.0.1:80",
        "127.1:80",
        "http://127.0.0.1:80",
        "127.0.0.1:80/",
        "user@host:80",
        "two words:80",
    ],
)
def test_other_text_is_no_address(text: str) -> None:
    """What a listener could not use is refused by parsing already."""
    with pytest.raises(ValueError, match=r"^(must|port) "):
        parse_address(text)


@given(st.ip_addresses(), st.integers(min_value=0, max_value=65_535))
def test_every_ip_address_is_parsed(host: Any, port: int) -> None:
    """Any IP address, as the standard library writes it, parses to itself."""
    text = f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"
    assert parse_address(text) == (str(host), port)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ingest.example",
        "ftp://ingest.example",
        "https://",
        "https:///path",
        "https://ingest.example:0",
        "https://ingest.example:65536",
        "https://ingest.example:https",
        "https://[::1",
        "https://user@ingest.example",
        "https://ingest.example/?",
        "https://ingest.example/#top",
        "https://ingest.example/a b",
        "https://bücher.example",
    ],
)
def test_other_text_is_no_upstream(url: str) -> None:
    """Only an absolute http(s) URL without credentials, query and fragment can be an upstream's base."""
    assert url_problem(url) is not None


@pytest.mark.parametrize("url", ["https://ingest.example", "http://[::1]:8790/", "HTTPS://Ingest.example:443/a/b"])
def test_upstream_may_have_port_and_path(url: str) -> None:
    """Port and path of an upstream's base URL are its own affair."""
    assert url_problem(url) is None


# --- rendering -----------------------------------------------------------------------------------------------


def test_rendered_defaults_read_back_as_defaults(tmp_path: Path) -> None:
    """The annotated file sets every option to its default."""
    path = tmp_path / "relay.toml"
    path.write_text(render_defaults())
    loaded = load(path, {}, [])
    assert loaded.config == Config()
    assert set(loaded.origins.values()) == {f"file {path}"}
    assert max(map(len, render_defaults().splitlines())) <= 110


@given(
    st.recursive(
        st.booleans()
        | st.integers(min_value=-(2**63), max_value=2**63 - 1)
        | st.floats(allow_nan=False)
        | st.text(st.characters(codec="utf-8")),
        lambda inner: st.lists(inner, max_size=3),
    )
)
def test_written_value_reads_back_as_itself(value: Any) -> None:
    """TOML notation of a value is one line and means that value."""
    written = write_value(value)
    assert "\n" not in written
    assert read_value(written) == value


def test_two_statements_are_no_value() -> None:
    """A value cannot bring a second statement along."""
    with pytest.raises(ValueError, match="one line"):
        read_value("1\nother = 2")
    with pytest.raises(tomllib.TOMLDecodeError):
        read_value("1 other = 2")
