"""Connections whose requests must come: one that is opened and sends no whole request line and headers is closed.

uvicorn bounds how long a connection may stay idle behind an answer, but not how long the first request, or one that has
begun, may take to arrive. A client that sends a byte now and then would hold its connection for ever; a few thousand of
them would hold all that the process may have open. (The time of a body is bounded in `app.py`.)
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class _TimedProtocol(H11Protocol):
    """uvicorn's protocol with a deadline for the headers of each request, counted from when it may begin."""

    header_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._has_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._await_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        self._cancel()
        self._has_begun = False
        self._deadline = self.loop.call_later(self.header_timeout_s, self._close_if_waiting)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _close_if_waiting(self) -> None:
        """Close the connection unless a request has arrived, which then takes its own time."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.transport.is_closing():
            return
        if self._has_begun:
            self.transport.write(_timeout_response(self.header_timeout_s))
        self.transport.close()


def protocol_with_timeout(header_timeout_s: float) -> type[H11Protocol]:
    """The protocol of connections that are closed where a request's headers take longer than so many seconds."""
    return type("TimedProtocol", (_TimedProtocol,), {"header_timeout_s": header_timeout_s})


def _timeout_response(header_timeout_s: float) -> bytes:
    """What a client gets that has begun a request and not ended its headers; the form is that of all refusals."""
    status = HTTPStatus.REQUEST_TIMEOUT
    message = f"the headers did not come to their end in {header_timeout_s:g} s; send them in one go"
    body = json.dumps({"error": {"status": status, "message": message}}).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
