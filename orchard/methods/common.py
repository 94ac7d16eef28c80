"""The common part of the methods of all resources: requests whose answers are objects of schema.py, and paths.

The methods themselves are in the files beside this one, and the client in orchard/client.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast
from urllib.parse import quote

from orchard.codec import ValidationError, decode, parse_json
from orchard.net.transport import ClientError, Transport, excerpt
from orchard.resources.filters import FieldCondition
from orchard.schema import (
    CONDITION_WRITERS,
    VM,
    vm_from_json,
)

JSON = Mapping[str, Any]
# Path of a field, with "!" at its end to negate -> value.
Conditions = Mapping[str, str]
ShownT = TypeVar("ShownT")


class ResourceMethods:
    """The methods of one resource of the API."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def _fetch(
        self,
        kind: type[ShownT],
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        json: object = ...,
    ) -> ShownT:
        """Send a request and return the object of its answer. Raises ClientError."""
        return decode_answer(kind, (await self._transport.request(method, path, query=query, json=json)).json())

    async def _fetch_list(self, kind: type[ShownT], path: str, query: Mapping[str, str] | None = None) -> list[ShownT]:
        """Return the objects of a list. Raises ClientError."""
        return decode_answers(kind, (await self._transport.request("GET", path, query=query)).json())


def parse_message(message: str | bytes) -> Any:
    """Parse JSON. Raises ValidationError."""
    return parse_json(message.encode() if isinstance(message, str) else message)


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Return a JSON object that the controller has sent as `what`. Raises ClientError."""
    try:
        parsed = parse_message(text)
    except ValidationError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ClientError(f"{what} is {excerpt(text)}, expected a JSON object")
    return parsed


def decode_answer(kind: type[ShownT], raw: Any) -> ShownT:
    try:
        return cast("ShownT", vm_from_json(_known_conditions(raw))) if kind is VM else decode(kind, raw)
    except (ValidationError, AttributeError, TypeError, ValueError) as error:
        raise ClientError(f"the answer is not a valid {kind.__name__}: {error}") from error


def _known_conditions(raw: Any) -> Any:
    """Return a VM's JSON without conditions of types that only a newer controller knows."""
    conditions = [item for item in raw.get("conditions") or () if item.get("type") in CONDITION_WRITERS]
    return {**raw, "conditions": conditions}


def decode_answers(kind: type[ShownT], raw: Any) -> list[ShownT]:
    if not isinstance(raw, list):
        raise ClientError(f"the answer is {excerpt(str(raw))}, expected a list")
    return [decode_answer(kind, item) for item in raw]


def url_path(*segments: str) -> str:
    """Return a path from its segments, which may hold any characters. Raises ValueError for an empty one."""
    if "" in segments:
        # With an empty name it would be the path of all objects.
        raise ValueError(f"a name is empty, expected one of {segments[0]}")
    return "".join("/" + quote(segment, safe="") for segment in segments)


def filter_query(conditions: Conditions | None, worker: str | None = None) -> dict[str, str]:
    """Return the query parameter of a filter, none without conditions."""
    given = {**({} if worker is None else {"worker": worker}), **(conditions or {})}
    return {"filter": ",".join(map(_condition_text, given, given.values()))} if given else {}


def _condition_text(path: str, value: str) -> str:
    field, _, key = path.removesuffix("!").partition(".")
    return str(FieldCondition(field, key, value, path.endswith("!")))
