"""The SSH jump host, with the system's OpenSSH programs as clients and a real SSH server in the VMs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import asyncssh
import pytest
import trio
import trio.testing
import trio_asyncio  # type: ignore[import-untyped]  # it has no types
from asyncssh.constants import MSG_USERAUTH_REQUEST
from asyncssh.packet import Boolean, String
from harness.clients import echo, listening, receive_exactly
from harness.processes import GENEROUS, LISTENING, at_rest, eventually, finished, free_port, processes_in, started

from orchard.client import Client, ResponseError
from orchard.controller import ControllerSettings, Running, run
from orchard.decisions.login_limit import MAX_FAILURES
from orchard.schema import TART_VMS, Worker
from orchard.ssh import jump
from orchard.testing import Cluster, cluster
from orchard.vm.synthetic import SyntheticDriver
from orchard.worker import WorkerService


class OpenSSH:
    """The OpenSSH programs with a configuration and passwords of their own, for the jump host and the VM."""

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
        return await self.call(program, "-F", self.config, *words, stdin=stdin)

    async def call(self, *command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        with trio.fail_after(GENEROUS):
            return await trio.run_process(
                command,
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=self._env,
                start_new_session=True,
            )


@asynccontextmanager
async def jumping() -> AsyncIterator[Cluster]:
    """Yield a cluster with a jump host and a running VM "vm"."""
    async with cluster(auth=True, ssh=True) as c:
        await c.client.vms.create(name="vm", image="any")
        await c.client.vms.wait("vm")
        yield c


@pytest.mark.needs("ssh")
async def test_openssh_client_runs_a_shell_in_a_vm(tmp_path: Path, sshd: int) -> None:
    async with jumping() as c:
        client = OpenSSH(c, tmp_path, sshd)
        ran = await client.run("ssh", "vm", stdin=b"echo in the vm; exit 7")
        assert (ran.returncode, ran.stdout) == (7, b"in the vm\n"), ran.stderr


@pytest.mark.needs("ssh")
async def test_a_connection_is_listed_with_its_account(tmp_path: Path, sshd: int) -> None:
    async with jumping() as c, trio.open_nursery() as nursery:

        async def is_listed() -> bool:
            found = [each for each in await c.client.sessions() if each.kind == "ssh"]
            return [(each.account, each.peer) for each in found] == [(c.account, "127.0.0.1")]

        nursery.start_soon(partial(OpenSSH(c, tmp_path, sshd).run, "ssh", "vm", "sleep 1000"))
        await eventually(is_listed)
        nursery.cancel_scope.cancel()


@pytest.mark.needs("ssh")
async def test_ssh_with_an_access_token_reaches_its_vm_only(tmp_path: Path, sshd: int) -> None:
    async with jumping() as c:
        issued = await c.client.vms.issue_access_token("vm")
        client = OpenSSH(c, tmp_path, sshd, issued.ssh_username, issued.token)
        assert (await client.run("ssh", "vm", stdin=b"echo hi")).stdout == b"hi\n"
        await c.client.vms.create(name="other", image="any")
        ran = await client.run("ssh", "other", stdin=b"echo hi")
        assert (ran.returncode, ran.stdout) == (255, b"")
        await c.client.vms.delete("vm")
        await c.client.vms.create(name="vm", image="any")
        ran = await client.run("ssh", "vm", stdin=b"echo hi")
        assert (ran.returncode, ran.stdout) == (255, b""), "another VM has the name now"


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("-O",)], ids=["sftp", "scp"])
@pytest.mark.needs("ssh", "scp")
async def test_scp_in_both_directions(tmp_path: Path, sshd: int, mode: tuple[str, ...]) -> None:
    data = hashlib.shake_128(b"file").digest(8 * 1024 * 1024)
    source, there, back = (tmp_path / name for name in ("source", "there", "back"))
    source.write_bytes(data)
    async with jumping() as c:
        client = OpenSSH(c, tmp_path, sshd)
        for one, other in ((str(source), f"vm:{there}"), (f"vm:{there}", str(back))):
            ran = await client.run("scp", *mode, one, other)
            assert ran.returncode == 0, ran.stderr
    assert back.read_bytes() == data


@pytest.mark.needs("ssh", "sftp")
async def test_sftp_in_both_directions(tmp_path: Path, sshd: int) -> None:
    data = hashlib.shake_128(b"file").digest(1024 * 1024)
    source, there, back, batch = (tmp_path / name for name in ("a source", "there", "back", "batch"))
    source.write_bytes(data)
    batch.write_text(f'put "{source}" {there}\nget {there} {back}\nrm {there}\n')
    async with jumping() as c:
        ran = await OpenSSH(c, tmp_path, sshd).run("sftp", "-oBatchMode=no", "-b", str(batch), "vm")
        assert ran.returncode == 0, ran.stderr
    assert back.read_bytes() == data
    assert not there.exists(), "sftp must have removed it in the VM"


@pytest.mark.needs("ssh", "rsync")
async def test_rsync_in_both_directions(tmp_path: Path, sshd: int) -> None:
    files = {
        "small": b"1\n",
        "a name with a blank": b"2\n",
        "deep/er/empty": b"",
        "deep/random": hashlib.shake_128(b"tree").digest(1024 * 1024),
    }
    for name, content in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    async with jumping() as c:
        client = OpenSSH(c, tmp_path, sshd)
        remote = f"ssh -F {client.config} -J jump"
        for one, other in (
            (f"{tmp_path}/tree/", f"vm:{tmp_path}/there/"),
            (f"vm:{tmp_path}/there/", f"{tmp_path}/back/"),
        ):
            ran = await client.call("rsync", "-a", "-e", remote, one, other)
            assert ran.returncode == 0, ran.stderr
    for root in ("there", "back"):
        found = {
            str(path.relative_to(tmp_path / root)): path for path in (tmp_path / root).rglob("*") if path.is_file()
        }
        assert {name: path.read_bytes() for name, path in found.items()} == files


@pytest.mark.slow
@pytest.mark.needs("ssh")
async def test_local_forwarding_of_a_vms_port(tmp_path: Path, sshd: int) -> None:
    local = free_port()
    async with jumping() as c, listening(echo) as port, trio.open_nursery() as nursery:
        client = OpenSSH(c, tmp_path, sshd)
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


@pytest.mark.needs("ssh")
async def test_vm_name_with_capitals_is_found_in_lower_case(tmp_path: Path, sshd: int) -> None:
    async with cluster(auth=True, ssh=True) as c:
        await c.client.vms.create(name="Vm", image="any")
        await c.client.vms.wait("Vm")
        assert (await OpenSSH(c, tmp_path, sshd).run("ssh", "Vm", stdin=b"echo hi")).stdout == b"hi\n"


@pytest.mark.parametrize("names", [("Vm", "vM"), ("VM", "vm")])
@pytest.mark.needs("ssh")
async def test_ambiguous_vm_name_in_lower_case_is_refused(
    tmp_path: Path, names: tuple[str, str], sshd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jump, "LINGER_SECONDS", 0.05)
    async with cluster(auth=True, ssh=True) as c:
        for name in names:
            await c.client.vms.create(name=name, image="any")
            await c.client.vms.wait(name)
        for target in (f"vm:{sshd}", f"{names[0]}:{sshd}"):
            ran = await OpenSSH(c, tmp_path, 22).run("ssh", "-W", target, "jump")
            # A name with capitals was not changed by the client.
            assert (b", ".join(name.encode() for name in sorted(names)) in ran.stderr) is target.islower()
            assert (b"SSH-2.0-" in ran.stdout) is not target.islower()
        access = await c.client.vms.issue_access_token(names[0])
        client = OpenSSH(c, tmp_path, sshd, "token", access.token)
        assert (await client.run("ssh", "vm", stdin=b"echo hi")).stdout == b"hi\n", "the token says which one"


@pytest.mark.needs("ssh")
async def test_two_sessions_over_one_connection_to_the_jump_host(
    tmp_path: Path, sshd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logins = 0

    def counted(server: jump._Server) -> None:
        nonlocal logins
        logins += 1
        server.admitted = True

    monkeypatch.setattr(jump._Server, "auth_completed", counted)
    first, second = tmp_path / "first", tmp_path / "second"
    # Each session waits for the other one, so both must be open at the same time.
    meet = "touch {}; until [ -e {} ]; do sleep 0.01; done; echo met"
    # The path of tmp_path may be too long for a Unix socket.
    with TemporaryDirectory() as sockets:
        async with jumping() as c, trio.open_nursery() as nursery:
            client = OpenSSH(c, tmp_path, sshd)
            path = f"{sockets}/s"
            config = Path(client.config)
            config.write_text(f"{config.read_text()}Host jump\n  ControlPath {path}\n")
            nursery.start_soon(client.run, "ssh", "-M", "-N", "jump")
            await eventually(Path(path).exists)
            said: list[bytes] = []

            async def session(one: Path, other: Path) -> None:
                ran = await client.run("ssh", "-J", "jump", "vm", meet.format(one, other))
                said.append(ran.stdout or ran.stderr)

            async with trio.open_nursery() as both:
                both.start_soon(session, first, second)
                both.start_soon(session, second, first)
            assert said == [b"met\n", b"met\n"]
            assert logins == 1
            nursery.cancel_scope.cancel()


@pytest.mark.needs("ssh")
async def test_answer_arrives_after_the_clients_end_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = trio.Event()
    answer = hashlib.shake_128(b"answer").digest(3_000_000)

    class Noticed(jump.ChannelStream):
        def eof_received(self) -> bool:
            ended.set()
            return super().eof_received()

    async def reply(stream: trio.SocketStream) -> None:
        assert await receive_exactly(stream, 8) == b"question"
        await ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(answer)

    monkeypatch.setattr(jump, "ChannelStream", Noticed)
    async with jumping() as c, listening(reply) as port:
        ran = await OpenSSH(c, tmp_path, 22).run("ssh", "-W", f"vm:{port}", "jump", stdin=b"question")
        assert ran.stdout == answer


@pytest.mark.needs("ssh")
async def test_tunnel_is_closed_when_the_vm_is_silent_after_the_clients_end_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jump, "LINGER_SECONDS", 0.05)
    got = bytearray()

    async def take(stream: trio.SocketStream) -> None:
        async for data in stream:
            got.extend(data)

    async with jumping() as c, listening(take) as port:
        ran = await OpenSSH(c, tmp_path, 22).run("ssh", "-W", f"vm:{port}", "jump", stdin=b"x" * 1_000_000)
        assert (ran.returncode, ran.stdout) == (0, b"")
        await eventually(lambda: got == b"x" * 1_000_000)


STALLED = """
import asyncio, asyncssh, sys
async def main():
    port, user, password, vm_port = sys.argv[1:]
    async with asyncssh.connect("127.0.0.1", int(port), username=user, password=password, known_hosts=None,
                                config=None) as connection:
        reader, writer = await connection.open_connection("vm", int(vm_port), window=2**32 - 1)
        print("open", flush=True)
        # Nothing is read from the socket meanwhile.
        sys.stdin.readline()
        size = 0
        while data := await reader.read(65536):
            size += len(data)
        print(size, flush=True)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_ssh_client_that_does_not_read_stops_its_vm_for_any_window_size() -> None:
    sent = 0

    async def pour(stream: trio.SocketStream) -> None:
        nonlocal sent
        for _ in range(1000):
            await stream.send_all(bytes(65536))
            sent += 1

    async with jumping() as c, listening(pour) as port, trio.open_nursery() as nursery:
        words = [sys.executable, "-c", STALLED, str(c.ssh_port), c.account, c.token, str(port)]
        start = partial(trio.run_process, words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process: trio.Process = await nursery.start(start)
        assert process.stdio is not None
        assert await receive_exactly(process.stdio, 5) == b"open\n"
        await at_rest(lambda: sent)
        assert 0 < sent < 500, "the sender must stop while the client does not read"
        await process.stdio.send_all(b"\n")
        assert await receive_exactly(process.stdio, 9) == b"%d\n" % (1000 * 65536)


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
@pytest.mark.needs("ssh")
async def test_shells_remote_forwarding_and_other_hosts_are_refused(
    tmp_path: Path, words: tuple[str, ...], reason: bytes
) -> None:
    async with jumping() as c:
        ran = await OpenSSH(c, tmp_path, 22).run("ssh", *words)
        assert ran.returncode != 0
        assert ran.stdout == b""
        assert reason in ran.stderr


@pytest.mark.needs("ssh")
async def test_closed_port_of_a_vm_is_refused_with_the_reason(tmp_path: Path) -> None:
    closed_port = free_port()
    async with jumping() as c:
        ran = await OpenSSH(c, tmp_path, 22).run("ssh", "-W", f"vm:{closed_port}", "jump")
        assert f"port {closed_port} ".encode() in ran.stderr
        assert b"connection refused" in ran.stderr


@pytest.mark.needs("ssh")
async def test_deleting_a_vm_ends_its_ssh_connections(tmp_path: Path, sshd: int) -> None:
    async with jumping() as c, trio.open_nursery() as nursery:
        client = OpenSSH(c, tmp_path, sshd)
        done: list[int] = []

        async def connect() -> None:
            ran = await client.run("ssh", "vm", stdin=f"touch {tmp_path}/in; sleep 1000".encode())
            done.append(ran.returncode)

        nursery.start_soon(connect)
        await eventually((tmp_path / "in").exists)
        await c.client.vms.delete("vm")
        await eventually(lambda: done == [255])


# ---- logins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("bootstrap-admin", "password-1"),
        ("nobody", "password-2"),
        ("token", "x.y.z"),
        ("reader", "password-3"),
        ("root", "password-4"),
    ],
)
@pytest.mark.needs("ssh")
async def test_wrong_credentials_are_refused_and_logged_without_the_password(
    tmp_path: Path, user: str, password: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with jumping() as c:
        await c.client.service_accounts.create("reader", roles=["compute:read"], token="password-3")
        ran = await OpenSSH(c, tmp_path, 22, user, password).run("ssh", "-W", "vm:22", "jump")
        assert b"Permission denied" in ran.stderr
    refused = [record for record in caplog.records if record.message == "SSH login refused"]
    assert len(refused) == 1
    assert password not in str(vars(refused[0]).get("reason"))


def with_key(client: OpenSSH, path: Path, **options: str) -> OpenSSH:
    """Have a client log in to the jump host by a key alone."""
    lines = {"IdentityFile": str(path), "PubkeyAuthentication": "yes", "PasswordAuthentication": "no", **options}
    config = Path(client.config)
    block = "".join(f"  {name} {value}\n" for name, value in lines.items())
    config.write_text(config.read_text().replace("Host jump\n", f"Host jump\n  IdentitiesOnly yes\n{block}", 1))
    return client


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [("ssh-ed25519", {}), ("ssh-rsa", {"key_size": 2048})])
@pytest.mark.needs("ssh")
async def test_login_by_a_key_of_the_service_account(
    tmp_path: Path, sshd: int, kind: str, options: dict[str, int]
) -> None:
    key = written_key(tmp_path / "id", kind, **options)
    line = key.export_public_key().decode().strip()
    async with jumping() as c:
        # A key may be in several accounts, since the user name says which one is meant.
        for name, roles in (("one", ["compute:connect"]), ("other", ["compute:write"]), ("reader", ["compute:read"])):
            await c.client.service_accounts.create(name, roles=roles, token="a-password", authorized_keys=[line])
        await c.client.service_accounts.create("keyless", roles=["compute:connect"], token="a-password")
        for user, status in (("one", 7), ("other", 7), ("reader", 255), ("keyless", 255), ("nobody", 255)):
            client = with_key(OpenSSH(c, tmp_path, sshd, user), tmp_path / "id")
            assert (await client.run("ssh", "vm", stdin=b"exit 7")).returncode == status
        if kind == "ssh-rsa":
            client = with_key(OpenSSH(c, tmp_path, sshd, "one"), tmp_path / "id", PubkeyAcceptedAlgorithms="ssh-rsa")
            assert (await client.run("ssh", "vm")).returncode == 255, "a signature with SHA-1"
        await c.client.service_accounts.replace("one", authorized_keys=[])
        client = with_key(OpenSSH(c, tmp_path, sshd, "one"), tmp_path / "id")
        assert (await client.run("ssh", "vm")).returncode == 255, "keys are looked up at each login"


