"""The verbs `demo` and `dev`: a whole cluster in this process, to look at or to develop against.

Both run `orchard.testing.cluster`, with tart if this host has it, otherwise with synthetic VMs, and both end at a
signal to stop or an error. `demo` creates one VM, prints each step with its duration, and deletes everything; with
several controllers it kills the one that leads, too. `dev` runs until it is stopped, on a fixed port, and keeps the
controller's state in a directory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from orchard import __version__
from orchard.base.command_line import CommandLine, HomeError, orchard_home, parse_count, parse_port, parse_resources
from orchard.base.daemon import run_main, run_until_signal
from orchard.base.files import WORKERS_LOCK_FILE, LockError, lock_directory, write_private
from orchard.base.logs import LogSettings
from orchard.cli.context import Context
from orchard.cli.session import remember_context
from orchard.client import Client, ClientError
from orchard.control.settings import parse_api_prefix
from orchard.control.stored_data import StartError
from orchard.net.urls import DEFAULT_PORT
from orchard.schema import TART_VMS, VM, Worker
from orchard.tart import TartDriver
from orchard.testing import VMS_PER_WORKER, Cluster, ClusterController, cluster
from orchard.vm.driver import Driver

_SCRIPT = """\
echo "Hello from $(uname -s), I am $(id -un)."
echo "$GREETING"
echo "My working directory is $PWD."
"""
_SCRIPT_ENV = {"GREETING": "Variables arrive unchanged: \"$HOME\" `uname` 'and quotes'."}
# Between two requests for new lines of the script.
_POLL_SECONDS = 0.02


_DEMO_IMAGE = "ghcr.io/cirruslabs/macos-tahoe-base:latest"
_DEV_DIRECTORY = Path(".dev-data")
_DEV_CONTEXT = "local-dev"

# From a worker's name to its driver. None: synthetic VMs.
_MakeDriver = Callable[[str], Driver] | None


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `demo` or `dev`."""
    if verb == "demo":
        parser.add_argument("--keep", action="store_true", help="keep it running, and print curl commands to try")
        parser.add_argument("--image", default=_DEMO_IMAGE, help="image of the VM; default: %(default)s")
        parser.add_argument("--controllers", type=parse_count, default=1,
            help="number of controllers; of several, which need etcd, one is killed; default: %(default)s")  # fmt: skip
    else:
        parser.add_argument(
            "--port", type=parse_port, default=DEFAULT_PORT, help="TCP port; default: %(default)s; 0: any free port"
        )
        parser.add_argument("--workers", type=parse_count, default=1, help="number of workers; default: %(default)s")
        parser.add_argument(
            "-d",
            "--data-dir",
            "--directory",
            dest="directory",
            metavar="DIR",
            type=Path,
            default=_DEV_DIRECTORY,
            help="directory for state and VMs; default: %(default)s",
        )
        parser.add_argument(
            "--resources", metavar="K=N,..", type=parse_resources, default={}, help="resources of each worker"
        )
        parser.add_argument("--api-prefix", metavar="P", type=parse_api_prefix, default="", help="path before /v1")
        parser.add_argument("--ready-file", metavar="FILE", type=Path,
            help='write {"url": URL} to this file when the cluster can be used; it is removed at the end')  # fmt: skip
    parser.add_argument("--synthetic", action="store_true", help="use VMs without a hypervisor even if tart is there")
    parser.add_argument("--debug", action="store_true", help="log to standard error")
    parser.set_defaults(run=run_verb, verb=verb)


def run_verb(options: argparse.Namespace) -> int:
    """Run `orchard demo` or `orchard dev`, and return the exit status. BrokenPipeError propagates."""
    failures: dict[type[Exception], int] = dict.fromkeys((StartError, ClientError, LockError, HomeError), 1)
    return run_main("orchard", partial(_run, options), failures, LogSettings(options.debug, quiet=not options.debug))


async def _run(options: argparse.Namespace) -> None:
    """Run a verb until it ends, or until a signal to stop. Raises StartError, ClientError, LockError.

    The VMs run by tart if this host has it and `--synthetic` is not set.
    """
    verb = partial(_demo if options.verb == "demo" else _dev, options)
    tart = None if options.synthetic else shutil.which("tart")
    if tart is None:
        await run_until_signal(partial(verb, None))
        return
    if options.verb == "dev" and options.workers > 1:
        raise LockError(f"--workers is {options.workers}, expected 1: only with --synthetic can one host have more")
    # Each of this worker and one of another controller would delete the other's VMs.
    with lock_directory(orchard_home("worker"), WORKERS_LOCK_FILE):
        await run_until_signal(partial(verb, lambda _: TartDriver(tart, orchard_home("worker") / "tart")))


def _describe_driver(make_driver: _MakeDriver) -> str:
    return "with VMs by tart" if make_driver else "with synthetic VMs: directories and processes, no hypervisor"


# ---- orchard demo --------------------------------------------------------------------------------------------------


