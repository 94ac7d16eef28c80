"""Webhooks: settings, signatures, what is told, and receivers of every kind."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import logging
import os
import re
import socket
import ssl
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import trio
import trio.testing
from harness import receiver as hostile
from harness.receiver import OK, Received, Receiver
from harness.served import BEGAN, Served, at_once, served

from orchard import controller
from orchard.client import Client
from orchard.control import webhooks
from orchard.control.scheduling_loop import TICK_SECONDS
from orchard.control.webhooks import LAST_WEBHOOK_PAUSE, MAX_WAITING_EVENTS, Webhooks
from orchard.net import tcp, tls
from orchard.net.outside import connect_outside, why_refused
from orchard.resources.cluster import Webhook, WebhookEvent
from orchard.resources.validation import replaced_settings
from orchard.schema import TART_VMS, ClusterSettings, ServiceAccount

SECRET = "a secret of a receiver"
URL = "http://receiver.example/hook"


async def set_webhooks(api: Served, *wanted: dict[str, Any]) -> Any:
    return await api.ok("PUT", "/cluster-settings", {"webhooks": list(wanted)})


@asynccontextmanager
async def telling(
    directory: Path, receiver: Receiver, *events: str, url: str = URL, connect: tcp.Connect | None = None
) -> AsyncIterator[tuple[Served, Webhooks]]:
    """Serve the API with one webhook, which leads to a receiver in memory or where `connect` leads."""
    async with served(directory, in_thread=at_once) as api, trio.open_nursery() as nursery:
        figures, loop = api.api.parts.figures, api.loop
        clock = api.api.parts.deadline_clock
        hooks = Webhooks(api.store, loop, figures.lives.failure_of, clock, connect or receiver.connector(nursery))
        await set_webhooks(api, {"url": url, "events": list(events), "secret": SECRET})
        nursery.start_soon(hooks.run)
        await trio.testing.wait_all_tasks_blocked()
        yield api, hooks
        nursery.cancel_scope.cancel()


def data_directory(home: Path, name: str) -> Path:
    (home / name).mkdir()
    return home / name


async def fail_vm(api: Served, name: str = "vm") -> None:
    if not api.state.workers:
        await api.register("w", resources={TART_VMS: 1000})
    await api.create(name, metadata={"pipeline": "7"}, password="hidden", startup_script={"script_content": "hidden"})
    api.assign(name)
    vm = api.state.vms[name]
    report = {"uid": vm.uid, "restart_count": 0, "status": "failed", "status_message": "no such image"}
    await api.ok("PUT", f"/vms/{name}/state", report)


# ---- settings --------------------------------------------------------------------------------------------------------


async def test_secrets_are_kept_by_url_and_never_shown_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    admin = ServiceAccount(name="a", token="t" * 16, roles=("admin:read", "admin:write", "compute:write"))
    async with served(tmp_path, admin) as api:

        async def call(method: str, target: str, body: object = ...) -> Any:
            answered = await api.call(method, target, body, account=("a", "t" * 16))
            assert SECRET not in str(answered)
            return answered

        first = {"url": "https://one.example/x", "events": ["vm.failed"], "secret": SECRET}
        second = {"url": "https://two.example/", "secret": SECRET + "2"}
        put = await call("PUT", "/cluster-settings", {"webhooks": [first, second]})
        assert put.status == 200
        got = (await call("GET", "/cluster-settings")).body
        assert got["webhooks"] == [{"url": first["url"], "events": ["vm.failed"]}, {"url": second["url"]}]
        # Sent back as it was shown, with one more event, in another order, and then by a client that knows none.
        got["webhooks"][1]["events"] = ["disk.low"]
        got["webhooks"].reverse()
        assert (await call("PUT", "/cluster-settings", got)).status == 200
        assert (await call("PUT", "/cluster-settings", {"schedulerProfile": "distribute-load"})).status == 200
        stored = api.state.settings.webhooks
        assert [(one.url, one.secret) for one in stored] == [
            (second["url"], SECRET + "2"),
            (first["url"], SECRET),
        ]
        assert SECRET not in repr(api.state.settings)
        await call("GET", "/controller/info")
        assert (await call("PUT", "/cluster-settings", {"webhooks": []})).status == 200
        assert api.state.settings.webhooks == ()
        refused = await call("PUT", "/cluster-settings", {"webhooks": [{"url": first["url"]}]})
        assert (refused.status, "webhooks[0].secret" in refused.message) == (400, True)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("webhook", "words"),
    [
        ({"url": "ftp://a.example/"}, ["webhooks[0].url"]),
        ({"url": "https://"}, ["webhooks[0].url"]),
        ({"url": "https://user:word@a.example/"}, ["webhooks[0].url"]),
        ({"url": "https://a.example/#part"}, ["webhooks[0].url"]),
        ({"url": "https://a.example:99999/"}, ["webhooks[0].url"]),
        ({"url": "https://a.example/ x"}, ["webhooks[0].url"]),
        ({"url": "https://ä.example/"}, ["webhooks[0].url"]),
        ({"url": "https://a.example/" + "x" * 2048}, ["webhooks[0].url"]),
        ({}, ["webhooks[0].url"]),
        ({"secret": "too short"}, ["webhooks[0].secret", "9"]),
        ({"secret": "x" * 257}, ["webhooks[0].secret", "257"]),
        ({"secret": "sixteen letters\n"}, ["webhooks[0].secret"]),
        ({"events": ["vm.faild"]}, ["webhooks[0].events[0]", "vm.faild", "vm.failed?"]),
        ({"events": "vm.failed"}, ["webhooks[0].events"]),
    ],
)
async def test_invalid_webhook_is_refused_and_changes_nothing(
    tmp_path: Path, webhook: dict[str, Any], words: list[str]
) -> None:
    async with served(tmp_path) as api:
        whole = {"url": "https://a.example/", "secret": SECRET, **webhook} if webhook else {"secret": SECRET}
        refused = await api.call("PUT", "/cluster-settings", {"webhooks": [whole]})
        assert refused.status == 400
        assert [word for word in words if word not in refused.message] == []
        assert "user:word" not in refused.message
        assert api.state.settings.webhooks == ()


async def test_webhooks_are_bounded_in_number_and_one_for_each_url(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        many = [{"url": f"https://a.example/{number}", "secret": SECRET} for number in range(11)]
        for wanted in (many, [many[0], many[0]]):
            assert (await api.call("PUT", "/cluster-settings", {"webhooks": wanted})).status == 400
        await set_webhooks(api, *many[:10])


# ---- what is sent ----------------------------------------------------------------------------------------------------


async def test_request_is_signed_over_timestamp_and_body(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    receiver = Receiver()
    async with telling(tmp_path, receiver, url="https://hooks.example/a/b?key=1".replace("https", "http")) as (
        api,
        hooks,
    ):
        await fail_vm(api)
        [sent] = await receiver.wait(1)
        assert (sent.target, sent.headers["host"]) == ("/a/b?key=1", "hooks.example:80")
        assert sent.headers["content-type"] == "application/json"
        stamp = sent.headers["orchard-timestamp"]
        assert abs(int(stamp) - BEGAN.timestamp()) < 5
        expected = hmac.new(SECRET.encode(), f"{stamp}.".encode() + sent.body, hashlib.sha256).hexdigest()
        assert sent.headers["orchard-signature"] == f"sha256={expected}"
        vm = api.state.vms["vm"]
        body = sent.json
        assert (sent.headers["orchard-event"], sent.headers["orchard-delivery"]) == (body["event"], body["id"])
        assert body["clusterId"] == api.state.cluster.id
        assert body["vm"] == {
            "name": "vm",
            "uid": vm.uid,
            "image": "image",
            "worker": "w",
            "metadata": {"pipeline": "7"},
            "restarts": 0,
            "statusMessage": "no such image",
            "reason": "start",
        }
        assert b"hidden" not in sent.body
        await trio.testing.wait_all_tasks_blocked()
        assert (hooks.status(receiver_url(api)), hooks.results["delivered"]) == ("ok", 1)


def receiver_url(api: Served) -> str:
    return api.state.settings.webhooks[0].url


async def test_only_events_that_a_webhook_wants_are_sent_and_ended_vms_are_no_failures(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    receiver = Receiver()
    async with telling(tmp_path, receiver, "vm.failed", "disk.low") as (api, _):
        await api.register("w", capabilities=["vm-restart"], resources={TART_VMS: 1000})
        await api.create("other")
        api.schedule()
        vm = api.state.vms["other"]
        await api.ok("PUT", "/vms/other/state", {"uid": vm.uid, "restart_count": 0, "status": "running"})
        await api.ok("POST", "/vms/other/restart")
        await trio.sleep(1000)
        await fail_vm(api)
        [sent] = await receiver.wait(1)
        assert (sent.event, sent.json["vm"]["name"]) == ("vm.failed", "vm")
        await set_webhooks(api, {"url": URL, "events": ["queue.old"]})
        await fail_vm(api, "third")
        await trio.sleep(100)
        assert len(receiver.received) == 1


async def test_lost_worker_and_its_return_are_told_once_and_a_short_absence_is_not(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    receiver = Receiver()
    async with telling(tmp_path, receiver, "worker.offline", "worker.online") as (api, _):
        await api.register("w")
        changed: list[datetime.datetime] = []
        for seconds in (20, 100, 20):
            api.schedule()
            api.close_watch("w")
            # The scheduler notices, with its next tick, that it is not back within two seconds.
            await trio.sleep(TICK_SECONDS)
            api.schedule()
            changed.append(api.api.parts.deadline_clock() + datetime.timedelta(seconds=webhooks.HOLD_SECONDS))
            await trio.sleep(seconds)
            await api.register("w")
            changed.append(api.api.parts.deadline_clock())
            await trio.sleep(60)
        sent = [(one.event, one.json["worker"]["name"], one.json["worker"]["state"]) for one in receiver.received]
        assert sent == [("worker.offline", "w", "offline"), ("worker.online", "w", "online")]
        assert receiver.received[0].json["worker"]["reason"]
        # Each is told at once, not with the next look at all workers.
        times = [datetime.datetime.fromisoformat(one.json["time"]) for one in receiver.received]
        assert [round((time - at).total_seconds(), 1) for time, at in zip(times, changed[2:4], strict=True)] == [0, 0]


async def test_low_disk_is_told_when_it_begins_and_again_after_it_has_ended(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    receiver = Receiver()
    async with telling(tmp_path, receiver, "disk.low") as (api, _):
        await api.ok("PUT", "/cluster-settings", {"minFreeDiskGB": 50})
        worker = await api.register("w")
        # Just enough ends nothing: it would come and go.
        for number, free in enumerate((60, 49, 51, 49, 56, 49)):
            seen = f"2026-01-31T12:00:{number:02}Z"
            disk = {"totalBytes": 10**12, "freeBytes": free * 10**9}
            await api.ok("PUT", "/workers/w", {**worker, "last_seen": seen, "disk": disk})
            # At once, not with the next look at all workers.
            await trio.testing.wait_all_tasks_blocked()
        # A look at all workers does not repeat it.
        await trio.sleep(2 * webhooks.SURVEY_SECONDS)
        assert [one.json["worker"]["freeBytes"] for one in receiver.received] == [49 * 10**9] * 2
        assert {one.event for one in receiver.received} == {"disk.low"}


async def test_vm_that_no_worker_could_take_and_an_old_queue_are_told_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    receiver = Receiver()
    async with telling(tmp_path, receiver, "vm.unplaceable", "queue.old") as (api, _):
        await api.register("w", resources={TART_VMS: 1})
        await api.create("runs")
        api.schedule()
        await api.create("later")
        await api.create("never", labels={"no": "worker"})
        for _ in range(80):
            await api.ok("GET", "/vms?filter=worker=w")
            api.schedule()
            await trio.sleep(10)
        first, second = receiver.received
        assert (first.event, first.json["vm"]["name"]) == ("vm.unplaceable", "never")
        assert (second.event, second.json["queue"]["waiting"]) == ("queue.old", 2)
        assert second.json["queue"]["oldestSeconds"] >= webhooks.OLD_QUEUE_SECONDS
        for name in ("later", "never"):
            await api.ok("DELETE", f"/vms/{name}")
        await trio.sleep(60)
        assert len(receiver.received) == 2


# ---- receivers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 307 Go\r\nLocation: /hook\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
        b"not HTTP\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        hostile.close_at_once,
        hostile.say_nothing,
        hostile.send_heads_without_end,
    ],
    ids=lambda answer: answer.__name__ if callable(answer) else answer.split(b"\r")[0].decode(),
)
async def test_what_is_not_taken_is_sent_again_to_the_same_place_until_it_is(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    receiver = Receiver(answer)
    async with telling(tmp_path, receiver) as (api, hooks):
        await fail_vm(api)
        await receiver.wait(3)
        shown = (await api.ok("GET", "/cluster-settings"))["webhooks"]
        assert hooks.failing() == 1
        assert hooks.status(URL).startswith("failing: ")
        assert shown == [{"url": URL}]
        receiver.answer = OK
        sent = await receiver.wait(4)
        await trio.testing.wait_all_tasks_blocked()
        assert {one.target for one in sent} == {"/hook"}
        # The same notification, signed anew.
        assert len({one.body for one in sent}) == 1
        assert len({one.headers["orchard-timestamp"] for one in sent}) > 1
        assert (hooks.failing(), hooks.waiting(), hooks.results["delivered"]) == (0, 0, 1)
        warned = [record for record in caplog.records if record.name == "orchard.webhooks"]
        assert 1 <= len(warned) < 4
        assert "/hook" not in str([vars(record) for record in warned])


async def test_body_of_an_answer_is_not_read(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    receiver = Receiver(hostile.answer_without_end)
    async with telling(tmp_path, receiver) as (api, hooks):
        await fail_vm(api)
        await receiver.wait(1)
        await trio.testing.wait_all_tasks_blocked()
        assert hooks.results == {"delivered": 1, "failed": 0, "dropped": 0}


async def test_slow_receiver_gets_everything_in_order_one_at_a_time_up_to_the_bound(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async def answer_slowly(stream: trio.abc.Stream) -> None:
        await trio.sleep(5)
        await stream.send_all(OK)

    receiver = Receiver(answer_slowly)
    async with telling(tmp_path, receiver, "vm.failed") as (api, hooks):
        for number in range(20):
            await fail_vm(api, f"vm-{number}")
        sent = await receiver.wait(20)
        assert [one.json["vm"]["name"] for one in sent] == [f"vm-{number}" for number in range(20)]
        assert receiver.most == 1
        assert hooks.results["dropped"] == 0


async def test_receiver_that_is_down_costs_a_bounded_queue_and_nothing_stays_for_ever(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "MAX_WAITING_EVENTS", 5)
    receiver = Receiver(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
    async with telling(tmp_path, receiver, "vm.failed") as (api, hooks):
        for number in range(8):
            await fail_vm(api, f"vm-{number}")
        assert (hooks.waiting(), hooks.results["dropped"]) == (5, 3)
        before = len(receiver.received)
        await trio.sleep(webhooks.GIVE_UP_SECONDS)
        assert len(receiver.received) - before <= webhooks.GIVE_UP_SECONDS / LAST_WEBHOOK_PAUSE + 10
        await trio.sleep(10 * LAST_WEBHOOK_PAUSE)
        assert (hooks.waiting(), hooks.results["dropped"]) == (0, 8)
    assert MAX_WAITING_EVENTS == 1000


async def test_webhook_that_is_removed_gets_nothing_more_and_others_go_on(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    receiver = Receiver(hostile.say_nothing)
    async with telling(tmp_path, receiver, "vm.failed") as (api, hooks):
        await fail_vm(api)
        await receiver.wait(1)
        await set_webhooks(api, {"url": "http://other.example/other", "events": ["vm.failed"], "secret": SECRET})
        await trio.testing.wait_all_tasks_blocked()
        receiver.answer = OK
        await fail_vm(api, "second")
        sent = await receiver.wait(2)
        await trio.sleep(300)
        assert [one.target for one in sent] == ["/hook", "/other"]
        assert hooks.waiting() == 0


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "::127.0.0.1", "2002:7f00:1::"),
        *("169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "fe80::1%lo", "64:ff9b::a9fe:a9fe"),
        *("0.0.0.0", "0.1.2.3", "::", "::ffff:0.0.0.0", "224.0.0.1", "ff02::1"),
    ],
)
def test_addresses_of_this_host_and_of_its_link_are_refused(address: str) -> None:
    assert why_refused(address)


@pytest.mark.parametrize("address", ["192.0.2.1", "10.0.0.1", "172.16.0.1", "2001:db8::1", "fd00::1", "::ffff:8.8.8.8"])
def test_other_addresses_are_not_refused(address: str) -> None:
    assert why_refused(address) == ""


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0", "0x7f000001", "2130706433", "127.1", "::1"])
async def test_every_spelling_of_an_own_address_is_refused_before_a_connection(host: str) -> None:
    receiver = Receiver()
    async with trio.open_nursery() as nursery:
        port = await receiver.listen(nursery)
        with pytest.raises(OSError, match=r"--allow-local-webhooks|not known|resolution|associated"):
            await connect_outside(host, port)
        nursery.cancel_scope.cancel()
    assert receiver.received == []


class Resolver(trio.abc.HostnameResolver):
    """Resolves each name to the next of some addresses, as a hostile name server does."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)

    async def getaddrinfo(self, host: Any, port: Any, *_: Any, **__: Any) -> Any:
        await trio.lowlevel.checkpoint()
        found = self.answers.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


