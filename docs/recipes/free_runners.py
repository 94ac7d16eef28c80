"""How many more runners fit, in place of summing up the resources of workers and VMs.

Needs the capability `capacity`. The answer promises nothing. A runner that has to start at once or not at all is created with
`queue="never"`.
"""

from collections.abc import Mapping

from orchard.client import Client
from orchard.schema import TART_VMS


async def count_free_runners(client: Client, labels: Mapping[str, str]) -> int:
    """Return how many runners with these labels could start now, beside those that wait already."""
    capacity = await client.capacity(resources={TART_VMS: 1}, labels=labels)
    return max(0, capacity.fits - capacity.queued_ahead)
