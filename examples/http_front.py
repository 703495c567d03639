"""What stands between the network and a service: an HTTP server whose connections are few, and never wait for long.

A server that waits for slow clients can be stopped by anyone: a few hundred connections that send a byte and then
nothing hold all of its places. Here a request that has not arrived after some seconds is answered with 408, and where
there are too many connections, the one that has been waiting for its request the longest makes room. A client that
sends a whole request at once is served, however many others do not.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

ABORT_SECONDS = 2  # in which a client takes what it was told last


@dataclass(frozen=True)
class Limits:
    """What clients may take.

    Args:
        read_s: Seconds for a whole request to arrive, and for an answer to be taken.
        connections: That are open at once.
        ending_s: Seconds for requests that are being answered when the server ends.
    """

    read_s: float = 10.0
    connections: int = 512
    ending_s: int = 30


class Bounded(H11Protocol):
    """A connection that ends in time, whatever the client does."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.waiting_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def answering(self) -> bool:
        """Whether a whole request has arrived and its answer is under way."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.limits.connections:
            waiting = [connection for connection in self.connections if not connection.answering]
            oldest = min(waiting, key=lambda connection: connection.waiting_since)
            oldest.refuse(503, "There are too many connections, and this one has waited for a request the longest.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.answering:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()  # goes on with a request that has arrived meanwhile
        if self.answering:
            self._stop_waiting()

    def refuse(self, status: int, why: str) -> None:
        """End the connection; if it still waits for its request, with an answer."""
        self.connections.discard(self)
        self._stop_waiting()
        self._timer = self.loop.call_later(ABORT_SECONDS, self.transport.abort)  # for those who do not read either
        if self.transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started:
            body = json.dumps({"detail": why}).encode()
            phrase = {408: "Request Timeout", 503: "Service Unavailable"}[status]
            head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        if self.cycle is not None:  # the application waits for the rest of the body: there will be none
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _wait(self) -> None:
        self._stop_waiting()
        self.waiting_since = self.loop.time()
        late = partial(self.refuse, 408, f"The request did not arrive within {self.limits.read_s:g} s.")
        self._timer = self.loop.call_later(self.limits.read_s, late)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@contextmanager
def serving(app: Any, port: int, limits: Limits) -> Iterator[uvicorn.Server]:
    """Serve an ASGI application on 127.0.0.1, in a thread; at the end, answer what has arrived."""
    listening = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(
        app,
        http=partial(Bounded, limits=limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=limits.read_s,
        timeout_graceful_shutdown=limits.ending_s,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), name="http")
    thread.start()
    try:
        yield server  # connections wait until it has started
    finally:
        server.should_exit = True
        thread.join()
