"""Who you are and what you may: accounts, roles, VM access and bootstrap tokens. Law: no I/O, no clock; keys handed in.

A request comes with HTTP Basic credentials, a service account's name and token. `Gate.identify` finds the account in
the time that it takes for every other request, whether the name is known or not; `require` says whether it has the
role that an operation demands. Roles do not include each other, with the one exception in IMPLIED.

Who has failed ten times within a minute gets 429 for another wrong guess (`Failures`), counted by the address that it
comes from. The right credentials are let in from there all the same: many clients may stand behind one address, and a
token of 190 bits is not guessed however often. What the limit is for is the log and the processor.

A VM access token (a JWT) lets its bearer into one VM for some time, without an account. It is good for the operations
that reach into that VM, and nowhere else.

A bootstrap token carries all that a worker needs to be let in: an account, its token, and, when the controller's
certificate is not one that every host trusts, that certificate to trust alone.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hmac
import ipaddress
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

from orchard.schema import MAX_NAME, Role, ServiceAccount

ROLES: tuple[Role, ...] = get_args(Role)
IMPLIED: Mapping[Role, Role] = {"compute:connect": "compute:write"}  # who may change VMs may reach into them
TOKEN_LENGTH = 32  # characters of a random token: 190 bits
TOKEN_ALPHABET = string.ascii_letters + string.digits  # a shell, a URL and a double click all take it for one word
BOOTSTRAP_PREFIX = "orchard-bootstrap-token-v0"
BOOTSTRAP_ADMIN = "bootstrap-admin"
ISSUER = "orchard-controller"
AUDIENCE = "orchard-vm-access"
SCOPES = ("vm:port-forward", "vm:ip", "vm:ssh-jumpbox")
TOKEN_USER = "token"  # noqa: S105 -- the SSH user whose password is an access token
MAX_FAILURES = 10  # of one source within FAILURE_SECONDS, before it is told to wait
FAILURE_SECONDS = 60.0
MAX_SOURCES = 4096  # that are remembered: those that failed last, at some hundred bytes each
RECOGNISED = 1024  # Authorization headers that are remembered: to check one takes a tenth of a request's time
MAX_ACCESS_TOKEN = 8 * 1024  # bytes; decoding takes its time, and ours have half a kilobyte
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")

_logger = logging.getLogger("orchard.auth")


class UnauthenticatedError(Exception):
    """The credentials are missing or wrong; `str(error)` never repeats them."""


class ForbiddenError(Exception):
    """The account lacks the role that the operation needs."""


class TooManyFailuresError(Exception):
    """Too many wrong credentials came from one address; the next are checked in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Gate:
    """Tells who sent a request. `accounts` is the live table, by name."""

    def __init__(self, accounts: Mapping[str, ServiceAccount]) -> None:
        self._accounts = accounts
        self._nobody = random_token()  # what the token of an unknown account is compared with
        self._recognised: dict[str, ServiceAccount] = {}  # by the whole header: most requests bring one of a few

    def identify(self, authorization: str | None) -> ServiceAccount:
        """Find the account that an Authorization header speaks for. Raises UnauthenticatedError."""
        if authorization is None:
            raise UnauthenticatedError("there are no credentials, expected HTTP Basic with a service account")
        # Only who is right gets here by the short way, so the time says nothing to those who guess.
        account = self._recognised.get(authorization)
        if account is not None and self._accounts.get(account.name) is account:
            return account
        account = self._identify(authorization)
        if len(self._recognised) >= RECOGNISED:
            self._recognised.clear()
        self._recognised[authorization] = account
        return account

    def _identify(self, authorization: str) -> ServiceAccount:
        splits = _basic(authorization)
        # A name may hold colons, and so may a token: the account that there is says where the one ends.
        known = [(name, token) for name, token in splits if name in self._accounts]
        for name, token in known[:-1]:
            with suppress(UnauthenticatedError):
                return self.check(name, token)
        return self.check(*(known or splits)[-1])

    def check(self, name: str, token: str) -> ServiceAccount:
        """Find the account of that name and token. Raises UnauthenticatedError."""
        account = self._accounts.get(name)
        expected = account.token if account is not None else self._nobody
        # Not only equal in time for every name: a digest hides the length of the token, too.
        same = hmac.compare_digest(_digest(expected), _digest(token))
        if account is None or not same:
            raise UnauthenticatedError("the service account does not exist, or its token is another one")
        return account


def _digest(token: str) -> bytes:
    return hmac.digest(b"orchard", token.encode(), "sha256")


