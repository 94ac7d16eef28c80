"""The SSH jump host, with the system's OpenSSH client and real SSH servers in the VMs."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import asyncssh
import pytest
import trio
import trio_asyncio  # type: ignore[import-untyped]
from processes import GENEROUS, eventually, finished, processes_in
from test_forward import echo, listening, receive_exactly
from test_processes import free_port

from orchard import jump
from orchard.client import Client as OrchardClient
from orchard.controller import Running, Settings, run
from orchard.synthetic import SyntheticDriver
from orchard.testing import Cluster, cluster
from orchard.worker import Identity, Worker


class Client:
    """OpenSSH with a password for the jump host and one for the VM, and nobody's configuration."""

    def __init__(self, c: Cluster, home: Path, sshd: int, user: str = "", password: str = "") -> None:
        self.user = user or c.account
        askpass = home / "askpass"
        askpass.write_text('#!/bin/sh\ncase "$1" in *127.0.0.1*) echo "$JUMP_PASSWORD";; *) echo admin;; esac\n')
        askpass.chmod(0o700)
        config = home / "ssh_config"
        config.write_text(
            f"Host jump\n  HostName 127.0.0.1\n  Port {c.ssh_port}\n  User {self.user}\n"
            f"Host vm Vm other\n  ProxyJump jump\n  User admin\n  Port {sshd}\n"
            "Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            "  PubkeyAuthentication no\n  NumberOfPasswordPrompts 1\n"
        )
        self.config = str(config)
        self._env = {
            **os.environ,
            "SSH_ASKPASS": str(askpass),
            "SSH_ASKPASS_REQUIRE": "force",
            "JUMP_PASSWORD": password or c.token,
        }

    async def run(self, program: str, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        with trio.fail_after(GENEROUS):
            return await trio.run_process(
                [program, "-F", self.config, *words],
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=self._env,
                start_new_session=True,
            )


@asynccontextmanager
async def jumping() -> AsyncIterator[Cluster]:
    """A cluster with a jump host, and a VM "vm" that runs."""
    async with cluster(auth=True, ssh=True) as c:
        await c.client.vms.create(name="vm", image="any")
        await c.client.vms.wait("vm")
        yield c


async def test_stock_openssh_gets_into_a_vm(tmp_path: Path, sshd: int) -> None:
    async with jumping() as c:
        client = Client(c, tmp_path, sshd)
        ran = await client.run("ssh", "vm", stdin=b"echo in the vm; exit 7")
        assert (ran.returncode, ran.stdout) == (7, b"in the vm\n"), ran.stderr


async def test_an_access_token_gets_into_its_vm_alone(tmp_path: Path, sshd: int) -> None:
    async with jumping() as c:
        issued = await c.client.vms.issue_access_token("vm")
        client = Client(c, tmp_path, sshd, issued.ssh_username, issued.token)
        assert (await client.run("ssh", "vm", stdin=b"echo hi")).stdout == b"hi\n"
        await c.client.vms.create(name="other", image="any")
        ran = await client.run("ssh", "other", stdin=b"echo hi")
        assert (ran.returncode, ran.stdout) == (255, b"")
        await c.client.vms.delete("vm")
        await c.client.vms.create(name="vm", image="any")
        ran = await client.run("ssh", "vm", stdin=b"echo hi")
        assert (ran.returncode, ran.stdout) == (255, b""), "it is another VM of that name"


async def test_files_are_copied_both_ways(tmp_path: Path, sshd: int) -> None:
    data = hashlib.shake_128(b"file").digest(8 * 1024 * 1024)
    source, there, back = (tmp_path / name for name in ("source", "there", "back"))
    source.write_bytes(data)
    async with jumping() as c:
        client = Client(c, tmp_path, sshd)
        for one, other in ((str(source), f"vm:{there}"), (f"vm:{there}", str(back))):
            ran = await client.run("scp", "-O", one, other)
            assert ran.returncode == 0, ran.stderr
    assert back.read_bytes() == data


async def test_any_port_of_a_vm_can_be_forwarded(tmp_path: Path, sshd: int) -> None:
    local = free_port()
    async with jumping() as c, listening(echo) as port, trio.open_nursery() as nursery:
        client = Client(c, tmp_path, sshd)
        nursery.start_soon(partial(client.run, "ssh", "-N", "-L", f"127.0.0.1:{local}:vm:{port}", "jump"))

        async def connects() -> bool:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", local)
            except OSError:
                return False
            await stream.aclose()
            return True

        await eventually(connects)

        async def one(number: int) -> None:
            sent = hashlib.shake_128(b"%d" % number).digest(500_000)
            async with await trio.open_tcp_stream("127.0.0.1", local) as stream, trio.open_nursery() as sending:
                sending.start_soon(stream.send_all, sent)
                assert await receive_exactly(stream, len(sent)) == sent

        async with trio.open_nursery() as many:
            for number in range(20):
                many.start_soon(one, number)
        nursery.cancel_scope.cancel()
    assert processes_in(tmp_path) == []


async def test_names_are_found_as_openssh_writes_them(tmp_path: Path, sshd: int) -> None:
    async with cluster(auth=True, ssh=True) as c:
        await c.client.vms.create(name="Vm", image="any")
        await c.client.vms.wait("Vm")
        assert (await Client(c, tmp_path, sshd).run("ssh", "Vm", stdin=b"echo hi")).stdout == b"hi\n"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("jump", "echo hi"), b"open failed"),
        (("-N", "-R", "0:127.0.0.1:1", "-o", "ExitOnForwardFailure=yes", "jump"), b"remote port forwarding failed"),
        (("-W", "none:22", "jump"), b'VM "none" does not exist'),
        (("-W", "localhost:22", "jump"), b'VM "localhost" does not exist'),
        (("-W", "127.0.0.1:22", "jump"), b'VM "127.0.0.1" does not exist'),
        (("-s", "jump", "sftp"), b"open failed"),
    ],
)
async def test_there_is_no_other_road(tmp_path: Path, words: tuple[str, ...], reason: bytes) -> None:
    async with jumping() as c:
        ran = await Client(c, tmp_path, 22).run("ssh", *words)
        assert ran.returncode != 0
        assert ran.stdout == b""
        assert reason in ran.stderr


