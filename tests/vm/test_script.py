"""Startup scripts: what a shell is sent, what its output means, and how the system's ssh behaves with a real server."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import EllipsisType

import pytest
import trio
import trio.testing
from harness.processes import GENEROUS, eventually
from harness.strategies import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.vm import script as ssh_script
from orchard.vm.driver import DriverError, Script, ScriptFailed
from orchard.vm.script import SSHServer, Transcript, cut, greeting, run_over_ssh, script_text

SSHD = Path(__file__).parent.parent / "standin" / "sshd.py"
MARKER = "0123456789abcdef"
Clock = trio.testing.MockClock


@pytest.fixture
def clock() -> Clock:
    """A clock that runs at the speed of the real one and can be advanced."""
    return trio.testing.MockClock(rate=1)


def in_shell(shell: str, text: str) -> bytes:
    return subprocess.run([shell], input=(greeting(MARKER) + text).encode(), capture_output=True, check=False).stdout


def read(output: bytes, size: int = 1 << 30) -> tuple[list[str], Transcript]:
    """Read the output of a shell in chunks of some size."""
    transcript = Transcript(MARKER)
    lines: list[str] = []
    for start in range(0, len(output), size):
        lines += transcript.feed(output[start : start + size])
    return lines + transcript.rest(), transcript


# ---- what is sent --------------------------------------------------------------------------------------------------

values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


# Each example starts some ten processes.
@settings(QUICK, max_examples=25)
@given(st.dictionaries(st.from_regex(r"ORCHARD_[A-Za-z0-9_]{1,5}", fullmatch=True), values, max_size=3))
def test_environment_values_survive_a_real_shell(env: dict[str, str]) -> None:
    script = "".join(f'printf "%s" "${name}" | od -An -v -tx1 | tr -d " \\n"; echo\n' for name in env)
    lines, transcript = read(in_shell("/bin/sh", script_text(script, env, MARKER)))
    assert [bytes.fromhex(line).decode() for line in lines] == list(env.values())
    assert transcript.exit_code == 0


@pytest.mark.parametrize(
    ("script", "lines", "code"),
    [
        ("echo a; echo b >&2", ["a", "b"], 0),
        ("false\necho never", [], 1),
        ("echo a; exit 7", ["a"], 7),
        ("cat; echo done", ["done"], 0),
        ("printf 'no end'", ["no end"], 0),
        ("echo 'it''s'; : \"$(echo x)\"", ["its"], 0),
        ("if true; then\n  echo x\nfi\n# comment", ["x"], 0),
        ("syntax error (", None, None),
        ("", [], 0),
        (f"echo {MARKER} 5", None, None),
    ],
)
def test_script_output_and_exit_code_in_real_shells(script: str, lines: list[str] | None, code: int | None) -> None:
    for shell in ("/bin/sh", "/bin/bash"):
        output = in_shell(shell, script_text(script, {}, MARKER))
        told, transcript = read(output)
        if lines is not None:
            assert (told, transcript.exit_code) == (lines, code)
        else:
            assert transcript.exit_code not in (0, None)


@pytest.mark.parametrize(
    ("env", "script"), [({"a-b": ""}, ""), ({"1a": ""}, ""), ({"": ""}, ""), ({"a": "\0"}, ""), ({}, "\0")]
)
def test_invalid_variable_names_and_nul_are_refused(env: dict[str, str], script: str) -> None:
    with pytest.raises(DriverError, match="startup script: "):
        script_text(script, env, MARKER)


# ---- what comes back -----------------------------------------------------------------------------------------------


def test_transcript_is_the_same_for_any_chunking() -> None:
    marker = MARKER.encode()
    output = b"welcome\n" + marker + b"\none\n\ntwo \xff" + "é".encode() + b"\nopen" + marker + b" 3\nlogout\n"
    expected = ["one", "", "two \ufffdé", "open"]
    for size in range(1, len(output) + 1):
        lines, transcript = read(output, size)
        assert (lines, transcript.exit_code, transcript.last_line) == (expected, 3, "open")


def test_exit_code_is_unknown_without_the_last_marker() -> None:
    lines, transcript = read(MARKER.encode() + b"\none\ntw")
    assert (lines, transcript.began, transcript.exit_code) == (["one", "tw"], True, None)
    lines, transcript = read(b"motd\n")
    assert (lines, transcript.began) == ([], False)


def test_long_lines_are_cut_between_characters() -> None:
    text = "é" * 20_000
    for size in (1000, 1 << 30):
        lines, transcript = read(f"{MARKER}\n{text}\n{MARKER} 0\n".encode(), size)
        assert "".join(lines) == text
        assert max(len(line.encode()) for line in lines) <= ssh_script.MAX_LINE
        assert transcript.exit_code == 0


@QUICK
@given(st.binary(max_size=40), st.integers(4, 9))
def test_cut_keeps_all_bytes_and_whole_characters(line: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssh_script, "MAX_LINE", size)
        pieces = list(cut(line))
    assert b"".join(pieces) == line
    assert all(size - 3 <= len(piece) <= size for piece in pieces[:-1])
    assert len(pieces[-1]) <= size
    with suppress(UnicodeDecodeError):
        line.decode()
        assert "".join(piece.decode() for piece in pieces) == line.decode()


def test_unfinished_long_line_is_handed_on() -> None:
    transcript = Transcript(MARKER)
    transcript.feed(f"{MARKER}\n".encode())
    fed = given_out = 0
    for _ in range(100):
        given_out += sum(map(len, transcript.feed(b"x" * 1000)))
        fed += 1000
        assert fed - given_out < ssh_script.MAX_LINE + 100


def test_output_before_the_first_marker_is_dropped() -> None:
    transcript = Transcript(MARKER)
    for _ in range(100):
        assert transcript.feed(b"welcome " * 1000) == []
    assert transcript.feed(f"{MARKER}\nx\n".encode()) == ["x"]
    assert transcript.last_line == "x"


def test_ssh_reads_no_configuration_keys_or_known_hosts() -> None:
    command = ssh_script.ssh_command("ssh", "-oProxyCommand=x", 2222, "-user")
    assert command[:4] == ["ssh", "-F", "/dev/null", "-T"]
    assert command[-6:] == ["-l", "-user", "-p", "2222", "--", "-oProxyCommand=x"]
    assert {"PubkeyAuthentication=no", "UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no"} <= set(command)


# ---- the system's ssh ----------------------------------------------------------------------------------------------


@contextmanager
def server(**env: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """An SSH server and its port."""
    process = subprocess.Popen([sys.executable, SSHD], stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(GENEROUS)
        process.stdout.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of an SSH server: admin/admin."""
    with server() as (_, port):
        yield port


