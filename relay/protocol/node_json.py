r"""JSON as Node reads it, for a parser that is stricter: what `JSON.parse` accepts, we accept.

Upstream decodes a body as UTF-8 with replacement and calls `JSON.parse`. Our parser refuses three things that this
accepts: a byte order mark, bytes that are not UTF-8, and escapes of lone surrogates such as `"\ud83d"`, which
`JSON.stringify` writes for text cut in the middle of an emoji.

Rules:
1. `protect` makes a body that the parser accepts; `restore` undoes it on any slice of that body, and is for no other.
2. Protecting is reversible: a lone surrogate's six bytes `\udXYZ` become six bytes of two raw characters, a
   noncharacter (U+FDD0 and following, which no text may contain) and a private-use one. Raw noncharacters that a
   body does contain are first written as escapes, which is the same JSON.
3. What comes out of `restore` is JSON-equal to what the client sent, and byte-equal but for the case of a
   surrogate's hex digits, replaced non-UTF-8 bytes and escaped noncharacters.

Not accepted, though Node does: values nested deeper than the parser's recursion limit (about 1 000).
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_NONCHARACTER = re.compile(rb"\xef\xb7[\x90-\xaf]")
"""U+FDD0 to U+FDEF in UTF-8."""

_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u([dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
"""One escape: a surrogate pair, a lone surrogate (its digits in group 1), or any other. Matching every escape in
turn is what keeps `\\\\ud83d`, a backslash and six letters, from being taken for one."""

_PLACEHOLDER = re.compile(rb"\xef\xb7([\x90-\xaf])\xee\x80([\x80-\xbf])")

_RAW_EVENTS = msgspec.json.Decoder(list[Raw])


def protect(body: bytes) -> bytes:
    """Return a body that the parser accepts wherever `JSON.parse` would accept `body`."""
    body = body.removeprefix(_BYTE_ORDER_MARK)
    if not is_utf8(body):
        body = body.decode("utf-8", "replace").encode()
    body = _NONCHARACTER.sub(lambda match: rb"\ufd%x" % match[0][2], body)
    return _ESCAPE.sub(_hide, body)


def _hide(match: re.Match[bytes]) -> bytes:
    if match[1] is None:
        return match[0]
    bits = int(match[1], 16) - 0xD800
    return bytes((0xEF, 0xB7, 0x90 + (bits >> 6), 0xEE, 0x80, 0x80 + (bits & 0x3F)))


def restore(piece: bytes) -> bytes:
    """Return a slice of a protected body with its lone surrogates as escapes again."""
    return _PLACEHOLDER.sub(lambda match: rb"\u%x" % (0xD800 + (match[1][0] - 0x90 << 6) + (match[2][0] - 0x80)), piece)


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
    text = b"[%b]" % run
    try:
        return [bytes(event) for event in _RAW_EVENTS.decode(text)]
    except msgspec.DecodeError:
        pass
    try:
        return [restore(bytes(event)) for event in _RAW_EVENTS.decode(protect(text))]
    except msgspec.DecodeError as error:
        raise ValueError(f"not a run of events: {error}") from error
