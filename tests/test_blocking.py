"""The client that blocks, against the asynchronous one: the same methods, signatures and documentation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import assert_type

import pytest

from orchard.blocking import BlockingClient, BlockingCommand, BlockingStream, Portal
from orchard.client import Client
from orchard.resources.bodies import VMAccessToken
from orchard.schema import VM, Event, Worker

PARTS = ("vms", "workers", "service_accounts", "cluster_settings")


def methods(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")}


@pytest.mark.parametrize("part", ["", *PARTS])
def test_blocking_client_has_every_method_with_the_same_signature(part: str) -> None:
    client = Client("http://localhost")
    blocking = BlockingClient(client, Portal())
    ours = getattr(client, part) if part else client
    theirs = getattr(blocking, part) if part else blocking
    names = methods(type(ours))
    assert names
    for name in names:
        method = getattr(theirs, name)
        assert inspect.signature(method) == inspect.signature(getattr(ours, name)), name
        assert method.__doc__ == getattr(ours, name).__doc__
    assert {name for name in vars(type(theirs)) if not name.startswith("_")} == names


def test_parts_of_the_client_are_complete() -> None:
    client = Client("http://localhost")
    found = {name for name, value in vars(client).items() if type(value).__module__.startswith("orchard.methods.")}
    assert found == set(PARTS)


def check_types(client: BlockingClient) -> None:
    """Never called: mypy checks it."""
    assert_type(client.vms.create(name="vm"), VM)
    assert_type(client.vms.list(), list[VM])
    assert_type(client.vms.events("vm", order="desc"), Iterator[Event])
    assert_type(client.vms.issue_access_token("vm"), VMAccessToken)
    assert_type(client.workers.list(), list[Worker])
    watch: AbstractContextManager[Iterator[tuple[str, VM]]] = client.vms.watch("vm")
    stream: AbstractContextManager[BlockingStream] = client.vms.port_forward("vm", 22, wait=1)
    command: AbstractContextManager[BlockingCommand] = client.vms.exec("vm", "true")
    del watch, stream, command
    client.vms.get(1)  # type: ignore[arg-type]
    client.vms.list(wroker="w")  # type: ignore[call-arg]
