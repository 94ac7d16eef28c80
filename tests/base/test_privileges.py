"""A process of root that becomes another user."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from harness.processes import GENEROUS, PLAIN, controller, eventually, finished
from harness.programs import need
from harness.users import OTHER, home_of_other, python_of_other

from orchard.base import privileges
from orchard.client import Client

STANDIN = Path(__file__).parent.parent / "standin" / "tart"
BECOME = f"""
import json, os
from orchard.base import privileges
os.environ["TMPDIR"] = "/of-another-user"
assert privileges.is_other_user({OTHER!r})
privileges.become_user({OTHER!r})
refused = []
for attempt in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0), lambda: os.setgroups([0]),
                lambda: open("/etc/shadow"), lambda: os.chroot("/")):
    try:
        attempt()
    except PermissionError:
        refused.append(True)
names = ("HOME", "USER", "LOGNAME", "SHELL", "TMPDIR")
print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), [os.environ.get(name) for name in names], len(refused)]))
"""


def test_user_that_cannot_be_become_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no-such-user", "root"):
        with pytest.raises(privileges.PrivilegeError, match=name):
            privileges.is_other_user(name)
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.getpwnam("root"))
    with pytest.raises(privileges.PrivilegeError, match=OTHER):
        privileges.is_other_user(OTHER)


@pytest.mark.slow
def test_rights_of_root_are_given_up_for_good() -> None:
    python, env = python_of_other()
    done = subprocess.run([python, "-c", BECOME], env=env, capture_output=True, text=True, check=True, cwd="/")
    user = pwd.getpwnam(OTHER)
    uids, gids, groups, environ, refused = json.loads(done.stdout)
    assert (uids, gids) == ([user.pw_uid] * 3, [user.pw_gid] * 3)
    assert groups == os.getgrouplist(OTHER, user.pw_gid)
    assert environ == [user.pw_dir, OTHER, OTHER, user.pw_shell, None]
    assert refused == 6


@pytest.mark.slow
def test_program_that_the_user_cannot_read_is_refused(tmp_path: Path) -> None:
    python, env = python_of_other()
    hidden = tmp_path / "python"
    hidden.symlink_to(python)
    text = f"import sys\nfrom orchard.base import privileges\nsys.executable = {str(hidden)!r}\nprivileges.become_user({OTHER!r})"
    done = subprocess.run([python, "-c", text], env=env, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 1
    assert str(hidden) in done.stderr.splitlines()[-1]


# ---- a worker -------------------------------------------------------------------------------------------------------


@contextmanager
def worker(url: str, home: Path, *words: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """Run a worker that root starts, and that becomes the other user, for the time of the block."""
    python, env = python_of_other()
    command = [python, "-m", "orchard.worker", url, "--name", "mac", "--user", OTHER, *words]
    process = subprocess.Popen(
        command,
        env={**env, "ORCHARD_HOME": str(home), **environ},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=GENEROUS)


def status_of(pid: int) -> dict[str, list[str]]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def wait_registered(client: Client) -> None:
    async def has_session() -> bool:
        return [one.state for one in await client.workers.list()] == ["online"]

    await eventually(has_session)


@pytest.mark.slow
async def test_worker_of_root_does_everything_as_the_user(tmp_path: Path) -> None:
    user = pwd.getpwnam(OTHER)
    with home_of_other() as home, controller(*PLAIN, home=tmp_path) as (_, url):
        words = ("--runtime", "synthetic", "--log-file", str(home / "log"))
        with worker(url, home, *words) as process:
            async with Client(url) as client:
                await wait_registered(client)
            ids = status_of(process.pid)
            assert ids["Uid"] == [str(user.pw_uid)] * 4
            assert ids["Gid"] == [str(user.pw_gid)] * 4
            assert ids["CapEff"] == ids["CapPrm"] == ["0" * 16]
            assert children_of(process.pid) == []
            process.terminate()
            assert process.wait(GENEROUS) == 0
        owners = {path.stat().st_uid for path in home.rglob("*")}
        assert (owners, (home / "log").exists()) == ({user.pw_uid}, True)


@contextmanager
def private_address() -> Iterator[str]:
    """Add a private address to this host for the time of the block."""
    need("ip")
    address = f"10.213.{os.getpid() >> 8 & 255}.{os.getpid() & 255 or 1}"
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    try:
        yield address
    finally:
        subprocess.run(["ip", "address", "del", f"{address}/32", "dev", "lo"], check=True)


def owner_of(port: int) -> int:
    """Return the user who has made the TCP socket with this local port."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, _, _, _, _, uid, *_ = line.split()
        if int(local.rpartition(":")[2], 16) == port:
            return int(uid)
    raise AssertionError(f"no socket has the port {port}")


@pytest.mark.slow
@pytest.mark.needs("ip")
async def test_connections_to_vms_are_opened_by_a_process_that_stays_root(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    python_of_other()
    owners: list[int] = []

    async def serve(stream: trio.SocketStream) -> None:
        owners.append(owner_of(stream.socket.getpeername()[1]))
        async for data in stream:
            await stream.send_all(data.upper())

    with home_of_other() as home, controller(*PLAIN, home=tmp_path) as (_, url), private_address() as address:
        (listener,) = await trio.open_tcp_listeners(0, host=address)
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        port = listener.socket.getsockname()[1]
        words = ("--tart", str(STANDIN), "--connect-as-root", "--allow-own-addresses")
        environ = {"TART_HOME": str(home / "tart-home"), "TART_IP": address}
        (home / "tart-home").mkdir()
        os.chown(home / "tart-home", pwd.getpwnam(OTHER).pw_uid, -1)
        async with Client(url) as client:
            with worker(url, home, *words, **environ) as process:
                await wait_registered(client)
                # Its other children are calls of tart.
                (connector,) = (pid for pid in children_of(process.pid) if status_of(pid)["Uid"] == ["0"] * 4)
                await client.vms.create(name="vm", image="ghcr.io/x/y:1", arch="amd64")
                await client.vms.wait("vm")
                async with client.vms.port_forward("vm", port) as stream:
                    await stream.send_all(b"hello")
                    assert await stream.receive_some() == b"HELLO"
                assert owners == [0]
                await client.vms.delete("vm")
                await eventually(lambda: not list((home / "tart-home" / "vms").glob("*.json")))
                # Without it no VM could be reached, so the worker ends, and launchd starts both again.
                os.kill(connector, signal.SIGKILL)
                assert await trio.to_thread.run_sync(process.wait, GENEROUS) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("user", ["no-such-user", "root"])
def test_worker_says_why_it_cannot_become_a_user(tmp_path: Path, user: str) -> None:
    ended = finished("worker", "http://127.0.0.1:1", "--runtime", "synthetic", "--user", user, home=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert user in ended.stderr
    assert not (tmp_path / ".orchard").exists()
