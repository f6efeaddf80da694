"""What the sandbox's data API holds: issues, signals and insights, made up, and the same at every start.

Rules:
1. Everything follows from the seed; nothing is read from a clock. Only a change of an issue brings the present in.
2. The shapes are the published schemas', with optional members in some and not in others, as a real organisation's are.
3. Lists are in the published order, `createdAt` and then `id`, descending. Some share their `createdAt`, so that
   pages end between equals.
"""

from __future__ import annotations

import random  # noqa: TID251 - a generator of its own, seeded by the caller
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeAlias, get_args

Record: TypeAlias = dict[str, Any]
"""One issue, signal or insight as JSON."""

Status: TypeAlias = Literal["unresolved", "ticket_created", "transient", "resolved"]
"""Of an issue, as published."""

STATUSES: tuple[Status, ...] = get_args(Status)

ISSUES, SIGNALS, INSIGHTS = 260, 70, 130
"""How many there are: each more than the largest page."""

_BEGINNING = datetime(2026, 1, 1, 9, tzinfo=UTC)
"""When the first of them was created."""

_SUMMARY = (
    *("id", "title", "description", "status", "priority", "previewUrl", "createdAt", "sessionCount"),
    *("ticketProvider", "ticketUrl", "ticketIdentifier"),
)
"""What a list of issues shows of each; the rest is for whoever asks for one."""

_PLACES = ("checkout", "search", "sign-in", "profile", "cart", "invoice list", "date picker", "file upload", "menu")
_TROUBLES = (
    *("does not react to the first tap", "shows an empty page", "loses what was typed", "jumps while it loads"),
    *(
        "spins for ever",
        "greets “undefined” 👋",
        "covers the button below it",
        "forgets the chosen language",
    ),
)
_PEOPLE = ("People give up", "Visitors go back", "Buyers reload", "Readers click again and again")


class Records:
    """All that the data API answers with.

    Args:
        seed: The same seed, the same records.
    """

    def __init__(self, seed: int) -> None:
        chance = random.Random(f"records/{seed}")  # noqa: S311 - it must repeat
        self._issues = {issue["id"]: issue for issue in _ordered(_issue(chance, at) for at in _moments(chance, ISSUES))}
        self.signals = _ordered(_signal(chance, at) for at in _moments(chance, SIGNALS))
        self.insights = _ordered(_insight(chance, at) for at in _moments(chance, INSIGHTS))

    def issues(self, status: str | None = None) -> list[Record]:
        """Return what a list shows of the issues, of one status or of all."""
        return [
            {name: issue[name] for name in _SUMMARY if name in issue}
            for issue in self._issues.values()
            if status is None or issue["status"] == status
        ]

    def issue(self, issue_id: uuid.UUID) -> Record | None:
        """Return a whole issue; None where there is none."""
        return self._issues.get(str(issue_id))

    def set_status(self, issue: Record, status: Status, now: float) -> None:
        """Change an issue; setting what it has changes nothing (published).

        Args:
            issue: From `issue`.
            status: Its new one.
            now: Seconds since the epoch.
        """
        if issue["status"] != status:
            issue["status"] = status
            issue["updatedAt"] = _written(datetime.fromtimestamp(now, UTC))


def _moments(chance: random.Random, count: int) -> list[datetime]:
    """Return moments, minutes to hours apart, some of them twice."""
    at = _BEGINNING
    found = []
    for _ in range(count):
        at += timedelta(seconds=chance.choice((0, 90, 3_600, 20_000)))
        found.append(at)
    return found


def _ordered(records: Any) -> list[Record]:
    return sorted(records, key=lambda record: (record["createdAt"], record["id"]), reverse=True)


def _written(moment: datetime) -> str:
    """Return a moment as JavaScript's `toISOString` writes it."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _id(chance: random.Random) -> str:
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


def _issue(chance: random.Random, at: datetime) -> Record:
    place, trouble = chance.choice(_PLACES), chance.choice(_TROUBLES)
    issue: Record = {
        "id": _id(chance),
        "title": f"The {place} {trouble}",
        "description": chance.choice((None, f"{chance.choice(_PEOPLE)} when the {place} {trouble}.")),
        "status": chance.choice(STATUSES),
        "priority": chance.choice(("low", "medium", "high", "critical")),
        "previewUrl": None,
        "createdAt": _written(at),
        "sessionCount": chance.randrange(1, 400),
        "updatedAt": _written(at + timedelta(seconds=chance.randrange(86_400))),
        "stepsToReplicate": chance.choice((None, f"1. Open the {place}\n2. Wait\n3. It {trouble}")),
        "aiVerified": chance.choice((None, True, False)),
    }
    if issue["status"] == "ticket_created":
        number = f"WEB-{chance.randrange(1, 5_000)}"
        issue["ticketProvider"] = "linear"
        issue["ticketUrl"] = f"https://tickets.example/{number}"
        issue["ticketIdentifier"] = number
    return issue


def _signal(chance: random.Random, at: datetime) -> Record:
    place, trouble = chance.choice(_PLACES), chance.choice(_TROUBLES)
    signal: Record = {
        "id": _id(chance),
        "name": f"{place} trouble",
        "prompt": f"Find sessions in which the {place} {trouble}",
        "status": chance.choice(("active", "paused")),
        "backfillStatus": chance.choice((None, "running", "done")),
        "createdAt": _written(at),
        "matchCount": chance.choice((0, chance.randrange(1, 90))),
    }
    if signal["matchCount"]:
        signal["lastMatchAt"] = _written(at + timedelta(seconds=chance.randrange(86_400)))
    return signal


def _insight(chance: random.Random, at: datetime) -> Record:
    sessions = chance.randrange(20, 4_000)
    return {
        "id": _id(chance),
        "createdAt": _written(at),
        "intervalStart": _written(at - timedelta(days=1)),
        "intervalEnd": _written(at),
        "sessionsCount": sessions,
        "contentPreview": f"{chance.choice(_PEOPLE)} in {sessions} sessions: the {chance.choice(_PLACES)} "
        f"{chance.choice(_TROUBLES)}.",
    }
