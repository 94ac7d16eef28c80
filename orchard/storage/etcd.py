"""A client of etcd's JSON gateway: requests to several endpoints, and the operations of which transactions are made.

The gateway speaks HTTP/1.1 and is the same in etcd 3.4 to 3.7. Keys and values are base64, 64-bit numbers are strings,
and fields that are false or zero are left out. Nothing here knows what the keys hold.

A request goes to the endpoint that answered last, and when that one does not answer, to each of the others in turn. So
a request may be carried out more than once: callers send only such as may be repeated.
"""

from __future__ import annotations

import base64
import logging
from binascii import a2b_base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypedDict
from urllib.parse import urlsplit

import trio

from orchard.codec import load_json
from orchard.net import tcp, tls
from orchard.net.transport import AnswerTooLargeError, ClientError, ClientResponse, ResponseError, Transport

_DEFAULT_PORT = 2379
# Limit for one endpoint's answer. An election of etcd's own leader takes about a second.
_ANSWER_SECONDS = 2.0
# Limit for a page, which may have large objects and come over a slow link.
_PAGE_SECONDS = 10.0
# Keys of the first page, which may all be large, and of any other page; and the bytes of values that a page should
# have.
_FIRST_PAGE_KEYS, _PAGE_KEYS, _PAGE_BYTES = 100, 1_000, 4_000_000
# Limits of one transaction. etcd takes at most 128 operations and 1.5 MiB.
MAX_OPERATIONS, MAX_TRANSACTION_BYTES = 100, 1_000_000
QUOTA_REMEDY = "compact and defragment each node, then disarm the alarm"
_NO_SPACE = "database space exceeded"
# Statuses that do not tell whether a request was carried out: 408, or 499 from newer gateways, when etcd stops meanwhile.
_UNCERTAIN = (408, 429, 499)
# etcd's answer to a request for a revision that it no longer has.
COMPACTED = "revision has been compacted"
# etcd's answer to a token that is older than the last change of users or roles.
_OUTDATED = "auth store is old"
# The beginnings of etcd's refusals of a user, and the remedies.
_REMEDIES = {
    "user name is empty": "give --etcd-user, and its password in ORCHARD_ETCD_PASSWORD",
    "authentication failed": "correct --etcd-user, or the password in ORCHARD_ETCD_PASSWORD",
    "authentication is not enabled": "turn authentication on in etcd, or leave --etcd-user out",
    "CommonName of client": "etcd with users takes no certificate with a common name here: give --etcd-cert one without",
    "permission denied": "give the role of --etcd-user the permission readwrite for all keys below --etcd-prefix",
}

# What is wrong with a certificate, and the remedy.
_CERTIFICATE_REMEDIES: Mapping[tls.CertificateProblem, str] = {
    "": "",
    "unknown issuer": "pass the CA of etcd's certificates with --etcd-ca",
    "expired": "renew etcd's certificate",
    "wrong name": "in --etcd, use a name or an address that etcd's certificate is for",
    "client": "pass a certificate that etcd trusts, and that has not expired, with --etcd-cert and --etcd-key",
}

TxnOperation = dict[str, Any]
Comparison = dict[str, Any]

_logger = logging.getLogger("orchard.storage")


class EtcdRequestError(Exception):
    """A request to etcd failed; str() names each endpoint and why it failed."""


class EtcdUnavailableError(EtcdRequestError):
    """No endpoint answered, or has a leader. Whether the request was carried out is unknown."""


class EtcdAnswerTooLargeError(EtcdRequestError):
    """The answer to a request was larger than the limit."""


class EtcdRefusedError(EtcdRequestError):
    """An endpoint refused the request, which was not carried out. `no_space`: the quota of etcd is used up."""

    def __init__(self, message: str, *, no_space: bool = False, denied: bool = False) -> None:
        super().__init__(message)
        self.no_space = no_space
        # Whether the user, its password or its role was refused.
        self.denied = denied


