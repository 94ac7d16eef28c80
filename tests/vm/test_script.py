"""Startup scripts: what a shell is sent, what its output means, and how the system's ssh behaves with a real server."""

from __future__ import annotations

import errno
import itertools
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import pytest
import trio
import trio.testing
from harness.processes import GENEROUS, at_last, eventually
from harness.ssh_server import ssh_server
from harness.strategies import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.vm import script as ssh_script
from orchard.vm.driver import DriverError, Script, ScriptFailed
from orchard.vm.script import (
    PROGRESS_SECONDS,
    SSHServer,
    Transcript,
    cut,
    greeting,
    interpreter,
    login_command,
    run_over_ssh,
    script_text,
)

MARKER = "0123456789abcdef"
Clock = trio.testing.MockClock


@pytest.fixture
def clock() -> Clock:
    """A clock that runs at the speed of the real one and can be advanced."""
    return trio.testing.MockClock(rate=1)


# Login shells; those without a Debian package are always there.
SHELLS = [
    "sh",
    "bash",
    pytest.param("dash", marks=pytest.mark.needs("dash")),
    pytest.param("zsh", marks=pytest.mark.needs("zsh")),
    pytest.param("ksh", marks=pytest.mark.needs("ksh")),
    pytest.param("fish", marks=pytest.mark.needs("fish")),
    pytest.param("tcsh", marks=pytest.mark.needs("tcsh")),
]
POSIX_SHELLS = SHELLS[:5]


def in_shell(name: str, text: str, env: dict[str, str] | None = None, home: Path | None = None) -> bytes:
    """Run a script in a login shell, and return the output."""
    path = shutil.which(name)
    assert path is not None
    environ = {**os.environ, "SHELL": path, **({"HOME": str(home)} if home else {})}
    sent = greeting(MARKER) + script_text(Script(text, env or {}), MARKER)
    return subprocess.run(
        ["/bin/sh", "-c", login_command(MARKER)], input=sent.encode(), capture_output=True, check=False, env=environ
    ).stdout


def read(output: bytes, size: int = 1 << 30) -> tuple[list[str], Transcript]:
    """Read the output of a shell in chunks of some size."""
    transcript = Transcript(MARKER)
    lines: list[str] = []
    for start in range(0, len(output), size):
        lines += transcript.feed(output[start : start + size], 0.0)
    return lines + transcript.rest(), transcript


def outcome(name: str, text: str, env: dict[str, str] | None = None, home: Path | None = None) -> tuple[Any, list[str]]:
    """Return exit code and lines of a script in a login shell."""
    lines, transcript = read(in_shell(name, text, env, home))
    assert transcript.began
    return transcript.exit_code, lines


# ---- what is sent --------------------------------------------------------------------------------------------------

values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


# Each example starts some ten processes.
@pytest.mark.slow
@settings(QUICK, max_examples=25)
@given(st.dictionaries(st.from_regex(r"ORCHARD_[A-Za-z0-9_]{1,5}", fullmatch=True), values, max_size=3))
def test_environment_values_survive_a_real_shell(env: dict[str, str]) -> None:
    script = "".join(f'printf "%s" "${name}" | od -An -v -tx1 | tr -d " \\n"; echo\n' for name in env)
    lines, transcript = read(in_shell("sh", script, env))
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
    for shell in ("sh", "bash"):
        exit_code, told = outcome(shell, script)
        if lines is not None:
            assert (told, exit_code) == (lines, code)
        else:
            assert exit_code not in (0, None)


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_in_each_login_shell(shell: str, tmp_path: Path) -> None:
    value = 'it\'s\n"$HOME" `id` \\ !x é'
    begin = "echo one\r\n\r\n"
    assert outcome(shell, begin + "exit 7\r\n", home=tmp_path) == (7, ["one"])
    code, lines = outcome(shell, "\ufeffecho one\n\nno_such_command x\nexit 5", home=tmp_path)
    # fish has no -e, csh no line numbers.
    assert code == (5 if shell == "fish" else 1 if shell == "tcsh" else 127)
    assert any("no_such_command" in line for line in lines)
    assert shell == "tcsh" or any(re.search(r"\b3\b", line) for line in lines)
    # A script for another program, in the environment of the login shell's profile.
    for name in (".profile", ".zprofile", ".bash_profile"):
        (tmp_path / name).write_text("echo welcome; export FROM_PROFILE=yes; set -eu\n")
    (tmp_path / ".cshrc").write_text("echo welcome; setenv FROM_PROFILE yes\n")
    (tmp_path / ".config" / "fish").mkdir(parents=True, exist_ok=True)
    (tmp_path / ".config" / "fish" / "config.fish").write_text("echo welcome; set -x FROM_PROFILE yes\n")
    python = (
        f"#!{sys.executable}\nimport os\nprint(ascii(os.environ['A']), os.environ['FROM_PROFILE'])\nraise SystemExit(3)"
    )
    assert outcome(shell, python, {"A": value}, tmp_path) == (3, [f"{value!a} yes"])


