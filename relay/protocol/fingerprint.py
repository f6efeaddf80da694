"""Fingerprints: how a secret is named where people read.

A key or token never appears in a log, a label, an error message or the dashboard. What appears is its
fingerprint, by which an operator who holds the key can find it, and nobody else can find the key.
"""

from __future__ import annotations

import hashlib
import re

FINGERPRINT_DIGITS = 8
"""Hexadecimal digits kept of the SHA-256: 32 bits tell a few thousand keys apart (two of 1 000 share
one with a probability of 1 in 8 600) and leave far too little to search for the key."""

SECRET = re.compile(r"luc_(?:pk|api|oat|mcp)_[\w.~+/=-]+")
"""What Lucent's keys and tokens look like: ingest keys, API keys, OAuth access tokens, legacy keys. The
characters are those of a bearer token (RFC 6750, 2.1), so a query parameter ends at its `&`."""


def fingerprint(secret: str | bytes) -> str:
    """Return the name under which a secret may be shown: `key-` and the start of its SHA-256.

    Args:
        secret: A key or token, as text or as it stood on the wire (UTF-8); both give the same name.
    """
    octets = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
    return f"key-{hashlib.sha256(octets).hexdigest()[:FINGERPRINT_DIGITS]}"


def redact(text: str) -> str:
    """Return `text` with everything that looks like a Lucent key or token replaced by its fingerprint."""
    if "luc_" not in text:  # the common case, without the regular expression
        return text
    return SECRET.sub(lambda found: fingerprint(found[0]), text)