async def test_signature_with_sha_1_is_refused() -> None:
    key = asyncssh.generate_private_key("ssh-rsa", key_size=2048)
    (pair,) = asyncssh.load_keypairs([key])
    async with jumping() as c, trio_asyncio.open_loop():
        await c.client.service_accounts.create(
            "someone", roles=["compute:connect"], authorized_keys=[key.export_public_key().decode().strip()]
        )
        connection = await logged_in(c.ssh_port, "someone", "x", client_keys=[pair])
        connection.close()
        await trio_asyncio.aio_as_trio(connection.wait_closed)()
        pair.sig_algorithms = (b"ssh-rsa",)
        pair.sig_algorithm = b"ssh-rsa"
        with pytest.raises(asyncssh.PermissionDenied):
            await logged_in(c.ssh_port, "someone", "x", client_keys=[pair], signature_algs=["ssh-rsa"])


async def test_key_that_was_removed_opens_no_more_channels(sshd: int) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    line = key.export_public_key().decode()
    async with jumping() as c, trio_asyncio.open_loop():
        await c.client.service_accounts.create("someone", roles=["compute:connect"], authorized_keys=[line.strip()])
        connection = await logged_in(c.ssh_port, "someone", client_keys=[key])
        reader, _ = await trio_asyncio.aio_as_trio(connection.open_connection)("vm", sshd)
        assert (await trio_asyncio.aio_as_trio(reader.read)(8)) == b"SSH-2.0-"
        await c.client.service_accounts.replace("someone", authorized_keys=[])
        with pytest.raises(asyncssh.ChannelOpenError, match="keys"):
            await trio_asyncio.aio_as_trio(connection.open_connection)("vm", sshd)
        connection.close()
        await trio_asyncio.aio_as_trio(connection.wait_closed)()


