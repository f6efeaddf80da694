"""The seam to upstream: the relay and the published rules, as zod on Node applies them, judge every body alike.

`LUCENT_RELAY_PARITY_BODIES` sets how many mutated bodies are judged, and `LUCENT_RELAY_PARITY_CORPUS` names a directory
with further recordings (`*.jsonl.zst`, a body a line).
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.cli import MAX_DEPTH
from relay.errors import InvalidBatch, RefusedBatch
from relay.protocol.codings import zstd_decompress
from relay.protocol.cut import body_prefix, body_suffix
from relay.protocol.replay import ClientBatch, decode_batch
from relay.protocol.schema import MAX_ISSUES
from relay.sandbox.body import parse_json
from relay.sandbox.schema import BatchSchema, as_utf8, load_description
from tests.contract.bodies import PATHS, mutated_bodies, small, systematic_bodies
from tests.contract.exceptions import EXCEPTIONS, MAX_ENVELOPE_BYTES, Refusal
from tests.node import Witness, open_witness
from tests.unit.batches import make_batch, spelled
from tests.unit.json_texts import VALUES

MUTATED_BODIES = int(os.environ.get("LUCENT_RELAY_PARITY_BODIES", "20000"))

_ASKED_AT_ONCE = 500
"""Bodies of one question; bounds the memory of both sides."""

_NO_ADDRESSES = ("too_big", ["replay", "sequence"])
"""How the one exception that a small body can fall under is named: its sequence has no addresses."""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Witness]:
    """Return Node with the published rules."""
    with open_witness(Path(__file__).parent / "upstream.mjs") as witness:
        yield witness


def recordings() -> list[bytes]:
    """Return every recorded body."""
    folders = [Path(__file__).parents[2] / "relay" / "demo" / "recordings"]
    if corpus := os.environ.get("LUCENT_RELAY_PARITY_CORPUS"):
        folders.append(Path(corpus))
    files = sorted(file for folder in folders for file in folder.rglob("*.jsonl.zst"))
    return [line for file in files for line in zstd_decompress(file.read_bytes()).splitlines() if line]


def judge(body: bytes) -> ClientBatch | RefusedBatch:
    """Return what the relay makes of a body."""
    try:
        return decode_batch(body, MAX_ENVELOPE_BYTES)
    except RefusedBatch as refusal:
        return refusal


def sent_upstream(judgement: ClientBatch | RefusedBatch) -> bytes:
    """Return a batch as the relay would send it, numbered as it came; nothing of what was refused."""
    if isinstance(judgement, RefusedBatch):
        return b""
    prefix = body_prefix(judgement.envelope, judgement.last_activity, judgement.sequence)
    return prefix + bytes(judgement.events) + body_suffix(is_final=judgement.is_final)


def disagreement(ours: ClientBatch | RefusedBatch, theirs: Any) -> str:
    """Say in what two judgements differ; empty where they do not."""
    if theirs is None:
        is_refused = isinstance(ours, InvalidBatch) and ours.details[0]["code"] == "custom"
        return "" if is_refused else f"it is no JSON, but we say {described(ours)}"
    if isinstance(ours, InvalidBatch):
        found, named = places(theirs.get("issues", [])), places(ours.details)
        if _NO_ADDRESSES not in found and _NO_ADDRESSES in named:
            named.remove(_NO_ADDRESSES)
        if len(ours.details) == MAX_ISSUES:
            found = found[: len(named)]
        return "" if found == named else f"upstream names {found}, we name {named}"
    if isinstance(ours, RefusedBatch) or "reading" not in theirs:
        return f"upstream says {theirs}, we say {described(ours)}"
    flush = "final" if ours.is_final else "normal"
    reading = [ours.session_id, ours.window_id, ours.sequence, flush, ours.event_count]
    for index in (0, 1):
        name = theirs["reading"][index]
        if name != as_utf8(name):  # it holds lone surrogates, and has a name of our own
            reading[index] = name
    if reading != theirs["reading"]:
        return f"upstream reads {theirs['reading']}, we read {reading}"
    return "" if theirs["kept"] else "what we would send says something else"


def described(ours: ClientBatch | RefusedBatch) -> str:
    """Return a judgement of ours as text."""
    return f"{ours} {ours.details}" if isinstance(ours, RefusedBatch) else repr(ours)


def places(issues: list[dict[str, Any]]) -> list[tuple[str, list[str | int]]]:
    """Return code and path of the first issue of each place; zod may have several for one."""
    firsts: dict[str, tuple[str, list[str | int]]] = {}
    for issue in issues:
        firsts.setdefault(str(issue["path"]), (issue["code"], issue["path"]))
    return list(firsts.values())


def hold_against(upstream: Witness, bodies: Iterable[bytes]) -> tuple[int, int, int]:
    """Assert that all bodies are judged alike; return how many are batches, how many other JSON, how many none."""
    counts = [0, 0, 0]
    remaining = iter(bodies)
    while asked := list(itertools.islice(remaining, _ASKED_AT_ONCE)):
        judgements = [judge(body) for body in asked]
        pairs = zip(asked, map(sent_upstream, judgements), strict=True)
        answers = upstream.ask(list(itertools.chain.from_iterable(pairs)))
        for body, ours, theirs in zip(asked, judgements, answers, strict=True):
            counts[2 if theirs is None else 1 if "issues" in theirs else 0] += 1
            assert (disagreement(ours, theirs), body) == ("", body)
    return counts[0], counts[1], counts[2]


def test_recordings_are_batches_to_both(upstream: Witness) -> None:
    """Every recorded body is accepted by both and read alike."""
    bodies = recordings()
    assert hold_against(upstream, bodies) == (len(bodies), 0, 0)
    assert len(bodies) > 100


def test_every_member_in_every_spelling_is_judged_alike(upstream: Witness) -> None:
    """Each member of a batch with each value at the edges of JSON, and a batch cut at each byte."""
    batches, invalid, broken = hold_against(upstream, systematic_bodies())
    assert min(batches, invalid, broken) > 1_000


def test_mutated_recordings_are_judged_alike(upstream: Witness) -> None:
    """Members dropped, doubled, renamed and exchanged, bytes spliced in; read alike where they are still a batch."""
    templates = [make_batch(), *map(small, recordings())]
    batches, invalid, broken = hold_against(upstream, mutated_bodies(templates, MUTATED_BODIES, seed=MUTATED_BODIES))
    assert min(batches, invalid, broken) > MUTATED_BODIES / 10


def test_the_sandbox_stands_in_for_upstream(upstream: Witness) -> None:
    """The sandbox's judgement is upstream's too, but for a byte order mark and integers that are not safe ones.

    It refuses the first and takes the second, the stricter reading and the published one; its manual says so.
    """
    published = BatchSchema(load_description())
    remaining = (body for body in systematic_bodies() if not body.startswith(b"\xef\xbb\xbf"))
    while asked := list(itertools.islice(remaining, _ASKED_AT_ONCE)):
        answers = upstream.ask(list(itertools.chain.from_iterable((body, b"") for body in asked)))
        for body, theirs in zip(asked, answers, strict=True):
            try:
                is_batch = not published.issues(parse_json(body))
            except InvalidBatch:
                is_batch = False
            issues = [None] if theirs is None else theirs.get("issues", [])
            expected = all(issue is not None and issue.get("origin") == "int" for issue in issues)
            assert (is_batch, body) == (expected, body)


@given(st.sampled_from(PATHS), VALUES)
def test_generated_values_are_judged_alike(upstream: Witness, path: str, value: bytes) -> None:
    """Whatever JSON stands in whatever place, we accept and refuse it as upstream does, and read the same."""
    hold_against(upstream, [spelled(path, value)])


@pytest.mark.parametrize("exception", EXCEPTIONS, ids=[exception.what for exception in EXCEPTIONS])
def test_exceptions_are_what_the_manual_says(upstream: Witness, exception: Refusal) -> None:
    """What the manual names is refused by the relay and accepted by upstream: no row outlives its reason."""
    body = exception.body()
    (theirs,) = upstream.ask([body, b""])
    assert "reading" in theirs
    assert type(judge(body)) is exception.refusal


def test_what_is_nested_less_deeply_is_read_alike(upstream: Witness) -> None:
    """Under the limit that the command sets, values of nearly 10 000 levels are accepted and kept."""
    limit = sys.getrecursionlimit()
    depth = MAX_DEPTH * 9 // 10
    sys.setrecursionlimit(MAX_DEPTH)
    try:
        bodies = [spelled("replay.events.0.data", b"[" * depth + text + b"]" * depth) for text in (b"", rb'"\ud83d"')]
        assert hold_against(upstream, bodies) == (len(bodies), 0, 0)
    finally:
        sys.setrecursionlimit(limit)
