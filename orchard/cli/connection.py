"""Requests of the `orchard` command to a controller, with the standard library alone.

Most verbs send one request and print its answer. The import of orchard.client would take most of their time, so only the
verbs with WebSockets use it.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self
from urllib.parse import quote, urlencode

from orchard.cli.context import Context
from orchard.cli.failure import CommandError
from orchard.net.urls import ServerURL, find_proxy, parse_url

# For the whole answer to a request, and for the next line of a stream, which has an empty line each 20 s.
ANSWER_SECONDS = 60.0

QueryPairs = Mapping[str, str] | Sequence[tuple[str, str]]


class AnswerError(CommandError):
    """The controller has refused a request: `status_code` is that of HTTP, and `may_retry` if it named a time for that."""

    def __init__(self, status_code: int, message: str, *, may_retry: bool) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.may_retry = may_retry


class NetworkError(CommandError):
    """The controller cannot be reached, or the connection was lost."""


class ControllerConnection:
    """One connection to the controller of a context, used by one request after the other. `close` ends it.

    All methods raise AnswerError for an answer of 400 or more, NetworkError where there is none, and CommandError for one
    that is not a controller's. `seconds` bounds the wait for an answer, and for the next line of a stream.
    """

    def __init__(self, context: Context, *, seconds: float = ANSWER_SECONDS) -> None:
        self._context = context
        server = parsed_url(context.url)
        self.url, self._prefix = server.text, server.prefix
        self._seconds = seconds
        self._http = _connection(server, context.certificate, seconds)
        self._sock: socket.socket | None = None
        # Of the last answer to `call`.
        self.headers: Mapping[str, str] = {}

    def call(self, method: str, path: str, *, query: QueryPairs = (), body: object = None) -> Any:
        """Send a request to a path below /v1, and return the parsed JSON of its answer; None if it is empty."""
        answer = self._send(method, path, query, body)
        self.headers = dict(answer.getheaders())
        with _network_errors(self.url):
            raw = answer.read()
        return _parse(raw) if raw.strip() else None

    def lines(self, path: str, *, query: QueryPairs = (), deadline: float | None = None) -> Iterator[Any]:
        """Yield the parsed lines of an answer of JSON lines as they come, until it ends or until `deadline`.

        `deadline` is a time of time.monotonic(). Empty lines are passed over.
        """
        answer = self._send("GET", path, query, None)
        assert self._sock is not None
        ended = False
        try:
            while not ended:
                left = self._seconds if deadline is None else min(self._seconds, deadline - time.monotonic())
                if left <= 0:
                    return
                self._sock.settimeout(left)
                with _network_errors(self.url):
                    line = answer.readline()
                ended = not line
                if line.strip():
                    yield _parse(line)
        except NetworkError:
            if deadline is None or time.monotonic() < deadline:
                raise
        finally:
            if not ended:
                # What is left of the answer would be taken for the next one.
                self.close()

    def _send(self, method: str, path: str, query: QueryPairs, body: object) -> http.client.HTTPResponse:
        target = f"{self._prefix}/v1{path}"
        if query:
            target += f"?{urlencode(query)}"
        headers = {"Accept": "application/json", "User-Agent": "orchard-command"}
        if self._context.account or self._context.token:
            pair = f"{self._context.account}:{self._context.token}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        raw = None
        if body is not None:
            raw = json.dumps(body, ensure_ascii=False).encode()
            headers["Content-Type"] = "application/json"
        with _network_errors(self.url):
            if self._http.sock is None:
                self._http.connect()
            # Of an answer that ends with its connection, http.client forgets the socket.
            self._sock = self._http.sock
            self._sock.settimeout(self._seconds)
            self._http.request(method, target, raw, headers)
            answer = self._http.getresponse()
            if answer.status >= 400:
                may_retry = answer.getheader("Retry-After") is not None
                raise AnswerError(answer.status, _message(answer.status, answer.read()), may_retry=may_retry)
        return answer

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def path_of(*parts: str) -> str:
    """Return a path below /v1 from its parts, which may hold any characters."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def parsed_url(url: str) -> ServerURL:
    """Return the parts of a controller's URL. Raises CommandError."""
    try:
        return parse_url(url, "/v1")
    except ValueError as error:
        raise CommandError(str(error)) from None


def fetch_certificate(url: str) -> bytes:
    """Return the certificate that a controller shows, in PEM, unverified. Raises CommandError."""
    server = parsed_url(url)
    with _network_errors(server.text):
        connection = _connection(server, b"", ANSWER_SECONDS)
        connection.connect()
        tls: Any = connection.sock
        der = tls.getpeercert(binary_form=True)
        connection.close()
    return ssl.DER_cert_to_PEM_cert(der).encode()


# ---- connections -----------------------------------------------------------------------------------------------------


def _connection(server: ServerURL, certificate: bytes | None, seconds: float) -> http.client.HTTPConnection:
    """Return a connection, not open yet, whose server has to show the certificate, if any. Raises CommandError."""
    try:
        proxy = find_proxy(server.is_tls, server.host, os.environ)
    except ValueError as error:
        raise CommandError(str(error)) from None
    host, port = (server.host, server.port) if proxy is None else (proxy.host, proxy.port)
    if server.is_tls:
        connection: http.client.HTTPConnection = _PinnedConnection(
            host, port, timeout=seconds, context=_tls(certificate), pinned=certificate
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
                raise CommandError(
                    "the controller's certificate is not the one of this context; if the controller has a new one, add the"
                    " context again with: orchard context create --force"
                )


def _tls(certificate: bytes | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if certificate is not None:
        # The certificate itself is compared.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _network_errors:  # noqa: N801
    """Raises NetworkError for what goes wrong between the command and a controller."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | http.client.HTTPException):
            raise NetworkError(f"no answer from {self._url}: {_reason(error)}") from None


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


def _message(status: int, raw: bytes) -> str:
    try:
        return " ".join(str(json.loads(raw)["message"]).split())
    except (ValueError, TypeError, KeyError):
        return f"the controller answered {status}, and not as an Orchard does: {raw[:64]!r}"


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        raise CommandError(f"the answer is not JSON, it begins: {raw[:64]!r}; is the URL that of an Orchard?") from None