async def test_password_is_asked_for_after_all_keys_of_an_agent() -> None:
    keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(20)]
    async with jumping() as c, trio_asyncio.open_loop():
        connection = await logged_in(c.ssh_port, c.account, c.token, client_keys=keys)
        connection.close()
        await trio_asyncio.aio_as_trio(connection.wait_closed)()


async def logged_in(port: int, user: str = "x", password: str = "guess", **options: Any) -> Any:
    """Connect by asyncssh. For use within a loop of trio-asyncio."""
    connect = partial(asyncssh.connect, "127.0.0.1", port, username=user, known_hosts=None, config=None, **options)
    return await trio_asyncio.aio_as_trio(connect)(password=password)


async def test_password_tries_in_a_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    class Guesser(asyncssh.SSHClient):
        def password_auth_requested(self) -> str:
            nonlocal tries
            tries += 1
            return "guess"

    async with jumping() as c, trio_asyncio.open_loop():
        with pytest.raises((asyncssh.Error, OSError)):
            await logged_in(c.ssh_port, password="", client_factory=Guesser)
    assert 0 < tries <= jump.MAX_TRIES + 1


async def test_passwords_sent_without_waiting_count_as_tries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    class Hasty(asyncssh.SSHClient):
        def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
            self.connection = conn

        def password_auth_requested(self) -> str:
            for number in range(100):
                words = (String("x"), String("ssh-connection"), String("password"), Boolean(False), String(str(number)))
                self.connection.send_packet(MSG_USERAUTH_REQUEST, *words)
            return "guess"

    async with jumping() as c, trio_asyncio.open_loop():
        with pytest.raises((asyncssh.Error, OSError)):
            await logged_in(c.ssh_port, password="", client_factory=Hasty)
    looked_at = [record for record in caplog.records if record.message == "SSH login refused"]
    assert len(looked_at) <= jump.MAX_TRIES


