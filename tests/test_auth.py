"""Roles and bootstrap tokens."""

from __future__ import annotations

from contextlib import suppress

import pytest
from harness.strategies import QUICK
from hypothesis import given
from hypothesis import strategies as st

from orchard import auth
from orchard.auth import BootstrapToken, ForbiddenError
from orchard.schema import Role, ServiceAccount

CI = ServiceAccount(name="ci", token="to:ken é", roles=("compute:read",))
PEM = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


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
