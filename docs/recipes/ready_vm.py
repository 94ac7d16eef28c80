"""A VM that is ready for work, in place of a probe that tries to log in every few seconds.

Needs the capabilities `vm-ready`, `wait-for` and `pending-timeout`.
"""

from orchard.client import Client
from orchard.schema import VM, StartupScript


async def create_ready_vm(client: Client, name: str, image: str, script: str) -> VM:
    """Create a VM and return it when its script has ended with exit code 0. Raises VMFailed, which says what went wrong."""
    await client.vms.create(
        name=name,
        image=image,
        startup_script=StartupScript(script),
        startup_timeout_seconds=300,
        pending_timeout_seconds=600,
    )
    return await client.vms.wait(name, until="ready")
