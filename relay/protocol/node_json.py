r"""JSON as Node reads it, for a parser that is stricter: what `JSON.parse` accepts, we accept.

Upstream decodes a body as UTF-8 with replacement and calls `JSON.parse`. Our parser refuses three things that this
accepts: a byte order mark, bytes that are not UTF-8, and escapes of lone surrogates such as `"\ud83d"`, which
`JSON.stringify` writes for text cut in the middle of an emoji.

Rules:
1. `protect` makes a body that the parser accepts; `restore` undoes it on any slice of that body, and is for no other.
2. Protecting is reversible, before and after decoding: a lone surrogate becomes two raw characters, a noncharacter
   (U+FDD0 and following, which no text may contain) and a private-use one. A noncharacter that a body does contain,
   raw or escaped, becomes itself and another private-use character.
3. What comes out of `restore` is JSON-equal to what the client sent, and byte-equal but for the case of a
   surrogate's hex digits, replaced non-UTF-8 bytes and escaped noncharacters.

Not accepted, though Node does: values nested deeper than Python's recursion limit, which the command sets to 10 000.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec
from msgspec import Raw

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_NONCHARACTER = re.compile(rb"\xef\xb7[\x90-\xaf]")
"""U+FDD0 to U+FDEF in UTF-8."""

_ESCAPE = re.compile(
    rb"\\(?<!\\\\)((?:\\\\)*+)u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|([dD][89a-fA-F][0-9a-fA-F]{2}|[fF][dD][dDeE][0-9a-fA-F]))"
)
"""An escape to look at: a surrogate pair, or a lone surrogate or noncharacter (its digits in group 2). The backslashes
before its own (group 1) must pair up, or it is `\\\\ud83d`, a backslash and five letters. It begins with a literal, so
that text without escapes is passed over at memory speed."""

_OWN = b"\xee\x81\x80"
"""U+E040, behind a noncharacter that is the body's own."""

_PLACEHOLDER = re.compile(rb"\xef\xb7([\x90-\xaf])\xee(?:\x80([\x80-\xbf])|\x81\x80)")

_OWN_NONCHARACTER = re.compile("([\ufdd0-\ufdef])\ue040")

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
"""What structures a JSON text: strings, brackets and commas. Possessive, so that no match costs memory."""

_RAW_EVENTS = msgspec.json.Decoder(list[Raw])


def protect(body: bytes) -> bytes:
    """Return a body that the parser accepts wherever `JSON.parse` would accept `body`."""
    body = body.removeprefix(_BYTE_ORDER_MARK)
    if not is_utf8(body):
        body = body.decode("utf-8", "replace").encode()
    body = _NONCHARACTER.sub(lambda match: match[0] + _OWN, body)
    return _ESCAPE.sub(_hide, body)


def _hide(match: re.Match[bytes]) -> bytes:
    backslashes, digits = match.groups()
    if digits is None:
        return match[0]
    code = int(digits, 16)
    if code >= 0xFDD0:
        return backslashes + chr(code).encode() + _OWN
    bits = code - 0xD800
    return backslashes + bytes((0xEF, 0xB7, 0x90 + (bits >> 6), 0xEE, 0x80, 0x80 + (bits & 0x3F)))


def restore(piece: bytes) -> bytes:
    """Return a slice of a protected body as it was."""
    return _PLACEHOLDER.sub(_show, piece)


def _show(match: re.Match[bytes]) -> bytes:
    high, low = match.groups()
    if low is None:
        return match[0][: -len(_OWN)]
    return rb"\u%x" % (0xD800 + (high[0] - 0x90 << 6) + (low[0] - 0x80))


def restore_text(text: str) -> str:
    """Return a decoded string of a protected body as it was, but for lone surrogates, which no UTF-8 can hold."""
    return _OWN_NONCHARACTER.sub(r"\1", text)


def is_utf8(body: bytes) -> bool:
    """Return whether `body` is valid UTF-8; all-ASCII bodies, the most of them, at memory speed."""
    if body.isascii():
        return True
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def split_events(run: bytes) -> list[bytes]:
    """Return the single events of a run.

    Args:
        run: Events joined by commas, without brackets, as they stand in a segment.

    Raises:
        ValueError: It is not a list of JSON values; a segment whose CRC holds never is.
    """
    try:
        return [bytes(event) for event in _RAW_EVENTS.decode(b"[%b]" % run)]
    except (msgspec.DecodeError, RecursionError):  # a lone surrogate, or nested as deeply as was just accepted
        return list(walk_items(run))


def walk_items(run: bytes) -> Iterator[bytes]:
    """Yield the items of a run of JSON values one by one: at 30 MB/s, of any depth and number, in no memory.

    Args:
        run: At least one value, joined by commas, known to be JSON.

    Raises:
        ValueError: Its brackets do not pair up.
    """
    depth = start = 0
    for match in _TOKEN.finditer(run):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
        elif token == b"," and not depth:
            yield run[start : match.start()].strip(b" \t\r\n")
            start = match.end()
    if depth:
        raise ValueError("not a run of events: its brackets do not pair up")
    yield run[start:].strip(b" \t\r\n")
