"""The verbs that listen on a port and open tunnels to a VM or a host: port-forward and vnc.

Bytes go through WebSockets of orchard.client, as those of exec and cp do (commands.py).
"""

from __future__ import annotations

import argparse
import re
import sys
import webbrowser
from collections.abc import Awaitable, Callable
from functools import partial
from urllib.parse import quote

import trio

from orchard.base.command_line import CommandLine
from orchard.cli.openssh import add_login_options, login_of
from orchard.cli.options import add_context_option, add_resource_arguments, add_wait_option
from orchard.cli.pipe import run_trio
from orchard.cli.session import chosen_context
from orchard.client import Client, ClientError, ResponseError
from orchard.net.tcp import splice

_VNC_PORT = 5900


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of one of these verbs."""
    add_resource_arguments(parser, "vm", "worker")
    if verb == "port-forward":
        parser.add_argument(
            "ports", metavar="[LOCAL]:REMOTE", type=parse_ports, help="LOCAL is a free port if it is left out"
        )
        parser.set_defaults(run=_forward)
    else:
        add_login_options(parser)
        parser.set_defaults(run=_open_vnc)
    add_wait_option(parser, "-w" if verb == "vnc" else "-t")
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

    return run_trio(run)


# ---- port forwards ---------------------------------------------------------------------------------------------------


def _forward(options: argparse.Namespace) -> int:
    return run_with_client(options, lambda client: _listen(client, options, *options.ports))


async def _listen(
    client: Client, options: argparse.Namespace, local: int, remote: int, login: str | None = None
) -> int:
    """Forward a local port until interrupted. Each failure of a connection is one line on standard error.

    `login` is for a VNC viewer, which is opened. Raises ResponseError for an unknown VM or worker.
    """
    resource = client.vms if options.kind == "vm" else client.workers
    try:
        await resource.get(options.name)
    except ResponseError as error:
        # The role compute:connect does not include compute:read.
        if error.status != 403:
            raise

    async def connect(stream: trio.SocketStream) -> None:
        try:
            async with stream, resource.port_forward(options.name, remote, wait=options.wait) as tunnel:
                await splice(stream, tunnel)
        except ClientError as error:
            print(f"orchard: {error}", file=sys.stderr)

    listeners = await trio.open_tcp_listeners(local, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, connect, listeners))
        address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        print(f"forwarding {address} -> {options.name}:{remote}...", flush=True)
        if login is not None and not await trio.to_thread.run_sync(webbrowser.open, f"vnc://{login}{address}"):
            print(f"open vnc://{address} in a VNC viewer", file=sys.stderr)
    return 0


def _open_vnc(options: argparse.Namespace) -> int:
    user, password = login_of(options) if options.kind == "vm" else (options.username, options.password)
    login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user else ""
    return run_with_client(options, lambda client: _listen(client, options, 0, _VNC_PORT, login))
