"""Credentials: HTTP Basic, roles, bootstrap tokens, and the limit for failures."""

from __future__ import annotations

import base64
from contextlib import suppress
from dataclasses import replace

import pytest
from harness.strategies import QUICK
from hypothesis import given
from hypothesis import strategies as st

from orchard import auth
from orchard.auth import (
    MAX_FAILED_SOURCES,
    MAX_FAILURES,
    BootstrapToken,
    FailureLimit,
    ForbiddenError,
    Gate,
    TooManyFailuresError,
    UnauthenticatedError,
)
from orchard.schema import Role, ServiceAccount

CI = ServiceAccount(name="ci", token="to:ken é", roles=("compute:read",))
GATE = Gate({"ci": CI})
PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


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
    digest = auth._digest

    def counted(token: str) -> bytes:
        work[-1] += 1
        return digest(token)

    monkeypatch.setattr(auth, "_digest", counted)
    gate = Gate({"ci": CI})
    for header in (basic("ci:to:ken é"), basic("ci:x"), basic("nobody:x"), basic("ci:x")):
        work.append(0)
        with suppress(UnauthenticatedError):
            gate.identify(header)
    assert work == [2, 2, 2, 2]


def test_cached_credentials_are_refused_after_the_account_changed() -> None:
    accounts = {"ci": CI}
    gate = Gate(accounts)
    assert [gate.identify(basic("ci:to:ken é")) for _ in range(2)] == [CI, CI]
    accounts["ci"] = replace(CI, roles=("admin:read",))
    assert gate.identify(basic("ci:to:ken é")).roles == ("admin:read",)
    accounts["ci"] = replace(CI, token="another")
    with pytest.raises(UnauthenticatedError):
        gate.identify(basic("ci:to:ken é"))
    assert gate.identify(basic("ci:another")) is accounts["ci"]
    del accounts["ci"]
    for _ in range(2):
        with pytest.raises(UnauthenticatedError):
            gate.identify(basic("ci:another"))


def test_credential_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_MAX_RECOGNISED", 3)
    gate = Gate({"ci": CI})
    # HTTP allows any number of spaces here.
    for spaces in range(1, 10):
        assert gate.identify(basic("ci:to:ken é").replace(" ", " " * spaces)) is CI
        assert len(gate._recognised) <= 3


def test_missing_role_is_named() -> None:
    auth.require(CI, "compute:read")
    with pytest.raises(ForbiddenError, match='service account "ci" lacks the role "admin:write"'):
        auth.require(CI, "admin:write")


def test_only_compute_write_implies_another_role() -> None:
    includes = {(has, role) for has in auth.ROLES for role in auth.ROLES if has != role and _has(has, role)}
    assert includes == {("compute:write", "compute:connect")}


def _has(has: Role, role: Role) -> bool:
    with suppress(ForbiddenError):
        auth.require(ServiceAccount(name="ci", token="t", roles=(has,)), role)
        return True
    return False


def test_random_tokens_are_alphanumeric() -> None:
    tokens = {auth.random_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 32 and token.isalnum() and token.isascii() for token in tokens)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@QUICK
@given(texts, texts, st.none() | st.binary().map(lambda tail: PEM + tail))
def test_bootstrap_token_round_trips(account: str, token: str, certificate: bytes | None) -> None:
    written = BootstrapToken(account, token, certificate)
    assert BootstrapToken.parse(f" {written}\n") == written


def test_bootstrap_token_format_and_repr() -> None:
    assert str(BootstrapToken("account", "token")) == "orchard-bootstrap-token-v0.YWNjb3VudA.dG9rZW4"
    assert "s3cret" not in repr(BootstrapToken("account", "s3cret"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not begin with orchard-bootstrap-token-v0"),
        ("orchard-bootstrap-token-v1.YQ.YQ", "does not begin with"),
        ("orchard-bootstrap-token-v0", "has 0 parts"),
        ("orchard-bootstrap-token-v0.c2VjcmV0", "has 1 parts"),
        ("orchard-bootstrap-token-v0.YQ.YQ.YQ.YQ", "has 4 parts"),
        ("orchard-bootstrap-token-v0.YQ.c2VjcmV0.YQ", "part 3 .* not a certificate"),
        ("orchard-bootstrap-token-v0.Y.c2VjcmV0", "part 1 .* not base64url"),
        ("orchard-bootstrap-token-v0.YQ.c2Vjcm+0", "part 2 .* not base64url"),
        ("orchard-bootstrap-token-v0.YQ==.YQ", "part 1"),
        ("orchard-bootstrap-token-v0._w.c2VjcmV0", "not UTF-8"),
        ("orchard-bootstrap-token-v0..c2VjcmV0", "is empty"),
    ],
)
def test_malformed_bootstrap_token_is_refused_without_repeating_it(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        BootstrapToken.parse(text)
    assert "c2Vjcm" not in str(refused.value)
    assert "secret" not in str(refused.value)


# ---- names with colons ----------------------------------------------------------------------------------------------


def test_names_and_tokens_may_have_colons() -> None:
    accounts = {
        name: ServiceAccount(name=name, token=token) for name, token in {"a": "b:c", "a:b": "d", ":": "::"}.items()
    }
    gate = Gate(accounts)
    for text, name in {"a:b:c": "a", "a:b:d": "a:b", ":" + ":" + "::": ":"}.items():
        assert gate.identify(basic(text)).name == name
    for text in ("a:b", "a:b:c:", "a:b:", "a:b:e", "b:c", ":::", "a" * 200 + ":b"):
        with pytest.raises(UnauthenticatedError):
            gate.identify(basic(text))


# ---- too many failures ----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def retry_after(limit: FailureLimit, address: str) -> int:
    """Record a failure. Return the seconds that its source is told to wait, or 0."""
    try:
        limit.record(address)
    except TooManyFailuresError as error:
        return error.retry_after
    return 0


def test_source_with_ten_failures_a_minute_has_to_wait(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    limit = FailureLimit(clock)
    for second in range(MAX_FAILURES):
        clock.now = 1000.0 + second
        assert retry_after(limit, "10.0.0.1") == 0
    for at, seconds in ((9.5, 51), (59.0, 1)):
        clock.now = 1000.0 + at
        assert retry_after(limit, "10.0.0.1") == seconds
        assert retry_after(limit, "10.0.0.2") == 0, "another source is not limited"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", "many failed logins")]
    clock.now = 1060.0
    assert retry_after(limit, "10.0.0.1") == 0
    assert retry_after(limit, "10.0.0.1") > 0, "the second of the last ten failures is less than a minute ago"


def test_failure_limit_remembers_the_latest_sources() -> None:
    limit = FailureLimit(Clock())
    for _ in range(MAX_FAILURES):
        limit.record("first")
    for number in range(MAX_FAILED_SOURCES - 1):
        limit.record(f"host-{number}")
    assert retry_after(limit, "first") > 0
    for number in range(MAX_FAILED_SOURCES):
        limit.record(f"other-{number}")
    assert retry_after(limit, "first") == 0
