"""The answers that no request deserves: what is said in an outage, and in place of what would have been done."""

from __future__ import annotations

from relay.http.message import HANG_UP, HeaderList, Response, error_response
from relay.sandbox.faults import FaultSettings


def injected_error(status: int) -> Response:
    """Return an error out of the blue."""
    # The published contract promises Retry-After with a 429, also with an invented one.
    headers: HeaderList = ((b"retry-after", b"1"),) if status == 429 else ()
    return error_response(status, "Injected by the sandbox", headers=headers)


def outage_answer(settings: FaultSettings) -> Response:
    """Return what an outage answers."""
    return injected_error(settings.outage_status) if settings.outage_status else HANG_UP