async def test_a_port_where_nobody_listens_is_refused_with_the_reason(tmp_path: Path) -> None:
    nobody = free_port()
    async with jumping() as c:
        ran = await Client(c, tmp_path, 22).run("ssh", "-W", f"vm:{nobody}", "jump")
        assert f"cannot connect to port {nobody} of the VM: connection refused".encode() in ran.stderr


async def test_a_vm_that_is_deleted_ends_its_connections(tmp_path: Path, sshd: int) -> None:
    async with jumping() as c, trio.open_nursery() as nursery:
        client = Client(c, tmp_path, sshd)
        done: list[int] = []

        async def connect() -> None:
            ran = await client.run("ssh", "vm", stdin=f"touch {tmp_path}/in; sleep 1000".encode())
            done.append(ran.returncode)

        nursery.start_soon(connect)
        await eventually((tmp_path / "in").exists)
        await c.client.vms.delete("vm")
        await eventually(lambda: done == [255])


# ---- who is let in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "password"),
    [("bootstrap-admin", "pw-1"), ("nobody", "pw-2"), ("token", "x.y.z"), ("reader", "pw-3"), ("root", "pw-4")],
)
async def test_strangers_are_not_let_in(
    tmp_path: Path, user: str, password: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jump, "DELAYS", (0.0,))
    async with jumping() as c:
        await c.client.service_accounts.create("reader", roles=["compute:read"], token="pw-3")
        ran = await Client(c, tmp_path, 22, user, password).run("ssh", "-W", "vm:22", "jump")
        assert b"Permission denied" in ran.stderr
    refused = [record for record in caplog.records if record.message == "a login was refused"]
    assert len(refused) == 1
    assert password not in str(vars(refused[0]).get("reason"))


async def test_a_connection_has_few_tries_and_each_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jump, "DELAYS", (0.0, 0.001))
    tries = 0

    class Guesser(asyncssh.SSHClient):
        def password_auth_requested(self) -> str:
            nonlocal tries
            tries += 1
            return "guess"

    async with jumping() as c, trio_asyncio.open_loop():
        connect = partial(
            asyncssh.connect,
            "127.0.0.1",
            c.ssh_port,
            username="x",
            known_hosts=None,
            client_factory=Guesser,
            config=None,
        )
        with pytest.raises((asyncssh.Error, OSError)):
            await trio_asyncio.aio_as_trio(connect)()
    assert tries <= jump.MAX_TRIES + 1


def test_delays_grow_by_source_and_are_forgotten_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = jump.Failures()
    assert [failures.refused("a") for _ in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert failures.refused("b") == 0.5
    failures.accepted("a")
    assert failures.refused("a") == 0.5
    monkeypatch.setattr(jump, "MAX_SOURCES", 3)
    for source in "cdefg":
        failures.refused(source)
    assert len(failures._counts) == 3


async def test_with_client_auth_off_everybody_gets_in(tmp_path: Path, sshd: int, nursery: trio.Nursery) -> None:
    settings = Settings(
        data_dir=tmp_path / "data",
        host="127.0.0.1",
        port=0,
        tls=False,
        auth=False,
        ssh=("127.0.0.1", 0),
        ssh_auth=False,
    )
    running: Running = await nursery.start(run, settings)
    async with OrchardClient(running.url) as client:
        c = Cluster(running.url, client, "anybody", "anything", running.ssh_port)
        identity = Identity("w", "arm64", "tart", "m", {"org.cirruslabs.tart-vms": 1})
        await nursery.start(Worker(identity, client, SyntheticDriver(tmp_path / "vms")).run)
        await client.vms.create(name="vm", image="any")
        await client.vms.wait("vm")
        assert (await Client(c, tmp_path, sshd).run("ssh", "vm", stdin=b"echo hi")).stdout == b"hi\n"
    nursery.cancel_scope.cancel()


# ---- its key, and where it is missing ------------------------------------------------------------------------------


def test_the_host_key_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = jump.host_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.get_algorithm() == "ssh-ed25519"
    assert jump.host_key(path).public_data == made.public_data
    path.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        jump.host_key(path)
    path.write_text("no key")
    path.chmod(0o600)
    with pytest.raises(ValueError, match="no SSH private key"):
        jump.host_key(path)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden" / "asyncssh.py"
    hidden.parent.mkdir()
    hidden.write_text("raise ImportError('not installed')\n")
    arguments = ("--listen", "127.0.0.1:0", "--insecure-no-tls", "--listen-ssh", "127.0.0.1:0")
    refused = finished("controller", *arguments, home=tmp_path, env={"PYTHONPATH": str(hidden.parent)})
    assert refused.returncode == 1
    assert "pip install 'orchard-cluster[ssh]'" in refused.stderr
    assert "Traceback" not in refused.stderr
