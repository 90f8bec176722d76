"""Connections that send no whole request, against the server as it is configured to serve, over raw sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'megatron3d[serve]'")
applications = pytest.importorskip("starlette.applications", reason="starlette is not installed")
responses = pytest.importorskip("starlette.responses")
routing = pytest.importorskip("starlette.routing")
server_config = pytest.importorskip("megatron3d.serve.server").server_config

TIMEOUT_S = 0.4
PATIENCE_S = 5.0  # far above the timeout and the pace of a busy machine
WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class _Plain:
    """Stands for a service: an application that answers at once, or after more than the timeout."""

    def __init__(self) -> None:
        async def health(request: object) -> object:
            return responses.JSONResponse({"status": "ok"})

        def slow(request: object) -> object:
            time.sleep(2 * TIMEOUT_S)
            return responses.JSONResponse({"status": "slow"})

        self.app = applications.Starlette(routes=[routing.Route("/health", health), routing.Route("/slow", slow)])


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(_Plain(), header_timeout_s=TIMEOUT_S))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield bound.getsockname()[1]
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the other side closes; raises TimeoutError if it does not."""
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    return found


def answer(connection: socket.socket) -> object:
    """The JSON of one answer, which is a 200; the connection stays open."""
    response = HTTPResponse(connection)
    response.begin()
    assert response.status == 200
    return json.loads(response.read())


def test_a_connection_without_a_request_is_closed(port: int) -> None:
    with connect(port) as connection:
        assert read_to_end(connection) == b""


@pytest.mark.parametrize("begun", [b"G", b"GET /health HTTP/1.1\r\n", WHOLE[:-1]], ids=["a byte", "a line", "all but"])
def test_headers_without_an_end_get_a_408_and_the_connection_is_closed(port: int, begun: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(begun)
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert json.loads(body)["error"] == {
        "status": 408,
        "message": "the headers did not come to their end in 0.4 s; send them in one go",
    }


def test_a_client_that_sends_a_byte_now_and_then_gains_no_time(port: int) -> None:
    with connect(port) as connection, pytest.raises(OSError):
        for _ in range(int(PATIENCE_S / 0.05)):
            connection.sendall(b"X")
            time.sleep(0.05)


def test_the_time_is_that_of_each_request_on_a_connection_that_is_kept(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(WHOLE)
            assert answer(connection) == {"status": "ok"}
            time.sleep(TIMEOUT_S / 2)
        connection.sendall(b"GET /hea")
        assert read_to_end(connection).startswith(b"HTTP/1.1 408")


def test_an_answer_that_takes_longer_than_the_headers_may_is_not_cut(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(WHOLE.replace(b"/health", b"/slow"))
        assert answer(connection) == {"status": "slow"}
