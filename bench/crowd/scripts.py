"""What the crowd sends: traffic of `bench.simulate`, made into batches that really travel.

Rules:
1. A trace and the scripts made of it say the same, byte for byte: the optimum is counted over what was sent.
2. A session's tabs keep their names over its visits; the rest of each envelope is the recorded one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import msgspec

from bench.simulate.traffic import Arrival, SdkBatch
from relay.demo.audit import WindowId
from relay.demo.session import Recording, SmallBatch, encode_batch
from relay.protocol.cut import Likeness, body_prefix, body_suffix
from relay.protocol.replay import Envelope, decode_batch
from relay.sandbox.body import parse_json

Counts: TypeAlias = Mapping[WindowId, int]
"""Events by window, from its first on."""

_LAST_ACTIVITY = b"1700000000000"
_EVENT = b'{"timestamp":0,"type":0,"data":0}'
_MAX_ENVELOPE_BYTES = 262_144


def window_id(arrival: Arrival) -> WindowId:
    """Return the names under which an arrival's window travels."""
    session, tab = arrival.window
    return f"crowd-{session}", f"tab-{tab}"


class Scripts:
    """A trace and what plays it.

    Args:
        arrivals: In order of time, and so within each window.
    """

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._envelopes: dict[tuple[int, int], dict[str, Any]] = {}
        self._travelling: dict[tuple[int, tuple[int, int]], Envelope] = {}
        batches: dict[str, list[SmallBatch]] = {}
        trace = []
        for arrival in arrivals:
            batch = arrival.batch
            session, _ = window_id(arrival)
            small = SmallBatch(self._envelope(arrival), batch.events, arrival.is_final, arrival.at)
            # A session that began before the trace has sent its first batches then.
            script = batches.setdefault(session, [])
            envelope = self._as_sent(arrival, small, session)
            likeness = Likeness(envelope.digest, envelope.pageless_digest)
            sent = msgspec.structs.replace(batch, envelope=envelope, likeness=likeness)
            trace.append(msgspec.structs.replace(arrival, batch=sent, sequence=len(script)))
            script.append(small)
        self.trace = trace
        """The arrivals as they are sent."""
        self.recordings = [Recording(name, len(script), tuple(script)) for name, script in batches.items()]
        """A session each, for a `Player`; due times count from the trace's beginning."""

    def _envelope(self, arrival: Arrival) -> dict[str, Any]:
        batch = arrival.batch
        known = self._envelopes.get((batch.envelope_id, batch.window))
        if known is None:
            body = body_prefix(batch.envelope, _LAST_ACTIVITY, 0) + body_suffix(is_final=False)
            known = parse_json(body)
            for name in ("events", "sequence"):
                del known["replay"][name]
            _, known["session"]["windowId"] = window_id(arrival)
            self._envelopes[batch.envelope_id, batch.window] = known
        return known

    def _as_sent(self, arrival: Arrival, small: SmallBatch, session: str) -> Envelope:
        identity = (arrival.batch.envelope_id, arrival.window)
        known = self._travelling.get(identity)
        if known is None:
            stand_in = msgspec.structs.replace(small, events=(_EVENT,), is_final=False)
            body = encode_batch(stand_in, session, 0)
            known = self._travelling[identity] = decode_batch(body, _MAX_ENVELOPE_BYTES).envelope
        return known


def excerpt(trace: Iterable[Arrival], begin: Counts, end: Counts) -> list[Arrival]:
    """Return what a trace has of each window from its event `begin` up to its event `end`."""
    passed: dict[WindowId, int] = {}
    found = []
    for arrival in trace:
        window = window_id(arrival)
        before, count = passed.get(window, 0), len(arrival.batch.events)
        passed[window] = before + count
        first = max(0, begin.get(window, 0) - before)
        last = min(count, end.get(window, 0) - before)
        if first < last:
            is_final = arrival.is_final and last == count
            part = msgspec.structs.replace(arrival, batch=_part(arrival.batch, first, last), is_final=is_final)
            found.append(part)
    return found


def _part(batch: SdkBatch, first: int, last: int) -> SdkBatch:
    events = batch.events[first:last]
    offsets = tuple(accumulate((len(event) + 1 for event in events), initial=0))
    size = batch.deflated_bytes(first, last)
    return msgspec.structs.replace(batch, events=events, offsets=offsets, whole_deflated_bytes=size)
