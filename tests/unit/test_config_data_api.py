from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_config_keys import problems, with_sets

HELD = "data_api.token=luc_api_held"
GIVEN = 'data_api.client_tokens=["handed-out-to-one"]'
OPEN = "data_api.anonymous=serve-with-the-relays-token"

PROBLEMS: dict[str, tuple[list[str], str]] = {
    "two sources of the token": (
        [HELD, "data_api.token_file=token", GIVEN],
        "must not be given beside data_api.token",
    ),
    "clients without a token to be served with": ([GIVEN], "must have a token to be served with"),
    "everybody without one": ([OPEN], "must have a token to serve with"),
    "a token that can be guessed": ([HELD, 'data_api.client_tokens=["short"]'], "must have 16 characters or more"),
    "Lucent's token for a client's": (
        [HELD, 'data_api.client_tokens=["luc_api_given_to_somebody"]'],
        'must not begin with "luc_"',
    ),
    "a token that is no header": (['data_api.token="luc_api two words"'], "must be visible ASCII without blanks"),
    "a token as print-config shows it": (["data_api.token=********"], "must be the token itself"),
    "a home directory": (["data_api.token_file=~/token", GIVEN], "must be written out"),
    "a body that there is never room for": (
        [
            "data_api.max_body_bytes=2000000",
            "intake.max_body_bytes=1048576",
            "listen.max_buffered_bytes=1048576",
        ],
        "one body must fit into what is buffered: must be <= listen.max_buffered_bytes",
    ),
    "a word that is easily missed": (
        ["data_api.anonymous=yes"],
        'must be "pass-through" or "serve-with-the-relays-token"',
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_what_cannot_be_used_is_refused(arguments: list[str], expected: str) -> None:
    """A mistake is named at the start, and no message holds a token."""
    (problem,) = problems(*arguments)
    assert expected in problem
    assert not any(secret in problem for secret in ("luc_api", "handed-out", 'short"', "two words"))


def test_a_long_token_can_be_held() -> None:
    """An OAuth access token is taken from the configuration as it is from a file: it may have kilobytes."""
    token = "luc_oat_" + "x" * 2_000
    assert with_sets(f"data_api.token={token}", GIVEN).config.data_api.token == token


WARNINGS: dict[str, tuple[list[str], str]] = {
    "everybody is served": ([HELD, OPEN], "everybody who reaches this address reads and changes your Lucent data"),
    "nobody is": ([HELD], "has no effect, since nobody is served with it"),
    "more reads than published": (["data_api.reads_per_minute=301"], "is above upstream's published limit"),
    "more changes than published": (["data_api.writes_per_minute=61"], "is above upstream's published limit"),
    "a cache that is too small": (["data_api.cache_max_bytes=1000000"], "large answers are not kept"),
}


@pytest.mark.parametrize(("arguments", "expected"), WARNINGS.values(), ids=WARNINGS.keys())
def test_what_is_seldom_meant_is_warned_of(arguments: list[str], expected: str) -> None:
    """What is allowed and seldom meant is said, without tokens."""
    (warning,) = with_sets(*arguments).warnings()
    assert expected in warning
    assert "luc_api" not in warning


def test_tokens_in_the_clear_are_warned_of() -> None:
    """Tokens of the relay's beyond loopback need TLS in front."""
    warnings = with_sets(HELD, GIVEN, "listen.relay=0.0.0.0:8787").warnings()
    assert any("travel in the clear" in warning for warning in warnings)


def test_the_usual_needs_no_warning() -> None:
    """A relay that holds a token for its clients on loopback is as it should be."""
    assert with_sets(HELD, GIVEN).warnings() == []


def test_a_token_file_is_looked_at(tmp_path: Path) -> None:
    """A token file that is not there, or that others can read, is warned of; one that is as it should be is not."""
    path = tmp_path / "token"
    arguments = (f"data_api.token_file={path}", GIVEN)
    (warning,) = with_sets(*arguments).warnings()
    assert "cannot be read at present: No such file" in warning
    path.write_text("luc_api_held")
    path.chmod(0o640)
    (warning,) = with_sets(*arguments).warnings()
    assert "can be read or written by others" in warning
    path.chmod(0o600)
    assert with_sets(*arguments).warnings() == []
