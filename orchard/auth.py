"""Accounts, roles and tokens: who sends a request, and what that account may do. No I/O; keys and clocks are arguments.

A request carries HTTP Basic credentials: the name and the token of a service account. `Gate.identify` finds the account,
and takes the same time for an unknown name as for a wrong token. `require` checks that the account has the role that an
operation needs. A role does not include another one, except as IMPLIED says.

`FailureLimit` counts wrong credentials by source address. From a source with ten failures within a minute, further
wrong credentials get a TooManyFailuresError. Correct ones are still accepted, because many clients may share an address
and a token of 190 bits cannot be guessed. The limit protects the log and the CPU.

A VM access token (a JWT) admits its bearer to one VM for some time, without an account. It is valid only for the
operations that connect to that VM.

A bootstrap token holds what a new worker needs: an account's name, its token and the controller's certificate. It can
omit the certificate if the workers' hosts trust it anyway.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hmac
import logging
import math
import re
import secrets
import string
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, get_args

import jwt

from orchard.net.unauthenticated import source_of
from orchard.schema import MAX_NAME, Role, ServiceAccount

ROLES: tuple[Role, ...] = get_args(Role)
# The second role includes the first one: an account that may change VMs may connect to them.
IMPLIED: Mapping[Role, Role] = {"compute:connect": "compute:write"}
# What an account needs to issue VM access tokens, and to keep for as long as they are valid.
ISSUER_ROLE: Role = "compute:write"
BOOTSTRAP_ADMIN = "bootstrap-admin"
# The user name with which an SSH client sends an access token as its password.
TOKEN_USER = "token"  # noqa: S105
# Failures of one source within _FAILURE_SECONDS, before it is told to wait.
MAX_FAILURES = 10
# The most sources that are remembered, at some hundred bytes each. Those that failed least recently are forgotten first.
MAX_FAILED_SOURCES = 4096

_FAILURE_SECONDS = 60.0
# Characters of a random token: 190 bits.
_TOKEN_LENGTH = 32
# Characters that need no quoting in shells and URLs, and that a double click selects as one word.
_TOKEN_ALPHABET = string.ascii_letters + string.digits
_BOOTSTRAP_PREFIX = "orchard-bootstrap-token-v0"
_ISSUER = "orchard-controller"
_AUDIENCE = "orchard-vm-access"
_SCOPES = ("vm:port-forward", "vm:ip", "vm:ssh-jumpbox")
# The most Authorization headers that are remembered with their account. Checking one takes a tenth of a request's time.
_MAX_RECOGNISED = 1024
# Decoding a token takes time in proportion to its length. Our tokens have half a kilobyte.
_MAX_ACCESS_TOKEN = 8 * 1024  # bytes
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")

_logger = logging.getLogger("orchard.auth")


class UnauthenticatedError(Exception):
    """The credentials are missing or wrong; `str(error)` never repeats them."""


class ForbiddenError(Exception):
    """The credentials are correct, but do not allow the operation."""


class TooManyFailuresError(Exception):
    """Too many wrong credentials came from one source; it is to wait `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


# ---- accounts -------------------------------------------------------------------------------------------------------


class Gate:
    """Finds the account of a request. `accounts` is the store's table of accounts, by name."""

    def __init__(self, accounts: Mapping[str, ServiceAccount]) -> None:
        self._accounts = accounts
        # The token of an unknown account is compared with this one.
        self._decoy = random_token()
        # Accounts by the whole header: most requests carry one of a few headers.
        self._recognised: dict[str, ServiceAccount] = {}

    def identify(self, authorization: str | None) -> ServiceAccount:
        """Return the account whose credentials an Authorization header carries. Raises UnauthenticatedError."""
        if authorization is None:
            raise UnauthenticatedError("credentials are missing, expected HTTP Basic with a service account")
        # Only correct credentials are cached, so timing reveals nothing about wrong ones.
        account = self._recognised.get(authorization)
        if account is not None and self._accounts.get(account.name) is account:
            return account
        account = self._identify(authorization)
        if len(self._recognised) >= _MAX_RECOGNISED:
            self._recognised.clear()
        self._recognised[authorization] = account
        return account

    def _identify(self, authorization: str) -> ServiceAccount:
        splits = _basic_credentials(authorization)
        # Names and tokens may contain colons, so try each split whose name is that of an account.
        known = [(name, token) for name, token in splits if name in self._accounts]
        for name, token in known[:-1]:
            with suppress(UnauthenticatedError):
                return self.check(name, token)
        return self.check(*(known or splits)[-1])

    def check(self, name: str, token: str) -> ServiceAccount:
        """Return the account of that name if its token is right. Raises UnauthenticatedError."""
        account = self._accounts.get(name)
        expected = account.token if account is not None else self._decoy
        # Digests have one length, so the time of the comparison does not depend on the length of the token either.
        same = hmac.compare_digest(_digest(expected), _digest(token))
        if account is None or not same:
            raise UnauthenticatedError("unknown service account or wrong token")
        return account


def _digest(token: str) -> bytes:
    return hmac.digest(b"orchard", token.encode(), "sha256")


def _basic_credentials(authorization: str) -> list[tuple[str, str]]:
    """Return every split of HTTP Basic credentials into a name and a token: one for each colon. Raises UnauthenticatedError."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(rest.strip().encode("latin-1"), validate=True).decode()
        except (binascii.Error, UnicodeError):
            text = ""
        if ":" in text[: MAX_NAME + 1]:
            return [(text[:at], text[at + 1 :]) for at, letter in enumerate(text[: MAX_NAME + 1]) if letter == ":"]
    raise UnauthenticatedError("the Authorization header is malformed, expected HTTP Basic with a name and a token")


def require(account: ServiceAccount, role: Role) -> None:
    """Raise ForbiddenError naming the role unless the account has it."""
    if role not in account.roles and IMPLIED.get(role) not in account.roles:
        raise ForbiddenError(f'service account "{account.name}" lacks the role "{role}"')


class FailureLimit:
    """Counts wrong credentials by source. `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # The times of each source's last failures. The source that failed last is last.
        self._recent: OrderedDict[str, deque[float]] = OrderedDict()

    def record(self, address: str) -> None:
        """Count a failure of a client's address. Raises TooManyFailuresError if its source had too many."""
        now, source = self._clock(), source_of(address)
        times = self._recent.setdefault(source, deque(maxlen=MAX_FAILURES))
        self._recent.move_to_end(source)
        while len(self._recent) > MAX_FAILED_SOURCES:
            self._recent.popitem(last=False)
        if len(times) == MAX_FAILURES and now < times[0] + _FAILURE_SECONDS:
            wait = math.ceil(times[0] + _FAILURE_SECONDS - now)
            raise TooManyFailuresError(
                f"{MAX_FAILURES} wrong credentials came from {source} within a minute; wait {wait} seconds before"
                " further attempts (correct credentials are accepted at any time)",
                retry_after=wait,
            )
        times.append(now)
        if len(times) == MAX_FAILURES and now < times[0] + _FAILURE_SECONDS:
            _logger.warning("many failed logins", extra={"source": source})


