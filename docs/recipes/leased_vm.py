"""A VM that is deleted when its owner stops renewing it, in place of a reaper.

Needs the capability `vm-ttl`. The controller deletes the VM, so it goes also if this program is killed.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from orchard.client import Client


@asynccontextmanager
async def leased_vm(client: Client, name: str, image: str, seconds: int = 600) -> AsyncIterator[None]:
    """Have a VM for the time of the block, and until `seconds` after it or after the end of this program."""
    await client.vms.create(name=name, image=image, ttl_seconds=seconds)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(renew, client, name, seconds)
        yield
        nursery.cancel_scope.cancel()


async def renew(client: Client, name: str, seconds: int) -> None:
    while True:
        await trio.sleep(seconds / 3)
        await client.vms.patch(name, ttl_seconds=seconds)
