"""Client batches for the core's tests, as values and as bytes in any spelling."""

from __future__ import annotations

import json
from typing import Any

_MARKER = "\N{SNOWMAN}"


def make_batch() -> dict[str, Any]:
    """Return a valid batch with every published member."""
    return {
        "session": {"id": "s", "windowId": "w", "startedAt": 1, "lastActivityAt": 2.5, "url": "https://shop.example/"},
        "user": {"id": "u", "anonymousId": "a", "properties": {"email": "a@example.com"}},
        "page": {"url": "https://shop.example/", "referrer": "", "viewport": {"width": 1280, "height": 720}},
        "replay": {
            "events": [{"timestamp": 1, "type": 2, "data": {}}, {"timestamp": 2, "type": 3, "data": [1]}],
            "sequence": 7,
        },
        "metadata": {"userAgent": "x", "language": "en"},
        "flush": "final",
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return a valid batch in which one member, named by a dotted path, has another value; `...` removes it."""
    batch = make_batch()
    *parents, last = path.split(".")
    target: Any = batch
    for name in parents:
        target = target[int(name)] if name.isdigit() else target[name]
    member = int(last) if last.isdigit() else last
    if value is ...:
        del target[member]
    else:
        target[member] = value
    return batch


def spelled(path: str, text: bytes) -> bytes:
    """Return a valid body in which one member's value is written just so."""
    return encode(changed(path, _MARKER)).replace(encode(_MARKER), text)


def encode(value: Any) -> bytes:
    """Return JSON as `JSON.stringify` writes it, lone surrogates as escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()
