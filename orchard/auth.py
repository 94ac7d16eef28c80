"""Accounts, roles and tokens. No I/O.

decisions/gate.py finds the account that sends a request. `require` checks that the account has the role that an operation needs.
A role does not include another one, except as IMPLIED says.

A bootstrap token holds what a new worker needs: an account's name, its token and the controller's certificate. It can
omit the certificate if the workers' hosts trust it anyway.
"""

from __future__ import annotations

import base64
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from orchard.schema import Role, ServiceAccount

ROLES: tuple[Role, ...] = get_args(Role)
# The second role includes the first one: an account that may change VMs may connect to them.
IMPLIED: Mapping[Role, Role] = {"compute:connect": "compute:write"}
# The role that an account needs to issue VM access tokens, and must keep for as long as they are valid.
ISSUER_ROLE: Role = "compute:write"
BOOTSTRAP_ADMIN = "bootstrap-admin"
# The user name with which an SSH client sends an access token as its password.
TOKEN_USER = "token"  # noqa: S105

# Characters of a random token: 190 bits.
_TOKEN_LENGTH = 32
# Characters that need no quoting in shells and URLs, and that a double click selects as one word.
_TOKEN_ALPHABET = string.ascii_letters + string.digits
_BOOTSTRAP_PREFIX = "orchard-bootstrap-token-v0"
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")


class UnauthenticatedError(Exception):
    """The credentials are missing or wrong; `str(error)` never repeats them."""


class ForbiddenError(Exception):
    """The credentials are correct, but do not allow the operation."""


def require(account: ServiceAccount, role: Role) -> None:
    """Raise ForbiddenError naming the role unless the account has it."""
    if role not in account.roles and IMPLIED.get(role) not in account.roles:
        raise ForbiddenError(f'service account "{account.name}" lacks the role "{role}"')


def bearer_of(authorization: str | None) -> str | None:
    """Return the token of an Authorization header with the scheme Bearer; None for another scheme."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


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
