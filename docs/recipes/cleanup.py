"""Deletion of one's own old VMs, in place of name prefixes and a parser for them.

Needs the capability `vm-metadata`. A VM that was created with `ttl_seconds` needs no cleanup. All VMs of a finished job, however
old, are deleted by `client.vms.delete_matching({"metadata.job": job})`.
"""

import datetime

from orchard.client import Client


async def delete_old(client: Client, owner: str, pool: str, age: datetime.timedelta) -> list[str]:
    """Delete the VMs of an owner and a pool that are older than `age`, and return their names."""
    oldest = datetime.datetime.now(datetime.UTC) - age
    vms = await client.vms.list(filter={"createdBy": owner, "metadata.pool": pool})
    deleted: list[str] = []
    for vm in vms:
        if vm.meta.created_at is not None and vm.meta.created_at < oldest:
            deleted += await client.vms.delete_matching({"name": vm.name, "createdBy": owner, "metadata.pool": pool})
    return deleted
