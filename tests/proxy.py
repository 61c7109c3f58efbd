"""A TCP proxy on loopback that cuts connections: what a bad network does to a client, at a chosen byte."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ALL = 2**62


@dataclass(frozen=True)
class Cut:
    """How many bytes of a connection pass before it is cut."""

    request: int = ALL
    """From the client. With fewer than it sends, the server sees the end in the middle."""
    answer: int = ALL
    """From the server, which has done all it was asked for when the client sees the end."""


@contextlib.contextmanager
def proxy(port: int, rule: Callable[[bytes], Cut]) -> Iterator[int]:
    """Port of a proxy in front of `port`; `rule` gets the first bytes of each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, port, rule), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, port: int, rule: Callable[[bytes], Cut]) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # closed
            return
        threading.Thread(target=_connection, args=(client, port, rule), daemon=True).start()


def _connection(client: socket.socket, port: int, rule: Callable[[bytes], Cut]) -> None:
    with client, socket.create_connection(("127.0.0.1", port)) as server, contextlib.suppress(OSError):
        first = client.recv(2**16)
        cut = rule(first)
        up = threading.Thread(target=_pass, args=(client, server, cut.request, first), daemon=True)
        up.start()
        _pass(server, client, cut.answer)
        up.join()


def _pass(source: socket.socket, target: socket.socket, limit: int, first: bytes = b"") -> None:
    """Pass on `limit` bytes; read to the end then, so that the sender has said everything, and end the other side."""
    with contextlib.suppress(OSError):
        data = first or source.recv(2**16)
        while data:
            target.sendall(data[:limit])
            limit -= min(len(data), limit)
            if not limit:
                target.shutdown(socket.SHUT_WR)
                if first:
                    break
            data = source.recv(2**16)
    for side in (source, target):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