class Front:
    """A listener that treats each connection by the next entry of `plan`, and by the last entry from then on.

    None closes the connection, a number forwards it to that port, and ... keeps it open without an answer.
    """

    def __init__(self, *plan: int | EllipsisType | None) -> None:
        self.plan = list(plan)
        self.port = 0
        self.count = 0

    async def serve(self, task_status: trio.TaskStatus[int]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._handle, listeners, task_status=task_status)  # type: ignore[arg-type]

    async def _handle(self, stream: trio.SocketStream) -> None:
        step = self.plan[min(self.count, len(self.plan) - 1)]
        self.count += 1
        if step is ...:
            await trio.sleep_forever()
        elif step is not None:
            async with await trio.open_tcp_stream("127.0.0.1", step) as inner, trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, stream, inner)
                await self._pass_on(inner, stream)
                nursery.cancel_scope.cancel()

    async def _pass_on(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        # A killed process resets its connection.
        with suppress(trio.BrokenResourceError):
            async for data in source:
                await target.send_all(data)
            await target.send_eof()


async def run(
    server: int | SSHServer,
    text: str,
    *,
    password: str = "admin",
    lines: list[str] | None = None,
    give_up: float = GENEROUS,
    program: str = "ssh",
) -> list[str]:
    """Run a script at a port of this host, and return its lines, which `lines` gets as they come."""
    received: list[str] = [] if lines is None else lines

    async def on_line(line: str) -> None:
        received.append(line)

    if isinstance(server, int):
        server = SSHServer("127.0.0.1", server)
    with trio.fail_after(give_up):
        await run_over_ssh(server, Script(text, password=password), on_line, program=program)
    return received


def processes_with(password: str) -> list[int]:
    """Return the numbers of the ssh processes that have a password in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"ORCHARD_SSH_PASSWORD={password}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.needs("ssh")
async def test_ssh_is_retried_until_the_guest_answers(port: int, nursery: trio.Nursery) -> None:
    front = Front(None, None, port)
    await nursery.start(front.serve)
    assert await run(front.port, "echo hello") == ["hello"]
    assert front.count == 3
    nursery.cancel_scope.cancel()


@pytest.mark.needs("ssh")
async def test_ssh_is_retried_while_the_account_does_not_exist(port: int, nursery: trio.Nursery) -> None:
    with server(SSHD_PASSWORD="not yet") as (_, first):
        front = Front(first, port)
        await nursery.start(front.serve)
        assert await run(front.port, "echo hello") == ["hello"]
    assert front.count == 2
    nursery.cancel_scope.cancel()


@pytest.mark.needs("ssh")
async def test_guest_that_never_answers_fails_with_the_last_reason(nursery: trio.Nursery, clock: Clock) -> None:
    front = Front(None, ...)
    await nursery.start(front.serve)

    async def lose_patience() -> None:
        # The second connection means that the first attempt is over.
        await eventually(lambda: front.count == 2)
        clock.jump(ssh_script.CONNECT_SECONDS)

    nursery.start_soon(lose_patience)
    expected = f"no SSH at admin@127.0.0.1:{front.port} within 600 seconds: .*(closed|reset) by"
    with pytest.raises(DriverError, match=expected):
        await run(front.port, "echo", password="waits-in-vain", give_up=math.inf)
    assert processes_with("waits-in-vain") == []
    nursery.cancel_scope.cancel()


@pytest.mark.needs("ssh")
async def test_script_has_no_time_limit(port: int, nursery: trio.Nursery, clock: Clock, tmp_path: Path) -> None:
    lines: list[str] = []

    async def jump() -> None:
        await eventually(lambda: bool(lines))
        clock.jump(10 * ssh_script.CONNECT_SECONDS)
        (tmp_path / "on").touch()

    nursery.start_soon(jump)
    text = f"echo begun; while [ ! -e {tmp_path}/on ]; do sleep 0.01; done; echo over"
    assert await run(port, text, lines=lines, give_up=math.inf) == ["begun", "over"]


@pytest.mark.needs("ssh")
async def test_wrong_password_fails_and_is_not_shown(
    port: int, nursery: trio.Nursery, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    front = Front(port)
    await nursery.start(front.serve)

    async def lose_patience() -> None:
        await eventually(lambda: front.count == 2)
        clock.jump(ssh_script.PASSWORD_SECONDS)

    nursery.start_soon(lose_patience)
    with pytest.raises(DriverError, match=r"refuses the password: .*Permission denied") as refused:
        await run(front.port, "echo", password="s3cret-wrong", give_up=math.inf)
    assert "s3cret" not in str(refused.value) + caplog.text
    nursery.cancel_scope.cancel()


async def test_password_with_line_break_or_nul_is_refused() -> None:
    for password in ("a\nb", "a\0", "a\r"):
        with pytest.raises(DriverError, match="line break or NUL"):
            await run(1, "echo", password=password)


@pytest.mark.parametrize("password", ["-n $HOME `id` \"'\\ %s *", " é "])
@pytest.mark.needs("ssh")
async def test_password_with_special_characters_is_passed_unchanged(password: str) -> None:
    with server(SSHD_PASSWORD=password) as (_, port):
        assert await run(SSHServer("127.0.0.1", port, password_seconds=0), "echo in", password=password) == ["in"]


def command_lines() -> list[str]:
    """Return the argument lists of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().decode("utf-8", "replace"))
    return found


