"""Messages between the service and the processes of a sandbox: a JSON object, and blobs of bytes that follow it."""

import json
import socket
import struct
import time
from collections.abc import Sequence

_LENGTH = struct.Struct("!I")
_MAX_HEADER = 1 << 20


def send(conn: socket.socket, header: dict, blobs: Sequence[bytes] = ()) -> None:
    text = json.dumps(header | {"sizes": [len(blob) for blob in blobs]}).encode()
    conn.sendall(b"".join((_LENGTH.pack(len(text)), text, *blobs)))


def receive(
    conn: socket.socket, *, max_bytes: int | None = None, deadline: float | None = None
) -> tuple[dict, list[bytes]]:
    """The next message. `max_bytes` bounds all blobs together, `deadline` is on the monotonic clock.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: the deadline has passed.
        ValueError: the message is not one, or larger than allowed.
    """
    (length,) = _LENGTH.unpack(_read(conn, _LENGTH.size, deadline))
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(_read(conn, length, deadline))
    sizes = header.pop("sizes")
    if max_bytes is not None and not 0 <= sum(sizes) <= max_bytes:
        raise ValueError(f"a message of {sum(sizes)} bytes, where {max_bytes} are allowed")
    return header, [_read(conn, size, deadline) for size in sizes]


def _read(conn: socket.socket, size: int, deadline: float | None) -> bytes:
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        if deadline is not None:
            conn.settimeout(max(1e-3, deadline - time.monotonic()))
        count = conn.recv_into(view[done:])
        if not count:
            raise EOFError("the other side is gone")
        done += count
    return bytes(buffer)
