"""The `orchard` command, for people. Law: it composes, and prints.

orchard demo                   a controller, a worker and a VM on this machine, step by step
orchard dev                    a controller and a worker to develop against: loopback, no TLS, nobody is asked
orchard bootstrap-token NAME   print what lets a worker in, from the controller's data directory
orchard check [DATA_DIR]       say what is wrong in a controller's data directory, and change nothing
orchard controller ...         the same as python -m orchard.controller
orchard worker ...             the same as python -m orchard.worker
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from orchard import __version__, controller, worker
from orchard.auth import BootstrapToken
from orchard.client import Client, ClientError
from orchard.controller import DEFAULT_PORT, StartError
from orchard.daemon import orchard_home, parse_count, parse_port, run_program, run_until_signal
from orchard.files import STATE_FILE, TLS_CERTIFICATE_FILE, WORKER_LOCK_FILE, LockError, lock_directory
from orchard.fsck import inspect
from orchard.schema import VM
from orchard.storage.journal import DamagedError, Disk, Journal
from orchard.store import load_state
from orchard.tart import TartDriver
from orchard.testing import Cluster, cluster
from orchard.vm.driver import Driver

DEMO_IMAGE = "ghcr.io/cirruslabs/macos-tahoe-base:latest"
DEMO_SCRIPT = """\
echo "Hello from $(uname -s), I am $(id -un)."
echo "$GREETING"
echo "My working directory is $PWD."
"""
DEMO_ENV = {"GREETING": "What's in a variable arrives as it is: \"$HOME\" `uname` 'and quotes'."}
DEV_DIRECTORY = Path(".dev-data")
POLL_SECONDS = 0.02  # between two looks for new lines of the demo's script


# ---- orchard demo --------------------------------------------------------------------------------------------------


class Steps:
    """Prints what happens, each line with the seconds since the one before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def say(self, text: str) -> None:
        now = self._clock()
        print(f"{now - self._last:8.3f} s  {text}", flush=True)
        self._last = now


async def demo(options: argparse.Namespace) -> None:
    """Show a VM's whole life. Raises StartError, ClientError."""
    make_driver, kind = _driver(options.tart)
    steps = Steps()
    print(f"Orchard {__version__}: a controller, a worker and a VM on this machine, in a throw-away directory.\n")
    async with cluster(workers=1, driver=make_driver) as running:
        steps.say(f'a controller listens on {running.url}, and the worker "worker-1" has registered,')
        steps.say(kind)
        client = running.client
        await client.vms.create(
            name="demo",
            image=options.image,
            headless=True,
            startup_script={"script_content": DEMO_SCRIPT, "env": DEMO_ENV},
        )
        steps.say(f'POST /v1/vms: the VM "demo" of {options.image} is created')
        await show_life(client, steps)
        if options.keep:
            print_curl_lines(running)
            await trio.sleep_forever()
        await client.vms.delete("demo")
        steps.say("DELETE /v1/vms/demo: the VM is deleted")
    steps.say("worker and controller have ended, and left nothing behind")


async def show_life(client: Client, steps: Steps) -> None:
    """Follow the VM until its script has printed all its lines."""
    shown = ""
    async with client.vms.watch("demo") as changes:
        async for _, vm in changes:
            if (now := describe(vm)) != shown:
                steps.say(now)
                shown = now
            if vm.state.status != "pending":
                break
    seen = 0
    while seen < DEMO_SCRIPT.count("\n"):
        vm = await client.vms.get("demo")
        lines = [event.payload async for event in client.vms.events("demo")]
        for line in lines[seen:]:
            steps.say(f"its script says: {line}")
        seen = len(lines)
        if vm.state.status == "failed":
            raise ClientError(f"the VM failed: {vm.state.status_message}")
        await trio.sleep(POLL_SECONDS)


def describe(vm: VM) -> str:
    where = f' on "{vm.state.worker}"' if vm.state.worker else ""
    message = f": {vm.state.status_message}" if vm.state.status_message else ""
    return f"the VM is {vm.state.status}{where}{message}"


def print_curl_lines(running: Cluster) -> None:
    body = json.dumps({"name": "second", "image": "any", "startup_script": {"script_content": "echo Hello; uptime"}})
    print(
        f"""
It stays until you press Ctrl-C. From another terminal:

  curl {running.url}/v1/vms                              # what there is
  curl {running.url}/v1/vms -d '{body}'
  curl {running.url}/v1/vms/second/events                # what its script printed
  curl -N '{running.url}/v1/vms/second?watch=true'       # what becomes of it
  curl -X DELETE {running.url}/v1/vms/second
""",
        flush=True,
    )


# ---- orchard dev ---------------------------------------------------------------------------------------------------


async def dev(options: argparse.Namespace) -> None:
    """Run a controller and workers until cancelled. Raises StartError."""
    make_driver, kind = _driver(options.tart)
    async with cluster(
        workers=options.workers, driver=make_driver, directory=options.directory, port=options.port
    ) as running:
        print(f"orchard {__version__} for development: {running.url}, workers {kind}, data in {options.directory}")
        print("Everybody on this host may do everything. Ctrl-C ends it; state is kept, VMs are not.", flush=True)
        await trio.sleep_forever()