@pytest.mark.slow
async def test_wrong_passwords_count_for_the_limit_of_the_api_and_right_ones_get_through(sshd: int) -> None:
    async with jumping() as c, trio_asyncio.open_loop():
        for _ in range(MAX_FAILURES):
            async with Client(c.url, account=c.account, token="wrong") as guesser:
                with pytest.raises(ResponseError) as refused:
                    await guesser.check()
                assert refused.value.status == 401
        # The account and the address are limited. A password is known from the API, where its check had to wait.
        begun = trio.current_time()
        with pytest.raises(asyncssh.PermissionDenied):
            await logged_in(c.ssh_port, c.account, "guess")
        assert trio.current_time() - begun >= 1.0
        connection = await logged_in(c.ssh_port, c.account, c.token)
        reader, _ = await trio_asyncio.aio_as_trio(connection.open_connection)("vm", sshd)
        assert (await trio_asyncio.aio_as_trio(reader.read)(8)) == b"SSH-2.0-"
        connection.close()
        await trio_asyncio.aio_as_trio(connection.wait_closed)()


@pytest.mark.parametrize("way", ["password", "access token"])
@pytest.mark.parametrize("roles", [None, ["compute:read"]], ids=["deleted", "without the role"])
async def test_ssh_connection_ends_with_its_account(sshd: int, roles: list[str] | None, way: str) -> None:
    async with jumping() as c, trio_asyncio.open_loop():
        await c.client.service_accounts.create("someone", roles=["compute:write"], token="a-password")
        credentials = "someone", "a-password"
        if way == "access token":
            async with Client(c.url, account="someone", token="a-password") as client:
                credentials = "token", (await client.vms.issue_access_token("vm")).token
        connection = await logged_in(c.ssh_port, *credentials)
        reader, _ = await trio_asyncio.aio_as_trio(connection.open_connection)("vm", sshd)
        assert (await trio_asyncio.aio_as_trio(reader.read)(8)) == b"SSH-2.0-"
        begun = trio.current_time()
        if roles is None:
            await c.client.service_accounts.delete("someone")
        else:
            await c.client.service_accounts.replace("someone", roles=roles)
        with trio.fail_after(GENEROUS):
            await trio_asyncio.aio_as_trio(connection.wait_closed)()
        assert trio.current_time() - begun < GENEROUS


