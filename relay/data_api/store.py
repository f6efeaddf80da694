"""Kept answers by token and target, within a bound of bytes; the least recently used go first.

What may be kept and when it may be served is `relay.protocol.caching`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from relay.protocol.caching import Kept, is_selected
from relay.protocol.fields import Fields

MAX_VARIANTS = 8
"""Answers of one target that `vary` tells apart: a few codings and languages. The oldest goes first."""

_Key = tuple[bytes, str]


class AnswerStore:
    """The kept answers.

    Args:
        max_bytes: Of all of them together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._variants: OrderedDict[_Key, list[Kept]] = OrderedDict()
        self.used_bytes = 0
        """What the answers cost now."""
        self.evicted_total = 0
        """Targets whose answers had to go for others."""

    def __len__(self) -> int:
        return len(self._variants)

    def find(self, partition: bytes, target: str, request: Fields) -> Kept | None:
        """Return the answer that is kept for a request.

        Args:
            partition: Of the token.
            target: Path and query.
            request: The request's fields as upstream would see them.
        """
        variants = self._variants.get((partition, target))
        if variants is None:
            return None
        self._variants.move_to_end((partition, target))
        return next((kept for kept in variants if is_selected(kept, request)), None)

    def has_room(self, target: str, kept: Kept, body_bytes: int) -> bool:
        """Return whether an answer would be kept: one page shall not drive out all others.

        Args:
            target: Path and query.
            kept: The answer, perhaps without its body.
            body_bytes: Of the body that is to come.
        """
        return kept.size + body_bytes + len(target) <= self._max_bytes // 4

    def put(self, partition: bytes, target: str, request: Fields, kept: Kept) -> bool:
        """Keep an answer in place of what would be found for its request, which goes.

        Returns:
            Whether it is kept: not without room, nor in place of one that was asked for later.
        """
        earlier = self.find(partition, target, request)
        if earlier is not None and earlier.asked_at > kept.asked_at:
            return False
        self.forget(partition, target, request)
        if not self.has_room(target, kept, 0):
            return False
        key = (partition, target)
        others = self._variants.pop(key, [])
        while len(others) >= MAX_VARIANTS:
            self._forget(others.pop(), target)
        self._variants[key] = [kept, *others]
        self.used_bytes += kept.size + len(target)
        while self.used_bytes > self._max_bytes:
            (_, oldest), variants = self._variants.popitem(last=False)
            for one in variants:
                self._forget(one, oldest)
            self.evicted_total += 1
        return True

    def forget(self, partition: bytes, target: str, request: Fields) -> None:
        """Forget what would be found for a request."""
        key = (partition, target)
        others = [one for one in self._variants.pop(key, []) if not self._is_gone(one, target, request)]
        if others:
            self._variants[key] = others

    def drop(self, is_dropped: Callable[[bytes, str], bool]) -> None:
        """Forget the answers of which `is_dropped` holds, given partition and target."""
        for key in [key for key in self._variants if is_dropped(*key)]:
            for one in self._variants.pop(key):
                self._forget(one, key[1])

    def _is_gone(self, kept: Kept, target: str, request: Fields) -> bool:
        if not is_selected(kept, request):
            return False
        self._forget(kept, target)
        return True

    def _forget(self, kept: Kept, target: str) -> None:
        self.used_bytes -= kept.size + len(target)
