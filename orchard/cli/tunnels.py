"""The verbs that lead into a VM: port-forward, ssh, exec, cp, vnc, and ssh-config with its hidden verb `__tunnel`.

Bytes go through WebSockets of orchard.client. `ssh` is the system's program, which reaches the VM by `__tunnel` as its
ProxyCommand: no extra package is needed for it, and scp, rsync, Ansible and editors go the same way.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import webbrowser
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import quote

import trio

from orchard.cli.connection import path_of
from orchard.cli.failure import USAGE, CommandError
from orchard.cli.session import add_context_option, chosen_context, open_connection
from orchard.client import Client, ClientError
from orchard.command_line import CommandLine, parse_duration, parse_port
from orchard.net.tcp import describe_network_error, splice
from orchard.nursery import unwrap_groups

_SSH_PORT, _VNC_PORT = 22, 5900
# Names of VMs for the system's ssh, as `ssh-config` declares them.
_SSH_DOMAIN = ".orchard"
_PIPE_BYTES = 64 * 1024
# Prints the password that `ssh` asks for.
_ASKPASS = '#!/bin/sh\nprintf "%s\\n" "$ORCHARD_SSH_PASSWORD"\n'


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of one of these verbs."""
    if verb == "port-forward":
        parser.add_argument("kind", choices=("vm", "worker"))
        parser.add_argument("name", metavar="NAME")
        parser.add_argument(
            "ports", metavar="[LOCAL]:REMOTE", type=parse_ports, help="LOCAL is a free port if it is left out"
        )
        parser.set_defaults(run=_forward)
    elif verb == "ssh-config":
        parser.set_defaults(run=_print_ssh_config)
    elif verb == "__tunnel":
        parser.add_argument("name", metavar="NAME")
        parser.add_argument("port", metavar="PORT", type=parse_port)
        parser.set_defaults(run=_pipe)
    else:
        parser.add_argument("kind", choices=("vm", "worker") if verb == "vnc" else ("vm",), metavar="vm")
        parser.add_argument("name", metavar="NAME")
        parser.add_argument("-u", "--username", default="", help="default: the VM's")
        parser.add_argument("-p", "--password", default="", help="default: the VM's")
        parser.set_defaults(run=_ssh if verb == "ssh" else _open_vnc)
        if verb == "ssh":
            parser.add_argument(
                "command", metavar="COMMAND", nargs="*", help="default: a login shell; options of it after --"
            )
            parser.is_intermixed = True
    if verb != "ssh-config":
        short = "-w" if verb == "vnc" else "-t"
        parser.add_argument(
            short, "--wait", metavar="SECONDS", type=parse_duration, default=60, help="default: %(default)s"
        )
    add_context_option(parser)


def parse_ports(text: str) -> tuple[int, int]:
    """Return the local port (0: any free one) and the remote port of a text such as 8080:80, :80 or 80."""
    match = re.fullmatch(r"(?:([0-9]{0,5}):)?([0-9]{1,5})", text)
    local, remote = (int(match[1] or 0), int(match[2])) if match else (0, 0)
    if not 0 < remote < 65536 or local > 65535:
        raise argparse.ArgumentTypeError(f'ports are "{text}", expected [LOCAL]:REMOTE, each at most 65535')
    return local, remote


def run_with_client(options: argparse.Namespace, work: Callable[[Client], Awaitable[int]]) -> int:
    """Return what `work` returns with a client of the chosen controller. Raises CommandError for its errors."""
    context = chosen_context(options)

    async def run() -> int:
        client = Client(context.url, account=context.account, token=context.token, certificate=context.certificate)
        async with client:
            return await work(client)

    try:
        with unwrap_groups():
            return trio.run(run, strict_exception_groups=True)
    except (ClientError, ValueError) as error:
        raise CommandError(str(error)) from None
    except BrokenPipeError:
        # Of standard output: a lost connection is a ClientError.
        raise
    except OSError as error:
        raise CommandError(describe_network_error(error)) from None


# ---- port forwards ---------------------------------------------------------------------------------------------------


def _forward(options: argparse.Namespace) -> int:
    async def announced(port: int) -> None:
        print(f"forwarding 127.0.0.1:{port} -> {options.name}:{options.ports[1]}...", flush=True)

    return run_with_client(options, lambda client: _listen(client, options, options.ports, announced))


async def _listen(
    client: Client, options: argparse.Namespace, ports: tuple[int, int], ready: Callable[[int], Awaitable[None]]
) -> int:
    """Forward a local port until interrupted; call `ready` with it. Each failure of a connection is one line."""
    resource = client.vms if options.kind == "vm" else client.workers

    async def connect(stream: trio.SocketStream) -> None:
        try:
            async with stream, resource.port_forward(options.name, ports[1], wait=options.wait) as tunnel:
                await splice(stream, tunnel)
        except ClientError as error:
            print(f"orchard: {error}", file=sys.stderr)

    listeners = await trio.open_tcp_listeners(ports[0], host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, connect, listeners))
        await ready(listeners[0].socket.getsockname()[1])
    return 0