async def test_changed_token_opens_no_more_channels(sshd: int) -> None:
    async with jumping() as c, trio_asyncio.open_loop():
        await c.client.service_accounts.create("someone", roles=["compute:connect"], token="a-password")
        connection = await logged_in(c.ssh_port, "someone", "a-password")
        await c.client.service_accounts.replace("someone", token="another-password")
        with pytest.raises(asyncssh.ChannelOpenError, match="service account"):
            await trio_asyncio.aio_as_trio(connection.open_connection)("vm", sshd)
        connection.close()
        await trio_asyncio.aio_as_trio(connection.wait_closed)()


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-x", b"SSH-2.0-x\r\n", b"\0" * 1000])
async def test_connection_without_a_login_is_closed(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jump, "LOGIN_SECONDS", 0.05)
    async with jumping() as c, await trio.open_tcp_stream("127.0.0.1", c.ssh_port) as stream:
        await stream.send_all(said)
        await until_closed(stream)


async def test_client_that_sends_no_password_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jump, "LOGIN_SECONDS", 0.3)

    class Silent(asyncssh.SSHClient):
        async def password_auth_requested(self) -> str:
            await asyncio.Event().wait()
            raise AssertionError

    async with jumping() as c, trio_asyncio.open_loop():
        with pytest.raises(asyncssh.Error), trio.fail_after(GENEROUS):
            await logged_in(c.ssh_port, password="", client_factory=Silent, login_timeout=GENEROUS)


