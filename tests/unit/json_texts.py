"""JSON texts, as bytes and not as values, so that every spelling occurs."""

from __future__ import annotations

from hypothesis import strategies as st

PIECES = st.sampled_from(
    [
        *(b"a", b" ", b"0", b"[", b"}", b",", b":", b"u", b"d83d", "é".encode(), "😀".encode()),
        *(rb"\\", rb"\"", rb"\n", rb"\/", rb"\u0041", rb"\u0000", rb"\uD83D\uDE00", rb"\ud83d\ude00"),
        *(rb"\ud83d", rb"\uDE00", rb"\ud800", rb"\uDBFF", rb"\udc00", rb"\udfff"),
        *(rb"\ufdd0", rb"\uFDEF", rb"\ue000", rb"\uE03f", rb"\ue040", rb"\ufdcf", rb"\ufdf0", rb"\ufeff"),
        *(text.encode() for text in ("\ufdd0", "\ufdef", "\ue000", "\ue03f", "\ue040", "\ufdcf", "\ufeff")),
        *(b"\xff", b"\xed\xa0\xbd", b"\xef\xb7", b"\xc3", b"\xf0\x9f"),
    ]
)
STRINGS = st.lists(PIECES, max_size=6).map(lambda pieces: b'"%b"' % b"".join(pieces))
NUMBERS = st.sampled_from(
    [b"0", b"-0", b"3.0", b"1e2", b"1E+2", b"1e999", b"-1.5e-300", b"123456789012345678901234567890"]
)
BLANKS = st.sampled_from([b"", b"", b" ", b"\r\n\t"])


def lists_of(items: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Return arrays, with blanks about their commas."""
    return st.tuples(BLANKS, st.lists(items, max_size=4), BLANKS).map(
        lambda parts: b"[%b%b]" % (parts[0], (parts[2] + b"," + parts[0]).join(parts[1]))
    )


def objects_of(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Return objects, repeated names among them."""
    members = st.tuples(STRINGS, BLANKS, values).map(
        lambda parts: b"%b%b:%b%b" % (parts[0], parts[1], parts[1], parts[2])
    )
    return st.lists(members, max_size=4).map(lambda found: b"{%b}" % b",".join(found))


VALUES = st.recursive(
    STRINGS | NUMBERS | st.sampled_from([b"null", b"true", b"false"]),
    lambda inner: lists_of(inner) | objects_of(inner),
    max_leaves=12,
)