# ---- VM access tokens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """The contents of an access token: one VM, the account that issued the token, when (Unix seconds), and its own id."""

    vm_name: str
    vm_uid: str
    account: str
    issued: int = 0
    token_id: str = ""


def issue_access_token(key: bytes, access: Access, expires: datetime.datetime) -> str:
    """Return a token that is valid from `access.issued` until `expires`. Its id is unique."""
    claims = {
        "iss": _ISSUER,
        "sub": access.account,
        "aud": [_AUDIENCE],
        "iat": access.issued,
        "nbf": access.issued,
        "exp": int(expires.timestamp()),
        "jti": access.token_id,
        "vm_uid": access.vm_uid,
        "vm_name": access.vm_name,
        "scopes": list(_SCOPES),
        "ports": "*",
    }
    return jwt.encode(claims, key, algorithm="HS256")


def read_access_token(key: bytes, token: str, now: datetime.datetime) -> Access:
    """Return the contents of a valid token. Raises UnauthenticatedError, whose message does not repeat the token."""
    if len(token) > _MAX_ACCESS_TOKEN:
        raise _rejected(f"it is longer than {_MAX_ACCESS_TOKEN} bytes")
    try:
        # The times are checked below, against `now`, and only if they are whole numbers, which PyJWT does not check.
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=["HS256"],
            audience=_AUDIENCE,
            issuer=_ISSUER,
            options={
                "require": ["iss", "sub", "aud", "iat", "nbf", "exp", "jti", "vm_uid", "vm_name"],
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
            },
        )
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise _rejected(_why_not(error)) from error
    begins, ends, issued = claims["nbf"], claims["exp"], claims["iat"]
    if not all(type(each) is int for each in (begins, ends, issued)):
        raise _rejected("its times are not whole numbers")
    if now.timestamp() >= ends:
        raise _rejected("it has expired")
    if now.timestamp() < begins:
        raise _rejected("it is not valid yet")
    subject, uid, name = claims["sub"], claims["vm_uid"], claims["vm_name"]
    if not all(isinstance(each, str) for each in (subject, uid, name, claims["jti"])):
        raise _rejected("one of its claims is not a string")
    return Access(name, uid, subject, issued, claims["jti"])