async def until_closed(stream: trio.SocketStream) -> bytes:
    """Return everything that is received until the other side closes or resets the connection."""
    data = b""
    with trio.fail_after(GENEROUS), suppress(trio.BrokenResourceError):
        async for more in stream:
            data += more
    return data


async def test_silent_connections_make_room_for_logins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jump, "MAX_LOGINS_OF_SOURCE", 3)
    monkeypatch.setattr(jump, "LOGIN_SECONDS", 10 * GENEROUS)
    async with jumping() as c, trio_asyncio.open_loop(), AsyncExitStack() as stack:
        friend = await logged_in(c.ssh_port, c.account, c.token)
        silent = [
            await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", c.ssh_port)) for _ in range(10)
        ]
        for stream in silent[:-3]:
            await until_closed(stream)
        another = await logged_in(c.ssh_port, c.account, c.token)
        assert await until_closed(silent[-3]) != b"", "the oldest one made room"
        assert not friend.is_closed()
        for connection in (friend, another):
            connection.close()
            await trio_asyncio.aio_as_trio(connection.wait_closed)()


@pytest.mark.parametrize("what", ["requests", "key exchanges"])
async def test_work_before_a_login_is_bounded(what: str) -> None:
    class Busy(asyncssh.SSHClient):
        def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
            self.connection = conn

        async def password_auth_requested(self) -> str:
            for number in range(jump.MAX_LOGIN_REQUESTS + 1):
                if what == "requests":
                    words = (String(f"x{number}"), String("ssh-connection"), String("none"))
                    self.connection.send_packet(MSG_USERAUTH_REQUEST, *words)
                else:
                    self.connection._send_kexinit()
                    self.connection._kexinit_sent = True
                    while self.connection._kex or not self.connection._kex_complete:  # noqa: ASYNC110
                        await asyncio.sleep(0.001)
            await asyncio.Event().wait()
            raise AssertionError

    async with jumping() as c, trio_asyncio.open_loop():
        with pytest.raises(asyncssh.Error, match="too many"), trio.fail_after(GENEROUS):
            await logged_in(c.ssh_port, password="", client_factory=Busy)


