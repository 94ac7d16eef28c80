"""The verbs `exec`, which runs a command in a VM, and `cp`, which copies files by it."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import trio

from orchard.base.command_line import CommandLine
from orchard.cli.failure import FAILED, USAGE, CommandError, cleaning_up
from orchard.cli.options import add_context_option, add_resource_arguments, add_wait_option
from orchard.cli.output import terminal_size
from orchard.cli.pipe import send_input, write_all
from orchard.cli.tunnels import run_with_client
from orchard.client import Client, RunningCommand

_READ_BYTES = 64 * 1024
# Runs on the VM: takes an archive that holds one file or directory, and puts it at "$1", or into "$1" if that is a directory.
_UNPACK = """\
set -e
if [ -d "$1" ]; then exec tar -xf - -C "$1"; fi
new=$(mktemp -d "$(dirname "$1")/.orchard-cp.XXXXXX")
trap 'rm -rf "$new"' EXIT
tar -xf - -C "$new"
mv "$new/$2" "$1"
"""


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `exec` or `cp`."""
    if verb == "exec":
        add_resource_arguments(parser, "vm")
        parser.add_argument("-i", "--stdin", action="store_true", help="send standard input to the command")
        parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
        parser.add_argument("-e", "--env", metavar="NAME=VALUE", action="append", default=[], help="repeatable")
        parser.add_argument("--workdir", metavar="DIR", default="")
        parser.add_argument("command", metavar="COMMAND", nargs="*", help="its options after --")
        parser.is_intermixed = True
        parser.set_defaults(run=_exec)
    else:
        parser.add_argument("source", metavar="SOURCE", help="a local path, or NAME:PATH in a VM")
        parser.add_argument("target", metavar="TARGET", help="the other of the two")
        parser.set_defaults(run=_copy)
    add_wait_option(parser)
    add_context_option(parser)


# ---- exec ------------------------------------------------------------------------------------------------------------


def _exec(options: argparse.Namespace) -> int:
    if not options.command:
        raise CommandError("the command is missing: orchard exec vm NAME -- COMMAND", USAGE)
    if options.tty and not sys.stdin.isatty():
        raise CommandError("-t needs a terminal as standard input", USAGE)
    env = dict(pair.partition("=")[::2] for pair in options.env)
    # One word is a line for the shell, several are a command and its arguments.
    line = options.command[0] if len(options.command) == 1 else shlex.join(options.command)
    with _raw_terminal() if options.tty else nullcontext():
        return run_with_client(options, lambda client: _run_command(client, options, line, env))


async def _run_command(client: Client, options: argparse.Namespace, line: str, env: dict[str, str]) -> int:
    size = terminal_size()
    running = client.vms.exec(
        options.name,
        line,
        interactive=options.stdin or options.tty,
        tty=options.tty,
        rows=size.lines,
        cols=size.columns,
        env=env,
        workdir=options.workdir,
        wait=options.wait,
    )
    async with running as command, trio.open_nursery() as nursery:
        if options.stdin or options.tty:
            nursery.start_soon(_send_all_input, command)
        if options.tty:
            nursery.start_soon(_follow_size, command)
        async for stream, data in command:
            await trio.to_thread.run_sync(write_all, 2 if stream == "stderr" else 1, data)
        nursery.cancel_scope.cancel()
    assert command.exit_code is not None
    return command.exit_code


async def _send_all_input(command: RunningCommand) -> None:
    await send_input(command.send)
    await command.send_eof()


async def _follow_size(command: RunningCommand) -> None:
    with trio.open_signal_receiver(signal.SIGWINCH) as changes:
        async for _ in changes:
            size = terminal_size()
            await command.resize(size.lines, size.columns)


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Have the terminal pass on every key for the time of the block: the VM's terminal acts on Ctrl-C and the like."""
    try:
        import termios
        import tty
    except ImportError:
        raise CommandError("-t needs a terminal as macOS and Linux have it; leave it out", USAGE) from None
    before = termios.tcgetattr(0)
    try:
        # Without a flush, keys that were typed before are not lost.
        with cleaning_up():
            tty.setraw(0, termios.TCSADRAIN)
            yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


