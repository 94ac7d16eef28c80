"""Who you are and what you may: accounts, roles, bootstrap tokens. Law: no I/O, no clock; secrets are handed in.

A request comes with HTTP Basic credentials, a service account's name and token. `Gate.identify` finds the account in
the time that it takes for every other request, whether the name is known or not; `require` says whether it has the
role that an operation demands. Roles do not include each other, with the one exception in IMPLIED.

A bootstrap token carries all that a worker needs to be let in: an account, its token, and, when the controller's
certificate is not one that every host trusts, that certificate to trust alone.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from orchard.codec import APIError
from orchard.schema import Role, ServiceAccount

ROLES: tuple[Role, ...] = get_args(Role)
IMPLIED: Mapping[Role, Role] = {"compute:connect": "compute:write"}  # who may change VMs may reach into them
TOKEN_LENGTH = 32  # characters of a random token: 190 bits
TOKEN_ALPHABET = string.ascii_letters + string.digits  # a shell, a URL and a double click all take it for one word
BOOTSTRAP_PREFIX = "orchard-bootstrap-token-v0"
BOOTSTRAP_ADMIN = "bootstrap-admin"
_CHALLENGE = (("WWW-Authenticate", 'Basic realm="orchard"'),)
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")


class Gate:
    """Tells who sent a request. `accounts` is the live table, by name."""

    def __init__(self, accounts: Mapping[str, ServiceAccount]) -> None:
        self._accounts = accounts
        self._nobody = random_token()  # what the token of an unknown account is compared with

    def identify(self, authorization: str | None) -> ServiceAccount:
        """Find the account that an Authorization header speaks for. Raises APIError(401)."""
        if authorization is None:
            raise APIError(401, "there are no credentials, expected HTTP Basic with a service account", _CHALLENGE)
        name, token = _basic(authorization)
        account = self._accounts.get(name)
        expected = account.token if account is not None else self._nobody
        # Not only equal in time for every name: a digest hides the length of the token, too.
        same = hmac.compare_digest(_digest(expected), _digest(token))
        if account is None or not same:
            raise APIError(401, "the service account does not exist, or its token is another one", _CHALLENGE)
        return account


def _digest(token: str) -> bytes:
    return hmac.digest(b"orchard", token.encode(), "sha256")


def _basic(authorization: str) -> tuple[str, str]:
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            name, colon, token = base64.b64decode(rest.strip().encode("latin-1"), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if colon:
            return name, token
    raise APIError(401, "the Authorization header is no HTTP Basic with a name and a token in it", _CHALLENGE)


def require(account: ServiceAccount, role: Role) -> None:
    """Raise APIError(403) naming the role unless the account has it."""
    if role not in account.roles and IMPLIED.get(role) not in account.roles:
        raise APIError(403, f'service account "{account.name}" lacks the role "{role}"')


def random_token() -> str:
    return "".join(secrets.choice(TOKEN_ALPHABET) for _ in range(TOKEN_LENGTH))


@dataclass(frozen=True, slots=True)
class BootstrapToken:
    """What a worker is let in with. `certificate` is the PEM to pin, None when the host's CAs are to be trusted."""

    account: str
    token: str = field(repr=False)
    certificate: bytes | None = None

    def __str__(self) -> str:
        parts = [self.account.encode(), self.token.encode(), self.certificate]
        encoded = (base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts if part is not None)
        return ".".join([BOOTSTRAP_PREFIX, *encoded])

    @classmethod
    def parse(cls, text: str) -> BootstrapToken:
        """Read a bootstrap token. Raises ValueError that says what is wrong with it, without repeating it."""
        prefix, *parts = text.strip().split(".")
        if prefix != BOOTSTRAP_PREFIX:
            raise ValueError(f"the bootstrap token does not begin with {BOOTSTRAP_PREFIX}")
        if len(parts) not in (2, 3):
            raise ValueError(f"the bootstrap token has {len(parts)} parts after {BOOTSTRAP_PREFIX}, expected 2 or 3")
        account, token, *certificate = (_unpadded(part, index) for index, part in enumerate(parts, 1))
        if certificate and b"-----BEGIN CERTIFICATE-----" not in certificate[0]:
            raise ValueError("the third part of the bootstrap token is no certificate in PEM")
        try:
            parsed = cls(account.decode(), token.decode(), certificate[0] if certificate else None)
        except UnicodeDecodeError:
            raise ValueError("the account or the token in the bootstrap token is not UTF-8") from None
        if not parsed.account or not parsed.token:
            raise ValueError("the account or the token in the bootstrap token is empty")
        return parsed


def _unpadded(part: str, index: int) -> bytes:
    if not _BASE64URL.fullmatch(part) or len(part) % 4 == 1:
        raise ValueError(f"part {index} of the bootstrap token is no base64url; was it cut off?")
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