@pytest.mark.slow
async def test_jump_host_recovers_from_a_lack_of_file_descriptors(tmp_path: Path) -> None:
    words = ("--listen", "127.0.0.1:0", "--insecure-no-tls", "--listen-ssh", "127.0.0.1:0")
    with started("controller", *words, home=tmp_path) as role:
        port = int(role.wait_for(re.compile(r"SSH into VMs: ssh -J ACCOUNT@HOST:([0-9]+)"))[1])
        role.wait_for(LISTENING)
        pid = role.process.pid
        taken = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (taken + 3, taken + 3))
        with ExitStack() as connections:
            for _ in range(10):
                connections.enter_context(socket.create_connection(("127.0.0.1", port)))
            await eventually(lambda: "Too many open files" in role.log.read_text())
        with socket.create_connection(("127.0.0.1", port), timeout=GENEROUS) as again:
            assert again.recv(100).startswith(b"SSH-2.0-Orchard")
        assert role.stop() == 0


async def test_stop_of_the_controller_closes_ssh_connections() -> None:
    async with AsyncExitStack() as stack:
        async with jumping() as c:
            stream = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", c.ssh_port))
            assert (await stream.receive_some()).startswith(b"SSH-2.0-Orchard")
        assert b"the controller is stopping" in await until_closed(stream)


async def test_every_offered_algorithm_works() -> None:
    async with jumping() as c, trio_asyncio.open_loop():
        choices = [{"kex_algs": [name]} for name in jump.KEY_EXCHANGE]
        choices += [{"encryption_algs": [name]} for name in jump.ENCRYPTION]
        for choice in choices:
            connection = await logged_in(c.ssh_port, c.account, c.token, **choice)
            connection.close()
            await trio_asyncio.aio_as_trio(connection.wait_closed)()


async def test_first_key_exchange_is_the_one_that_dropbear_guesses_and_ciphers_are_aes() -> None:
    """Dropbear sends the first packet of its guess before it has read what the server offers."""
    async with jumping() as c, await trio.open_tcp_stream("127.0.0.1", c.ssh_port) as stream:
        await stream.send_all(b"SSH-2.0-Test\r\n")
        while await receive_exactly(stream, 1) != b"\n":
            pass
        size = int.from_bytes(await receive_exactly(stream, 4))
        # RFC 4253, section 7.1: the number of bytes of padding, the type 20 and a cookie, then lists of names.
        packet = await receive_exactly(stream, size)
    assert packet[1] == 20
    names, at = [], 18
    for _ in range(4):
        end = at + 4 + int.from_bytes(packet[at : at + 4])
        names.append(packet[at + 4 : end].decode().split(","))
        at = end
    exchanges, _, *ciphers = names
    assert exchanges[0] == "curve25519-sha256"
    for offered in ciphers:
        assert offered[0].startswith("aes")
        assert "gcm" in offered[0]
        assert not [name for name in offered if "chacha20" in name]


