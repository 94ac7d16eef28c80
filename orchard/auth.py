"""Accounts, roles and tokens: what an account may do, and what proves who sends a request. No I/O; keys and clocks are arguments.

gate.py finds the account that sends a request. `require` checks that the account has the role that an operation needs.
A role does not include another one, except as IMPLIED says.

A VM access token (a JWT) admits its bearer to one VM for some time, without an account. It is valid only for the
operations that connect to that VM.

A bootstrap token holds what a new worker needs: an account's name, its token and the controller's certificate. It can
omit the certificate if the workers' hosts trust it anyway.
"""

from __future__ import annotations

import base64
import datetime
import re
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import jwt

from orchard.schema import Role, ServiceAccount

ROLES: tuple[Role, ...] = get_args(Role)
# The second role includes the first one: an account that may change VMs may connect to them.
IMPLIED: Mapping[Role, Role] = {"compute:connect": "compute:write"}
# What an account needs to issue VM access tokens, and to keep for as long as they are valid.
ISSUER_ROLE: Role = "compute:write"
BOOTSTRAP_ADMIN = "bootstrap-admin"
# The user name with which an SSH client sends an access token as its password.
TOKEN_USER = "token"  # noqa: S105

# Characters of a random token: 190 bits.
_TOKEN_LENGTH = 32
# Characters that need no quoting in shells and URLs, and that a double click selects as one word.
_TOKEN_ALPHABET = string.ascii_letters + string.digits
_BOOTSTRAP_PREFIX = "orchard-bootstrap-token-v0"
_ISSUER = "orchard-controller"
_AUDIENCE = "orchard-vm-access"
_SCOPES = ("vm:port-forward", "vm:ip", "vm:ssh-jumpbox")
# The most credentials that are remembered with their account. Checking some takes a tenth of a request's time.
MAX_RECOGNISED = 1024
# Decoding a token takes time in proportion to its length. Our tokens have half a kilobyte.
_MAX_ACCESS_TOKEN = 8 * 1024  # bytes
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")


class UnauthenticatedError(Exception):
    """The credentials are missing or wrong; `str(error)` never repeats them."""


class ForbiddenError(Exception):
    """The credentials are correct, but do not allow the operation."""


def require(account: ServiceAccount, role: Role) -> None:
    """Raise ForbiddenError naming the role unless the account has it."""
    if role not in account.roles and IMPLIED.get(role) not in account.roles:
        raise ForbiddenError(f'service account "{account.name}" lacks the role "{role}"')


# ---- VM access tokens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """The contents of an access token: one VM, the account that issued the token, and the token's own id.

    It is valid from `issued` until `expires`, in Unix seconds.
    """

    vm_name: str
    vm_uid: str
    account: str
    issued: int
    expires: int
    token_id: str


class AccessTokens:
    """Issues access tokens and reads them. `clock` returns the time in UTC."""

    def __init__(
        self, key: bytes, accounts: Mapping[str, ServiceAccount], clock: Callable[[], datetime.datetime]
    ) -> None:
        self._key = key
        self._accounts = accounts
        self._clock = clock
        # The contents of tokens that were valid lately.
        self._recognised: dict[str, Access] = {}

    def issue(self, access: Access) -> str:
        """Return a token with these contents."""
        claims = {
            "iss": _ISSUER,
            "sub": access.account,
            "aud": [_AUDIENCE],
            "iat": access.issued,
            "nbf": access.issued,
            "exp": access.expires,
            "jti": access.token_id,
            "vm_uid": access.vm_uid,
            "vm_name": access.vm_name,
            "scopes": list(_SCOPES),
            "ports": "*",
        }
        return jwt.encode(claims, self._key, algorithm="HS256")

    def recall(self, token: str) -> Access | None:
        """Return the contents of a token that was read lately and is still valid."""
        access = self._recognised.get(token)
        if access is None:
            return None
        try:
            self._check(access)
        except UnauthenticatedError:
            del self._recognised[token]
            return None
        return access

    def read(self, token: str) -> Access:
        """Return the contents of a valid token. Raises UnauthenticatedError, whose message does not repeat the token."""
        if access := self.recall(token):
            return access
        access = read_access_token(self._key, token, self._clock())
        self._check(access)
        if len(self._recognised) >= MAX_RECOGNISED:
            self._recognised.clear()
        self._recognised[token] = access
        return access

    def _check(self, access: Access) -> None:
        """Raise UnauthenticatedError unless the token is valid now, and its issuer may still issue tokens.

        An account that was deleted and created again is another account. (Times of issue are whole seconds.)
        """
        if self._clock().timestamp() >= access.expires:
            raise _rejected("it has expired")
        issuer = self._accounts.get(access.account)
        if issuer is None or (issuer.created_at is not None and int(issuer.created_at.timestamp()) > access.issued):
            raise _rejected("the account that issued it was deleted")
        if ISSUER_ROLE not in issuer.roles:
            raise _rejected(f'the account that issued it lacks the role "{ISSUER_ROLE}"')


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
    # PyJWT before 2.14 raises RecursionError for a header of thousands of nested lists.
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
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
    return Access(name, uid, subject, issued, ends, claims["jti"])


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
