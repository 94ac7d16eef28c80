"""exec: commands in a VM over a WebSocket, by an independent client, with a real SSH server and a real shell."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import trio
import trio_asyncio  # type: ignore[import-untyped]  # it has no types
from asyncssh.packet import UInt32
from harness.clients import connect_websocket, listening, refusal, running_vm, websocket_url
from harness.inprocess import InProcessCluster
from harness.processes import GENEROUS, at_last, eventually, free_port
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from orchard.client import Client, ClientError, ResponseError
from orchard.codec import MalformedError
from orchard.ssh import connections, remaining_output
from orchard.ssh import exec as vm_exec
from orchard.ssh.exec import Command
from orchard.testing import Cluster


@pytest.fixture
def ssh_port(sshd: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(connections, "SSH_PORT", sshd)
    return sshd


def send_nothing(client: ClientConnection) -> None:
    """The default of `run_command`."""


def read_frames(client: ClientConnection) -> list[dict[str, Any]]:
    """Read to the end; return the frames with decoded data, the data of neighbours of one type joined.

    Each frame must have the next watermark, which is left out of what is returned.
    """
    found: list[dict[str, Any]] = []
    number = 0
    try:
        while True:
            message = client.recv()
            assert isinstance(message, str), "frames are text"
            frame = json.loads(message)
            number += 1
            assert frame.pop("watermark") == number
            if "data" in frame:
                frame["data"] = base64.b64decode(frame["data"])
                if found and found[-1]["type"] == frame["type"]:
                    found[-1]["data"] += frame["data"]
                    continue
            found.append(frame)
    except ConnectionClosed:
        return found


def stdin(data: bytes) -> str:
    return json.dumps({"type": "stdin", "data": base64.b64encode(data).decode()})


async def run_command(
    c: Cluster, command: str, send: Callable[[ClientConnection], None] = send_nothing, /, **query: str
) -> list[dict[str, Any]]:
    """Run a command in the VM "vm" and return its frames; `send` may send frames first."""

    def talk() -> list[dict[str, Any]]:
        with connect_websocket(websocket_url(c, "/vms/vm/exec", command=command, **query)) as client:
            send(client)
            return read_frames(client)

    with trio.fail_after(GENEROUS):
        return await trio.to_thread.run_sync(talk)


def sending(data: bytes) -> Callable[[ClientConnection], None]:
    """Return a function that sends the whole stdin of a command, in frames of 100 KB."""

    def send(client: ClientConnection) -> None:
        for start in range(0, len(data), 100_000):
            client.send(stdin(data[start : start + 100_000]))
        client.send(stdin(b""))

    return send


def exited(code: int) -> dict[str, Any]:
    return {"type": "exit", "exit": {"code": code}}


Session = Callable[[asyncssh.SSHServerProcess[Any]], Any]


# The connections of the guests.
OPEN: list[asyncssh.SSHServerConnection] = []


class Guest(asyncssh.SSHServer):
    """The side of a guest in one connection: lets everybody in."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        OPEN.append(conn)

    def begin_auth(self, username: str) -> bool:
        return False

    async def session_requested(self) -> Any:
        return asyncssh.SSHServerProcess(self.session, None, 0, False)


@asynccontextmanager
async def guest(
    monkeypatch: pytest.MonkeyPatch, session: Session, server: Callable[[Session], Guest] = Guest, **options: Any
) -> AsyncIterator[None]:
    """An SSH server of the test in the VM, which calls `session` for each command."""
    async with trio_asyncio.open_loop():
        listen = partial(
            asyncssh.listen,
            "127.0.0.1",
            options.pop("port", 0),
            server_factory=partial(server, session),
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            **options,
        )
        acceptor = await trio_asyncio.aio_as_trio(listen)()
        monkeypatch.setattr(connections, "SSH_PORT", acceptor.get_port())
        yield
        acceptor.close()
        while OPEN:
            OPEN.pop().abort()
        await trio_asyncio.aio_as_trio(acceptor.wait_closed)()


async def test_output_and_exit_code_of_a_command(ssh_port: int) -> None:
    async with running_vm() as c:
        assert await run_command(c, "echo out; exit 3") == [{"type": "stdout", "data": b"out\n"}, exited(3)]
        assert await run_command(c, "echo err >&2") == [{"type": "stderr", "data": b"err\n"}, exited(0)]
        assert await run_command(c, "true") == [exited(0)]
        assert await run_command(c, "cat") == [exited(0)], "stdin is at its end without interactive"
        frames = await run_command(c, "seq 100000; printf '\\377'")
        assert frames[0]["data"] == b"".join(b"%d\n" % n for n in range(1, 100_001)) + b"\xff"