SHEBANGS = ["#!/bin/sh", "#! /bin/bash", "#!/usr/bin/env bash", "#!/usr/bin/env -S bash -u", "#!/bin/bash --norc"]


@pytest.mark.parametrize("line", SHEBANGS)
def test_shell_named_by_the_first_line_ends_after_a_command_that_fails(line: str) -> None:
    code, lines = outcome("sh", f"{line}\necho $0 $#\n\nno_such_command x\necho never")
    assert (code, len(lines)) == (127, 2)
    assert lines[0].endswith(" 0")
    assert re.search(r"\b4\b.*no_such_command", lines[1])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("#!/bin/zsh", ["/bin/zsh", "-e"]),
        ("#! /bin/bash -x", ["/bin/bash", "-x", "-e"]),
        ("#!/bin/sh -", ["/bin/sh", "-e", "-"]),
        ("#!/usr/bin/env ksh", ["/usr/bin/env", "ksh", "-e"]),
        ("#!/usr/bin/env -S A=b dash -u", ["/usr/bin/env", "-S", "A=b", "dash", "-u", "-e"]),
        ("#!/usr/bin/env python3", ["/usr/bin/env", "python3"]),
        ("#!/usr/bin/perl -w", ["/usr/bin/perl", "-w"]),
        ("#!/opt/my shells/fish", ["/opt/my", "shells/fish"]),
        ("#!", []),
        ("echo", []),
        ("", []),
    ],
)
def test_interpreter_of_a_script(line: str, words: list[str]) -> None:
    assert interpreter(line) == words
    assert interpreter(line + "\n#!/bin/sh\n") == words


def test_missing_interpreter_is_named() -> None:
    code, lines = outcome("sh", "#!/no/such program\necho")
    assert code == 127
    assert "/no/such" in lines[0]


