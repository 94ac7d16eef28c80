"""VM access tokens: what they allow, and that no other token is accepted."""

from __future__ import annotations

import base64
import datetime
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
from harness.clients import echo, listening, receive_exactly, running_vm
from harness.processes import ORCHARD, PLAIN, controller, finished

from orchard import auth
from orchard.client import Client, ResponseError
from orchard.decisions.access_tokens import Access, AccessTokens, read_access_token
from orchard.decisions.login_limit import MAX_FAILURES
from orchard.schema import ServiceAccount
from orchard.testing import Cluster, cluster


@asynccontextmanager
async def token_vm() -> AsyncIterator[tuple[Cluster, int, str]]:
    """Yield a cluster with a running VM "vm", the port of a server in it, and an access token for it."""
    async with running_vm(auth=True) as c, listening(echo) as port:
        yield c, port, (await c.client.vms.issue_access_token("vm")).token


async def test_access_token_is_valid_for_its_vm_only() -> None:
    async with token_vm() as (c, port, token), Client(c.url, access_token=token) as bearer:
        issued = await c.client.vms.issue_access_token("vm", ttl=60)
        vm = await c.client.vms.get("vm")
        assert (issued.token_type, issued.ssh_username, issued.vm_name, issued.vm_uid) == (
            *("Bearer", "token", "vm"),
            vm.uid,
        )
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims.keys() == {
            *("iss", "sub", "aud", "iat", "nbf", "exp", "jti", "vm_uid", "vm_name", "scopes", "ports")
        }
        assert (claims["iss"], claims["sub"]) == ("orchard-controller", "bootstrap-admin")
        assert claims["aud"] == ["orchard-vm-access"]
        assert claims["exp"] - claims["iat"] == 86_400
        assert await bearer.vms.ip("vm") == "127.0.0.1"
        async with bearer.vms.port_forward("vm", port) as stream:
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"
        for call in (bearer.check, bearer.vms.list, partial(bearer.vms.get, "vm"), partial(bearer.vms.delete, "vm")):
            with pytest.raises(ResponseError) as refused:
                await call()
            assert refused.value.status == 401
        await c.client.vms.create(name="other", image="any")
        with pytest.raises(ResponseError) as refused:
            await bearer.vms.ip("other", wait=60)
        assert refused.value.status == 403
        with pytest.raises(ResponseError) as refused:
            await bearer.vms.ip("none")
        assert refused.value.status == 404
        await c.client.vms.delete("vm")
        await c.client.vms.create(name="vm", image="any")
        with pytest.raises(ResponseError) as refused:
            await bearer.vms.ip("vm", wait=60)
        assert refused.value.status == 403, "another VM has the name now"


@pytest.mark.parametrize("roles", [None, ["compute:read", "compute:connect"]], ids=["deleted", "without the role"])
async def test_access_token_ends_with_the_account_that_issued_it(roles: list[str] | None) -> None:
    async with running_vm(auth=True) as c:
        account = await c.client.service_accounts.create("guest", roles=["compute:write"])
        async with Client(c.url, account="guest", token=account.token) as guest:
            token = (await guest.vms.issue_access_token("vm")).token
        async with Client(c.url, access_token=token) as bearer:
            assert await bearer.vms.ip("vm") == "127.0.0.1"
            if roles is None:
                await c.client.service_accounts.delete("guest")
            else:
                await c.client.service_accounts.replace("guest", roles=roles)
            with pytest.raises(ResponseError) as refused:
                await bearer.vms.ip("vm")
            assert refused.value.status == 401


@pytest.mark.slow
async def test_guessed_access_tokens_are_limited_and_known_ones_get_through() -> None:
    async with running_vm(auth=True) as c:
        token = (await c.client.vms.issue_access_token("vm")).token
        async with Client(c.url, access_token=token) as bearer, Client(c.url, access_token="a.b.c") as guesser:
            assert await bearer.vms.ip("vm") == "127.0.0.1"
            for number in range(MAX_FAILURES + 1):
                with pytest.raises(ResponseError) as refused:
                    await guesser.vms.ip("vm")
                assert refused.value.status == (401 if number < MAX_FAILURES else 429)
            assert await bearer.vms.ip("vm") == "127.0.0.1"


def test_access_token_is_not_that_of_an_account_created_later_under_the_same_name() -> None:
    for seconds, valid in ((-60, True), (0.5, True), (1, False)):
        created = NOW + datetime.timedelta(seconds=seconds)
        account = ServiceAccount(name="account", token="t", roles=("compute:write",), created_at=created)
        refused = nullcontext() if valid else pytest.raises(auth.UnauthenticatedError)
        tokens = AccessTokens(KEY, {"account": account}, lambda: NOW)
        with refused:
            assert tokens.read(tokens.issue(ABOUT)) == ABOUT


KEY = b"k" * 32
NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
ABOUT = Access("vm", "uid", "account", int(NOW.timestamp()), int((NOW + HOUR).timestamp()), "id")
TOKENS = AccessTokens(KEY, {}, lambda: NOW)


