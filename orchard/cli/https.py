"""Connections of the `orchard` command to a controller, with the standard library alone.

connection.py imports this file for its first request. A verb that sends none does without http.client and ssl, whose import
takes as long as the start of Python.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchard.cli.failure import CommandError, NetworkError
from orchard.net.urls import ServerURL, find_proxy


def open_http(
    server: ServerURL, certificate: bytes | None, seconds: float, context: ssl.SSLContext | None = None
) -> http.client.HTTPConnection:
    """Return a connection, not open yet, whose server has to show the certificate, if any. Raises CommandError."""
    try:
        proxy = find_proxy(server.is_tls, server.host, os.environ)
    except ValueError as error:
        raise CommandError(str(error)) from None
    host, port = (server.host, server.port) if proxy is None else (proxy.host, proxy.port)
    if server.is_tls:
        connection: http.client.HTTPConnection = _PinnedConnection(
            host, port, timeout=seconds, context=context or _tls(certificate), pinned=certificate
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=seconds)
    if proxy is not None:
        headers = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
        connection.set_tunnel(server.host, server.port, headers=headers)
    return connection


class _PinnedConnection(http.client.HTTPSConnection):
    """An HTTPS connection that ends before its first request unless the server shows the pinned certificate, if any."""

    def __init__(self, *arguments: Any, pinned: bytes | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pinned = pinned

    def connect(self) -> None:
        super().connect()
        if self._pinned:
            der: Any = self.sock.getpeercert(binary_form=True)
            if der != ssl.PEM_cert_to_DER_cert(self._pinned.decode("ascii")):
                self.close()
                raise OSError(
                    "its certificate is not the one of this context; if the controller has a new one, add the context"
                    " again with: orchard context create --force"
                )


def _tls(certificate: bytes | None) -> ssl.SSLContext:
    if certificate is None:
        return ssl.create_default_context()
    # The certificate itself is compared. To load the host's CAs would take tens of milliseconds.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@contextmanager
def network_errors(url: str) -> Iterator[None]:
    """Raise NetworkError for what goes wrong between the command and a controller."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise NetworkError(
            f"no answer from {url}: {_reason(error)}",
            is_untrusted=isinstance(error, ssl.SSLCertVerificationError),
            is_refused=isinstance(error, ConnectionRefusedError),
        ) from None


def _reason(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message}); add the controller with:"
            " orchard context create, which shows the certificate's fingerprint"
        )
    if isinstance(error, ssl.SSLError):
        return f"the TLS handshake failed ({error.reason or error}); does the URL begin with http:// where it should?"
    if isinstance(error, socket.gaierror):
        return f"the host name is unknown ({error.strerror})"
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused; is the controller running?"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed; does it expect https:// in place of http://?"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"it is not HTTP ({type(error).__name__}: {error})"
