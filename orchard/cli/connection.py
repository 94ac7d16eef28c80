"""Requests of the `orchard` command to a controller, with the standard library alone.

Most verbs send one request and print its answer. orchard.client would take longer to import than such a verb may run
(./run bench command), so only the verbs with WebSockets use it.
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
from urllib.parse import quote, unquote, urlencode, urlsplit

from orchard.cli.context import Context
from orchard.cli.failure import CommandError

DEFAULT_CONTROLLER_PORT = 6120
# For the whole answer to a request, and for the next line of a stream, which has an empty line each 20 s.
ANSWER_SECONDS = 60.0
_EXPECTED = "expected a URL such as https://orchard.example.com:6120"

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
        self.url, is_tls, host, port, self._prefix = split_url(context.url)
        self._seconds = seconds
        self._http = _connection(context, is_tls, host, port, seconds)
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


def split_url(url: str) -> tuple[str, bool, str, int, str]:
    """Return a controller's URL in full, whether it has TLS, its host, its port and its path. Raises CommandError."""
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        port = parts.port or DEFAULT_CONTROLLER_PORT
    except ValueError as error:
        raise CommandError(f'the URL is "{url}" ({error}), {_EXPECTED}') from None
    if parts.username is not None or parts.password is not None:
        raise CommandError(f"the URL contains a user name, {_EXPECTED}; give the account and its token separately")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or " " in url:
        raise CommandError(f'the URL is "{url}", {_EXPECTED}')
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{host}:{port}{prefix}", parts.scheme == "https", parts.hostname, port, prefix


def fetch_certificate(url: str) -> bytes:
    """Return the certificate that a controller shows, in PEM, unverified. Raises CommandError."""
    full, _, host, port, _ = split_url(url)
    with _network_errors(full):
        connection = _connection(Context(full, b""), True, host, port, ANSWER_SECONDS)
        connection.connect()
        tls: Any = connection.sock
        der = tls.getpeercert(binary_form=True)
        connection.close()
    return ssl.DER_cert_to_PEM_cert(der).encode()


# ---- connections -----------------------------------------------------------------------------------------------------


def _connection(context: Context, is_tls: bool, host: str, port: int, seconds: float) -> http.client.HTTPConnection:
    proxy = _proxy(is_tls, host)
    connect_to = (host, port) if proxy is None else (proxy[0], proxy[1])
    if is_tls:
        connection: http.client.HTTPConnection = _PinnedConnection(
            *connect_to, timeout=seconds, context=_tls(context.certificate), pinned=context.certificate
        )
    else:
        connection = http.client.HTTPConnection(*connect_to, timeout=seconds)
    if proxy is not None:
        connection.set_tunnel(host, port, headers=proxy[2])
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
                    f"the certificate of {self.host} is not the one of this context; if the controller has a new one, add the"
                    " context again with: orchard context create --force"
                )


def _tls(certificate: bytes | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if certificate is not None:
        # The certificate itself is compared.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _proxy(is_tls: bool, host: str) -> tuple[str, int, dict[str, str]] | None:
    """Return the host and port of the environment's proxy for a host, and the headers for it; None for no proxy."""
    name = "HTTPS_PROXY" if is_tls else "HTTP_PROXY"
    url = os.environ.get(name.lower()) or os.environ.get(name)
    if not url or host == "localhost" or host.startswith("127.") or host == "::1":
        return None
    # Imported here, since it takes as long as all the rest.
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    if proxy_bypass_environment(host):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if not parts.hostname:
        raise CommandError(f"{name} holds no valid URL, expected one such as http://proxy.example.com:3128")
    headers = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return parts.hostname, parts.port or 80, headers


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
