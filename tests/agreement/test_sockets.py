"""Connections of a group, told apart from all others of the process, and cut."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from collective_scope.agreement.sockets import Connections


@pytest.fixture(name="server")
def _server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_connection_of_the_client_is_told_from_one_that_another_thread_opens_meanwhile(server: socket.socket) -> None:
    """A client is opened again if more than one connection has appeared; only that of the last one is cut."""
    port = server.getsockname()[1]
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", port), 5.0))
        server.accept()[0].detach()
        return opened[-1]

    def clone() -> socket.socket:
        if not opened:
            connect()  # of the other thread
        return connect()

    connections = Connections(port)
    client = connections.open_client(clone)

    assert [False, False, True] == [each is client for each in opened]
    connections.cut(with_client=False)
    assert [False] * 3 == [_is_cut(each) for each in opened]
    connections.cut(with_client=True)
    assert [False, False, True] == [_is_cut(each) for each in opened]
    for each in opened:
        each.close()


def _is_cut(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
