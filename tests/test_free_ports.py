"""Ports that nothing takes before the caller listens on them."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchard import etcd_nodes
from orchard.etcd_nodes import find_free_port

RANGE_OF_KERNEL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_free_ports_differ_and_the_kernel_takes_none_of_them() -> None:
    ports = {find_free_port() for _ in range(20)}
    assert len(ports) == 20
    first = int(RANGE_OF_KERNEL.read_text().split()[0]) if RANGE_OF_KERNEL.exists() else 49152
    assert max(ports) < first


def test_free_ports_of_another_process_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {find_free_port() for _ in range(100)}
    # What a process has that has just been forked.
    monkeypatch.setattr(os, "getpid", lambda: -1)
    monkeypatch.setattr(etcd_nodes, "_own", etcd_nodes._OwnPorts(etcd_nodes._own.process, etcd_nodes._own.ports))
    assert mine.isdisjoint({find_free_port() for _ in range(100)})


def test_last_block_of_ports_ends_within_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_nodes, "_FIRST_PORT", etcd_nodes._LAST_PORT - etcd_nodes._BLOCK_PORTS + 2)
    with pytest.raises(OSError, match="in use"):
        etcd_nodes._claim_ports()


def test_ports_that_are_all_in_use_are_named() -> None:
    find_free_port()
    ports = sorted(find_free_port() for _ in range(etcd_nodes._BLOCK_PORTS))
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        with pytest.raises(OSError, match=f"{ports[0]} to {ports[-1]} "):
            find_free_port()


def test_port_in_use_is_left_out() -> None:
    first, second = find_free_port(), find_free_port()
    with socket.create_server(("127.0.0.1", second)):
        seen = {find_free_port() for _ in range(100)}
    assert first in seen
    assert second not in seen