def _driver(tart: str | None) -> tuple[Callable[[str], Driver] | None, str]:
    if tart is None:
        return None, "with synthetic VMs: directories and processes, no hypervisor"
    return (lambda _: TartDriver(tart, orchard_home() / "tart")), f"with VMs by {tart}"


@contextmanager
def _host_to_itself(options: argparse.Namespace) -> Iterator[None]:
    """Keep other workers off this host's VMs: each deletes those of ours that it does not know. Raises LockError."""
    options.tart = None if options.synthetic else shutil.which("tart")
    if options.tart is None:
        yield
        return
    if getattr(options, "workers", 1) > 1:
        raise LockError("one host's VMs belong to one worker, so --workers is for --synthetic")
    with lock_directory(orchard_home(), WORKER_LOCK_FILE):
        yield


# ---- orchard bootstrap-token ---------------------------------------------------------------------------------------


def bootstrap_token(options: argparse.Namespace) -> int:
    """Print a bootstrap token for a service account, out of a data directory, which may be in use."""
    directory: Path = options.data_dir or orchard_home() / "controller"
    path = directory / STATE_FILE
    try:
        state = load_state(path, Journal(path, Disk()).read())
        certificate = directory / TLS_CERTIFICATE_FILE
        pem = certificate.read_bytes() if certificate.exists() and not options.no_certificate else None
    except OSError as error:
        return _complain(f"cannot read the controller's data in {directory}: {error.strerror}; see --data-dir")
    except DamagedError as error:
        return _complain(str(error))
    account = state.accounts.get(options.account)
    if account is None:
        known = ", ".join(sorted(state.accounts)) or "none"
        return _complain(f'there is no service account "{options.account}" in {path}, expected one of: {known}')
    print(BootstrapToken(account.name, account.token, pem))
    return 0


# ---- orchard check -------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> int:
    """Print what is wrong in a data directory, which may be in use."""
    directory: Path = options.data_dir or orchard_home() / "controller"
    try:
        report = inspect(directory)
    except OSError as error:
        return _complain(f"cannot read {error.filename}: {error.strerror}")
    print(*report.problems, *(f"note: {note}" for note in report.notes), f"{directory}: {report.summary()}", sep="\n")
    return 1 if report.problems else 0


# ---- the command line ----------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="orchard", description="An orchestrator for Tart virtual machines.")
    parser.add_argument("--version", action="version", version=f"orchard {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    shown = verbs.add_parser("demo", help="a controller, a worker and a VM on this machine, step by step")
    shown.add_argument("--keep", action="store_true", help="leave it running, and print the curl lines to go on with")
    shown.add_argument("--image", default=DEMO_IMAGE, help="default: %(default)s")
    lasting = verbs.add_parser("dev", help="a controller and workers to develop against: loopback, no TLS, no accounts")
    lasting.add_argument("--port", type=parse_port, default=DEFAULT_PORT, help="default: %(default)s; 0: any")
    lasting.add_argument("--workers", type=parse_count, default=1, help="default: %(default)s")
    lasting.add_argument("--directory", type=Path, default=DEV_DIRECTORY, help="default: %(default)s")
    for verb in (shown, lasting):
        verb.add_argument("--synthetic", action="store_true", help="VMs without a hypervisor, even if there is tart")
        verb.add_argument("--debug", action="store_true", help="log to stderr")
    token = verbs.add_parser("bootstrap-token", help="print what lets a worker in")
    token.add_argument("account", help="service account of the worker, with compute:read and compute:write")
    token.add_argument("--data-dir", type=Path, help="of the controller; default: $ORCHARD_HOME/controller")
    token.add_argument("--no-certificate", action="store_true", help="the workers' hosts trust the certificate anyway")
    checked = verbs.add_parser("check", help="say what is wrong in a controller's data directory, and change nothing")
    checked.add_argument("data_dir", metavar="DATA_DIR", nargs="?", type=Path, help="default: $ORCHARD_HOME/controller")
    verbs.add_parser("controller", help="run a controller; see orchard controller --help", add_help=False)
    verbs.add_parser("worker", help="run a worker; see orchard worker --help", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["controller"]:
        return controller.main(words[1:])
    if words[:1] == ["worker"]:
        return worker.main(words[1:])
    options = arguments().parse_args(words)
    if options.verb == "bootstrap-token":
        return bootstrap_token(options)
    if options.verb == "check":
        return check(options)
    work = partial(run_until_signal, partial(demo if options.verb == "demo" else dev, options))
    failures = {StartError: 1, ClientError: 1, LockError: 1}
    try:
        with _host_to_itself(options):
            return run_program("orchard", work, failures, debug=options.debug, quiet=not options.debug)
    except LockError as error:
        return _complain(str(error))
    except BrokenPipeError:  # whoever read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes there
        return 1


def _complain(text: str) -> int:
    print(f"orchard: {text}", file=sys.stderr)
    return 1
