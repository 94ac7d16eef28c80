"""SSH into synthetic VMs: exec, and the jump host with the system's OpenSSH client, in a real cluster."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.clients import refusal, running_vm
from harness.processes import GENEROUS, eventually
from test_exec import exited, run_command, sending
from test_jump import OpenSSH, jumping

from orchard.ssh import synthetic_server as synthetic
from orchard.testing import Cluster, cluster


async def test_exec_runs_in_the_directory_of_a_synthetic_vm() -> None:
    async with cluster() as c:
        await c.client.vms.create(name="vm", image="any", startup_script={"script_content": "echo content > file"})
        await c.client.vms.wait("vm", until="ready")
        await c.client.vms.create(name="other", image="any", username="me", password="secret")
        await c.client.vms.wait("other")
        frames = await run_command(c, "cat file; exit 3", wait="60")
        assert frames == [{"type": "stdout", "data": b"content\n"}, exited(3)]
        assert (await run_command(c, 'test "$PWD" = "$HOME"')) == [exited(0)]
        async with c.client.vms.exec("other", "echo $USER; cat file") as running:
            output = [(kind, data) async for kind, data in running]
            assert ("stdout", b"me\n") in output
            assert running.exit_code == 1, "another VM has another directory"


async def test_exec_in_a_synthetic_vm_takes_stdin_and_any_bytes() -> None:
    data = bytes(range(256)) * 4096

    async with running_vm() as c:
        frames = await run_command(c, "cat; echo err >&2; sleep 1000 & exit 4", sending(data), interactive="true")
        assert b"".join(frame["data"] for frame in frames if frame["type"] == "stdout") == data
        assert {"type": "stderr", "data": b"err\n"} in frames
        assert frames[-1] == exited(4)


def is_alive(number: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(number, 0)
        return True
    return False


async def test_command_in_a_synthetic_vm_ends_with_its_client_and_with_the_vm(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    async with running_vm() as c, trio.open_nursery() as nursery:
        async with c.client.vms.exec("vm", f"echo $$ > {first}.new; mv {first}.new {first}; exec sleep 1000"):
            await eventually(first.exists)
        number = int(first.read_text())
        await eventually(lambda: not is_alive(number))
        frames: list[dict[str, Any]] = []

        async def run() -> None:
            frames.extend(await run_command(c, f"touch {second}; sleep 1000"))

        nursery.start_soon(run)
        await eventually(second.exists)
        await c.client.vms.delete("vm")
        await eventually(lambda: bool(frames))
        assert frames[-1]["type"] == "error"


@pytest.mark.slow
@pytest.mark.needs("ssh")
async def test_openssh_client_gets_into_a_synthetic_vm_through_the_jump_host(tmp_path: Path) -> None:
    async with jumping() as c:
        client = OpenSSH(c, tmp_path, 22)
        ran = await client.run("ssh", "vm", "cat > file; cat file; exit 7", stdin=b"hello")
        assert (ran.returncode, ran.stdout) == (7, b"hello"), ran.stderr
        ran = await client.run("ssh", "vm", stdin=b"cat file; exit 5")
        assert (ran.returncode, ran.stdout) == (5, b"hello"), "a login shell"
        ran = await client.run("ssh", "-o", "NumberOfPasswordPrompts=1", "-l", "root", "vm", "true")
        assert ran.returncode == 255, "another user name"


async def test_nothing_listens_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "find_spec", lambda _: None)
    async with running_vm() as c:
        status, message = await refusal(c, "/vms/vm/exec", command="a", wait=0)
        assert status == 503
        assert "port 22" in message


async def test_port_that_no_one_connects_to_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_CLAIM_SECONDS", 0.01)
    ports: list[int] = []
    open_port = synthetic.SyntheticSSH._open_port

    async def unclaimed(server: synthetic.SyntheticSSH, name: str) -> int:
        ports.append(await open_port(server, name))
        await trio.sleep(0.05)
        return ports[-1]

    monkeypatch.setattr(synthetic.SyntheticSSH, "_open_port", unclaimed)
    async with running_vm() as c:
        assert (await refusal(c, "/vms/vm/exec", command="a", wait=0))[0] == 503
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", ports[0])


async def test_many_commands_in_a_synthetic_vm_at_once() -> None:
    async def one(c: Cluster, number: int) -> None:
        assert await run_command(c, f"echo {number}") == [{"type": "stdout", "data": b"%d\n" % number}, exited(0)]

    async with running_vm() as c:
        with trio.fail_after(GENEROUS):
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(one, c, number)
