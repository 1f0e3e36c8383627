"""The socket between the two processes."""

from __future__ import annotations

import contextlib
import socket
import stat
import struct
from pathlib import Path

import msgspec
import psutil

from faults.house import House


def socket_of(house: House) -> Path:
    """Where the server waits for its engine."""
    connections = psutil.Process(house.server.process.pid).net_connections("unix")
    (path,) = {each.laddr for each in connections if str(each.laddr).endswith("engine.sock")}
    return Path(path)


def framed(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


def test_row_74_garbage_on_the_internal_socket_is_ignored(house: House) -> None:
    path = socket_of(house)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    engine = house.server.engine
    for content in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 64,  # a frame of 4 GB
        framed(b"hello"),
        framed(b"\x81" * 100_000),  # maps in maps
        framed(msgspec.msgpack.encode({"type": "Hello", "secret": "0" * 32})),
        framed(msgspec.msgpack.encode({"type": "Hello", "secret": ["0"]})),
        framed(msgspec.msgpack.encode({"type": "Failed", "message": "bye", "startup": False})),
        framed(msgspec.msgpack.encode({"type": "Pieces", "pieces": [], "ended": [0]})),
    ):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(path))
            stranger.settimeout(20)
            stranger.sendall(content)
            stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # it was closed with something unread
                assert stranger.recv(16) == b"", content[:40]
    assert house.server.engine == engine
