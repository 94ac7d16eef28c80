"""Requests of the `orchard` command to a controller, with the standard library alone.

Most verbs send one request and print its answer. The import of orchard.client would take most of their time, so only
the verbs with WebSockets use it; https.py opens the connections here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlencode

from orchard.cli.context import Context
from orchard.cli.failure import USAGE, CommandError, NetworkError
from orchard.net.urls import (
    NOT_SERVING,
    REFUSED_PAUSE,
    SERVER_ERRORS,
    TAKEOVER_SECONDS,
    ServerURL,
    basic_header,
    parse_urls,
)

if TYPE_CHECKING:
    import http.client
    import socket
    from contextlib import AbstractContextManager

# For the whole answer to a request, and for the next line of a stream, which has an empty line each 20 s.
ANSWER_SECONDS = 60.0
# For a connection to a controller while there is another one to try: two round trips, and a first packet that was lost.
_CONNECT_SECONDS = 3.0
# Of a stream, at once.
_READ_BYTES = 64 * 1024  # bytes
# How long a controller may be away, as in orchard.client, and between two tries to reach it.
_OUTAGE_SECONDS, _RETRY_SECONDS = 600.0, 0.5
# Requests that may be sent to another controller although the first one may have carried them out.
_REPEATABLE = frozenset({"GET", "PUT", "PATCH"})

QueryPairs = Mapping[str, str] | Sequence[tuple[str, str]]


class AnswerError(CommandError):
    """The controller has refused a request: `status_code` is that of HTTP.

    `may_retry`: it named a time for that, or a proxy that reaches no controller has answered.
    """

    def __init__(self, status_code: int, message: str, *, may_retry: bool) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.may_retry = may_retry


class ControllerConnection:
    """One connection to the controller of a context, used by one request after the other. `close` ends it.

    A context may name several controllers, of which one leads. The one that answered last is tried first, and the next
    one if no connection can be opened, or if it answers that it does not lead. Only requests of `_REPEATABLE` are sent
    again after a controller may have carried them out.

    All methods raise AnswerError for an answer of 400 or more, NetworkError where there is none, and CommandError for
    one that is not a controller's. `seconds` bounds the wait for an answer, and for the next line of a stream.
    """

    def __init__(self, context: Context, *, seconds: float = ANSWER_SECONDS) -> None:
        self._context = context
        # The first one is tried first.
        self._servers = parsed_urls(context.url)
        self._seconds = seconds
        self._http: http.client.HTTPConnection | None = None
        self._sock: socket.socket | None = None
        # Of the last answer, also of a refusal.
        self.headers: Mapping[str, str] = {}

    @property
    def url(self) -> str:
        """The URL of the controller that answered last."""
        return self._servers[0].text

    def call(self, method: str, path: str, *, query: QueryPairs = (), body: object = None) -> Any:
        """Send a request to a path below /v1, and return the parsed JSON of its answer; None if it is empty."""
        answer = self._send(method, path, query, body)
        with _network_errors(self.url):
            raw = answer.read()
        return _parse(raw) if raw.strip() else None

    def fetch(self, method: str, path: str, *, query: QueryPairs = (), body: object = None) -> dict[str, Any]:
        """Do as `call`, and return the object of the answer. A name that is missing in it raises CommandError."""
        found = self.call(method, path, query=query, body=body)
        if not isinstance(found, dict):
            raise _unexpected(found, "an object")
        return found

    def fetch_list(self, path: str, *, query: QueryPairs = ()) -> list[dict[str, Any]]:
        """GET a list of objects, as `fetch` an object."""
        found = self.call("GET", path, query=query)
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise _unexpected(found, "a list of objects")
        return found

    def lines(self, path: str, *, query: QueryPairs = (), deadline: float | None = None) -> Iterator[Any]:
        """Yield the parsed lines of an answer of JSON lines as they come, until it ends or until `deadline`.

        `deadline` is a time of time.monotonic(). Empty lines are passed over.
        """
        answer = self._send("GET", path, query, None)
        assert self._sock is not None
        rest, ended = b"", False
        try:
            while not ended:
                left = self._seconds if deadline is None else min(self._seconds, deadline - time.monotonic())
                if left <= 0:
                    return
                self._sock.settimeout(left)
                # `readline` takes the loss of the connection for the end of the answer.
                with _network_errors(self.url):
                    data = answer.read1(_READ_BYTES)
                ended = not data
                *lines, rest = (rest + (data or b"\n")).split(b"\n")
                for line in lines:
                    if line.strip():
                        parsed = _parse(line)
                        if not isinstance(parsed, dict):
                            raise _unexpected(parsed, "lines that are objects")
                        yield parsed
        except NetworkError:
            if deadline is None or time.monotonic() < deadline:
                raise
        finally:
            if not ended:
                # What is left of the answer would be taken for the next one.
                self.close()

    def resumed_lines(
        self, path: str, make_query: Callable[[], QueryPairs], *, deadline: float | None = None, may_end: bool = False
    ) -> Iterator[Any]:
        """Yield lines as `lines` does. When the connection is lost or the answer ends, another request goes on.

        `make_query` returns the query parameters of the next request. `may_end`: the end of an answer is the end.
        """
        outage = Outage()
        while deadline is None or time.monotonic() < deadline:
            try:
                for line in self.lines(path, query=make_query(), deadline=deadline):
                    outage.end()
                    yield line
            except (AnswerError, NetworkError) as error:
                outage.bear(error)
            else:
                if may_end:
                    return

    def _send(self, method: str, path: str, query: QueryPairs, body: object) -> http.client.HTTPResponse:
        target = f"/v1{path}"
        if query:
            target += f"?{urlencode(query)}"
        headers = {"Accept": "application/json", "User-Agent": "orchard-command"}
        if self._context.account or self._context.token:
            headers["Authorization"] = basic_header(self._context.account, self._context.token)
        raw = None
        if body is not None:
            raw = json.dumps(body, ensure_ascii=False).encode()
            headers["Content-Type"] = "application/json"
        failures: dict[ServerURL, NetworkError] = {}
        while True:
            connection = self._open(failures)
            try:
                with _network_errors(self.url):
                    connection.request(method, f"{self._servers[0].prefix}{target}", raw, headers)
                    answer = connection.getresponse()
                    self.headers = dict(answer.getheaders())
                    if 200 <= answer.status < 300:
                        return answer
                    content = answer.read()
            except NetworkError as error:
                if method not in _REPEATABLE or len(self._servers) == 1:
                    raise
                self._move_on(failures, error)
                continue
            may_retry = answer.getheader("Retry-After") is not None
            refusal = _refusal(answer.status, content, may_retry=may_retry)
            if answer.status != 503 or answer.getheader(NOT_SERVING[0]) != NOT_SERVING[1]:
                raise refusal
            url, is_last = self.url, len(self._servers) == 1
            self._move_on(failures, NetworkError(f"no answer from {url}: {refusal}"))
            if is_last or method not in _REPEATABLE:
                raise refusal

    def _open(self, failures: dict[ServerURL, NetworkError]) -> http.client.HTTPConnection:
        """Return an open connection to the first controller that accepts one and is not among `failures`."""
        from orchard.cli.https import open_http

        until = time.monotonic() + TAKEOVER_SECONDS
        while self._http is None or self._http.sock is None:
            server = self._servers[0]
            if server in failures:
                refusing = [each for each, error in failures.items() if error.is_refused]
                if len(self._servers) == 1 or not refusing or time.monotonic() > until:
                    raise _all_failures(failures)
                # What was refused was not sent. One of them may be about to lead.
                time.sleep(REFUSED_PAUSE)
                for each in refusing:
                    del failures[each]
                self._servers = tuple(sorted(self._servers, key=failures.__contains__))
                continue
            is_last = len(failures) == len(self._servers) - 1
            try:
                self._http = open_http(server, self._context.certificate, self._seconds)
                self._http.timeout = self._seconds if is_last else min(self._seconds, _CONNECT_SECONDS)
                with _network_errors(server.text):
                    self._http.connect()
            except NetworkError as error:
                self._move_on(failures, error)
        # Of an answer that ends with its connection, http.client forgets the socket.
        self._sock = self._http.sock
        self._sock.settimeout(self._seconds)
        return self._http

    def _move_on(self, failures: dict[ServerURL, NetworkError], error: NetworkError) -> None:
        """Note why the first controller failed, and try the one after it first."""
        failures[self._servers[0]] = error
        self.close()
        self._servers = (*self._servers[1:], self._servers[0])

    def open_socket(self) -> socket.socket:
        """Return the socket of the connection, which is opened if needed."""
        sock: socket.socket = self._open({}).sock
        return sock

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Outage:
    """The time during which a controller does not answer, for example because it is restarted."""

    def __init__(self) -> None:
        self._began: float | None = None

    def bear(self, error: AnswerError | NetworkError) -> None:
        """Wait a moment before the request is sent again. Raises the error if that would not help, or after ten minutes."""
        if isinstance(error, AnswerError) and error.status_code < SERVER_ERRORS:
            raise error
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        if now - self._began > _OUTAGE_SECONDS:
            raise error
        time.sleep(_RETRY_SECONDS)

    def end(self) -> None:
        """Note that the controller has answered."""
        self._began = None


def path_of(*parts: str) -> str:
    """Return a path below /v1 from its parts, which may hold any characters. Raises CommandError for an empty one."""
    if "" in parts:
        # The path of all objects, and not of one.
        raise CommandError(f"a name is empty, expected one of {parts[0]}", USAGE)
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def parsed_urls(text: str) -> tuple[ServerURL, ...]:
    """Return the parts of the URLs of controllers, which are separated by commas. Raises CommandError."""
    try:
        return parse_urls(text, "/v1")
    except ValueError as error:
        raise CommandError(str(error)) from None


def _network_errors(url: str) -> AbstractContextManager[None]:
    from orchard.cli.https import network_errors

    return network_errors(url)


def fetch_certificate(url: str) -> bytes:
    """Return the certificate that a controller shows, in PEM, unverified. Raises CommandError."""
    import ssl

    with ControllerConnection(Context(url, certificate=b"")) as controller:
        tls: Any = controller.open_socket()
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True)).encode()


def _all_failures(failures: Mapping[ServerURL, NetworkError]) -> NetworkError:
    """Return the error of one controller as it is; of several, an error that names each and why it failed."""
    errors = list(failures.values())
    if len(errors) == 1:
        return errors[0]
    is_untrusted = any(error.is_untrusted for error in errors)
    return NetworkError("; ".join(str(error) for error in errors), is_untrusted=is_untrusted)


def _refusal(status: int, raw: bytes, *, may_retry: bool) -> AnswerError:
    """Return the error of an answer of 400 or more. `may_retry`: it names a time for that."""
    try:
        message = " ".join(str(json.loads(raw)["message"]).split())
    except (ValueError, TypeError, KeyError):
        message = f"the controller answered {status}, and not as an Orchard does: {raw[:64]!r}"
        may_retry = may_retry or status >= SERVER_ERRORS
    if status == 401:
        message += "; log in again with: orchard login URL"
    return AnswerError(status, message, may_retry=may_retry)


class _AnswerObject(dict[str, Any]):
    """An object in an answer, which says so when it lacks what is asked of it."""

    def __missing__(self, name: str) -> Any:
        raise CommandError(f'the answer has no "{name}"; is the URL that of an Orchard?')


def _unexpected(found: object, expected: str) -> CommandError:
    shown = json.dumps(found, ensure_ascii=False)[:64]
    return CommandError(f"the answer begins with {shown}, expected {expected}; is the URL that of an Orchard?")


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw, object_hook=_AnswerObject)
    except ValueError:
        raise CommandError(f"the answer is not JSON, it begins: {raw[:64]!r}; is the URL that of an Orchard?") from None
