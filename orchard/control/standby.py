"""The work of a controller that stands by: it decodes what the leader stores, so that a takeover has little to decode.

A takeover reads everything from etcd again. What was decoded here counts only for the same bytes of the same key, so it
saves time and decides nothing.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import trio

from orchard.codec import ValidationError, load_json
from orchard.storage.etcd import EtcdClient, EtcdRequestError
from orchard.store import DecodedObject, decode_object

# The kinds of which there may be many objects.
_KINDS = ("vm", "worker")
# Pause before the first look at what the leader has stored, and between looks.
_LOOK_SECONDS = 3.0  # seconds
# Objects that are decoded in one step of the event loop, which takes about 5 ms.
_AT_ONCE = 50
# Everything is read anew when so many keys of deleted objects are kept, in addition to the number of objects.
_SLACK = 1_000


async def decode_ahead(client: EtcdClient, prefix: str, decoded: dict[str, tuple[bytes, DecodedObject]]) -> None:
    """Decode into `decoded` what the leader has stored, by key, until cancelled. What cannot be read is left out."""
    most = -1
    while True:
        await trio.sleep(_LOOK_SECONDS)
        is_anew = len(decoded) > most
        if is_anew:
            decoded.clear()
            since = Counter[str]()
        for kind in _KINDS:
            # The campaign logs errors of etcd.
            with suppress(EtcdRequestError):
                for number, each in enumerate(await client.scan(f"{prefix}/{kind}/", since=since[kind])):
                    # A takeover reports a wrong value.
                    with suppress(KeyError, TypeError, ValueError, ValidationError):
                        decoded[each.key] = (each.value, decode_object(kind, load_json(each.value)))
                    since[kind] = max(since[kind], each.mod_revision + 1)
                    if number % _AT_ONCE == 0:
                        await trio.lowlevel.checkpoint()
        if is_anew:
            most = 2 * len(decoded) + _SLACK
