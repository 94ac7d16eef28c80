"""A view of all VMs that is always current, in place of polling `GET /vms` every few seconds.

Needs the capability `watch-list`.
"""

from orchard.client import Client, WatchedChange
from orchard.schema import VM


async def keep_view(client: Client, view: dict[str, VM]) -> None:
    """Keep `view` equal to the controller's VMs by name, over lost connections and restarts, until it is cancelled."""
    async with client.watch(kinds=["vms"]) as changes:
        async for change in changes:
            match change:
                case WatchedChange("DELETED", _, VM() as vm):
                    del view[vm.name]
                case WatchedChange(_, _, VM() as vm):
                    view[vm.name] = vm
