"""etcd with TLS, client certificates and users: what works, and what each wrong certificate is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio
from harness.certificates import Authority
from harness.memory_etcd import encoded
from harness.processes import finished

from orchard.client import Client
from orchard.controller import ControllerSettings, EtcdAccess, EtcdSettings, Running, run
from orchard.etcd_nodes import EtcdNodes, EtcdOptions, etcd_nodes, find_free_port
from orchard.net.transport import Transport
from orchard.storage.etcd import EtcdClient, EtcdRefusedError, EtcdUnavailableError

pytestmark = [pytest.mark.needs("etcd"), pytest.mark.slow]

USER, PASSWORD = "controllers", "a password of the tests"


@dataclass
class SecuredEtcd:
    """An etcd node that asks for client certificates of `authority` at `url`. `nodes` are the same in the clear."""

    nodes: EtcdNodes
    url: str
    authority: Authority


@asynccontextmanager
async def secured_etcd(directory: Path, *, is_expired: bool = False) -> AsyncIterator[SecuredEtcd]:
    authority = Authority(directory)
    certificate, key = map(str, authority.issue("etcd", is_expired=is_expired))
    url = f"https://127.0.0.1:{find_free_port()}"
    ca = str(authority.certificate)
    more = ["--cert-file", certificate, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", ca]
    async with etcd_nodes(directory / "etcd", options=EtcdOptions(more=more, listens=[url])) as nodes:
        yield SecuredEtcd(nodes, url, authority)


async def problem_of(access: EtcdAccess) -> str:
    """Return the message of the error with which etcd cannot be used."""
    async with EtcdClient(access) as client:
        with pytest.raises(EtcdUnavailableError) as error:
            await client.get("/orchard/head")
    return str(error.value)


async def test_remedy_for_each_certificate_is_named(tmp_path: Path) -> None:
    async with secured_etcd(tmp_path) as etcd:
        other = Authority(tmp_path, "other")
        ca = etcd.authority.certificate
        mine = etcd.authority.issue("controller")
        async with EtcdClient(EtcdAccess(etcd.url, ca, *mine)) as client:
            assert await client.get("/orchard/head") is None
        for access in (
            EtcdAccess(etcd.url, ca),
            EtcdAccess(etcd.url, ca, *other.issue("foreign")),
            EtcdAccess(etcd.url, ca, *etcd.authority.issue("old", is_expired=True)),
        ):
            assert "--etcd-cert" in await problem_of(access)
        for access in (EtcdAccess(etcd.url, other.certificate, *mine), EtcdAccess(etcd.url, None, *mine)):
            assert "--etcd-ca" in await problem_of(access)
        by_name = etcd.url.replace("127.0.0.1", "localhost")
        assert "in --etcd," in await problem_of(EtcdAccess(by_name, ca, *mine))
        # The second one is never reached.
        both = await problem_of(EtcdAccess(f"{etcd.url},{by_name}", ca))
        assert etcd.url in both
        assert by_name in both


async def test_expired_certificate_of_etcd_is_named(tmp_path: Path) -> None:
    # etcd's own gateway shows it to itself, so no request would be answered either.
    async with secured_etcd(tmp_path, is_expired=True) as etcd:
        problem = await problem_of(EtcdAccess(etcd.url, etcd.authority.certificate, *etcd.authority.issue("mine")))
        assert "renew" in problem


async def add_user(url: str) -> None:
    """Add the user that docs/etcd.md describes, and turn authentication on."""
    everything = {"permType": "READWRITE", "key": encoded(b"/orchard/"), "range_end": encoded(b"/orchard0")}
    requests = [
        ("user/add", {"name": "root", "password": "r"}),
        ("role/add", {"name": "root"}),
        ("user/grant", {"user": "root", "role": "root"}),
        ("role/add", {"name": USER}),
        ("role/grant", {"name": USER, "perm": everything}),
        ("user/add", {"name": USER, "password": PASSWORD}),
        ("user/grant", {"user": USER, "role": USER}),
        ("enable", {}),
    ]
    async with Transport(url, connect_seconds=10, answer_seconds=60) as gateway:
        for path, body in requests:
            await gateway.request("POST", f"/v3/auth/{path}", json=body)


async def test_controller_leads_with_certificates_and_a_password(tmp_path: Path) -> None:
    async with secured_etcd(tmp_path) as etcd, trio.open_nursery() as nursery:
        await add_user(etcd.nodes.url)
        ca = etcd.authority.certificate
        named = EtcdAccess(etcd.url, ca, *etcd.authority.issue("named"), USER, PASSWORD)
        async with EtcdClient(named) as client:
            with pytest.raises(EtcdRefusedError, match="--etcd-cert") as refused:
                await client.get("/orchard/head")
            assert refused.value.denied
        certificate, key = etcd.authority.issue("controller", is_nameless=True)
        access = EtcdAccess(etcd.url, ca, certificate, key, USER, PASSWORD)
        settings = ControllerSettings(
            data_dir=tmp_path / "c", host="127.0.0.1", port=0, tls=False, auth=False, etcd=EtcdSettings(access)
        )
        running: Running = await nursery.start(partial(run, settings))
        async with Client(running.url) as user:
            await user.vms.create(name="vm", image="i")
        options = ["--etcd", etcd.url, "--etcd-ca", str(ca), "--etcd-cert", str(certificate), "--etcd-key", str(key)]
        options += ["--etcd-user", USER]
        environ = {"ORCHARD_ETCD_PASSWORD": PASSWORD}
        check = partial(finished, "", "check", *options, home=tmp_path / "home", env=environ)
        checked = await trio.to_thread.run_sync(check)
        assert (checked.returncode, "1 VM" in checked.stdout) == (0, True), checked
        nursery.cancel_scope.cancel()