async def test_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def connect(host: str, port: int) -> trio.abc.Stream:
        asked.append(host)
        await trio.lowlevel.checkpoint()
        return trio.testing.memory_stream_pair()[0]

    monkeypatch.setattr(tcp, "connect", connect)
    resolver = Resolver(["127.0.0.1", "192.0.2.7"], ["127.0.0.1"])
    trio.socket.set_custom_hostname_resolver(resolver)
    await connect_outside("rebinding.example", 80)
    assert asked == ["192.0.2.7"]
    with pytest.raises(OSError, match="--allow-local-webhooks"):
        await connect_outside("rebinding.example", 80)
    assert asked == ["192.0.2.7"]


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example", "*"])
async def test_name_that_cannot_be_resolved_is_an_error_of_the_network(host: str) -> None:
    trio.socket.set_custom_hostname_resolver(None)
    with pytest.raises(OSError, match=r"."):
        await connect_outside(host, 80)


# ---- over the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [True, False])
async def test_receiver_over_https_must_have_a_certificate_of_the_hosts_cas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    certificate, key = await tls.self_signed(tmp_path, ["localhost"])
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate if trusted else tmp_path / "none"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    receiver = Receiver()
    async with trio.open_nursery() as nursery:
        port = await receiver.listen(nursery, context)
        url = f"https://localhost:{port}/"
        async with telling(data_directory(tmp_path, "data"), receiver, url=url, connect=tcp.connect) as (api, hooks):
            await fail_vm(api)
            if trusted:
                [sent] = await receiver.wait(1)
                assert sent.event == "vm.failed"
            else:
                while not hooks.failing():
                    await trio.lowlevel.checkpoint()
                assert receiver.received == []
        nursery.cancel_scope.cancel()