@pytest.mark.needs("ssh")
async def test_jump_host_without_authentication(tmp_path: Path, sshd: int, nursery: trio.Nursery) -> None:
    settings = ControllerSettings(
        data_dir=tmp_path / "data",
        host="127.0.0.1",
        port=0,
        tls=False,
        auth=False,
        ssh=("127.0.0.1", 0),
        ssh_auth=False,
    )
    running: Running = await nursery.start(run, settings)
    async with Client(running.url) as client:
        c = Cluster(running.url, client, "anybody", "anything", running.ssh_port)
        description = Worker(name="w", machine_id="m", resources={TART_VMS: 1})
        await nursery.start(WorkerService(description, client, SyntheticDriver(tmp_path / "vms")).run)
        await client.vms.create(name="vm", image="any")
        await client.vms.wait("vm")
        assert (await OpenSSH(c, tmp_path, sshd).run("ssh", "vm", stdin=b"echo hi")).stdout == b"hi\n"
    nursery.cancel_scope.cancel()


# ---- start -----------------------------------------------------------------------------------------------------------


def test_host_key_is_created_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "key"
    (made,) = jump.host_keys([path])
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.get_algorithm() == "ssh-ed25519"
    assert jump.host_keys([path])[0].public_data == made.public_data
    assert [path] == list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="one of each type"):
        jump.host_keys([path, tmp_path / "another"])
    path.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        jump.host_keys([path])
    path.write_text("no key")
    path.chmod(0o600)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        jump.host_keys([path])


def written_key(path: Path, kind: str, **options: Any) -> asyncssh.SSHKey:
    key = asyncssh.generate_private_key(kind, **options)
    path.write_bytes(key.export_private_key())
    path.chmod(0o600)
    return key


def test_small_rsa_host_key_is_refused(tmp_path: Path) -> None:
    written_key(tmp_path / "key", "ssh-rsa", key_size=1024)
    with pytest.raises(ValueError, match="2048"):
        jump.host_keys([tmp_path / "key"])


@pytest.mark.needs("ssh")
async def test_host_keys_of_other_types_on_request(tmp_path: Path, nursery: trio.Nursery) -> None:
    kinds = {"ecdsa-sha2-nistp256": {}, "ssh-rsa": {"key_size": 2048}, "ssh-ed25519": {}}
    for kind, options in kinds.items():
        written_key(tmp_path / kind, kind, **options)
    settings = ControllerSettings(
        data_dir=tmp_path / "data",
        host="127.0.0.1",
        port=0,
        tls=False,
        auth=False,
        ssh=("127.0.0.1", 0),
        ssh_host_keys=tuple(tmp_path / kind for kind in kinds),
        ssh_auth=False,
    )
    running: Running = await nursery.start(run, settings)
    async with Client(running.url) as client:
        c = Cluster(running.url, client, "anybody", "anything", running.ssh_port)
        ssh = OpenSSH(c, tmp_path, 22)
        for algorithm in ("ecdsa-sha2-nistp256", "rsa-sha2-512", "rsa-sha2-256", "ssh-ed25519", "ssh-rsa"):
            ran = await ssh.run("ssh", "-W", "none:22", "-o", f"HostKeyAlgorithms={algorithm}", "jump")
            # SHA-1 signatures are not offered.
            assert (b'VM "none" does not exist' in ran.stderr) is (algorithm != "ssh-rsa"), ran.stderr
    nursery.cancel_scope.cancel()


@pytest.mark.slow
def test_missing_extra_is_reported_with_the_remedy(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden" / "asyncssh.py"
    hidden.parent.mkdir()
    hidden.write_text("raise ImportError('not installed')\n")
    arguments = ("--listen", "127.0.0.1:0", "--insecure-no-tls", "--listen-ssh", "127.0.0.1:0")
    refused = finished("controller", *arguments, home=tmp_path, env={"PYTHONPATH": str(hidden.parent)})
    assert refused.returncode == 1
    assert "pip install 'orchard-cluster[ssh]'" in refused.stderr
    assert "Traceback" not in refused.stderr