@dataclass(frozen=True, slots=True)
class EtcdAccess:
    """How etcd is reached. `urls` has the endpoints; the files are in PEM; `user` and `password` may be empty."""

    urls: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    user: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key with its value, and the revisions of etcd at which it was created and last written."""

    key: str
    value: bytes = field(repr=False)
    create_revision: int
    mod_revision: int


class TransactionResult(TypedDict):
    """The outcome of a transaction: whether its comparisons held, at which revision, and what its reads found."""

    succeeded: bool
    revision: int
    found: list[list[KeyValue]]


class EtcdClient:
    """A client of the endpoints of one etcd cluster. Raises ValueError for URLs or files that cannot be used.

    `connect` opens a connection to a host and port, and raises OSError; by default it is TCP.
    """

    def __init__(self, access: EtcdAccess, connect: tcp.Connect = tcp.connect) -> None:
        try:
            trust = tls.Trust(None, access.ca, access.certificate, access.key)
        except tls.TLSError as error:
            raise ValueError(str(error)) from error
        self._access = access
        # The first one is tried first.
        self._endpoints = [
            Transport(
                _with_port(url.strip()),
                trust=trust,
                connect_seconds=_ANSWER_SECONDS,
                answer_seconds=_PAGE_SECONDS,
                connect=connect,
            )
            for url in access.urls.split(",")
        ]
        self._token = ""

    @property
    def url(self) -> str:
        """The URLs of the endpoints."""
        return ",".join(sorted(endpoint.url for endpoint in self._endpoints))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.CancelScope(shield=True):
            for endpoint in self._endpoints:
                await endpoint.aclose()

    # -- requests

    async def call(self, path: str, body: dict[str, Any], seconds: float = _ANSWER_SECONDS) -> Any:
        """Send a request that may be repeated, and return the JSON of its answer. Raises EtcdRequestError.

        Each endpoint is tried once, for so many seconds.
        """
        reasons: list[str] = []
        for endpoint in list(self._endpoints):
            try:
                with trio.fail_after(seconds):
                    return await self._call_one(endpoint, path, body)
            except EtcdRefusedError as error:
                if reasons:
                    # An earlier endpoint may have carried it out.
                    raise EtcdUnavailableError("; ".join([*reasons, str(error)])) from error
                raise
            except trio.TooSlowError:
                reasons.append(f"{endpoint.url} did not answer within {seconds:g} seconds")
            except AnswerTooLargeError as error:
                raise EtcdAnswerTooLargeError(f"{endpoint.url}: {error}") from error
            except ResponseError as error:
                reasons.append(f"{endpoint.url}: {error}")
            except ClientError as error:
                remedy = _CERTIFICATE_REMEDIES[tls.certificate_problem(error)]
                reasons.append(f"{error} ({remedy})" if remedy else str(error))
            self._endpoints.remove(endpoint)
            self._endpoints.append(endpoint)
        raise EtcdUnavailableError("; ".join(reasons))

    async def _call_one(self, endpoint: Transport, path: str, body: dict[str, Any]) -> Any:
        """Send a request to one endpoint. Raises EtcdRefusedError, ClientError."""
        for attempt in range(2):
            if self._access.user and not self._token:
                await self._authenticate(endpoint)
            headers = [("Authorization", self._token)] if self._token else []
            try:
                return _parsed(endpoint, await endpoint.request("POST", path, json=body, headers=headers))
            except ResponseError as error:
                # Tokens expire, and do not survive a restart of etcd.
                if self._access.user and attempt == 0 and (error.status == 401 or _OUTDATED in error.message):
                    self._token = ""
                    continue
                if (refusal := _refusal(endpoint.url, error)) is not None:
                    raise refusal from error
                raise
        raise AssertionError("unreachable")

    async def _authenticate(self, endpoint: Transport) -> None:
        credentials = {"name": self._access.user, "password": self._access.password}
        try:
            answer = await endpoint.request("POST", "/v3/auth/authenticate", json=credentials)
        except ResponseError as error:
            if error.status in (400, 401, 403, 412):
                what = f"{endpoint.url} refused the user {self._access.user}: {_with_remedy(error.message)}"
                raise EtcdRefusedError(what, denied=True) from error
            raise
        self._token = str(_parsed(endpoint, answer).get("token", ""))

    async def transact(
        self, comparisons: Sequence[Comparison], success: Sequence[TxnOperation], failure: Sequence[TxnOperation] = ()
    ) -> TransactionResult:
        """Carry out `success` if the comparisons hold, else `failure`. Raises EtcdRequestError."""
        body = {"compare": list(comparisons), "success": list(success), "failure": list(failure)}
        answer = await self.call("/v3/kv/txn", body)
        responses = answer.get("responses", ())
        return {
            "succeeded": answer.get("succeeded", False),
            "revision": int(answer["header"]["revision"]),
            "found": [_key_values(each["response_range"]) for each in responses if "response_range" in each],
        }

    async def get(self, key: str) -> KeyValue | None:
        """Return a key as etcd's majority has it. Raises EtcdRequestError."""
        found = _key_values(await self.call("/v3/kv/range", {"key": encoded(key.encode())}))
        return found[0] if found else None

    async def read_range(self, begin: bytes, end: bytes) -> list[KeyValue]:
        """Return the keys from `begin` to before `end`. The caller bounds their size. Raises EtcdRequestError."""
        return _key_values(await self.call("/v3/kv/range", {"key": encoded(begin), "range_end": encoded(end)}))

    async def scan(
        self, prefix: str, revision: int = 0, *, keys_only: bool = False, since: int = 0
    ) -> list[KeyValue]:  # fmt: skip
        """Return all keys with a prefix, in their order, at a revision of etcd or at the present one.

        With `since`, leave out those that were last written before this revision. Raises EtcdRequestError.
        """
        found: list[KeyValue] = []
        begin, end = prefix.encode(), end_of(prefix)
        limit = _FIRST_PAGE_KEYS
        while True:
            body = {
                "key": encoded(begin),
                "range_end": encoded(end),
                "limit": str(limit),
                "revision": str(revision),
                "keys_only": keys_only,
                "min_mod_revision": str(since),
            }
            try:
                answer = await self.call("/v3/kv/range", body, _PAGE_SECONDS)
            except EtcdAnswerTooLargeError:
                if limit == 1:
                    raise
                limit = max(1, limit // 8)
                continue
            # Later pages are read at the revision of the first one.
            revision = revision or int(answer["header"]["revision"])
            page = _key_values(answer)
            found += page
            if not answer.get("more"):
                return found
            begin = a2b_base64(answer["kvs"][-1]["key"]) + b"\0"
            limit = max(1, min(_PAGE_KEYS, _PAGE_BYTES * len(page) // max(1, sum(len(each.value) for each in page))))

    async def scan_each(self, prefixes: Sequence[str], revision: int) -> list[list[KeyValue]]:
        """Do what `scan` does for several prefixes at once: etcd makes pages while others are decoded."""
        found: dict[str, list[KeyValue]] = {}
        errors: list[EtcdRequestError] = []

        async def scan(prefix: str) -> None:
            try:
                found[prefix] = await self.scan(prefix, revision)
            except EtcdRequestError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for prefix in prefixes:
                nursery.start_soon(scan, prefix)
        if errors:
            raise errors[0]
        return [found[prefix] for prefix in prefixes]


# ---- operations ------------------------------------------------------------------------------------------------------


def encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def end_of(prefix: str) -> bytes:
    """Return the end of the range of keys with a prefix, which ends with an ASCII character."""
    return prefix[:-1].encode() + bytes([ord(prefix[-1]) + 1])


def put(key: str, value: bytes, lease: str = "") -> TxnOperation:
    request = {"key": encoded(key.encode()), "value": encoded(value)}
    return {"request_put": {**request, "lease": lease} if lease else request}


def delete(key: str) -> TxnOperation:
    return {"request_delete_range": {"key": encoded(key.encode())}}


def delete_prefix(prefix: str) -> TxnOperation:
    return {"request_delete_range": {"key": encoded(prefix.encode()), "range_end": encoded(end_of(prefix))}}


def delete_range(begin: str, end: str) -> TxnOperation:
    """Delete the keys from `begin` to before `end`."""
    return {"request_delete_range": {"key": encoded(begin.encode()), "range_end": encoded(end.encode())}}


def get(key: str) -> TxnOperation:
    return {"request_range": {"key": encoded(key.encode())}}


def was_written_at(key: str, revision: int) -> Comparison:
    """Return the comparison that holds while a key is as it was written at a revision; 0: it does not exist."""
    return {"key": encoded(key.encode()), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def _parsed(endpoint: Transport, answer: ClientResponse) -> dict[str, Any]:
    """Return the JSON of an answer. Raises ClientError unless it is one of etcd's: each has a header, or a result with one."""
    try:
        parsed = load_json(answer.body)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict) or not isinstance(parsed.get("header", parsed.get("result")), dict):
        raise ClientError(f"{endpoint.url} did not answer as etcd does; is it the client URL of etcd?")
    return parsed


def _key_values(answer: dict[str, Any]) -> list[KeyValue]:
    return [
        KeyValue(
            # Another program's key may be any bytes. It is only shown.
            a2b_base64(each["key"]).decode(errors="backslashreplace"),
            a2b_base64(each.get("value", "")),
            int(each.get("create_revision", 0)),
            int(each.get("mod_revision", 0)),
        )
        for each in answer.get("kvs", ())
    ]


def _refusal(url: str, error: ResponseError) -> EtcdRefusedError | None:
    """Return the error if the answer proves that the request was not carried out, else None."""
    if _NO_SPACE in error.message:
        return EtcdRefusedError(f"{url} has no space left: its quota is used up; {QUOTA_REMEDY}", no_space=True)
    if 400 <= error.status < 500 and error.status not in _UNCERTAIN:
        is_denied = error.status in (401, 403) or any(what in error.message for what in _REMEDIES)
        return EtcdRefusedError(f"{url} refused the request: {_with_remedy(error.message)}", denied=is_denied)
    return None


def _with_remedy(message: str) -> str:
    return next((f"{message}; {remedy}" for what, remedy in _REMEDIES.items() if what in message), message)


def _with_port(url: str) -> str:
    """Return an endpoint's URL with etcd's port unless it has one. Raises ValueError."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f'the URL of etcd is "{url}", expected a URL such as https://etcd-1.example.com:{_DEFAULT_PORT}'
        )
    parts = urlsplit(url)
    try:
        has_port = parts.port is not None
    except ValueError as error:
        raise ValueError(f'the URL of etcd is "{url}" ({error})') from None
    return url if has_port else f"{parts.scheme}://{parts.netloc}:{_DEFAULT_PORT}{parts.path}"
