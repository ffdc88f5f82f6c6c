"""Connections on which a request must be stated in time: uvicorn itself waits for the end of headers without end."""

import asyncio
from functools import cache
from typing import Any

# Until all headers of a request must be there, from the connection's beginning or from their first byte.
HEADER_SECONDS = 30.0
TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@cache
def timely_protocol() -> type[asyncio.Protocol]:
    """uvicorn's protocol of a connection, which closes it when headers are late."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimelyProtocol(H11Protocol):
        """Waits for headers until a request is under way, and again after it."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Begin, and wait for headers."""
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            """Take in data: headers, or a part of them, or of a body."""
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._wait_no_more()
            elif self._deadline is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            """End."""
            self._wait_no_more()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

        def _wait_no_more(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                self.transport.write(TOO_LATE)
                self.transport.close()

    return TimelyProtocol