async def test_local_receiver_is_not_sent_anything_without_the_flag(tmp_path: Path) -> None:
    receiver = Receiver()
    async with trio.open_nursery() as nursery:
        port = await receiver.listen(nursery)
        url = f"http://127.0.0.1:{port}/"
        async with telling(data_directory(tmp_path, "1"), receiver, url=url, connect=connect_outside) as (api, hooks):
            await fail_vm(api)
            while not hooks.failing():
                await trio.lowlevel.checkpoint()
            assert "--allow-local-webhooks" in hooks.status(url)
            assert receiver.received == []
        async with telling(data_directory(tmp_path, "2"), receiver, url=url, connect=tcp.connect) as (api, _):
            await fail_vm(api)
            await receiver.wait(1)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [False, True])
async def test_controller_sends_to_its_own_host_only_with_the_flag(tmp_path: Path, allowed: bool) -> None:
    receiver = Receiver()
    settings = controller.ControllerSettings(
        tmp_path / "data", host="127.0.0.1", port=0, tls=False, auth=False, allow_local_webhooks=allowed
    )
    async with trio.open_nursery() as nursery:
        running: controller.Running = await nursery.start(controller.run, settings)
        url = f"http://127.0.0.1:{await receiver.listen(nursery)}/"
        async with Client(running.url) as client:
            await client.cluster_settings.put(webhooks=[Webhook(url, ("vm.failed",), SECRET)])
            await client.vms.create(name="vm", image="any", labels={"no": "worker"}, pending_timeout_seconds=1)
            while not (status := (await client.cluster_settings.get()).webhooks[0].status):
                await trio.lowlevel.checkpoint()
        assert (status == "ok", len(receiver.received)) == (allowed, allowed)
        nursery.cancel_scope.cancel()