async def test_error_in_the_asyncio_loop_is_logged_and_ends_nothing(
    ssh_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loops: list[Any] = []
    log_in = connections._log_in

    async def noting(*arguments: Any) -> Any:
        loops.append(trio_asyncio.current_loop.get())
        return await log_in(*arguments)

    monkeypatch.setattr(connections, "_log_in", noting)
    async with running_vm() as c:
        assert await run_command(c, "true") == [exited(0)]
        loops[0].call_soon(lambda: 1 / 0)
        await eventually(lambda: "ZeroDivisionError" in caplog.text)
        assert await run_command(c, "true") == [exited(0)]


async def test_stdin_is_passed_on_and_closed(ssh_port: int) -> None:
    data = bytes(range(256)) * 4096

    async with running_vm() as c:
        frames = await run_command(c, "cat", sending(data), interactive="true")
        assert [(frame["type"], len(frame.get("data", b""))) for frame in frames] == [
            ("stdout", len(data)),
            ("exit", 0),
        ]
        assert frames[0]["data"] == data


async def test_environment_and_workdir_of_a_command(ssh_port: int, tmp_path: Path) -> None:
    nasty = 'it\'s "$HOME" `id` $(id)\nnext'
    odd = tmp_path / "a 'b' $c"
    odd.mkdir()
    async with running_vm() as c:
        frames = await run_command(c, 'printf "%s" "$VALUE"', send_nothing, **{"env[VALUE]": nasty, "env[OTHER]": ""})
        assert frames == [{"type": "stdout", "data": nasty.encode()}, exited(0)]
        assert (await run_command(c, "pwd", workdir=str(odd)))[0]["data"].decode() == f"{odd}\n"
        assert (await run_command(c, "echo no", workdir=str(odd / "none")))[-1] == exited(1)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ("no json", "JSON"),
        ("[]", "expected one of type"),
        ('{"type": "x"}', "expected one of type"),
        ('{"type": "stdin", "data": "!"}', "expected base64"),
        ('{"type": "stdin", "data": 1}', "expected one of type"),
        ('{"type": "resize", "terminal": {"rows": 0, "cols": 1}}', "expected 1 to"),
    ],
)
async def test_malformed_frame_ends_the_command_with_the_reason(ssh_port: int, frame: str, words: str) -> None:
    async with running_vm() as c:
        frames = await run_command(c, "sleep 1000", lambda client: client.send(frame), interactive="1")
        assert frames[-1]["type"] == "error"
        assert words in frames[-1]["error"]
        frames = await run_command(c, "sleep 1000", lambda client: client.send(stdin(b"x")))
        assert "not interactive" in frames[-1]["error"]


@pytest.mark.slow
async def test_stdin_frame_without_data_closes_stdin(ssh_port: int) -> None:
    for end in ({"type": "stdin"}, {"type": "stdin", "data": None}, {"type": "stdin", "data": ""}):
        async with running_vm() as c:

            def send(client: ClientConnection, end: dict[str, Any] = end) -> None:
                client.send(stdin(b"hello"))
                client.send(json.dumps(end))

            frames = await run_command(c, "cat", send, stdin="true")
            assert frames == [{"type": "stdout", "data": b"hello"}, exited(0)]


async def test_names_in_frames_have_any_case(ssh_port: int) -> None:
    def send(client: ClientConnection) -> None:
        client.send(json.dumps({"TYPE": "resize", "Terminal": {"Rows": 10, "COLS": 20}}))
        client.send(json.dumps({"Type": "stdin", "type": "stdin", "Data": "bm8=", "data": "aGVsbG8="}))
        client.send(json.dumps({"Type": "stdin"}))

    async with running_vm() as c:
        assert await run_command(c, "cat", send, stdin="true") == [{"type": "stdout", "data": b"hello"}, exited(0)]


