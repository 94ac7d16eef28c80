"""Watches, tunnels and waiting requests of an account end within a second of its deletion, and so do its tokens' tunnels."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from harness.clients import echo, listening, receive_exactly, running_vm

from orchard.client import Client, ConnectError, ResponseError
from orchard.testing import Cluster

ROLES = ["compute:read", "compute:write"]


@asynccontextmanager
async def guest_account(c: Cluster) -> AsyncIterator[Client]:
    account = await c.client.service_accounts.create("guest", roles=ROLES)
    async with Client(c.url, account="guest", token=account.token) as client:
        yield client


async def end_guest(c: Cluster, how: str) -> None:
    if how == "deleted":
        await c.client.service_accounts.delete("guest")
    else:
        await c.client.service_accounts.replace("guest", roles=[])


@pytest.mark.parametrize("how", ["deleted", "without roles"])
async def test_everything_that_an_account_has_open_ends_with_it(how: str) -> None:
    async with running_vm(auth=True) as c, listening(echo) as port, AsyncExitStack() as stack:
        guest = await stack.enter_async_context(guest_account(c))
        token = (await guest.vms.issue_access_token("vm")).token
        bearer = await stack.enter_async_context(Client(c.url, access_token=token))
        admin_tunnel = await stack.enter_async_context(c.client.vms.port_forward("vm", port))
        tunnels = [await stack.enter_async_context(client.vms.port_forward("vm", port)) for client in (guest, bearer)]
        for tunnel in tunnels:
            await tunnel.send_all(b"hello")
            assert await receive_exactly(tunnel, 5) == b"hello"
        changes = await stack.enter_async_context(guest.vms.watch("vm"))
        assert (await anext(changes))[0] == "ADDED"
        await c.client.vms.create(name="waiting", image="any", labels={"nowhere": "1"})
        statuses: list[int] = []

        async def wait_for_address() -> None:
            with pytest.raises(ResponseError) as refused:
                await guest.vms.ip("waiting", wait=600)
            statuses.append(refused.value.status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_address)
            # The request waits at the controller by the time that another one on a new connection is answered.
            await guest.vms.get("vm")
            await end_guest(c, how)
            with trio.fail_after(60):
                for tunnel in tunnels:
                    with pytest.raises(trio.BrokenResourceError):
                        await tunnel.receive_some()
                with pytest.raises((StopAsyncIteration, ConnectError)):
                    await anext(changes)
        assert statuses in ([403], [401]), statuses
        await admin_tunnel.send_all(b"hello")
        assert await receive_exactly(admin_tunnel, 5) == b"hello"
