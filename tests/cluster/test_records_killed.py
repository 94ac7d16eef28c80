"""Lifecycle events, the history and followers of events, while their controller is killed and started again."""

from __future__ import annotations

import http.client
import itertools
import json
import signal
import threading
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from harness.clients import call
from harness.processes import GENEROUS, LISTENING, PLAIN, at_last, free_port, started

KILLS = 3


class Life(threading.Thread):
    """Creates VMs, appends an event to each, and deletes those with odd numbers. What fails is tried again."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.stopped = threading.Event()
        # The names of all VMs by uid.
        self.created: dict[str, str] = {}

    def run(self) -> None:
        for number in itertools.count():
            name = f"vm-{number}"
            status, vm = self.do("POST", "/v1/vms", {"name": name, "image": "any"})
            if self.stopped.is_set():
                return
            # 409: the answer to the creation was lost.
            uid = vm["uid"] if status == 200 else self.do("GET", f"/v1/vms/{name}")[1]["uid"]
            self.created[uid] = name
            self.do("POST", "/v1/vms/followed/events", [{"kind": "log_line", "payload": str(number), "timestamp": 1}])
            if number % 2:
                self.do("DELETE", f"/v1/vms/{name}")

    def has_created(self, count: int) -> bool:
        return len(self.created) >= count

    def do(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, str]]:
        while not self.stopped.is_set():
            try:
                return call(self.url, method, path, body)
            except (OSError, http.client.HTTPException):
                self.stopped.wait(0.02)
        return 0, {}


class Follower(threading.Thread):
    """Follows the events of a VM, and goes on after the last line when the connection was lost."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.port = urlsplit(url).port
        self.stopped = threading.Event()
        self.events: list[dict[str, str]] = []
        self.connections = 0

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                self.read()
            except (OSError, http.client.HTTPException):
                self.stopped.wait(0.02)

    def read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=GENEROUS)
        try:
            cursor = self.events[-1]["cursor"] if self.events else ""
            target = f"/v1/vms/followed/events?follow=true&kinds=log_line,lifecycle&cursor={cursor}"
            connection.request("GET", target)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            self.connections += 1
            for line in iter(answer.readline, b""):
                # A line that was cut off by the kill is sent again.
                if line.endswith(b"\n") and line.strip():
                    self.events.append(json.loads(line))
        finally:
            connection.close()

    def payloads(self, kind: str) -> list[str]:
        return [event["payload"] for event in self.events if event["kind"] == kind]


def payloads(url: str, name: str, kind: str) -> list[str]:
    return [event["payload"] for event in call(url, "GET", f"/v1/vms/{name}/events?kinds={kind}")[1]]


class Shown:
    """What the controller has shown of the history and of lifecycle events, which no kill may take back."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.history: list[str] = []
        # VMs whose creation was shown.
        self.vms: set[str] = set()

    def compare(self) -> None:
        """Compare what was shown before with what is shown now."""
        found = [ended["uid"] for ended in call(self.url, "GET", "/v1/history")[1]]
        assert len(set(found)) == len(found)
        assert [uid for uid in found if uid in set(self.history)] == self.history
        self.history = found
        present = {vm["name"] for vm in call(self.url, "GET", "/v1/vms")[1]}
        # Some of those with even numbers, which are not deleted.
        kept = {name for name in present if name.endswith(("0", "2"))}
        shown = {name for name in kept if payloads(self.url, name, "lifecycle") == ["created"]}
        assert self.vms <= shown
        assert all(payloads(self.url, name, "lifecycle") == [] for name in kept - shown)
        self.vms = shown


@pytest.mark.slow
def test_records_that_were_shown_survive_kills_and_none_is_repeated(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    life, follower, shown = Life(url), Follower(url), Shown(url)
    try:
        for kill in range(KILLS + 1):
            with started("controller", "--listen", f"127.0.0.1:{port}", *PLAIN, home=tmp_path) as role:
                role.wait_for(LISTENING)
                if not kill:
                    assert call(url, "POST", "/v1/vms", {"name": "followed", "image": "any"})[0] == 200
                    life.start()
                    follower.start()
                at_last(partial(life.has_created, len(life.created) + 8))
                shown.compare()
                if kill < KILLS:
                    role.stop(signal.SIGKILL)
                else:
                    life.stopped.set()
                    life.join(GENEROUS)
                    shown.compare()
                    compare_follower(url, follower)
    finally:
        life.stopped.set()
        follower.stopped.set()
        if life.ident and follower.ident:
            life.join(GENEROUS)
            follower.join(GENEROUS)
    assert len(shown.history) > KILLS
    assert set(shown.history) <= set(life.created)


def compare_follower(url: str, follower: Follower) -> None:
    """Check that a follower was sent each event once, in order, although each kill cut its connection."""
    lines = payloads(url, "followed", "log_line")
    at_last(lambda: len(follower.payloads("log_line")) >= len(lines))
    assert follower.payloads("log_line") == lines
    assert follower.payloads("lifecycle") == ["created"]
    assert follower.connections > KILLS
