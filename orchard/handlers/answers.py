"""The common part of the API's answers: the statuses of errors, and remarks in a Warning header.

`http_error` maps the errors of the layers below to HTTP by ERROR_STATUS. `Remarks` collects what a client should know
although its request succeeds: names in it that nothing here knows, and notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from orchard import auth, transitions
from orchard.codec import InvalidError, MalformedError, shown
from orchard.decisions.login_limit import TooManyFailuresError
from orchard.net.request import HTTPError
from orchard.net.urls import NOT_SERVING
from orchard.schema import VM, ServiceAccount, Worker
from orchard.ssh import exec as vm_exec
from orchard.ssh.connections import ExecUnavailableError
from orchard.state.change_log import RevisionGoneError
from orchard.storage.errors import ObjectTooLargeError, StorageFullError, StorageUnavailableError
from orchard.storage.event_pages import EventsDeletedError, InvalidCursorError
from orchard.storage.event_storage import EventLimitError
from orchard.tunnel import UnknownSessionError, UnreachableError, VMGoneError

# The most unknown names that a Warning header lists.
MAX_WARNED = 8

NamedT = TypeVar("NamedT", VM, Worker, ServiceAccount)
HeaderPairs = Sequence[tuple[str, str]]

# The status of each error of the layers below. A row also holds for the subclasses of its class.
ERROR_STATUS: Mapping[type[Exception], int] = {
    MalformedError: 400,
    InvalidError: 412,
    transitions.TransitionError: 412,
    transitions.StaleReportError: 404,
    auth.UnauthenticatedError: 401,
    auth.ForbiddenError: 403,
    TooManyFailuresError: 429,
    UnreachableError: 503,
    VMGoneError: 404,
    ExecUnavailableError: 503,
    vm_exec.TooManyCommandsError: 503,
    UnknownSessionError: 404,
    StorageFullError: 507,
    StorageUnavailableError: 503,
    InvalidCursorError: 400,
    EventLimitError: 412,
    ObjectTooLargeError: 412,
    EventsDeletedError: 404,
    RevisionGoneError: 410,
}
PRODUCT_ERRORS: tuple[type[Exception], ...] = tuple(ERROR_STATUS)


def http_error(error: Exception) -> HTTPError:
    """Return the answer to a request that failed with an error of ERROR_STATUS."""
    status = next(ERROR_STATUS[kind] for kind in type(error).__mro__ if kind in ERROR_STATUS)
    headers: HeaderPairs = ()
    if isinstance(error, auth.UnauthenticatedError):
        headers = (("WWW-Authenticate", 'Basic realm="orchard"'),)
    elif isinstance(error, TooManyFailuresError):
        headers = (("Retry-After", str(error.retry_after)),)
    elif isinstance(error, StorageUnavailableError):
        # Soon another controller leads, or this one is started again.
        headers = (("Retry-After", "1"),)
    return HTTPError(status, str(error), headers)


def not_leading() -> HTTPError:
    """Return the error that replaces every answer of a controller that does not lead, or does not know that it leads."""
    headers = (("Retry-After", "1"), NOT_SERVING)
    return HTTPError(503, "this controller does not lead any more", headers, details={"role": "standby"})


class Remarks:
    """The remarks in the Warning header of one answer (RFC 7234, section 5.5).

    `unknown` holds the unknown names in a request, as codec.add_unknown makes them, after what they name: "field
    colour". `notes` are sentences without a full stop. All of them are printable ASCII without values of the client.
    """

    __slots__ = ("notes", "unknown")

    def __init__(self) -> None:
        self.unknown: list[str] = []
        self.notes: list[str] = []

    def add_unknown(self, kind: str, names: Iterable[str]) -> None:
        self.unknown += [f"{kind} {name}" for name in names]

    def __bool__(self) -> bool:
        return bool(self.unknown or self.notes)

    def __str__(self) -> str:
        more = len(self.unknown) - MAX_WARNED
        found = [f"unknown {name}" for name in self.unknown[:MAX_WARNED]]
        return "; ".join([*found, *([f"and {more} more"] if more > 0 else []), *self.notes])

    def headers(self) -> HeaderPairs:
        return (("Warning", f'299 orchard "{self}"'),) if self else ()


def found(kind: str, table: Mapping[str, NamedT], name: str) -> NamedT:
    """Return the resource of that name. Raises HTTPError(404)."""
    resource = table.get(name)
    if resource is None:
        raise HTTPError(404, f"{kind} {shown(name)} does not exist")
    return resource


def vm_is_gone(name: str, uid: str) -> HTTPError:
    return HTTPError(404, f'VM "{name}" with uid {shown(uid)} does not exist')