def _basic(authorization: str) -> list[tuple[str, str]]:
    """Give each way to read a header as a name and a token: the name may end at any colon."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(rest.strip().encode("latin-1"), validate=True).decode()
        except (binascii.Error, UnicodeError):
            text = ""
        if ":" in text[: MAX_NAME + 1]:
            return [(text[:at], text[at + 1 :]) for at, letter in enumerate(text[: MAX_NAME + 1]) if letter == ":"]
    raise UnauthenticatedError("the Authorization header is no HTTP Basic with a name and a token in it")


class Failures:
    """Who has failed to show credentials lately, by address. `clock` gives seconds that nobody sets."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: OrderedDict[str, deque[float]] = OrderedDict()  # whoever failed last is last

    def refusal(self, address: str, error: UnauthenticatedError) -> UnauthenticatedError | TooManyFailuresError:
        """Note a failure, and give what it is answered with: `error`, or 429 when there were too many."""
        now, source = self._clock(), source_of(address)
        times = self._recent.setdefault(source, deque(maxlen=MAX_FAILURES))
        self._recent.move_to_end(source)
        while len(self._recent) > MAX_SOURCES:
            self._recent.popitem(last=False)
        if len(times) < MAX_FAILURES or now >= times[0] + FAILURE_SECONDS:
            times.append(now)
            if len(times) == MAX_FAILURES and now < times[0] + FAILURE_SECONDS:
                _logger.warning("wrong credentials again and again", extra={"source": source})
            return error
        wait = math.ceil(times[0] + FAILURE_SECONDS - now)
        return TooManyFailuresError(
            f"{MAX_FAILURES} wrong credentials came from {source} within a minute; the next will be looked at"
            f" in {wait} seconds, the right ones at any time",
            retry_after=wait,
        )


def source_of(address: str) -> str:
    """Give what counts as one source: an IPv4 address, or the network of 64 bits that a host with IPv6 has."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))


def require(account: ServiceAccount, role: Role) -> None:
    """Raise ForbiddenError naming the role unless the account has it."""
    if role not in account.roles and IMPLIED.get(role) not in account.roles:
        raise ForbiddenError(f'service account "{account.name}" lacks the role "{role}"')


# ---- VM access tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """What an access token is about: one VM, and who let the bearer in."""

    vm_name: str
    vm_uid: str
    account: str


def issue_access_token(
    key: bytes, access: Access, now: datetime.datetime, expires: datetime.datetime, token_id: str
) -> str:
    """Make a token that is good from `now` until it `expires`; `token_id` is new for each."""
    claims = {
        "iss": ISSUER,
        "sub": access.account,
        "aud": [AUDIENCE],
        "iat": int(now.timestamp()),
        "nbf": int(now.timestamp()),
        "exp": int(expires.timestamp()),
        "jti": token_id,
        "vm_uid": access.vm_uid,
        "vm_name": access.vm_name,
        "scopes": list(SCOPES),
        "ports": "*",
    }
    return jwt.encode(claims, key, algorithm="HS256")


def read_access_token(key: bytes, token: str, now: datetime.datetime) -> Access:
    """Check a token. Raises UnauthenticatedError that does not repeat it."""
    if len(token) > MAX_ACCESS_TOKEN:
        raise _no_access(f"it has more than {MAX_ACCESS_TOKEN} bytes")
    try:
        # The times are checked below: against our clock, and only if they are numbers, which PyJWT does not ask for.
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=["HS256"],
            audience=AUDIENCE,
            issuer=ISSUER,
            options={
                "require": ["iss", "sub", "aud", "iat", "nbf", "exp", "jti", "vm_uid", "vm_name"],
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
            },
        )
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise _no_access(_why_not(error)) from error
    begins, ends = claims["nbf"], claims["exp"]
    if type(begins) is not int or type(ends) is not int:
        raise _no_access("its times are no whole numbers")
    if now.timestamp() >= ends:
        raise _no_access("it has expired")
    if now.timestamp() < begins:
        raise _no_access("it is not valid yet")
    subject, uid, name = claims["sub"], claims["vm_uid"], claims["vm_name"]
    if not (isinstance(subject, str) and isinstance(uid, str) and isinstance(name, str)):
        raise _no_access("a claim in it is no text")
    return Access(name, uid, subject)


def bearer_of(authorization: str | None) -> str | None:
    """Give the token of an Authorization header with the scheme Bearer, None for any other."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _why_not(error: Exception) -> str:
    if isinstance(error, jwt.InvalidSignatureError | jwt.InvalidAlgorithmError):
        return "it was not signed by this controller"
    if isinstance(error, jwt.InvalidAudienceError | jwt.InvalidIssuerError | jwt.MissingRequiredClaimError):
        return "it is no access token for a VM"
    return "it is malformed"


def _no_access(why: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"the access token is not accepted: {why}")


# ---- tokens --------------------------------------------------------------------------------------------------------


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