def _open_vnc(options: argparse.Namespace) -> int:
    user, password = _credentials(options) if options.kind == "vm" else (options.username, options.password)
    login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user else ""

    async def opened(port: int) -> None:
        print(f"forwarding 127.0.0.1:{port} -> {options.name}:{_VNC_PORT}...", flush=True)
        url = f"vnc://{login}127.0.0.1:{port}"
        if not await trio.to_thread.run_sync(webbrowser.open, url):
            print(f"open vnc://127.0.0.1:{port} in a VNC viewer", file=sys.stderr)

    return run_with_client(options, lambda client: _listen(client, options, (0, _VNC_PORT), opened))


def _credentials(options: argparse.Namespace) -> tuple[str, str]:
    """Return the user name and the password for a VM."""
    with open_connection(options) as controller:
        vm = controller.call("GET", path_of("vms", options.name))
    return options.username or vm.get("username", ""), options.password or vm.get("password", "")


# ---- ssh -------------------------------------------------------------------------------------------------------------


def _pipe(options: argparse.Namespace) -> int:
    """Connect standard input and output to a port of a VM."""
    name = options.name.removesuffix(_SSH_DOMAIN)

    async def relay(client: Client) -> int:
        async with (
            client.vms.port_forward(name, options.port, wait=options.wait) as tunnel,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(send_input, tunnel.send_all)
            while data := await tunnel.receive_some():
                await trio.to_thread.run_sync(write_all, 1, data)
            nursery.cancel_scope.cancel()
        return 0

    return run_with_client(options, relay)


async def send_input(send: Callable[[bytes], Awaitable[None]]) -> None:
    """Send standard input until its end."""
    # A thread, since a file cannot be waited for; and a shell must not find its terminal in non-blocking mode.
    while data := await trio.to_thread.run_sync(os.read, 0, _PIPE_BYTES, abandon_on_cancel=True):
        await send(data)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _ssh(options: argparse.Namespace) -> int:
    program = shutil.which("ssh")
    if program is None:
        raise CommandError("the program ssh is missing; install OpenSSH, or use: orchard exec vm NAME -it")
    user, password = _credentials(options)
    if user.startswith("-"):
        raise CommandError(f'the user name is "{user}", expected no "-" at its start', USAGE)
    proxy = [*_own_command(), "__tunnel", "--wait", str(options.wait), options.name, str(_SSH_PORT)]
    if options.context:
        proxy[-2:-2] = ["--context", options.context]
    with tempfile.TemporaryDirectory() as directory:
        askpass = Path(directory) / "askpass"
        askpass.write_text(_ASKPASS)
        askpass.chmod(stat.S_IRWXU)
        env = {
            **os.environ,
            "SSH_ASKPASS": str(askpass),
            "SSH_ASKPASS_REQUIRE": "force",
            "ORCHARD_SSH_PASSWORD": password,
        }
        words = [program, *_ssh_options(proxy), "-l", user, f"{options.name}{_SSH_DOMAIN}"]
        if options.command:
            words += ["--", *options.command]
        process = subprocess.Popen(words, env=env)  # noqa: S603
        while True:
            try:
                return _status(process.wait())
            except KeyboardInterrupt:
                # ssh has it, too, and decides.
                continue


def _own_command() -> list[str]:
    """Return the command that runs this program."""
    return [sys.executable, "-P", "-m", "orchard"]


def _ssh_options(proxy: list[str]) -> list[str]:
    # Each clone of an image has the same host key as the image, and names are used again: a key proves nothing here. The
    # tunnel leads to this VM alone.
    settings: Mapping[str, str] = {
        "ProxyCommand": shlex.join(proxy).replace("%", "%%"),
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": os.devnull,
        "LogLevel": "ERROR",
        "NumberOfPasswordPrompts": "1",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _status(code: int) -> int:
    """Return the exit status of a process that ended with `code`, also by a signal."""
    return code if code >= 0 else 128 - code


def _print_ssh_config(options: argparse.Namespace) -> int:
    context = f" --context {shlex.quote(options.context)}" if options.context else ""
    print(
        f"# For ~/.ssh/config: then `ssh NAME{_SSH_DOMAIN}`, scp, rsync, Ansible and editors reach the VM NAME.\n"
        f"Host *{_SSH_DOMAIN}\n"
        f"  ProxyCommand {shlex.join(_own_command())} __tunnel{context} %h %p\n"
        "  User admin\n"
        "  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {os.devnull}\n"
        "  LogLevel ERROR"
    )
    return 0
