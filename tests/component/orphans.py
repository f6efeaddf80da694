"""What no spool's database may hold: rows that nothing needs, and events that are in two places."""

from __future__ import annotations

HOLDER = (
    "CREATE TEMP VIEW holder AS SELECT window_id, address, events, envelope_id, body_id FROM segment"
    " UNION ALL SELECT window_id, address, events, envelope_id, body_id FROM dead_letter"
)
"""What holds events."""

ORPHANS = (
    "SELECT id FROM body WHERE id NOT IN (SELECT body_id FROM holder)",
    "SELECT body_id FROM holder GROUP BY body_id HAVING count(*) > 1",
    "SELECT body_id FROM holder WHERE body_id NOT IN (SELECT id FROM body)",
    "SELECT id FROM envelope WHERE id NOT IN (SELECT envelope_id FROM holder UNION SELECT envelope_id FROM batch)",
    "SELECT envelope_id FROM holder WHERE envelope_id NOT IN (SELECT id FROM envelope)",
    "SELECT batch_id FROM segment WHERE batch_id IS NOT NULL AND batch_id NOT IN (SELECT id FROM batch)",
    "SELECT id FROM batch WHERE events != (SELECT sum(events) FROM segment WHERE batch_id = batch.id)",
    "SELECT id FROM batch WHERE envelope_id NOT IN (SELECT id FROM envelope)",
    "SELECT window_id FROM holder WHERE window_id NOT IN (SELECT id FROM window)",
    "SELECT id FROM window WHERE session_id NOT IN (SELECT id FROM session)",
    "SELECT id FROM session WHERE id NOT IN (SELECT session_id FROM mark)",
    "SELECT id FROM key WHERE id NOT IN (SELECT key_id FROM session)",
    "SELECT session_id FROM mark WHERE session_id NOT IN (SELECT id FROM session)",
)
"""Queries that find nothing; on a connection with `HOLDER`."""