@pytest.mark.parametrize("shell", SHELLS)
def test_variable_that_a_shell_refuses_or_evaluates_is_passed_over(shell: str, tmp_path: Path) -> None:
    """A value is data for every name, and a name that cannot be set ends no script."""
    code = f"a[$(touch {tmp_path}/hacked)]"
    python = f"#!{sys.executable}\nimport os\nfor n in NAMES: print(n, os.environ.get(n), os.getuid())"
    names = "RANDOM SECONDS OPTIND HISTCMD SRANDOM LINENO BASHPID COLUMNS HISTSIZE UID EUID GID PPID USERNAME path argv status"
    python = python.replace("NAMES", repr([*names.split(), "LAST"]))
    for value in (code, "12", "x y"):
        env = dict.fromkeys(names.split(), value)
        exit_code, lines = outcome(shell, python, {**env, "LAST": value})
        assert exit_code == 0
        assert f"LAST {value} {os.getuid()}" in lines
        ignored = {line.split()[2] for line in lines if "is ignored" in line}
        for name in names.split():
            # A shell may count on from the number.
            counts = value == "12" and name in ssh_script._EVALUATED
            assert counts or name in ignored or f"{name} {value} {os.getuid()}" in lines, (name, lines)
        if shell in ("bash", "zsh"):
            assert {"UID", "EUID", "PPID"} <= ignored
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_script_leaves_no_file_in_the_guest(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert outcome(shell, f"ls {tmp_path}; exit 3")[0] == 3
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/none")
    assert outcome(shell, "echo never")[0] not in (0, None)


@pytest.mark.parametrize("shell", POSIX_SHELLS)
def test_options_and_aliases_of_a_profile_do_not_matter(shell: str, tmp_path: Path) -> None:
    for name in (".profile", ".zprofile", ".bash_profile"):
        (tmp_path / name).write_text("set -euC; alias cat=false rm=false mktemp=false\n")
    assert outcome(shell, "echo in", home=tmp_path) == (0, ["in"])


@pytest.mark.parametrize(
    ("env", "script"), [({"a-b": ""}, ""), ({"1a": ""}, ""), ({"": ""}, ""), ({"a": "\0"}, ""), ({}, "\0")]
)
def test_invalid_variable_names_and_nul_are_refused(env: dict[str, str], script: str) -> None:
    with pytest.raises(DriverError, match="startup script: "):
        script_text(Script(script, env), MARKER)


def test_complaint_about_a_script_names_its_kind() -> None:
    with pytest.raises(DriverError, match="shutdown script"):
        script_text(Script("true", {"A B": ""}, kind="shutdown"), MARKER)
    missing = script_text(Script("#!/no/such/interpreter\n", kind="shutdown"), MARKER)
    assert "shutdown script: there is no interpreter" in missing


# ---- what comes back -----------------------------------------------------------------------------------------------


def test_transcript_is_the_same_for_any_chunking() -> None:
    marker = MARKER.encode()
    output = (
        b"welcome\n"
        + marker
        + b"\none\n\ntwo \xff"
        + "é".encode()
        + b"\nopen"
        + marker
        + b" 3\nlate\n"
        + marker
        + b" 0\n"
    )
    expected = ["one", "", "two \ufffdé", "open", "late"]
    for size in range(1, len(output) + 1):
        lines, transcript = read(output, size)
        assert (lines, transcript.exit_code, transcript.last_line) == (expected, 3, "late")


def test_states_of_a_progress_bar_are_lines_at_most_one_a_second() -> None:
    fed = [
        ("1%\r", 0.0, ["1%"]),
        # Its line ended there.
        ("\n", 0.1, []),
        ("2%\r3%\r", 0.2, []),
        ("\n", 0.3, ["3%"]),
        ("4%\r5%\r6%", 1.0, ["5%"]),
        (" of 9\r7%\r", 1.5, []),
        ("", 1.9, []),
        ("8%", 2.0, ["7%"]),
        ("\r\r9%\r", 2.9, []),
        ("done\r\n", 3.0, ["done"]),
        ("dos\r\nmac\r", 3.0, ["dos", "mac"]),
        ("\r\n\r\n", 5.0, [""]),
        ("\r10%", 6.0, []),
        ("\r11%\rend", 6.5, ["11%"]),
        (f"{MARKER} 0\n", 6.6, ["end"]),
    ]
    transcript = Transcript(MARKER)
    transcript.feed(f"{MARKER}\n".encode(), 0.0)
    for data, now, lines in fed:
        assert transcript.feed(data.encode(), now) == lines, (data, now)
    assert transcript.exit_code == 0


@QUICK
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "\r", "\n", "é"]), st.floats(0, 0.7)), max_size=40))
def test_last_state_of_each_line_is_returned_once(fed: list[tuple[str, float]]) -> None:
    transcript, now = Transcript(MARKER), 0.0
    lines, times = transcript.feed(f"{MARKER}\n".encode(), now), list[float]()
    for data, seconds in fed:
        now += seconds
        new = transcript.feed(data.encode(), now)
        lines += new
        times += [now] * len(new) * (data != "\n")
    lines += transcript.feed(f"{MARKER} 0\n".encode(), now)
    assert all(later - earlier >= PROGRESS_SECONDS for earlier, later in itertools.pairwise(times))
    # The states that each line ends with, in order, are among the returned ones.
    remaining = iter(lines)
    for line in "".join(data for data, _ in fed).split("\n"):
        states = list(filter(None, line.split("\r")))
        assert not states or states[-1] in remaining
    assert transcript.exit_code == 0


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
    transcript.feed(f"{MARKER}\n".encode(), 0.0)
    fed = given_out = 0
    for _ in range(100):
        given_out += sum(map(len, transcript.feed(b"x" * 1000, 0.0)))
        fed += 1000
        assert fed - given_out < ssh_script.MAX_LINE + 100


def test_output_before_the_first_marker_is_dropped() -> None:
    transcript = Transcript(MARKER)
    for _ in range(100):
        assert transcript.feed(b"welcome " * 1000, 0.0) == []
    assert transcript.feed(f"{MARKER}\nx\n".encode(), 0.0) == ["x"]
    assert transcript.last_line == "x"


def test_ssh_reads_no_configuration_keys_or_known_hosts() -> None:
    command = ssh_script.ssh_command("ssh", "-oProxyCommand=x", 2222, "-user")
    assert command[:4] == ["ssh", "-F", "/dev/null", "-T"]
    assert command[-6:] == ["-l", "-user", "-p", "2222", "--", "-oProxyCommand=x"]
    assert {"PubkeyAuthentication=no", "UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no"} <= set(command)


