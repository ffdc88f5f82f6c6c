"""Connections on which a request must be stated, and its answer read, in time: uvicorn itself waits without end."""

import asyncio
from functools import cache
from typing import Any

# Until all headers of a request must be there, from the connection's beginning or from their first byte.
HEADER_SECONDS = 30.0
# Until what waits for a client must be read, and the bytes for which there is a second more. A client that does not
# read that fast is cut off, which ends its reply.
READ_SECONDS, READ_BYTES = 60.0, 16 << 10
TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class _Read(asyncio.Protocol):
    """A connection that ends when its client does not read; `timely_protocol` has it go before uvicorn's."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin; whatever waits for the client counts, not only much."""
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)

    def pause_writing(self) -> None:
        """Something waits for the client; it must be read in time."""
        super().pause_writing()
        seconds = READ_SECONDS + self.transport.get_write_buffer_size() / READ_BYTES
        self._unread = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read it."""
        self._is_read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._is_read()
        super().connection_lost(exc)

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


@cache
def timely_protocol() -> type[asyncio.Protocol]:
    """uvicorn's protocol of a connection, which closes it when headers are late, or nobody reads."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimelyProtocol(_Read, H11Protocol):
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