def require_issuer(accounts: Mapping[str, ServiceAccount], access: Access) -> None:
    """Raise UnauthenticatedError unless the account that issued a token exists and may still issue tokens.

    An account that was deleted and created again is another account. (Times of issue are whole seconds.)
    """
    issuer = accounts.get(access.account)
    if issuer is None or (issuer.created_at is not None and int(issuer.created_at.timestamp()) > access.issued):
        raise _rejected("the account that issued it was deleted")
    if ISSUER_ROLE not in issuer.roles:
        raise _rejected(f'the account that issued it lacks the role "{ISSUER_ROLE}"')


def bearer_of(authorization: str | None) -> str | None:
    """Return the token of an Authorization header with the scheme Bearer; None for another scheme."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _why_not(error: Exception) -> str:
    if isinstance(error, jwt.InvalidSignatureError | jwt.InvalidAlgorithmError):
        return "it was not signed by this controller"
    if isinstance(error, jwt.InvalidAudienceError | jwt.InvalidIssuerError | jwt.MissingRequiredClaimError):
        return "it is not an access token for a VM"
    return "it is malformed"


def _rejected(why: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"the access token is not accepted: {why}")


# ---- tokens ---------------------------------------------------------------------------------------------------------


def random_token() -> str:
    """Return a new secret token of 32 letters and digits."""
    return "".join(secrets.choice(_TOKEN_ALPHABET) for _ in range(_TOKEN_LENGTH))


@dataclass(frozen=True, slots=True)
class BootstrapToken:
    """A worker's credentials. `certificate` is the PEM to pin; None: the worker trusts its host's CAs."""

    account: str
    token: str = field(repr=False)
    certificate: bytes | None = None

    def __str__(self) -> str:
        parts = [self.account.encode(), self.token.encode(), self.certificate]
        encoded = (base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts if part is not None)
        return ".".join([_BOOTSTRAP_PREFIX, *encoded])

    @classmethod
    def parse(cls, text: str) -> BootstrapToken:
        """Return the bootstrap token of a text. Raises ValueError, whose message does not repeat the text."""
        prefix, *parts = text.strip().split(".")
        if prefix != _BOOTSTRAP_PREFIX:
            raise ValueError(f"the bootstrap token does not begin with {_BOOTSTRAP_PREFIX}")
        if len(parts) not in (2, 3):
            raise ValueError(f"the bootstrap token has {len(parts)} parts after {_BOOTSTRAP_PREFIX}, expected 2 or 3")
        account, token, *certificate = (_unpadded(part, index) for index, part in enumerate(parts, 1))
        if certificate and b"-----BEGIN CERTIFICATE-----" not in certificate[0]:
            raise ValueError("part 3 of the bootstrap token is not a certificate in PEM")
        try:
            parsed = cls(account.decode(), token.decode(), certificate[0] if certificate else None)
        except UnicodeDecodeError:
            raise ValueError("the account or the token in the bootstrap token is not UTF-8") from None
        if not parsed.account or not parsed.token:
            raise ValueError("the account or the token in the bootstrap token is empty")
        return parsed


def _unpadded(part: str, index: int) -> bytes:
    if not _BASE64URL.fullmatch(part) or len(part) % 4 == 1:
        raise ValueError(f"part {index} of the bootstrap token is not base64url; was it cut off?")
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