# ---- cp --------------------------------------------------------------------------------------------------------------


def _copy(options: argparse.Namespace) -> int:
    (from_vm, source), (to_vm, target) = _split(options.source), _split(options.target)
    if bool(from_vm) == bool(to_vm):
        raise CommandError("expected one path in a VM, NAME:PATH, and one here", USAGE)
    if from_vm:
        return _download(options, from_vm, source, Path(target))
    path = Path(source).resolve()
    if not path.exists():
        raise CommandError(f"{source} does not exist")
    return run_with_client(options, lambda client: _upload(client, options, to_vm, path, target))


def _split(text: str) -> tuple[str, str]:
    """Return the name of the VM ("" for here) and the path of a text such as NAME:PATH. A path here may begin with ./"""
    name, colon, path = text.partition(":")
    if not colon or not name or "/" in name or (os.name == "nt" and len(name) == 1):
        return "", text
    return name, path or "."


async def _upload(client: Client, options: argparse.Namespace, vm: str, source: Path, target: str) -> int:
    line = shlex.join(["sh", "-c", _UNPACK, "sh", target, source.name])
    archive = ["tar", "-cf", "-", "-C", str(source.parent), "--", source.name]
    async with (
        client.vms.exec(vm, line, interactive=True, wait=options.wait) as command,
        trio.open_nursery() as nursery,
    ):
        packing = await trio.lowlevel.open_process(archive, stdout=subprocess.PIPE)
        nursery.start_soon(_send_archive, packing, command)
        await _print_complaints(command)
        nursery.cancel_scope.cancel()
    return _result(command.exit_code, packing.returncode)


async def _send_archive(packing: trio.Process, command: RunningCommand) -> None:
    assert packing.stdout is not None
    async with packing.stdout:
        while data := await packing.stdout.receive_some(_READ_BYTES):
            await command.send(bytes(data))
    # An archive that is cut off must not pass for a whole one: tar on the other side reads on to its end.
    if await packing.wait() == 0:
        await command.send_eof()


async def _print_complaints(command: RunningCommand) -> None:
    async for _, data in command:
        await trio.to_thread.run_sync(write_all, 2, data)


def _download(options: argparse.Namespace, vm: str, source: str, target: Path) -> int:
    path = PurePosixPath(source)
    directory, name = (str(path.parent), path.name) if path.name not in ("", ".", "..") else (source, ".")
    line = shlex.join(["tar", "-cf", "-", "-C", directory, "--", name])
    within = target if target.is_dir() else target.absolute().parent
    # Beside the target, so that it can be renamed.
    with cleaning_up(), tempfile.TemporaryDirectory(prefix=".orchard-cp.", dir=within) as scratch:
        packed, new = Path(scratch, "archive"), Path(scratch, "new")
        with packed.open("wb") as file:
            status = run_with_client(options, lambda client: _receive_archive(client, options, vm, line, file))
        if not status:
            _unpack(packed, new)
            _place(new, name, target)
    return _result(status, 0)


async def _receive_archive(client: Client, options: argparse.Namespace, vm: str, line: str, file: BinaryIO) -> int:
    async with client.vms.exec(vm, line, wait=options.wait) as command:
        async for stream, data in command:
            write = partial(write_all, 2) if stream == "stderr" else file.write
            await trio.to_thread.run_sync(write, data)
    assert command.exit_code is not None
    return command.exit_code


def _unpack(packed: Path, directory: Path) -> None:
    """Unpack an archive that a VM has sent, and nothing that would lead out of the directory. Raises CommandError."""
    try:
        with tarfile.open(packed) as archive:
            archive.extractall(directory, filter="data")
    except tarfile.TarError as error:
        raise CommandError(f"the VM sent an archive that is not accepted: {error}") from None


def _place(new: Path, name: str, target: Path) -> None:
    made = new if name == "." else new / name
    place = target / name if target.is_dir() and name != "." else target
    if place.is_dir():
        for each in list(made.iterdir()):
            shutil.move(str(each), str(place / each.name))
    else:
        made.replace(place)


def _result(code: int | None, ours: int | None) -> int:
    if code or ours:
        raise CommandError("the copy failed; tar's messages are above", FAILED)
    return 0
