"""VM access tokens: each admits its bearer to one VM for some time, without an account. No I/O; keys and clocks are arguments.

A token (a JWT) is valid only for the operations that connect to that VM. This is the only file that imports PyJWT: its
import takes a tenth of a worker's start, and neither workers nor the command need it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from orchard.auth import ISSUER_ROLE, UnauthenticatedError
from orchard.schema import ServiceAccount

_ISSUER = "orchard-controller"
_AUDIENCE = "orchard-vm-access"
_SCOPES = ("vm:port-forward", "vm:ip", "vm:ssh-jumpbox")
# The most credentials that are remembered with their account. Checking credentials takes a tenth of a request's time.
MAX_RECOGNISED = 1024
# Decoding a token takes time in proportion to its length. Our tokens have half a kilobyte.
_MAX_ACCESS_TOKEN = 8 * 1024  # bytes


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


def _why_not(error: Exception) -> str:
    if isinstance(error, jwt.InvalidSignatureError | jwt.InvalidAlgorithmError):
        return "it was not signed by this controller"
    if isinstance(error, jwt.InvalidAudienceError | jwt.InvalidIssuerError | jwt.MissingRequiredClaimError):
        return "it is not an access token for a VM"
    return "it is malformed"


def _rejected(why: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"the access token is not accepted: {why}")