async def test_process_in_the_background_does_not_hold_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_exec, "REST_SECONDS", 0.1)
    monkeypatch.setattr(remaining_output, "REST_BYTES", 100_000)
    # As OpenSSH does it: the status of the command at its end, the end of the output when the last process closes it.
    rest = {"silent": b"", "chatty": b"x", "flooding": b"x" * 60_000}

    async def session(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.channel._send_request(b"exit-status", UInt32(3))
        process.stdout.write(b"out")
        # Until the client has closed the channel. An exception would end the connection, which later commands share.
        with suppress(OSError):
            while data := rest[process.command or ""]:
                process.stdout.write(data)
                await process.stdout.drain()
                await asyncio.sleep(0.01)
        await process.wait_closed()

    async with guest(monkeypatch, session, encoding=None), running_vm() as c:
        for kind in rest:
            frames = await run_command(c, kind)
            assert [frame["type"] for frame in frames] == ["stdout", "exit"]
            assert frames[0]["data"].startswith(b"out")
            assert len(frames[0]["data"]) < 500_000
            assert frames[1] == exited(3)


@pytest.mark.slow
async def test_slow_client_gets_all_output_of_a_command_that_has_ended(
    ssh_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_exec, "REST_SECONDS", 0.1)
    send = vm_exec._Frames.send

    async def slow(frames: Any, kind: str, **content: Any) -> None:
        await trio.sleep(0.15)
        await send(frames, kind, **content)

    monkeypatch.setattr(vm_exec._Frames, "send", slow)
    async with running_vm() as c:
        frames = await run_command(c, "head -c 500000 /dev/zero")
        assert [len(frame.get("data", b"")) for frame in frames] == [500_000, 0]


async def test_disconnected_client_ends_its_command(ssh_port: int, tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    command = f"trap 'touch {ended}; exit' TERM HUP; touch {begun}; while :; do sleep 0.05; done"

    def talk(url: str) -> None:
        with connect_websocket(url):
            while not begun.exists():
                pass

    async with running_vm() as c:
        url = websocket_url(c, "/vms/vm/exec", command=command)
        await trio.to_thread.run_sync(talk, url)
        await eventually(ended.exists)


@pytest.mark.parametrize("way", ["account", "access token"])
async def test_command_ends_with_the_account_of_its_sender(ssh_port: int, tmp_path: Path, way: str) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    command = f"trap 'touch {ended}; exit' TERM HUP; touch {begun}; while :; do sleep 0.05; done"
    async with running_vm(auth=True) as c, AsyncExitStack() as stack:
        account = await c.client.service_accounts.create("guest", roles=["compute:write"])
        sender = await stack.enter_async_context(Client(c.url, account="guest", token=account.token))
        if way == "access token":
            token = (await sender.vms.issue_access_token("vm")).token
            sender = await stack.enter_async_context(Client(c.url, access_token=token))
        with suppress(ClientError):
            async with sender.vms.exec("vm", command) as running:
                await eventually(begun.exists)
                await c.client.service_accounts.delete("guest")
                async for _ in running:
                    pass
        await eventually(ended.exists)


@pytest.mark.slow
async def test_exec_client_is_pinged(
    ssh_port: int, tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "websockets.client")
    pinging = InProcessCluster(tmp_path, nursery, ping_interval=2.0)
    await pinging.start()

    def talk() -> list[dict[str, Any]]:
        url = f"ws://127.0.0.1:{pinging.port}/v1/vms/vm/exec?command=cat&interactive=true"
        with connect_websocket(url) as client:
            at_last(lambda: "< PING" in caplog.text)
            client.send(stdin(b""))
            return read_frames(client)

    async with pinging.working():
        await pinging.client.vms.create(name="vm", image="any")
        await pinging.client.vms.wait("vm")
        assert await trio.to_thread.run_sync(talk) == [exited(0)]
    await pinging.stop()


@pytest.mark.slow
async def test_commands_share_one_connection_that_is_reopened_when_lost(
    ssh_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    log_in = connections._log_in

    async def noted(*arguments: Any) -> Any:
        opened.append(await log_in(*arguments))
        return opened[-1]

    monkeypatch.setattr(connections, "_log_in", noted)
    async with running_vm() as c:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(expect, c, "echo hello", b"hello\n")
        assert len(opened) == 1
        opened[0].abort()
        await eventually(partial(works, c))
        assert len(opened) == 2


class Narrow(Guest):
    """Takes two sessions on each connection, as OpenSSH does with `MaxSessions 2`."""

    opened = 0

    async def session_requested(self) -> Any:
        self.opened += 1
        if self.opened > 2:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "open failed")
        return await super().session_requested()


async def test_guest_that_refuses_another_session_gets_another_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[Narrow] = []
    running = 0
    all_run = asyncio.Event()

    def server(session: Session) -> Narrow:
        servers.append(Narrow(session))
        return servers[-1]

    async def session(process: asyncssh.SSHServerProcess[str]) -> None:
        nonlocal running
        running += 1
        if running == 5:
            all_run.set()
        await all_run.wait()
        process.exit(0)

    async with guest(monkeypatch, session, server), running_vm() as c:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(succeed, c)
        assert len(servers) == 3


async def succeed(c: Cluster) -> None:
    assert (await run_command(c, "any", wait="60"))[-1] == exited(0)


async def test_connection_that_does_not_answer_any_more_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SESSION_SECONDS", 0.1)
    servers: list[Guest] = []

    class Stuck(Guest):
        async def session_requested(self) -> Any:
            if self is servers[0]:
                await asyncio.Event().wait()
            return await super().session_requested()

    def server(session: Session) -> Guest:
        servers.append(Stuck(session))
        if len(servers) > 1:
            # The new one has the time that a busy machine takes.
            monkeypatch.setattr(connections, "SESSION_SECONDS", float(GENEROUS))
        return servers[-1]

    async def session(process: asyncssh.SSHServerProcess[str]) -> None:
        process.exit(0)

    async with guest(monkeypatch, session, server), running_vm() as c:
        await succeed(c)
        assert len(servers) == 2


async def test_each_caller_waits_for_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def session(process: asyncssh.SSHServerProcess[str]) -> None:
        process.exit(0)

    port = free_port()
    monkeypatch.setattr(connections, "SSH_PORT", port)
    served = trio.Event()

    async def patient(c: Cluster) -> None:
        await succeed(c)
        served.set()

    async with running_vm() as c, trio.open_nursery() as nursery:
        nursery.start_soon(patient, c)
        for _ in range(2):
            assert (await refusal(c, "/vms/vm/exec", command="a", wait=0))[0] == 503
        async with guest(monkeypatch, session, port=port):
            await served.wait()


async def test_number_of_commands_in_a_vm_is_bounded(ssh_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_exec, "MAX_VM_COMMANDS", 3)
    monkeypatch.setattr(vm_exec, "MAX_SENDER_COMMANDS", 2)
    async with running_vm(auth=True) as c, AsyncExitStack() as commands:
        tokens = [(await c.client.vms.issue_access_token("vm")).token for _ in range(3)]
        bearers = [await commands.enter_async_context(Client(c.url, access_token=token)) for token in tokens]
        for bearer, status in (*((bearers[0], 101),) * 2, (bearers[0], 503), (bearers[1], 101), (bearers[2], 503)):
            if status == 101:
                await commands.enter_async_context(bearer.vms.exec("vm", "cat", interactive=True))
                continue
            with pytest.raises(ResponseError) as refused:
                await commands.enter_async_context(bearer.vms.exec("vm", "true"))
            assert refused.value.status == status


async def works(c: Cluster) -> bool:
    return (await run_command(c, "true"))[-1] == exited(0)


async def expect(c: Cluster, command: str, output: bytes) -> None:
    assert await run_command(c, command) == [{"type": "stdout", "data": output}, exited(0)]


async def test_deleting_a_vm_ends_its_commands(ssh_port: int, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    async with running_vm() as c, trio.open_nursery() as nursery:
        frames: list[dict[str, Any]] = []

        async def run() -> None:
            frames.extend(await run_command(c, f"touch {begun}; sleep 1000"))

        nursery.start_soon(run)
        await eventually(begun.exists)
        await c.client.vms.delete("vm")
        await eventually(lambda: bool(frames))
    assert frames == [{"type": "error", "error": "the connection to the VM was lost"}]


# ---- hostile guests --------------------------------------------------------------------------------------------------


def ssh_packet(payload: bytes) -> bytes:
    padding = 16 - (len(payload) + 5) % 8
    return struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding)


def key_exchange(*names: bytes) -> bytes:
    lists = b"".join(struct.pack(">I", len(name)) + name for name in names)
    return b"SSH-2.0-x\r\n" + ssh_packet(b"\x14" + bytes(16) + lists + bytes(5))


HOSTILE = {
    "nothing": b"",
    "no SSH": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a line without end": b"x" * 100_000,
    "lines without end": b"x\r\n" * 10_000,
    "a packet that is too large": b"SSH-2.0-x\r\n" + b"\xff" * 100,
    "a packet that is cut off": b"SSH-2.0-x\r\n" + ssh_packet(b"\x14" + bytes(10)),
    "names that are not ASCII": key_exchange(
        b"\xff\xfe", b"ssh-ed25519", *[b"aes128-ctr"] * 2, *[b"\xff"] * 2, *[b""] * 4
    ),
    "an unknown message": b"SSH-2.0-x\r\n" + ssh_packet(b"\xc8"),
    "the end": b"SSH-2.0-x\r\n" + ssh_packet(b"\x01" + struct.pack(">II", 11, 3) + b"bye" + bytes(4)),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_guest_that_does_not_speak_ssh_is_answered_with_503(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def say(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(HOSTILE[name])
            await stream.send_eof()

    async with running_vm() as c, listening(say) as port:
        monkeypatch.setattr(connections, "SSH_PORT", port)
        status, message = await refusal(c, "/vms/vm/exec", command="a", wait=0)
        assert status == 503
        assert '"vm"' in message
        assert await c.client.vms.get("vm"), "the controller goes on"
    assert [record for record in caplog.records if record.exc_info] == []


@asynccontextmanager
async def breaking(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Any], None]) -> AsyncIterator[None]:
    """An SSH server in the VM that does something to its connection in the middle of a command."""

    async def session(process: asyncssh.SSHServerProcess[str]) -> None:
        process.stdout.write("begun")
        await process.stdin.readline()
        breaks(process.channel.get_connection())

    async with guest(monkeypatch, session):
        yield


@pytest.mark.parametrize(
    "breaks",
    [
        lambda connection: connection.abort(),
        lambda connection: connection.disconnect(11, "bye\nlevel=error"),
        lambda connection: connection._transport.write(b"\xff" * 5000),
        lambda connection: connection.send_packet(98, b"\0"),
        lambda connection: connection.send_packet(98, b"\0\0\0\0", b"\0\0\0\x0bexit-signal", b"\0\xff"),
    ],
)
async def test_guest_that_breaks_the_ssh_protocol_ends_the_command_with_the_reason(
    breaks: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with breaking(monkeypatch, breaks), running_vm() as c:
        frames = await run_command(c, "any", lambda client: client.send(stdin(b"go\n")), interactive="true")
        assert frames[0] == {"type": "stdout", "data": b"begun"}
        assert frames[1]["type"] == "error"
        assert "the connection to the VM was lost" in frames[1]["error"]
    assert [record for record in caplog.records if record.exc_info] == []


async def test_exec_is_refused_before_the_upgrade(ssh_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_vm() as c:
        path = "/vms/vm/exec"
        for query, words in (
            ({}, "command is missing"),
            ({"command": "a", "rows": 0}, 'rows is "0"'),
            ({"command": "a", "tty": "maybe"}, 'tty is "maybe"'),
            ({"command": "a", "env[1A]": "x"}, 'env["1A"]'),
            ({"command": "a\0"}, "command contains a NUL"),
        ):
            status, message = await refusal(c, path, **query)
            assert status == 400
            assert words in message
        assert (await refusal(c, "/vms/none/exec", command="a"))[0] == 404
        assert (await refusal(c, path, session="abc"))[0] == 404
        await c.client.vms.create(name="wrong", image="any", password="wrong")
        status, message = await refusal(c, "/vms/wrong/exec", command="a", wait=1)
        assert status == 503
        assert '"wrong"' in message
        monkeypatch.setattr(connections, "import_extra", not_installed)
        status, message = await refusal(c, path, command="a")
        assert (status, message) == (503, "not installed")


def not_installed() -> None:
    raise connections.ExecUnavailableError("not installed")


async def test_exec_with_an_access_token(ssh_port: int) -> None:
    async with running_vm(auth=True) as c:
        token = (await c.client.vms.issue_access_token("vm")).token
        async with Client(c.url, access_token=token) as bearer:
            async with bearer.vms.exec("vm", "cat; exit 4", interactive=True) as running:
                await running.send(b"hello")
                await running.send_eof()
                output = [(kind, data) async for kind, data in running]
                assert output == [("stdout", b"hello")]
                assert running.exit_code == 4
            with pytest.raises(ResponseError) as refused:
                async with bearer.vms.exec("other", "true"):
                    raise AssertionError("it ran")
            assert refused.value.status == 404


async def test_exec_with_a_terminal_that_is_resized(ssh_port: int) -> None:
    async with running_vm() as c, c.client.vms.exec("vm", "true", tty=True, rows=10, cols=20) as running:
        await running.resize(30, 40)
        assert [kind async for kind, _ in running] in ([], ["stdout"])
        assert running.exit_code == 0


def test_shell_line_of_a_command() -> None:
    command = Command("make test", env={"A": "it's"}, workdir="/a b")
    assert command.line() == "export A='it'\"'\"'s'; cd -- '/a b' || exit 1; make test"
    for wrong in (Command(""), Command("\0"), Command("a", env={"": "x"}), Command("a", env={"a b": "x"})):
        with pytest.raises(MalformedError):
            wrong.check()
