"""exec: commands in a VM over a WebSocket, by an independent client, with a real SSH server and a real shell."""

from __future__ import annotations

import base64
import json
import logging
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import trio
import trio_asyncio  # type: ignore[import-untyped]  # it has no types
from harness.clients import connect_websocket, listening, refusal, running_vm, websocket_url
from harness.inprocess import InProcessCluster
from harness.processes import GENEROUS, at_last, eventually
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from orchard.client import Client, ResponseError
from orchard.codec import MalformedError
from orchard.ssh import exec as vm_exec
from orchard.ssh.exec import Command
from orchard.testing import Cluster


@pytest.fixture
def ssh_port(sshd: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(vm_exec, "SSH_PORT", sshd)
    return sshd


def send_nothing(client: ClientConnection) -> None:
    """The default of `run_command`."""


def read_frames(client: ClientConnection) -> list[dict[str, Any]]:
    """Read to the end; return the frames with decoded data, the data of neighbours of one type joined."""
    found: list[dict[str, Any]] = []
    try:
        while True:
            message = client.recv()
            assert isinstance(message, str), "frames are text"
            frame = json.loads(message)
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


def exited(code: int) -> dict[str, Any]:
    return {"type": "exit", "exit": {"code": code}}


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
    log_in = vm_exec._log_in

    async def noting(*arguments: Any) -> Any:
        loops.append(trio_asyncio.current_loop.get())
        return await log_in(*arguments)

    monkeypatch.setattr(vm_exec, "_log_in", noting)
    async with running_vm() as c:
        assert await run_command(c, "true") == [exited(0)]
        loops[0].call_soon(lambda: 1 / 0)
        await eventually(lambda: "ZeroDivisionError" in caplog.text)
        assert await run_command(c, "true") == [exited(0)]


async def test_stdin_is_passed_on_and_closed(ssh_port: int) -> None:
    data = bytes(range(256)) * 4096

    def send(client: ClientConnection) -> None:
        for start in range(0, len(data), 100_000):
            client.send(stdin(data[start : start + 100_000]))
        client.send(stdin(b""))

    async with running_vm() as c:
        frames = await run_command(c, "cat", send, interactive="true")
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


async def test_commands_share_one_connection_that_is_reopened_when_lost(
    ssh_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[Any] = []
    log_in = vm_exec._log_in

    async def noted(*arguments: Any) -> Any:
        connections.append(await log_in(*arguments))
        return connections[-1]

    monkeypatch.setattr(vm_exec, "_log_in", noted)
    async with running_vm() as c:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(expect, c, "echo hello", b"hello\n")
        assert len(connections) == 1
        connections[0].abort()
        await eventually(partial(works, c))
        assert len(connections) == 2


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
        monkeypatch.setattr(vm_exec, "SSH_PORT", port)
        status, message = await refusal(c, "/vms/vm/exec", command="a", wait=0)
        assert status == 503
        assert '"vm"' in message
        assert await c.client.vms.get("vm"), "the controller goes on"
    assert [record for record in caplog.records if record.exc_info] == []


@asynccontextmanager
async def breaking(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Any], None]) -> AsyncIterator[None]:
    """An SSH server in the VM that does something to its connection in the middle of a command."""

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return False

    async def session(process: asyncssh.SSHServerProcess[str]) -> None:
        process.stdout.write("begun")
        await process.stdin.readline()
        breaks(process.channel.get_connection())

    async with trio_asyncio.open_loop():
        listen = partial(
            asyncssh.listen,
            "127.0.0.1",
            0,
            server_factory=Server,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            process_factory=session,
        )
        server = await trio_asyncio.aio_as_trio(listen)()
        monkeypatch.setattr(vm_exec, "SSH_PORT", server.get_port())
        yield
        server.close()


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
        await c.client.vms.create(name="wrong", image="any", password="wrong")
        status, message = await refusal(c, "/vms/wrong/exec", command="a", wait=1)
        assert status == 503
        assert '"wrong"' in message
        monkeypatch.setattr(vm_exec, "import_extra", not_installed)
        status, message = await refusal(c, path, command="a")
        assert (status, message) == (503, "not installed")


def not_installed() -> None:
    raise vm_exec.ExecUnavailableError("not installed")


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
