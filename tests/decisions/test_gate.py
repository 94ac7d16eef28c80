"""The gate: HTTP Basic credentials and access tokens of requests, and what is remembered of them."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import pytest

from orchard.auth import UnauthenticatedError
from orchard.decisions import gate as gates
from orchard.decisions.access_tokens import Access, AccessTokens
from orchard.decisions.gate import Gate, named_account
from orchard.decisions.login_limit import LoginLimit
from orchard.net.urls import basic_header
from orchard.schema import ServiceAccount

NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)


def make_gate(accounts: Mapping[str, ServiceAccount]) -> Gate:
    return Gate(accounts, AccessTokens(b"k" * 32, accounts, lambda: NOW), LoginLimit(lambda: 0.0))


CI = ServiceAccount(name="ci", token="to:ken é", roles=("compute:read",))
GATE = make_gate({"ci": CI})


def basic(text: str | bytes) -> str:
    return "Basic " + base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


@pytest.mark.parametrize("scheme", ["Basic", "basic", "BASIC"])
def test_correct_credentials_are_accepted(scheme: str) -> None:
    assert GATE.identify(basic("ci:to:ken é").replace("Basic", scheme)) is CI


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Basic",
        "Basic ",
        "Basic !!!",
        "Basic \xe9",
        "Basic \u20ac",
        "Basic" + basic("ci:to:ken é")[6:],
        basic("ci:to:ken é")[:-4],
        basic("ci:to:ken é") + ", " + basic("ci:to:ken é"),
        basic("to:ken é"),
        basic("ci"),
        basic(b"ci:\xff"),
        basic("ci:"),
        basic("ci:to:ken"),
        basic("ci:to:ken é "),
        basic("CI:to:ken é"),
        basic("nobody:to:ken é"),
        basic(":"),
        "Bearer " + basic("ci:to:ken é")[6:],
        "Digest x",
    ],
)
def test_other_credentials_are_refused(header: str | None) -> None:
    with pytest.raises(UnauthenticatedError) as refused:
        GATE.identify(header)
    assert "to:ken" not in str(refused.value)


def test_unknown_name_takes_as_many_digests_as_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[int] = []
    digest = gates._digest

    def counted(token: str) -> bytes:
        work[-1] += 1
        return digest(token)

    monkeypatch.setattr(gates, "_digest", counted)
    gate = make_gate({"ci": CI})
    for header in (basic("ci:to:ken é"), basic("ci:x"), basic("nobody:x"), basic("ci:x")):
        work.append(0)
        with suppress(UnauthenticatedError):
            gate.identify(header)
    assert work == [2, 2, 2, 2]


def test_cached_credentials_are_refused_after_the_account_changed() -> None:
    accounts = {"ci": CI}
    gate = make_gate(accounts)
    assert [gate.identify(basic("ci:to:ken é")) for _ in range(2)] == [CI, CI]
    accounts["ci"] = replace(CI, roles=("admin:read",))
    changed = gate.identify(basic("ci:to:ken é"))
    assert isinstance(changed, ServiceAccount)
    assert changed.roles == ("admin:read",)
    accounts["ci"] = replace(CI, token="another")
    with pytest.raises(UnauthenticatedError):
        gate.identify(basic("ci:to:ken é"))
    assert gate.identify(basic("ci:another")) is accounts["ci"]
    del accounts["ci"]
    for _ in range(2):
        with pytest.raises(UnauthenticatedError):
            gate.identify(basic("ci:another"))


def test_credential_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "MAX_RECOGNISED", 3)
    gate = make_gate({"ci": CI})
    # HTTP allows any number of spaces here.
    for spaces in range(1, 10):
        assert gate.identify(basic("ci:to:ken é").replace(" ", " " * spaces)) is CI
        assert len(gate._recognised) <= 3


# ---- names with colons ----------------------------------------------------------------------------------------------


def test_names_and_tokens_may_have_colons() -> None:
    accounts = {
        name: ServiceAccount(name=name, token=token) for name, token in {"a": "b:c", "a:b": "d", ":": "::"}.items()
    }
    gate = make_gate(accounts)
    for text, name in {"a:b:c": "a", "a:b:d": "a:b", ":" + ":" + "::": ":"}.items():
        assert gate.identify(basic(text)) is accounts[name]
    for text in ("a:b", "a:b:c:", "a:b:", "a:b:e", "b:c", ":::", "a" * 200 + ":b"):
        with pytest.raises(UnauthenticatedError):
            gate.identify(basic(text))


def test_accepted_credentials_are_recalled_and_others_are_not() -> None:
    accounts = {"ci": replace(CI, roles=("compute:write",))}
    gate = make_gate(accounts)
    issued = int(NOW.timestamp())
    access = Access("vm", "uid", "ci", issued, issued + 60, "id")
    right, bearer = basic_header("ci", CI.token), f"Bearer {gate.tokens.issue(access)}"
    assert [gate.recall(header, bearer=True) for header in (right, bearer)] == [None, None]
    assert gate.identify(right) is accounts["ci"]
    assert gate.identify(bearer, bearer=True) == access
    assert [gate.recall(header, bearer=True) for header in (right, bearer)] == [accounts["ci"], access]
    assert gate.recall(bearer) is None, "only where access tokens are accepted"
    accounts["ci"] = replace(accounts["ci"], roles=("compute:read",))
    assert [gate.recall(header, bearer=True) for header in (right, bearer)] == [None, None]


@pytest.mark.parametrize(("header", "name"), [(basic("a:b:c"), "a"), ("Bearer x", ""), ("Basic !", ""), ("", "")])
def test_account_that_a_header_names(header: str, name: str) -> None:
    assert named_account(header) == name


def test_repr_of_credentials_shows_no_secret() -> None:
    account = ServiceAccount(name="ci", token="s3cret")
    gate = make_gate({"ci": account})
    gate.identify(basic("ci:s3cret"))
    assert "s3cret" not in f"{gate!r} {gate.tokens!r} {gate.limit!r} {account!r}"
