from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import ConfigError
from relay.http.connect import Origin, parse_base_url


@pytest.mark.parametrize(
    ("url", "origin", "prefix", "authority"),
    [
        ("https://a.example", Origin("https", "a.example", 443), "", "a.example"),
        ("https://a.example/", Origin("https", "a.example", 443), "", "a.example"),
        ("HTTPS://A.Example:443/x/", Origin("https", "a.example", 443), "/x", "a.example"),
        ("https://a.example:80/x/y%20z", Origin("https", "a.example", 80), "/x/y%20z", "a.example:80"),
        ("http://localhost:8787", Origin("http", "localhost", 8787), "", "localhost:8787"),
        ("http://batch_jobs", Origin("http", "batch_jobs", 80), "", "batch_jobs"),
        ("http://127.0.0.1", Origin("http", "127.0.0.1", 80), "", "127.0.0.1"),
        ("http://[::1]:8080/x", Origin("http", "::1", 8080), "/x", "[::1]:8080"),
        ("https://[2001:DB8::1]", Origin("https", "2001:db8::1", 443), "", "[2001:db8::1]"),
        ("https://xn--bcher-kva.example", Origin("https", "xn--bcher-kva.example", 443), "", "xn--bcher-kva.example"),
    ],
)
def test_a_base_url_is_an_origin_and_a_prefix(url: str, origin: Origin, prefix: str, authority: str) -> None:
    """Defaults are filled in, case and trailing slashes do not matter."""
    assert parse_base_url(url) == (origin, prefix)
    assert origin.authority == authority


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "scheme ''"),
        ("a.example", "scheme ''"),
        ("ftp://a.example", "scheme 'ftp'"),
        ("https:a.example", "no host"),
        ("https://", "no host"),
        ("https:///x", "no host"),
        ("https://:443", "no host"),
        ("https://user@a.example", "user name or password"),
        ("https://user:secret@a.example", "user name or password"),
        ("https://user:secret@a.example:x", "malformed"),
        ("https://a.example?secret", "query or a fragment"),
        ("https://a.example/?", "query or a fragment"),
        ("https://a.example/#secret", "query or a fragment"),
        ("https://a.example:0", "port 0"),
        ("https://a.example:65536", "port outside"),
        ("https://a.example:x", "port outside"),
        ("https://[::1", "malformed"),
        ("https://[::1%25eth0]", "host"),
        ("https://[v1.x]", "host"),
        ("https://::1", "host"),
        ("https://a..example", "host 'a..example'"),
        ("https://-a.example", "host '-a.example'"),
        ("https://a.example.", "host 'a.example.'"),
        ("https://" + "a" * 64 + ".example", "host"),
        ("https://" + "a." * 127 + "example", "host"),
        ("https://bücher.example", "non-ASCII"),
        ("https://a.example/a b", "blank"),
        ("https://a.exam\tple", "control character"),
        ("https://a.example\n", "control character"),
    ],
)
def test_anything_else_is_refused_and_never_echoed(url: str, problem: str) -> None:
    """A base URL with more, or less, than it needs is a configuration error that names the part, not the secret."""
    with pytest.raises(ConfigError) as caught:
        parse_base_url(url)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "secret" not in str(caught.value.__cause__)


@given(st.text() | st.text("htps:/@?#[]%.a1\\ ").map("https://".__add__))
def test_no_text_gets_past_the_rules(url: str) -> None:
    """Whatever is configured either is refused or gives an origin that can be written back."""
    try:
        origin, prefix = parse_base_url(url)
    except ConfigError:
        return
    assert parse_base_url(f"{origin}{prefix}/") == (origin, prefix)
