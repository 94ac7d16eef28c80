"""Scripts into a VM: what a shell is sent, what its output means, and what the system's ssh does with a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from processes import GENEROUS, eventually
from strategies import QUICK
from test_processes import free_port

from orchard import ssh
from orchard.ssh import SSHError, Transcript, greeting, script_text

SSHD = Path(__file__).parent / "standin" / "sshd.py"
MARKER = "0123456789abcdef"


def in_shell(shell: str, text: str) -> bytes:
    return subprocess.run([shell], input=(greeting(MARKER) + text).encode(), capture_output=True, check=False).stdout


def read(output: bytes, size: int = 1 << 30) -> tuple[list[str], Transcript]:
    """Read the output of a shell in pieces."""
    transcript = Transcript(MARKER)
    lines: list[str] = []
    for start in range(0, len(output), size):
        lines += transcript.feed(output[start : start + size])
    return lines + transcript.rest(), transcript


# ---- what is sent --------------------------------------------------------------------------------------------------

values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@QUICK
@given(st.dictionaries(st.from_regex(r"ORCHARD_[A-Za-z0-9_]{1,5}", fullmatch=True), values, max_size=3))
def test_values_come_out_of_a_real_shell_byte_by_byte(env: dict[str, str]) -> None:
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
def test_scripts_in_a_real_shell(script: str, lines: list[str] | None, code: int | None) -> None:
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
def test_what_no_shell_can_hold_is_refused(env: dict[str, str], script: str) -> None:
    with pytest.raises(ValueError, match="startup script: "):
        script_text(script, env, MARKER)


# ---- what comes back -----------------------------------------------------------------------------------------------


def test_output_is_read_the_same_however_it_is_cut() -> None:
    marker = MARKER.encode()
    output = b"welcome\n" + marker + b"\none\n\ntwo \xff" + "é".encode() + b"\nopen" + marker + b" 3\nlogout\n"
    expected = ["one", "", "two \ufffdé", "open"]
    for size in range(1, len(output) + 1):
        lines, transcript = read(output, size)
        assert (lines, transcript.exit_code, transcript.last_line) == (expected, 3, "open")


def test_without_the_last_marker_nobody_knows_how_it_ended() -> None:
    lines, transcript = read(MARKER.encode() + b"\none\ntw")
    assert (lines, transcript.began, transcript.exit_code) == (["one", "tw"], True, None)
    lines, transcript = read(b"motd\n")
    assert (lines, transcript.began) == ([], False)


def test_long_lines_come_in_pieces_and_keep_their_characters() -> None:
    text = "é" * 20_000
    for size in (1000, 1 << 30):
        lines, transcript = read(f"{MARKER}\n{text}\n{MARKER} 0\n".encode(), size)
        assert "".join(lines) == text
        assert max(len(line.encode()) for line in lines) <= ssh.MAX_LINE
        assert transcript.exit_code == 0


# ---- the system's ssh ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def server(*arguments: str) -> AsyncIterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen([sys.executable, SSHD, *arguments], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    assert process.stdout is not None
    try:
        yield process, int(await trio.to_thread.run_sync(process.stdout.readline))
    finally:
        process.terminate()
        process.wait(GENEROUS)
        process.stdout.close()


async def run(
    port: int, script: str, *, password: str = "admin", lines: list[str] | None = None, **options: float | str
) -> ssh.ScriptEnd:
    async def on_line(line: str) -> None:
        if lines is not None:
            lines.append(line)

    with trio.fail_after(GENEROUS):
        return await ssh.run_script(
            "127.0.0.1",
            port,
            username="admin",
            password=password,
            script=script,
            env={},
            on_line=on_line,
            **options,  # type: ignore[arg-type]
        )


async def test_a_server_that_comes_up_later_is_waited_for() -> None:
    port = free_port()
    lines: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_and_run, port, lines)
        await trio.testing.wait_all_tasks_blocked()
        async with server("--port", str(port)):
            await eventually(lambda: lines == ["hello", "end 0"])


async def wait_and_run(port: int, lines: list[str]) -> None:
    end = await run(port, "echo hello", lines=lines)
    lines.append(f"end {end.exit_code}")


async def test_nobody_there_is_given_up_with_the_reason() -> None:
    port = free_port()
    with pytest.raises(SSHError, match=f"no SSH at admin@127.0.0.1:{port} within 0.5 seconds: .*Connection refused"):
        await run(port, "echo", connect_seconds=0.5)


async def test_a_wrong_password_is_given_up_and_never_shown() -> None:
    async with server() as (_, port):
        with pytest.raises(SSHError, match=r"refuses the password: .*Permission denied") as refused:
            await run(port, "echo", password="s3cret-wrong", password_seconds=0.0)
    assert "s3cret" not in str(refused.value)


async def test_a_password_that_no_prompt_can_take_is_refused() -> None:
    for password in ("a\nb", "a\0", "a\r"):
        with pytest.raises(SSHError, match="line break or NUL"):
            await run(1, "echo", password=password)


def command_lines(but: int) -> list[str]:
    """Give the argument lists of all processes but one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if path.parent.name != str(but):
            with suppress(OSError):
                found.append(path.read_bytes().decode("utf-8", "replace"))
    return found


async def test_the_password_is_in_no_argument_list() -> None:
    seen: list[str] = []
    lines: list[str] = []
    async with server("--password", "pass-in-no-list") as (process, port), trio.open_nursery() as nursery:

        async def look() -> None:
            await eventually(lambda: bool(lines))
            seen.extend(command_lines(process.pid))
            nursery.cancel_scope.cancel()

        nursery.start_soon(look)
        await run(port, "echo begun; sleep 1000", password="pass-in-no-list", lines=lines)
    assert any("NumberOfPasswordPrompts" in text for text in seen), "the ssh process was looked at"
    assert not any("pass-in-no-list" in text for text in seen if "pytest" not in text)


async def test_exit_255_of_the_script_is_not_a_lost_connection() -> None:
    async with server() as (_, port):
        assert await run(port, "echo x; exit 255") == ssh.ScriptEnd(255, "x")


async def test_a_connection_that_is_lost_is_no_end_of_the_script() -> None:
    lines: list[str] = []
    async with server() as (process, port), trio.open_nursery() as nursery:

        async def lose() -> None:
            await eventually(lambda: bool(lines))
            process.kill()

        nursery.start_soon(lose)
        with pytest.raises(SSHError, match=f"lost admin@127.0.0.1:{port} while the startup script ran"):
            await run(port, "echo begun; sleep 1000", lines=lines)


async def test_without_ssh_the_missing_program_is_named() -> None:
    with pytest.raises(SSHError, match="cannot run /none/ssh, the OpenSSH client, on this machine: No such file"):
        await run(1, "echo", program="/none/ssh")


async def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with server() as (_, port):
        await run(port, "echo")
    assert os.listdir(tmp_path) == []  # noqa: PTH208 -- not for an asynchronous function