# ---- the system's ssh ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of an SSH server: admin/admin."""
    with ssh_server() as (_, port):
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
    env: dict[str, str] | None = None,
) -> list[str]:
    """Run a script at a port of this host, and return its lines, which `lines` gets as they come."""
    received: list[str] = [] if lines is None else lines

    async def on_line(line: str) -> None:
        received.append(line)

    if isinstance(server, int):
        server = SSHServer("127.0.0.1", server)
    with trio.fail_after(give_up):
        await run_over_ssh(server, Script(text, env or {}, password=password), on_line, program=program)
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
async def test_ssh_uses_the_connections_that_the_worker_opens(port: int) -> None:
    dialled = []

    async def dial(host: str, port: int) -> trio.SocketStream:
        dialled.append((host, port))
        if len(dialled) == 1:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        return await trio.open_tcp_stream("127.0.0.1", port)

    # That address leads nowhere: ssh itself connects to nothing.
    assert await run(SSHServer("192.0.2.1", port, dial=dial), "echo hello") == ["hello"]
    assert dialled == [("192.0.2.1", port)] * 2


@pytest.mark.needs("ssh")
async def test_ssh_is_retried_while_the_account_does_not_exist(port: int, nursery: trio.Nursery) -> None:
    with ssh_server(SSHD_PASSWORD="not yet") as (_, first):
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
async def test_password_with_special_characters_is_passed_unchanged(
    password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_script, "PASSWORD_SECONDS", 0.0)
    with ssh_server(SSHD_PASSWORD=password) as (_, port):
        assert await run(port, "echo in", password=password) == ["in"]


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
async def test_secrets_are_in_no_argument_list_no_file_and_no_repr(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Joined, so that the argument list of a test run that names this test does not contain it.
    password = "-".join(("in", "no", "list"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lines: list[str] = []
    with ssh_server(SSHD_PASSWORD=password) as (_, port):
        text, env = f"echo begun; sleep 1000; : {password}", {"SECRET": password}
        nursery.start_soon(partial(run, port, text, password=password, lines=lines, env=env))
        await eventually(lambda: bool(lines))
        seen = command_lines()
        assert any("NumberOfPasswordPrompts" in text for text in seen)
        assert not any(password in text for text in seen)
        check_files(tmp_path, password)
        assert password not in repr(Script(text, env, password=password))
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


@pytest.mark.slow
@pytest.mark.needs("ssh")
async def test_script_ends_although_its_background_processes_run_on(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_script, "_REST_SECONDS", 0.1)
    assert await run(port, "sleep 1000 & echo over") == ["over"]
    # The bound holds for processes that print for ever, too.
    monkeypatch.setattr(ssh_script, "OUTPUT_BYTES", 100_000)
    assert (await run(port, "yes & echo over"))[0] in ("over", "y")


@pytest.mark.needs("ssh")
async def test_output_that_comes_after_the_end_of_the_script_is_not_lost(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_script, "_REST_SECONDS", float(GENEROUS))
    # The login shell ends after it has told the exit code of the script.
    text = "( while kill -0 $$ 2>/dev/null; do sleep 0.01; done; echo late ) & echo over; exit 3"
    lines: list[str] = []
    with pytest.raises(ScriptFailed):
        await run(port, text, lines=lines)
    assert lines == ["over", "late"]


@pytest.mark.needs("ssh")
@pytest.mark.parametrize("shell", SHELLS)
async def test_each_login_shell_works_over_ssh(shell: str, tmp_path: Path) -> None:
    with ssh_server(HOME=str(tmp_path), SSHD_SHELL=shutil.which(shell) or "") as (_, port):
        assert await run(port, "#!/bin/sh\necho $SHELL") == [shutil.which(shell)]
        with pytest.raises(ScriptFailed, match="exit code 4: in"):
            await run(port, "echo in\nexit 4")


@pytest.mark.needs("ssh")
async def test_output_and_options_of_a_profile_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".bash_profile").write_text("echo welcome; echo warning >&2; set -eu; export FROM_PROFILE=yes\n")
    lines: list[str] = []
    with ssh_server(HOME=str(tmp_path)) as (_, port), pytest.raises(ScriptFailed, match="exit code 7: yes"):
        await run(port, "echo $FROM_PROFILE; exit 7", lines=lines)
    assert lines == ["yes"]


@pytest.mark.needs("ssh")
async def test_lost_connection_fails_and_the_script_is_not_run_again(nursery: trio.Nursery) -> None:
    lines: list[str] = []
    with ssh_server() as (process, port):

        async def lose() -> None:
            await eventually(lambda: bool(lines))
            process.terminate()

        nursery.start_soon(lose)
        with pytest.raises(DriverError, match=f"lost admin@127.0.0.1:{port} while the startup script ran"):
            await run(port, "echo begun; sleep 1000", lines=lines)
    assert lines == ["begun"]


@pytest.mark.slow
@pytest.mark.needs("ssh")
async def test_script_that_kills_its_shell_fails_with_the_status_of_the_signal(port: int) -> None:
    with pytest.raises(ScriptFailed, match="exit code 137: begun"):
        await run(port, "echo begun; sleep 1000 & kill -9 $$")


async def test_missing_ssh_program_is_named() -> None:
    with pytest.raises(DriverError, match="cannot run /none/ssh, the OpenSSH client, on this machine: No such file"):
        await run(1, "echo", program="/none/ssh")


@pytest.mark.needs("ssh")
async def test_completed_script_leaves_no_file(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await run(port, "echo")
    assert os.listdir(tmp_path) == []  # noqa: PTH208


# ---- scripts that take too long --------------------------------------------------------------------------------------

DEFIANT = {
    "hangs": "echo begun; sleep 1000; echo never",
    "ignores signals": "trap '' TERM INT HUP; echo begun; while :; do sleep 1000; done",
    "forks": "sleep 1001 & (setsid sleep 1002 &); nohup setsid sleep 1003 >/dev/null 2>&1 & echo begun; sleep 1004",
    "replaces itself": "echo begun; exec sleep 1000",
    "stops its shell": "echo begun; kill -STOP $$; sleep 1000",
    "prints without end": "echo begun; yes $(printf %01000d 1)",
    "is a program": f"#!{sys.executable}\nimport time\nprint('begun', flush=True)\ntime.sleep(1000)",
}


def processes_of_script(word: str) -> list[int]:
    """Return the numbers of the processes that have a word in their environment or their arguments, but no ssh."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            said = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
            if word.encode() in said and b"NumberOfPasswordPrompts" not in said:
                found.append(int(path.name))
    return found


@pytest.mark.needs("ssh")
@pytest.mark.parametrize("name", DEFIANT)
async def test_script_that_takes_too_long_is_killed_with_what_it_started(
    name: str, port: int, nursery: trio.Nursery, clock: Clock
) -> None:
    lines: list[str] = []
    word = f"too-long-{os.getpid()}-{name.replace(' ', '-')}"

    async def on_line(line: str) -> None:
        if not lines:
            clock.jump(60.0)
        lines[:] = [*lines[:10], line]

    script = Script(DEFIANT[name], {"WORD": word}, seconds=60.0)
    with pytest.raises(ScriptFailed) as failed:
        await run_over_ssh(SSHServer("127.0.0.1", port), script, on_line)
    assert (failed.value.exit_code, lines[0]) == (ssh_script.TIMED_OUT, "begun")
    await eventually(lambda: processes_of_script(word) == [])


@pytest.mark.parametrize("shell", SHELLS)
def test_each_login_shell_is_killed_with_its_script(shell: str, tmp_path: Path) -> None:
    path = shutil.which(shell) or ""
    word = f"killed-{os.getpid()}-{shell}"
    files = tmp_path / "files"
    files.mkdir()
    home = {"HOME": str(tmp_path), "TMPDIR": str(files)}
    process = subprocess.Popen(
        ["/bin/sh", "-c", login_command(MARKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, **home, "SHELL": path, "WORD": word}, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        text = script_text(Script("sleep 1000 & echo begun; sleep 1000"), MARKER)
        process.stdin.write((greeting(MARKER) + text).encode())
        process.stdin.flush()
        while process.stdout.readline() != b"begun\n":
            pass
        assert [file.name.split(".")[0] for file in files.iterdir()] == ["startup-script"]
        process.stdin.write(b"end\n")
        process.stdin.flush()
        # The shell around the login shell tells how that one has ended.
        assert process.stdout.read() == f"{MARKER} 137\n".encode()
    at_last(lambda: processes_of_script(word) == [] and not list(files.iterdir()))


@pytest.mark.needs("ssh")
async def test_time_limit_begins_when_the_guest_has_answered(port: int, nursery: trio.Nursery, clock: Clock) -> None:
    front = Front(None, port)
    await nursery.start(front.serve)

    async def boot_slowly() -> None:
        await eventually(lambda: front.count == 1)
        clock.jump(ssh_script.CONNECT_SECONDS / 2)

    nursery.start_soon(boot_slowly)
    lines: list[str] = []

    async def on_line(line: str) -> None:
        lines.append(line)

    script = Script("echo in time", seconds=ssh_script.CONNECT_SECONDS / 4)
    await run_over_ssh(SSHServer("127.0.0.1", front.port), script, on_line)
    assert lines == ["in time"]
    nursery.cancel_scope.cancel()


async def test_exit_code_124_of_a_script_is_its_own(port: int) -> None:
    with pytest.raises(ScriptFailed, match="failed with exit code 124: x"):
        await run(port, "echo x; exit 124")
