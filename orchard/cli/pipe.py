"""The hidden verb `__tunnel`, the ProxyCommand of ssh: standard input and output become those of a port of a VM.

Every connection of ssh, scp, rsync and Ansible starts it. So it uses the transport alone, and imports neither
orchard.client nor the resources. Verbs with a client also have from here how a program on trio runs and fails.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Awaitable, Callable

import trio

from orchard.base.command_line import CommandLine, parse_port
from orchard.base.nursery import unwrap_groups
from orchard.cli.connection import ANSWER_SECONDS, path_of
from orchard.cli.failure import CommandError
from orchard.cli.openssh import SSH_DOMAIN
from orchard.cli.options import add_context_option, add_wait_option
from orchard.cli.session import chosen_context
from orchard.net.tcp import describe_network_error
from orchard.net.transport import ClientError, Transport
from orchard.net.urls import basic_header

_PIPE_BYTES = 64 * 1024
# As that of orchard.client.
_CONNECT_SECONDS = 10.0


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `__tunnel`."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("port", metavar="PORT", type=parse_port)
    add_wait_option(parser, "-t")
    add_context_option(parser)
    parser.set_defaults(run=_pipe)


def run_trio(run: Callable[[], Awaitable[int]]) -> int:
    """Return what an asynchronous function returns. Raises CommandError for errors of clients and of the network."""
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


def _pipe(options: argparse.Namespace) -> int:
    """Connect standard input and output to a port of a VM."""
    name = options.name.removesuffix(SSH_DOMAIN)
    context = chosen_context(options)
    path, query = path_of("vms", name, "port-forward"), {"port": str(options.port), "wait": str(options.wait)}

    async def relay() -> int:
        transport = Transport(
            context.url,
            base_path="/v1",
            authorization=basic_header(context.account, context.token) if context.account else "",
            certificate=context.certificate,
            connect_seconds=_CONNECT_SECONDS,
            answer_seconds=ANSWER_SECONDS,
        )
        async with transport, transport.tunnel(path, query) as tunnel, trio.open_nursery() as nursery:
            nursery.start_soon(send_input, tunnel.send_all)
            while data := await tunnel.receive_some():
                await trio.to_thread.run_sync(write_all, 1, data)
            nursery.cancel_scope.cancel()
        return 0

    return run_trio(relay)


async def send_input(send: Callable[[bytes], Awaitable[None]]) -> None:
    """Send standard input until its end."""
    # A thread, since a file cannot be waited for; and a shell must not find its terminal in non-blocking mode.
    while data := await trio.to_thread.run_sync(os.read, 0, _PIPE_BYTES, abandon_on_cancel=True):
        await send(data)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