def forged(key: bytes = KEY, algorithm: str = "HS256", header: dict[str, Any] | None = None, **claims: object) -> str:
    """Return a token with some of its claims replaced; None leaves a claim out."""
    good = TOKENS.issue(ABOUT)
    changed = {**jwt.decode(good, options={"verify_signature": False}), **claims}
    changed = {name: value for name, value in changed.items() if value is not None}
    return jwt.encode(changed, key, algorithm=algorithm, headers=header)


def unsigned(**header: object) -> str:
    parts = [{"typ": "JWT", **header}, jwt.decode(forged(), options={"verify_signature": False})]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
    return ".".join([*encoded, ""])


FORGERIES: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "no token": lambda: "a.b.c",
    "alg none": lambda: unsigned(alg="none"),
    "alg None": lambda: unsigned(alg="None"),
    "alg HS384": lambda: forged(algorithm="HS384"),
    "another key": lambda: forged(key=b"x" * 32),
    "short key": lambda: forged(key=b"\0"),
    "tampered": lambda: ".".join([*forged().split(".")[:2], forged(vm_uid="x").split(".")[2]]),
    "signature cut off": lambda: forged()[:-1],
    "another audience": lambda: forged(aud=["orchard"]),
    "no audience": lambda: forged(aud=None),
    "another issuer": lambda: forged(iss="x"),
    "expired": lambda: forged(exp=int(NOW.timestamp())),
    "never expires": lambda: forged(exp=None),
    "expiry as text": lambda: forged(exp=str(int(NOW.timestamp()) + 3600)),
    "expiry not finite": lambda: forged(exp=float("inf")),
    "from the future": lambda: forged(nbf=int(NOW.timestamp()) + 1),
    "start as text": lambda: forged(nbf="0"),
    "uid is no text": lambda: forged(vm_uid=["uid"]),
    "no uid": lambda: forged(vm_uid=None),
    "no subject": lambda: forged(sub=None),
    "a megabyte": lambda: forged(x="x" * 1_000_000),
    "unknown critical header": lambda: forged(header={"crit": ["x"], "x": 1}),
    "detached": lambda: "..",
    "deeply nested header": lambda: ".".join(
        [base64.urlsafe_b64encode(b"[" * 2900 + b"]" * 2900).decode(), *forged().split(".")[1:]]
    ),
    "key of its own": lambda: forged(key=b"y" * 32, header={"jwk": {"kty": "oct", "k": "eXl5"}, "kid": "../../key"}),
}


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_or_malformed_access_token_is_refused(forgery: str) -> None:
    token = FORGERIES[forgery]()
    with pytest.raises(auth.UnauthenticatedError) as refused:
        read_access_token(KEY, token, NOW)
    assert not token or token not in str(refused.value)


def test_access_token_with_one_changed_byte_is_refused() -> None:
    good = TOKENS.issue(ABOUT)
    assert read_access_token(KEY, good, NOW) == ABOUT
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    accepted = []
    for index, char in itertools.product(range(len(good)), "A_."):
        changed = good[:index] + char + good[index + 1 :]
        try:
            read_access_token(KEY, changed, NOW)
        except auth.UnauthenticatedError:
            continue
        accepted.append((index, changed))
    # In base64, the last character of a signature of 32 bytes has two unused bits.
    same = [good[:-1] + alphabet[alphabet.index(good[-1]) & ~3 | bits] for bits in range(4)]
    assert all(changed in (good, *same) for _, changed in accepted)


async def test_access_token_in_the_query_is_refused() -> None:
    async with token_vm() as (c, _, token):
        for name in ("token", "access_token", "authorization"):
            async with Client(c.url) as stranger:
                with pytest.raises(ResponseError) as refused:
                    await stranger.request("GET", "/vms/vm/ip", query={name: token})
            assert refused.value.status == 401


@pytest.mark.parametrize(
    ("ttl", "status"), [(1, 200), (2_592_000, 200), (0, 412), (2_592_001, 412), (-1, 400), ("1", 400)]
)
async def test_lifetime_of_an_access_token_is_bounded(ttl: object, status: int) -> None:
    async with cluster(workers=0) as c:
        await c.client.vms.create(name="vm", image="any")
        request = partial(c.client.request, "POST", "/vms/vm/access-tokens", json={"ttlSeconds": ttl})
        if status == 200:
            await request()
        else:
            with pytest.raises(ResponseError, match="ttlSeconds") as refused:
                await request()
            assert refused.value.status == status
        assert (await c.client.request("POST", "/vms/vm/access-tokens")).status == 200, "the body is optional"


@pytest.mark.slow
def test_access_token_key_is_kept_private_across_restarts(tmp_path: Path) -> None:
    with controller(*PLAIN, home=tmp_path):
        pass
    path = tmp_path / ORCHARD / "controller" / "access-token.key"
    key = path.read_bytes()
    assert (len(key), path.stat().st_mode & 0o777) == (32, 0o600)
    with controller(*PLAIN, home=tmp_path):
        assert path.read_bytes() == key
    for spoil, words in ((lambda: path.chmod(0o640), "chmod 600"), (lambda: path.write_bytes(b"short"), "5 bytes")):
        path.chmod(0o600)
        spoil()
        refused = finished("controller", "--listen", "127.0.0.1:0", "--insecure-no-tls", home=tmp_path)
        assert refused.returncode == 1
        assert words in refused.stderr