# ---- the document ----------------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "webhooks.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def test_each_event_and_no_other_is_described() -> None:
    assert re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", DOCUMENT, re.MULTILINE) == [*get_args(WebhookEvent)]


@pytest.mark.slow
@pytest.mark.needs("openssl")
async def test_examples_of_the_document_set_a_webhook_and_check_its_signature(tmp_path: Path) -> None:
    receiver = Receiver()
    settings = controller.ControllerSettings(
        tmp_path / "data", host="127.0.0.1", port=0, tls=False, auth=False, allow_local_webhooks=True
    )
    async with trio.open_nursery() as nursery:
        running: controller.Running = await nursery.start(controller.run, settings)
        url = f"http://127.0.0.1:{await receiver.listen(nursery)}/orchard"
        setting, checking = blocks("python")
        names: dict[str, Any] = {}
        setting = setting.replace("https://example.com/orchard", url)
        exec("async def example(client):\n" + textwrap.indent(setting, "    "), names)
        exec(checking, names)
        [secret] = set(re.findall(r'"secret": "([^"]*)"', DOCUMENT))
        async with Client(running.url) as client:
            await names["example"](client)
            vm = await client.vms.create(name="vm", image="any", labels={"no": "worker"}, pending_timeout_seconds=1)
            [sent] = await receiver.wait(1)
            assert (sent.json["vm"]["uid"], sent.json["vm"]["reason"]) == (vm.uid, "no_worker")
            while not (status := (await client.cluster_settings.get()).webhooks[0].status):
                await trio.lowlevel.checkpoint()
            assert status == "ok"
        stamp, signed = sent.headers["orchard-timestamp"], sent.headers["orchard-signature"]
        await check_in_shell(tmp_path, secret, sent)
        assert names["verify"](secret, stamp, signed, sent.body, int(stamp) + 1)
        assert not names["verify"](secret, stamp, signed, sent.body + b" ", int(stamp) + 1)
        assert not names["verify"](secret, stamp, signed, sent.body, int(stamp) + 301)
        assert not names["verify"](secret[1:], stamp, signed, sent.body, int(stamp))
        nursery.cancel_scope.cancel()


async def check_in_shell(home: Path, secret: str, sent: Received) -> None:
    (home / "body").write_bytes(sent.body)
    for timestamp, status in ((sent.headers["orchard-timestamp"], 0), ("1", 1)):
        env = {"SECRET": secret, "TIMESTAMP": timestamp, "SIGNATURE": sent.headers["orchard-signature"]}
        command = ["sh", "-euc", blocks("sh")[2]]
        done = await trio.run_process(command, cwd=home, env={**os.environ, **env}, check=False)
        assert done.returncode == status


def test_example_of_a_file_is_a_valid_setting() -> None:
    wanted = json.loads(blocks("json webhooks.json")[0])
    unknown: list[str] = []
    settings = replaced_settings(ClusterSettings(), {"webhooks": wanted}, unknown)
    assert (len(settings.webhooks), unknown) == (1, [])
    example = json.loads(blocks("json")[0])
    assert example["event"] in get_args(WebhookEvent)
