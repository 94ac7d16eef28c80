"""An admitted request: the data that its handler gets, and how handlers read its body. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from orchard.codec import InvalidError, shown
from orchard.decisions.liveness import Source
from orchard.handlers.answers import Remarks
from orchard.net.openapi import Operation
from orchard.net.request import HTTPError, Request
from orchard.net.transport import READS_NEW_VALUES
from orchard.resources.bodies import SessionKind
from orchard.schema import Role
from orchard.sessions import SessionSubject

# The version in the User-Agent of the existing Orchard's workers. Since 0.44 they report states by
# `PUT /vms/{name}/state`.
_GO_VERSION = re.compile(r"Orchard/0\.([0-9]{1,4})(?![0-9])")
_STATE_ENDPOINT_SINCE = 44

# The kinds of sessions by the last part of the path. Other requests that last are watches.
_KINDS: Mapping[str, SessionKind] = {"events": "events", "exec": "exec", "port-forward": "port-forward"}

APIOperation = Operation[Role | Literal["public"]]
BodyT = TypeVar("BodyT")


@dataclass(slots=True)
class Admitted:
    """The operation that a request is for, the name in its path, the account that sent it, and its role.

    `account` is "" where no credentials are asked for. `role` is what the account must keep for as long as the answer
    lasts. `sender` tells the bearers of the account's access tokens from the account itself.
    """

    operation: APIOperation
    name: str
    account: str
    role: Role | None = None
    sender: str = ""
    # The next three are set once the body is read. It is parsed; None if there is none.
    body: Any = field(default=None, repr=False)
    remarks: Remarks = field(default_factory=Remarks)
    # Whether a request with an unknown name in it is refused.
    strict: bool = False

    @property
    def authenticated(self) -> bool:
        """Also of a controller that asks for no credentials: there, everybody may do everything."""
        return self.operation.role != "public"

    @property
    def body_limit(self) -> int:
        return self.operation.body_limit if self.operation.body is not None else 0


def liveness_source(request: Request, admitted: Admitted) -> Source:
    return (admitted.account, request.peer)


def subject_of(request: Request, admitted: Admitted) -> SessionSubject:
    """Return the subject of a request that lasts, for the list of sessions."""
    path = admitted.operation.path
    if path == "/rpc/watch":
        return SessionSubject("worker", f"worker/{request.query.one('workerName')}", request.peer)
    last = path.rpartition("/")[2]
    kind = _KINDS.get(last, "watch")
    what = path.split("/")[1].removesuffix("s")
    return SessionSubject(kind, f"{what}/{admitted.name}" if admitted.name else "", request.peer)


def read_body(admitted: Admitted, read: Callable[[Any, list[str]], BodyT], *, is_named: bool = False) -> BodyT:
    """Read the body by a function of resources/validation.py. Raises HTTPError(400), ValidationError.

    `is_named`: it is an object that has the name in the path, or none.
    """
    unknown: list[str] = []
    try:
        value = read(_with_name(admitted.body, admitted.name) if is_named else admitted.body, unknown)
    finally:
        admitted.remarks.add_unknown("field", unknown)
    refuse_unknown(admitted)
    return value


def _with_name(raw: Any, name: str) -> Any:
    """Return an object with the name in the path. Raises InvalidError if it has another one."""
    if not isinstance(raw, dict):
        return raw
    for key, value in raw.items():
        if key.lower() == "name" and value not in (None, "", name):
            raise InvalidError(f"name is {shown(value)}, expected {shown(name)} as in the path, or no name")
    return {**{key: value for key, value in raw.items() if key.lower() != "name"}, "name": name}


def refuse_unknown(admitted: Admitted) -> None:
    if admitted.strict and admitted.remarks.unknown:
        raise HTTPError(400, f"{admitted.remarks}; nothing was changed, because fieldValidation is strict")


def is_old_worker(request: Request) -> bool:
    """Return whether a worker that reports states by `PUT /vms/{name}` has sent a request."""
    version = _GO_VERSION.match(request.headers.get("user-agent") or "")
    return version is not None and int(version[1]) < _STATE_ENDPOINT_SINCE


def refuses_new_values(request: Request) -> bool:
    """Return whether a client or worker of an earlier version of this product has sent a request.

    It refuses an answer with a condition of a type that it does not know.
    """
    agent = request.headers.get("user-agent") or ""
    return agent.startswith("orchard/") and READS_NEW_VALUES not in agent
