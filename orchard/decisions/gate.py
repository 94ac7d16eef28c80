"""The gate: who sends a request, by HTTP Basic credentials or by a VM access token. Pure.

A request carries the name and the token of a service account, and `Gate.identify` finds the account. It takes the same
time for an unknown name as for a wrong token. The SSH jump host passes its credentials through the same gate, so one
limit (login_limit.py) holds for both.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from contextlib import suppress

from orchard.auth import UnauthenticatedError, bearer_of
from orchard.decisions.access_tokens import MAX_RECOGNISED, Access, AccessTokens
from orchard.decisions.login_limit import LoginLimit
from orchard.schema import MAX_NAME, ServiceAccount

# The token of an unknown account is compared with this one. Whatever the result is, the credentials are wrong.
_DECOY = "x" * 32


class Gate:
    """Finds the sender of a request. `accounts` is the store's table of accounts, by name.

    `limit` is for the callers: `identify` itself never waits.
    """

    def __init__(self, accounts: Mapping[str, ServiceAccount], tokens: AccessTokens, limit: LoginLimit) -> None:
        self.tokens = tokens
        self.limit = limit
        self._accounts = accounts
        # Accounts by the whole header: most requests carry one of a few headers.
        self._recognised: dict[str, ServiceAccount] = {}

    def recall(self, authorization: str, *, bearer: bool = False) -> ServiceAccount | Access | None:
        """Return whose credentials an Authorization header carries if they were accepted lately.

        `bearer`: VM access tokens are accepted, too.
        """
        # Only correct credentials are cached, so timing reveals nothing about wrong ones.
        account = self._recognised.get(authorization)
        if account is not None:
            return account if self._accounts.get(account.name) is account else None
        token = bearer_of(authorization) if bearer else None
        return self.tokens.recall(token) if token is not None else None

    def identify(self, authorization: str | None, *, bearer: bool = False) -> ServiceAccount | Access:
        """Return whose credentials an Authorization header carries. Raises UnauthenticatedError."""
        if authorization is None:
            raise UnauthenticatedError("credentials are missing, expected HTTP Basic with a service account")
        if known := self.recall(authorization, bearer=bearer):
            return known
        if bearer and (token := bearer_of(authorization)) is not None:
            return self.tokens.read(token)
        account = self._identify(authorization)
        if len(self._recognised) >= MAX_RECOGNISED:
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
        expected = account.token if account is not None else _DECOY
        # Digests have one length, so the time of the comparison does not depend on the length of the token either.
        same = hmac.compare_digest(_digest(expected), _digest(token))
        if account is None or not same:
            raise UnauthenticatedError("unknown service account or wrong token")
        return account


def _digest(token: str) -> bytes:
    return hmac.digest(b"orchard", token.encode(), "sha256")


def _basic_credentials(authorization: str) -> list[tuple[str, str]]:
    """Return each split of HTTP Basic credentials at a colon into name and token. Raises UnauthenticatedError."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(rest.strip().encode("latin-1"), validate=True).decode()
        except (binascii.Error, UnicodeError):
            text = ""
        if ":" in text[: MAX_NAME + 1]:
            return [(text[:at], text[at + 1 :]) for at, letter in enumerate(text[: MAX_NAME + 1]) if letter == ":"]
    raise UnauthenticatedError("the Authorization header is malformed, expected HTTP Basic with a name and a token")


def named_account(authorization: str) -> str:
    """Return the name in an Authorization header, "" if it has none. (A name with colons is cut at the first one.)"""
    with suppress(UnauthenticatedError):
        return _basic_credentials(authorization)[0][0]
    return ""
