"""The connector: a process that opens TCP connections to VMs as root, for a worker that has given up that right.

From version 15 on, macOS lets a process of a normal user connect to VMs only with the permission "Local Network", which
is granted at the screen. Daemons of root need none. So a worker that is started as root with `--user` starts this
process first, and then becomes that user.

The two have a pair of connected sockets, on which the worker sends requests of REQUEST_BYTES: "HOST PORT", and with
each a socket for its answer. The answer is "0" with the connected socket, or the number of the error. The connector
connects to private addresses only, reads no names, no files and nothing from the network. It ends when the worker's end
is closed.

The worker's start waits for this process, so it imports only what it needs. The worker's side is in vm_connections.py.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

REQUEST_BYTES = 64
# Longer than each deadline of the worker, which ends the wait earlier.
_CONNECT_SECONDS = 30.0
# Connections that are being opened at the same time. More are refused.
_MAX_CONNECTING = 256


def is_permitted(host: str, port: int) -> bool:
    """Return whether the connector connects to an address: a private one that does not lead to this host's loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    is_special = address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
    return address.is_private and not is_special and not address.is_reserved and 0 < port < 65536


def serve_worker(control: socket.socket, permitted: Callable[[str, int], bool] = is_permitted) -> None:
    """Open connections until the other end of `control` is closed."""
    slots = threading.BoundedSemaphore(_MAX_CONNECTING)
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 1, socket.MSG_WAITALL)
        if len(request) < REQUEST_BYTES:
            return
        if not descriptors:
            # This process has no descriptor free. The system has closed the socket, which the worker sees.
            continue
        answer = socket.socket(fileno=descriptors[0])
        if slots.acquire(blocking=False):
            threading.Thread(target=_answer, args=(request, answer, slots, permitted), daemon=True).start()
        else:
            _refuse(answer, errno.EAGAIN)


def _answer(
    request: bytes, answer: socket.socket, slots: threading.BoundedSemaphore, permitted: Callable[[str, int], bool]
) -> None:
    try:
        host, port = request.decode("ascii").split()
        if not permitted(host, int(port)):
            _refuse(answer, errno.EPERM)
            return
        with socket.create_connection((host, int(port)), _CONNECT_SECONDS) as connection:
            connection.setblocking(False)
            # The worker may have closed its socket for the answer.
            with answer, suppress(OSError):
                socket.send_fds(answer, [b"0"], [connection.fileno()])
    except ValueError:
        _refuse(answer, errno.EINVAL)
    except OSError as error:
        _refuse(answer, error.errno or errno.ETIMEDOUT)
    finally:
        slots.release()


def _refuse(answer: socket.socket, number: int) -> None:
    with answer, suppress(OSError):
        answer.send(b"%d" % number)


if __name__ == "__main__":
    # The connector ends when the worker's socket closes, so a signal of the terminal must not end it before.
    with socket.socket(fileno=sys.stdin.fileno()) as pair:
        serve_worker(pair)
