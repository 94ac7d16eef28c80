"""An etcd in memory that speaks the JSON gateway on the product's server, for a virtual clock and a network in memory.

`MemoryEtcd` is one node's state: revisions, keys, leases by trio's clock, watches, users. It answers as the real one does
(tests/storage/test_etcd_conformance.py runs the same requests against both) to what the etcd engine asks for, and raises
AssertionError for fields that it does not know. `has_no_leader` and `is_full` make it fail, and the hooks `before` and
`after` let tests cut a connection before or after a request was carried out.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio
import trio.testing

from orchard.base.nursery import Wakeup
from orchard.net import server
from orchard.net.connection import Limits, Service
from orchard.net.request import AnyResponse, Request, Response, SendPiece, Stream

# Bounds of the real one.
MAX_OPERATIONS = 128
MAX_REQUEST_BYTES = 1536 * 1024
MAX_MESSAGE_BYTES = 2 * 1024 * 1024
# With the default time for an election.
LEAST_TTL = 2  # seconds
TERM = 2
MEMBER, CLUSTER = 11, 12
_TARGETS = {
    "VERSION": "version",
    "CREATE": "create_revision",
    "MOD": "mod_revision",
    "VALUE": "value",
    "LEASE": "lease",
}
# Of gRPC, and the HTTP status of the gateway for each.
INVALID, NOT_FOUND, DENIED, EXHAUSTED, OUT_OF_RANGE, UNAVAILABLE, UNAUTHENTICATED = 3, 5, 7, 8, 11, 14, 16
STATUS = {
    INVALID: 400,
    NOT_FOUND: 404,
    DENIED: 403,
    EXHAUSTED: 429,
    OUT_OF_RANGE: 400,
    UNAVAILABLE: 503,
    UNAUTHENTICATED: 401,
}

PATHS = frozenset(
    {
        *("/v3/kv/range", "/v3/kv/put", "/v3/kv/deleterange", "/v3/kv/txn", "/v3/kv/compaction", "/v3/watch"),
        *("/v3/lease/grant", "/v3/lease/keepalive", "/v3/lease/revoke"),
        *("/v3/maintenance/status", "/v3/auth/authenticate"),
    }
)

JSON = dict[str, Any]


class RefusedError(Exception):
    """An error of etcd: a code of gRPC and a message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Value:
    """A key's value at one revision."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0

    def json(self, *, keys_only: bool = False) -> JSON:
        fields = {
            "key": encoded(self.key),
            "create_revision": str(self.create_revision),
            "mod_revision": str(self.mod_revision),
            "version": str(self.version),
        }
        if self.value and not keys_only:
            fields["value"] = encoded(self.value)
        if self.lease:
            fields["lease"] = str(self.lease)
        return fields


@dataclass(slots=True)
class Lease:
    ttl: int
    until: float


@dataclass(slots=True)
class Change:
    revision: int
    key: bytes
    # None: deleted.
    value: Value | None


@dataclass(slots=True)
class Users:
    """`passwords` by user, empty while authentication is off; the tokens that were issued."""

    passwords: Mapping[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Admitted:
    authenticated: bool = True
    body_limit: int = 4 * MAX_MESSAGE_BYTES


class MemoryEtcd:
    """The state of an etcd, and its answers."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self.values: dict[bytes, Value] = {}
        self.leases: dict[int, Lease] = {}
        self.users = Users()
        # Whether its space is used up, and whether its nodes have no leader.
        self.is_full = self.has_no_leader = False
        # Called before and after each request with its path; what they raise ends the connection.
        self.before: Callable[[str], Awaitable[None]] | None = None
        self.after: Callable[[str], Awaitable[None]] | None = None
        self._changes: list[Change] = []
        self._watchers: set[Wakeup] = set()
        self._next_lease = 1

    # ---- over HTTP

    async def serve(self, listeners: Sequence[trio.abc.Listener[Any]], **options: Any) -> None:
        """Serve the gateway until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.expire_leases)
            await server.serve(Service(self.handle, lambda _: Admitted()), listeners, limits=Limits(), **options)

    async def handle(self, request: Request, _: Admitted) -> AnyResponse:
        if self.before is not None:
            await self.before(request.path)
        answer = self._answer(request.path, request.body, request.headers.get("authorization") or "")
        if self.after is not None:
            await self.after(request.path)
        return answer

    def _answer(self, path: str, raw: bytes, token: str) -> AnyResponse:
        try:
            if message_bytes(raw) > MAX_MESSAGE_BYTES:
                raise RefusedError(EXHAUSTED, f"grpc: received message larger than max (0 vs. {MAX_MESSAGE_BYTES})")
            if path not in PATHS:
                return Response(404)
            body = json.loads(raw or b"{}")
            if path == "/v3/watch":
                self._check_user(path, token)
                return Stream(partial(self._watch, body["create_request"]), content_type="application/json")
            return Response(200, dumped(self.answer(path, body, token)))
        except RefusedError as error:
            return refusal(error)

    # ---- requests

    def answer(self, path: str, body: JSON, token: str = "") -> JSON:
        """Answer a request other than a watch. Raises RefusedError."""
        methods: Mapping[str, Callable[[JSON], JSON]] = {
            "/v3/kv/range": self._range,
            "/v3/kv/put": lambda request: self._alone("put", request),
            "/v3/kv/deleterange": lambda request: self._alone("delete_range", request),
            "/v3/kv/txn": self._txn,
            "/v3/kv/compaction": self._compact,
            "/v3/lease/grant": self._grant,
            "/v3/lease/keepalive": self._keep_alive,
            "/v3/lease/revoke": self._revoke,
            "/v3/maintenance/status": self._status,
            "/v3/auth/authenticate": self._authenticate,
        }
        if self.has_no_leader and path != "/v3/maintenance/status":
            raise RefusedError(UNAVAILABLE, "etcdserver: no leader")
        self._check_user(path, token)
        answer = methods[path](body)
        # The gateway wraps the answers of what is a stream in gRPC.
        return answer if "result" in answer else {"header": self._header(), **answer}

    def _header(self) -> JSON:
        return {
            "cluster_id": str(CLUSTER),
            "member_id": str(MEMBER),
            "revision": str(self.revision),
            "raft_term": str(TERM),
        }

    def _check_user(self, path: str, token: str) -> None:
        if not self.users.passwords or path in ("/v3/auth/authenticate", "/v3/maintenance/status"):
            return
        if not token:
            raise RefusedError(INVALID, "etcdserver: user name is empty")
        if token not in self.users.tokens:
            raise RefusedError(UNAUTHENTICATED, "etcdserver: invalid auth token")

    def _authenticate(self, body: JSON) -> JSON:
        if not self.users.passwords:
            raise RefusedError(9, "etcdserver: authentication is not enabled")
        if self.users.passwords.get(body.get("name", "")) != body.get("password", ""):
            raise RefusedError(INVALID, "etcdserver: authentication failed, invalid user ID or password")
        token = secrets.token_hex(8)
        self.users.tokens.add(token)
        return {"token": token}

    def _status(self, body: JSON) -> JSON:
        size = str(20_000_000 if self.is_full else 20_000 + sum(len(value.value) for value in self.values.values()))
        answer = {"version": "3.5.1", "dbSize": size, "dbSizeInUse": size, "raftTerm": str(TERM), "raftIndex": "9"}
        answer |= {} if self.has_no_leader else {"leader": str(MEMBER)}
        if self.is_full:
            answer["errors"] = [f"memberID:{MEMBER} alarm:NOSPACE "]  # type: ignore[assignment]
        return answer

    # ---- keys and values

    def _range(self, body: JSON) -> JSON:
        known(
            body, "key", "range_end", "limit", "revision", "serializable", "keys_only", "count_only", "min_mod_revision"
        )
        at = int(body.get("revision", 0))
        if at > self.revision:
            raise RefusedError(OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
        if 0 < at < self.compacted:
            raise RefusedError(OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
        values = self._values_at(at)
        in_range = [values[key] for key in sorted(values) if within(key, body)]
        found = [value for value in in_range if value.mod_revision >= int(body.get("min_mod_revision", 0))]
        limit = int(body.get("limit", 0)) or len(found)
        answer: JSON = {}
        if found and not body.get("count_only"):
            answer["kvs"] = [value.json(keys_only=bool(body.get("keys_only"))) for value in found[:limit]]
        if len(found) > limit:
            answer["more"] = True
        if in_range:
            answer["count"] = str(len(in_range))
        return answer

    def _values_at(self, revision: int) -> Mapping[bytes, Value]:
        if revision in (0, self.revision):
            return self.values
        values: dict[bytes, Value] = {}
        for change in self._changes:
            if change.revision > revision:
                break
            if change.value is None:
                values.pop(change.key, None)
            else:
                values[change.key] = change.value
        return values

    def _alone(self, kind: str, body: JSON) -> JSON:
        if kind == "put":
            self._check_space(message_bytes(dumped(body)))
        answer, changed = self._apply(kind, body, self.revision + 1)
        self._commit(changed)
        return answer

    def _txn(self, body: JSON) -> JSON:
        known(body, "compare", "success", "failure")
        operations = [body.get(part, []) for part in ("compare", "success", "failure")]
        if max(map(len, operations)) > MAX_OPERATIONS:
            raise RefusedError(INVALID, "etcdserver: too many operations in txn request")
        for part in operations[1:]:
            written = [each["request_put"]["key"] for each in part if "request_put" in each]
            if len(set(written)) < len(written):
                raise RefusedError(INVALID, "etcdserver: duplicate key given in txn request")
        # A real one takes some transactions that add nothing.
        self._check_space(message_bytes(dumped(body)))
        succeeded = all(map(self._holds, operations[0]))
        responses, changes = [], list[Change]()
        for each in operations[1 if succeeded else 2]:
            ((kind, request),) = each.items()
            kind = kind.removeprefix("request_")
            answer, changed = self._apply(kind, request, self.revision + 1)
            changes += changed
            header = {"revision": str(self.revision + bool(changes))}
            responses.append({f"response_{kind}": {"header": header, **answer}})
        self._commit(changes)
        return {**({"succeeded": True} if succeeded else {}), **({"responses": responses} if responses else {})}

    def _check_space(self, size: int) -> None:
        if size > MAX_REQUEST_BYTES:
            raise RefusedError(INVALID, "etcdserver: request is too large")
        if self.is_full:
            raise RefusedError(EXHAUSTED, "etcdserver: mvcc: database space exceeded")

    def _holds(self, compare: JSON) -> bool:
        """Return whether a comparison holds; a key that does not exist has revisions and a version of 0."""
        known(compare, "key", "target", "result", *_TARGETS.values())
        name = _TARGETS[compare.get("target", "VERSION")]
        value = self.values.get(decoded(compare["key"]))
        left: Any
        right: Any
        if name == "value":
            left, right = (None if value is None else value.value), decoded(compare.get("value", ""))
            if left is None:
                return False
        else:
            left, right = (0 if value is None else getattr(value, name)), int(compare.get(name, 0))
        result: bool = {
            "EQUAL": left == right,
            "NOT_EQUAL": left != right,
            "GREATER": left > right,
            "LESS": left < right,
        }[compare.get("result", "EQUAL")]
        return result

    def _apply(self, kind: str, body: JSON, revision: int) -> tuple[JSON, list[Change]]:
        """Apply an operation, and return its answer and the changes that it made."""
        if kind == "range":
            return self._range(body), []
        if kind == "delete_range":
            known(body, "key", "range_end", "prev_kv")
            keys = [key for key in sorted(self.values) if within(key, body)]
            gone = [self.values.pop(key) for key in keys]
            answer: JSON = {"deleted": str(len(keys))} if keys else {}
            if gone and body.get("prev_kv"):
                answer["prev_kvs"] = [value.json() for value in gone]
            return answer, [Change(revision, key, None) for key in keys]
        assert kind == "put", kind
        known(body, "key", "value", "lease", "prev_kv")
        key, lease = decoded(body["key"]), int(body.get("lease", 0))
        if lease and lease not in self.leases:
            raise RefusedError(NOT_FOUND, "etcdserver: requested lease not found")
        old = self.values.get(key)
        created, version = (revision, 1) if old is None else (old.create_revision, old.version + 1)
        value = Value(key, decoded(body.get("value", "")), created, revision, version, lease)
        self.values[key] = value
        answer = {"prev_kv": old.json()} if old is not None and body.get("prev_kv") else {}
        return answer, [Change(revision, key, value)]

    def _commit(self, changes: list[Change]) -> None:
        if changes:
            self.revision += 1
            self._changes += changes
            for wakeup in self._watchers:
                wakeup.set()

    def _compact(self, body: JSON) -> JSON:
        known(body, "revision", "physical")
        at = int(body.get("revision", 0))
        if at <= self.compacted:
            raise RefusedError(OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
        if at > self.revision:
            raise RefusedError(OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
        kept = dict(self._values_at(at))
        later = [change for change in self._changes if change.revision > at]
        self._changes = [Change(value.mod_revision, key, value) for key, value in kept.items()] + later
        self.compacted = at
        return {}

    # ---- leases

    def _grant(self, body: JSON) -> JSON:
        known(body, "TTL", "ID")
        if self.is_full:
            raise RefusedError(EXHAUSTED, "etcdserver: mvcc: database space exceeded")
        number = int(body.get("ID", 0)) or self._next_lease
        if number in self.leases:
            raise RefusedError(9, "etcdserver: lease already exists")
        self._next_lease = max(self._next_lease, number) + 1
        ttl = max(LEAST_TTL, int(body["TTL"]))
        self.leases[number] = Lease(ttl, trio.current_time() + ttl)
        return {"ID": str(number), "TTL": str(ttl)}

    def _keep_alive(self, body: JSON) -> JSON:
        known(body, "ID")
        lease = self.leases.get(int(body["ID"]))
        ttl = {}
        if lease is not None:
            lease.until = trio.current_time() + lease.ttl
            ttl = {"TTL": str(lease.ttl)}
        return {"result": {"header": self._header(), "ID": str(body["ID"]), **ttl}}

    def _revoke(self, body: JSON) -> JSON:
        known(body, "ID")
        self._end_lease(int(body["ID"]))
        return {}

    def _end_lease(self, number: int) -> None:
        if self.leases.pop(number, None) is None:
            raise RefusedError(NOT_FOUND, "etcdserver: requested lease not found")
        keys = [key for key, value in self.values.items() if value.lease == number]
        for key in keys:
            del self.values[key]
        self._commit([Change(self.revision + 1, key, None) for key in keys])

    async def expire_leases(self) -> None:
        """End leases whose time is over, twice a second as etcd does, until cancelled. Without a leader none ends."""
        while True:
            await trio.sleep(0.5)
            for number, lease in list(self.leases.items()):
                if self.has_no_leader:
                    # A new leader begins each lease anew.
                    lease.until = trio.current_time() + lease.ttl
                elif lease.until <= trio.current_time():
                    self._end_lease(number)

    # ---- watches

    async def _watch(self, request: JSON, send: SendPiece) -> None:
        known(request, "key", "range_end", "start_revision", "progress_notify")
        wakeup = Wakeup()
        self._watchers.add(wakeup)
        try:
            at = int(request.get("start_revision", 0)) or self.revision + 1
            await send(self._line(created=True))
            if at < self.compacted:
                line = {"header": {}, "canceled": True, "compact_revision": str(self.compacted)}
                await send(dumped({"result": line}) + b"\n")
                return
            while True:
                now = self.revision
                events = [event(change) for change in self._changes_since(at) if within(change.key, request)]
                if events:
                    await send(self._line(events=events))
                at = now + 1
                await wakeup.wait()
        finally:
            self._watchers.discard(wakeup)

    def _changes_since(self, revision: int) -> Iterator[Change]:
        return (change for change in self._changes if change.revision >= revision)

    def _line(self, **fields: Any) -> bytes:
        return dumped({"result": {"header": self._header(), **fields}}) + b"\n"


def event(change: Change) -> JSON:
    if change.value is not None:
        return {"kv": change.value.json()}
    return {"type": "DELETE", "kv": {"key": encoded(change.key), "mod_revision": str(change.revision)}}


def within(key: bytes, body: Mapping[str, Any]) -> bool:
    """Return whether a key is in the range of a request: one key, or all before `range_end`, where a zero byte means all."""
    first, end = decoded(body["key"]), decoded(body.get("range_end", ""))
    if not end:
        return key == first
    return key >= first and (end == b"\0" or key < end)


def known(body: Mapping[str, Any], *names: str) -> None:
    """Fail for fields that this etcd would ignore."""
    unknown = set(body) - set(names)
    assert not unknown, f"the etcd in memory does not know {unknown}"


def message_bytes(raw: bytes) -> int:
    """Return about the size of a request in gRPC, where keys and values are not in base64."""
    return len(raw) * 3 // 4


def encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def decoded(text: str) -> bytes:
    return base64.b64decode(text)


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


def refusal(error: RefusedError) -> Response:
    body = {"error": str(error), "code": error.code, "message": str(error)}
    return Response(STATUS.get(error.code, 400), dumped(body))


class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    """A listener for streams in memory. `connect` opens one, whatever the host and the port."""

    def __init__(self) -> None:
        self._accepted, self._arriving = trio.open_memory_channel[trio.abc.Stream](1000)

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        await self._accepted.send(theirs)
        return ours

    async def accept(self) -> trio.abc.Stream:
        return await self._arriving.receive()

    async def aclose(self) -> None:
        self._arriving.close()


@asynccontextmanager
async def running_memory_etcd(etcd: MemoryEtcd) -> AsyncIterator[MemoryListener]:
    """Serve an etcd in memory over streams in memory for the time of the block."""
    listener = MemoryListener()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(etcd.serve, [listener])
        yield listener
        nursery.cancel_scope.cancel()
