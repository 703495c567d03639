"""examples/http_front.py on this machine's own sockets: clients that do not send, or do not read, and the others."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import requests
import uvicorn
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect

from examples.http_front import Limits, serving
from tests.ddp_processes import free_port

BODY = b"POST /echo HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\nx"  # one byte of a hundred
HEAD = b"P"
LARGE = 32 * 2**20

app = FastAPI()
left: list[str] = []


@app.get("/health")
async def health() -> str:
    return "ok"


@app.post("/echo")
async def echo(request: Request) -> dict[str, Any]:
    try:
        return {"bytes": len(await request.body())}
    except ClientDisconnect:
        left.append("echo")
        return {}


@app.get("/large")
async def large() -> str:
    return "x" * LARGE


@contextmanager
def served(**limits: Any) -> Iterator[tuple[uvicorn.Server, int]]:
    port = free_port()
    with serving(app, port, Limits(**limits)) as server:
        yield server, port


def wait_until(happened: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def connected(port: int, stack: ExitStack, sent: bytes) -> socket.socket:
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
    client.sendall(sent)
    return client


def answer(client: socket.socket) -> tuple[int, dict[str, str], float]:
    """The status, the body, and how long it took until the server closed the connection."""
    started, received = time.monotonic(), b""
    while data := client.recv(4096):
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body), time.monotonic() - started


@pytest.mark.parametrize("sent", [b"", HEAD, BODY], ids=["nothing", "a byte of the head", "a byte of the body"])
def test_a_request_that_does_not_arrive_is_a_408(sent: bytes) -> None:
    left.clear()
    with served(read_s=0.5) as (_, port), ExitStack() as stack:
        status, body, seconds = answer(connected(port, stack, sent))
    assert status == 408
    assert body == {"detail": "The request did not arrive within 0.5 s."}
    assert 0.3 < seconds < 5
    assert left == (["echo"] if sent == BODY else []), "the application does not wait for it either"


def test_a_byte_now_and_then_does_not_help() -> None:
    with served(read_s=0.5) as (_, port), ExitStack() as stack:
        client, started = connected(port, stack, BODY), time.monotonic()
        client.settimeout(0.1)
        received = b""
        while time.monotonic() - started < 5 and not received:
            client.send(b"x")
            try:
                received = client.recv(4096)
            except TimeoutError:
                continue
    assert received.startswith(b"HTTP/1.1 408")


def test_those_who_send_are_served_beside_300_who_do_not() -> None:
    with served(read_s=60) as (server, port), ExitStack() as stack:
        slow = [connected(port, stack, HEAD if number % 2 else BODY) for number in range(300)]
        for _ in range(5):
            started = time.monotonic()
            assert requests.get(f"http://127.0.0.1:{port}/health", timeout=10).text == '"ok"'
            assert requests.post(f"http://127.0.0.1:{port}/echo", data=b"y" * 1000, timeout=10).json() == {
                "bytes": 1000
            }
            assert time.monotonic() - started < 5
        assert len(server.server_state.connections) >= 300
        for client in slow:
            client.close()


def crowded(server: uvicorn.Server, count: int) -> bool:
    return len(server.server_state.connections) >= count


def test_connections_are_limited_and_the_slowest_makes_room() -> None:
    with served(read_s=60, connections=20) as (server, port), ExitStack() as stack:
        slow: list[socket.socket] = []
        for tens in range(5):  # within ten, they may arrive in any order
            slow += [connected(port, stack, BODY if number % 2 else HEAD) for number in range(10)]
            wait_until(partial(crowded, server, min(len(slow), 20)))
            refused = [answer(client)[0] for client in slow[10 * (tens - 2) : 10 * (tens - 1)]] if tens > 1 else []
            assert refused == [503] * len(refused)
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code == 200
        assert len(server.server_state.connections) <= 20
        slow[-1].sendall(b"x" * 99)
        assert slow[-1].recv(4096).startswith(b"HTTP/1.1 200"), "who was late in coming is still served"


def test_who_does_not_take_the_answer_is_let_go() -> None:
    with served(read_s=0.5) as (server, port), ExitStack() as stack:
        client = stack.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
        wait_until(lambda: bool(server.server_state.connections))
        (connection,) = server.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        wait_until(lambda: sock.fileno() < 0)  # a client that reads before may still take all of it
        assert server.server_state.total_requests == 1
        assert not server.server_state.connections
        taken = 0
        with suppress(ConnectionResetError):
            while data := client.recv(2**20):
                taken += len(data)
    assert taken < LARGE


def test_a_connection_that_is_kept_serves_many_and_is_closed_in_the_end() -> None:
    with served(read_s=0.5) as (server, port), requests.Session() as session:
        for count in range(5):
            reply = session.post(f"http://127.0.0.1:{port}/echo", data=b"y" * count, timeout=10)
            assert reply.json() == {"bytes": count}
        assert len(server.server_state.connections) == 1
        wait_until(lambda: not server.server_state.connections)


def test_a_port_that_is_taken_is_named() -> None:
    with served() as (_, port), pytest.raises(OSError, match=f"in use.*{port}"), serving(app, port, Limits()):
        pass
