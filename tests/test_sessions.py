"""Sessions end when their account is deleted or loses the role that let it in."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest
import trio

from orchard.auth import ForbiddenError
from orchard.schema import ServiceAccount
from orchard.sessions import AccountSessions

BEGAN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
READER = ServiceAccount(name="reader", token="secret", roles=("compute:read", "compute:write"))


@pytest.mark.parametrize(
    ("after", "ends"),
    [
        (None, True),
        (replace(READER, roles=("compute:read",)), True),
        (replace(READER, roles=("compute:write",)), False),
        (replace(READER, token="another"), False),
    ],
)
def test_session_ends_when_its_account_is_deleted_or_loses_its_role(after: ServiceAccount | None, ends: bool) -> None:
    accounts = {"reader": READER}
    sessions = AccountSessions(accounts, lambda: BEGAN)
    reasons: list[str] = []
    with sessions.hold("reader", "compute:connect", reasons.append), sessions.hold("", "admin:read", reasons.append):
        accounts |= {"reader": after} if after is not None else {}
        if after is None:
            del accounts["reader"]
        for _ in range(2):
            sessions.review("reader")
        assert len(reasons) == ends
    sessions.review("reader")
    assert len(reasons) == ends


def test_session_ends_with_its_account_even_if_another_one_has_the_name_by_now() -> None:
    sessions = AccountSessions({"reader": READER}, lambda: BEGAN)
    reasons: list[str] = []
    with sessions.hold("reader", "compute:read", reasons.append):
        sessions.review("reader", deleted=True)
        assert len(reasons) == 1


def test_session_of_an_account_that_is_gone_already_ends_at_its_beginning() -> None:
    reasons: list[str] = []
    with AccountSessions({}, lambda: BEGAN).hold("reader", None, reasons.append):
        assert len(reasons) == 1


async def test_block_is_cancelled_with_its_account(autojump_clock: trio.testing.MockClock) -> None:
    accounts = {"reader": READER}
    sessions = AccountSessions(accounts, lambda: BEGAN)

    async def wait() -> None:
        with sessions.cancel_when_over("reader", "compute:read"):
            accounts["reader"] = replace(READER, roles=())
            sessions.review("reader")
            await trio.sleep_forever()

    with pytest.raises(ForbiddenError):
        await wait()
    with sessions.cancel_when_over("reader", None):
        await trio.lowlevel.checkpoint()