class _StepPrinter:
    """Prints what happens, each line with the seconds since the line before."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        now = time.monotonic()
        print(f"{now - self._last:8.3f} s  {text}", flush=True)
        self._last = now


async def _demo(options: argparse.Namespace, make_driver: _MakeDriver) -> None:
    """Create a VM, show what happens to it, and delete it. Raises StartError, ClientError."""
    steps = _StepPrinter()
    several = options.controllers > 1
    what = f"three etcd nodes, {options.controllers} controllers" if several else "a controller"
    print(f"Orchard {__version__}: {what}, a worker and a VM on this machine, in a temporary directory.\n")
    async with cluster(workers=1, driver=make_driver, controllers=options.controllers) as running:
        url = _leader(running)[1].url if several else running.url
        steps.say(f'a controller listens on {url}, and the worker "worker-1" has registered,')
        steps.say(_describe_driver(make_driver))
        client = running.client
        await client.vms.create(
            name="demo",
            image=options.image,
            headless=True,
            startup_script={"script_content": _SCRIPT, "env": _SCRIPT_ENV},
        )
        steps.say(f'POST /v1/vms: the VM "demo" of {options.image} is created')
        await _show_status(client, steps)
        await _show_script_output(client, steps)
        if several:
            await _show_fail_over(running, options.image, steps)
        if options.keep:
            _print_curl_lines(running)
            await trio.sleep_forever()
        await client.vms.delete("demo")
        steps.say("DELETE /v1/vms/demo: the VM is deleted")
    steps.say("worker and controller have ended, and the directory is deleted")


async def _show_status(client: Client, steps: _StepPrinter) -> None:
    """Print each status of the VM until it runs or has failed."""
    shown = ""
    async with client.vms.watch("demo") as changes:
        async for _, vm in changes:
            if (now := _describe(vm)) != shown:
                steps.say(now)
                shown = now
            if vm.state.status != "pending":
                return


def _describe(vm: VM) -> str:
    where = f' on "{vm.state.worker}"' if vm.state.worker else ""
    message = f": {vm.state.status_message}" if vm.state.status_message else ""
    return f"the VM is {vm.state.status}{where}{message}"


async def _show_script_output(client: Client, steps: _StepPrinter) -> None:
    """Print the lines of the VM's script until all are there. Raises ClientError if the VM fails."""
    seen = 0
    while seen < _SCRIPT.count("\n"):
        vm = await client.vms.get("demo")
        lines = [event.payload async for event in client.vms.events("demo")]
        for line in lines[seen:]:
            steps.say(f"its script printed: {line}")
        seen = len(lines)
        if vm.state.status == "failed":
            raise ClientError(f"the VM failed: {vm.state.status_message}")
        await trio.sleep(_POLL_SECONDS)


def _leader(running: Cluster) -> tuple[str, ClusterController]:
    """Return the controller that leads, with its name."""
    return next((name, each) for name, each in running.controllers.items() if each.leads)


async def _show_fail_over(running: Cluster, image: str, steps: _StepPrinter) -> None:
    """Kill the controller that leads, and show that the VM runs on and another one is created."""
    client = running.client
    name, leader = _leader(running)
    before = await client.vms.get("demo")
    steps.say(f"{name} leads, the others stand by")
    await leader.kill()
    steps.say(f"{name} is killed, as by kill -9")
    async with trio.open_nursery() as nursery:
        for other in running.controllers.values():
            nursery.start_soon(_cancel_when_leading, other, nursery.cancel_scope)
    steps.say(f"{_leader(running)[0]} leads, and answers on {_leader(running)[1].url}")
    after = await client.vms.get("demo")
    same = (before.uid, before.state.restart_count) == (after.uid, after.state.restart_count)
    steps.say(f"the VM {'runs on' if same and after.state.status == 'running' else 'has not survived'}")
    await client.vms.create(name="second", image=image, headless=True)
    await client.vms.wait("second")
    steps.say('another VM, "second", was created and runs')
    await client.vms.delete("second")
    await leader.come_back()
    steps.say(f"{name} is started again, and stands by")


async def _cancel_when_leading(controller: ClusterController, scope: trio.CancelScope) -> None:
    await controller.wait_leads()
    scope.cancel()


def _print_curl_lines(running: Cluster) -> None:
    body = json.dumps({"name": "second", "image": "any", "startup_script": {"script_content": "echo Hello; uptime"}})
    print(
        f"""
It runs until you press Ctrl-C. From another terminal:

  curl {running.url}/v1/vms                              # list the VMs
  curl {running.url}/v1/vms -d '{body}'
  curl {running.url}/v1/vms/second/events                # what its script printed
  curl -N '{running.url}/v1/vms/second?watch=true'       # follow its changes
  curl -X DELETE {running.url}/v1/vms/second
""",
        flush=True,
    )


# ---- orchard dev ---------------------------------------------------------------------------------------------------


async def _dev(options: argparse.Namespace, make_driver: _MakeDriver) -> None:
    """Run a controller and workers until cancelled. Raises StartError."""
    resources = {TART_VMS: VMS_PER_WORKER, **options.resources}
    async with cluster(
        workers=[Worker(resources=resources)] * options.workers,
        driver=make_driver,
        directory=options.directory,
        port=options.port,
        api_prefix=options.api_prefix,
    ) as running:
        remember_context(_DEV_CONTEXT, Context(running.url))
        print(
            f"orchard {__version__} for development: {running.url}, workers {_describe_driver(make_driver)},"
            f" data in {options.directory}"
        )
        print(
            "Any program on this host can use it without credentials. Press Ctrl-C to stop it; state is kept, VMs are not.",
            flush=True,
        )
        with _ready_file(options.ready_file, running.url):
            await trio.sleep_forever()


@contextmanager
def _ready_file(path: Path | None, url: str) -> Iterator[None]:
    """Keep a file with the controller's URL during the block. Raises StartError if it cannot be written."""
    if path is None:
        yield
        return
    try:
        # Whole as soon as it exists: programs wait for it.
        write_private(path, json.dumps({"url": url}).encode() + b"\n")
    except OSError as error:
        raise StartError(f"cannot write {path}: {error.strerror}") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