def check_files(temporary: Path, password: str) -> None:
    (directory,) = temporary.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [password in path.read_text() for path in directory.iterdir()] == [False]


@pytest.mark.needs("ssh")
async def test_password_is_in_no_argument_list_and_no_file(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Joined, so that the argument list of a test run that names this test does not contain it.
    password = "-".join(("in", "no", "list"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lines: list[str] = []
    with server(SSHD_PASSWORD=password) as (_, port):
        nursery.start_soon(partial(run, port, "echo begun; sleep 1000", password=password, lines=lines))
        await eventually(lambda: bool(lines))
        seen = command_lines()
        assert any("NumberOfPasswordPrompts" in text for text in seen)
        assert not any(password in text for text in seen)
        check_files(tmp_path, password)
        nursery.cancel_scope.cancel()


@pytest.mark.needs("ssh")
async def test_cancelled_script_leaves_no_process_and_no_file(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    front = Front(...)
    lines: list[str] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(front.serve)
        nursery.start_soon(partial(run, front.port, "echo", password="broken-off"))
        nursery.start_soon(partial(run, port, "echo begun; sleep 1000", lines=lines))
        await eventually(lambda: front.count == 1 and bool(lines))
        assert processes_with("broken-off") != []
        nursery.cancel_scope.cancel()
    assert processes_with("broken-off") == []
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.needs("ssh")
async def test_exception_from_on_line_ends_the_script(port: int) -> None:
    async def on_line(line: str) -> None:
        raise RuntimeError(line)

    with pytest.raises(RuntimeError, match="begun"):
        await run_over_ssh(SSHServer("127.0.0.1", port), Script("echo begun; sleep 1000"), on_line)


@pytest.mark.needs("ssh")
async def test_exit_code_255_of_a_script_is_not_a_lost_connection(port: int) -> None:
    with pytest.raises(ScriptFailed, match="exit code 255: x") as failed:
        await run(port, "echo x; exit 255")
    assert (failed.value.exit_code, failed.value.last_line) == (255, "x")


@pytest.mark.needs("ssh")
async def test_script_ends_although_its_background_processes_run_on(port: int) -> None:
    assert await run(port, "sleep 1000 & echo over") == ["over"]


@pytest.mark.needs("ssh")
async def test_output_and_options_of_a_profile_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".bash_profile").write_text("echo welcome; echo warning >&2; set -eu; export FROM_PROFILE=yes\n")
    lines: list[str] = []
    with server(HOME=str(tmp_path)) as (_, port), pytest.raises(ScriptFailed, match="exit code 7: yes"):
        await run(port, "echo $FROM_PROFILE; exit 7", lines=lines)
    assert lines == ["yes"]


@pytest.mark.needs("ssh")
async def test_lost_connection_fails_and_the_script_is_not_run_again(nursery: trio.Nursery) -> None:
    lines: list[str] = []
    with server() as (process, port):

        async def lose() -> None:
            await eventually(lambda: bool(lines))
            process.terminate()

        nursery.start_soon(lose)
        with pytest.raises(DriverError, match=f"lost admin@127.0.0.1:{port} while the startup script ran"):
            await run(port, "echo begun; sleep 1000", lines=lines)
    assert lines == ["begun"]


@pytest.mark.needs("ssh")
async def test_script_that_kills_its_shell_fails_with_unknown_end(port: int) -> None:
    with pytest.raises(DriverError, match=f"lost admin@127.0.0.1:{port} while the startup script ran"):
        await run(port, "kill -9 $$")


async def test_missing_ssh_program_is_named() -> None:
    with pytest.raises(DriverError, match="cannot run /none/ssh, the OpenSSH client, on this machine: No such file"):
        await run(1, "echo", program="/none/ssh")


@pytest.mark.needs("ssh")
async def test_completed_script_leaves_no_file(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await run(port, "echo")
    assert os.listdir(tmp_path) == []  # noqa: PTH208
