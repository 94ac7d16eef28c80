"""The `orchard` command: its verbs, and how it starts and ends.

Each verb is in a file of this folder, which is imported when the verb is called: a verb that sends one request must not
wait for the import of a controller. Such a file has `add_verb(verb, parser)`, which declares the options of a verb and
sets `run`, a function that takes the parsed options and returns the exit status. It raises CommandError.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import ModuleType

from orchard import __version__
from orchard.base.command_line import CommandLine, HomeError, discard_output, suggest
from orchard.cli.failure import FAILED, INTERRUPTED, USAGE, CommandError


class Verb:
    """The file of this folder that has a verb ("" for a role), and what `orchard --help` says of it.

    A verb without help is called by other programs and is not listed.
    """

    def __init__(self, module: str, help: str) -> None:
        self.module = module
        self.help = help


VERBS: Mapping[str, Verb] = {
    "status": Verb("views", "show the fleet on one screen"),
    "top": Verb("views", "show the fleet on one screen, anew every two seconds"),
    "ui": Verb("dashboard", "open the dashboard in the browser"),
    "describe": Verb("views", "show all of a VM or a worker; why a VM waits, and what would help"),
    "login": Verb("login", "log in to a controller, and use it by default"),
    "context": Verb("contexts", "the controllers that this command knows"),
    "create": Verb("create", "create a VM, a service account, or an access token for a VM"),
    "list": Verb("listing", "list VMs, workers or service accounts"),
    "get": Verb("resources", "show one VM, worker or service account, or one of its fields"),
    "delete": Verb("resources", "delete a VM, worker or service account"),
    "update": Verb("changes", "change a VM"),
    "apply": Verb("changes", "create or change the VMs that a JSON file describes"),
    "set": Verb("changes", "change the cluster settings"),
    "rotate": Verb("changes", "give a service account a new token"),
    "pause": Verb("resources", "assign no new VMs to a worker"),
    "resume": Verb("resources", "assign new VMs to a worker again"),
    "logs": Verb("streams", "print the output of a VM's startup script"),
    "events": Verb("streams", "print what happened to a VM, and its script's output"),
    "watch": Verb("streams", "print each change of VMs and workers"),
    "ssh": Verb("openssh", "log in to a VM, or run a command there, by the system's ssh"),
    "exec": Verb("commands", "run a command in a VM"),
    "cp": Verb("commands", "copy files to a VM or from it"),
    "port-forward": Verb("tunnels", "forward a local port to a VM or to a worker's host"),
    "vnc": Verb("tunnels", "open the screen of a VM or of a worker's host"),
    "ssh-config": Verb("openssh", "print settings for ~/.ssh/config: ssh, scp and others reach each VM"),
    "__tunnel": Verb("pipe", ""),
    "restart": Verb("actions", "restart a VM, with a fresh clone of its image"),
    "stop": Verb("actions", "stop a VM; its disk stays on its worker"),
    "suspend": Verb("actions", "suspend a VM"),
    "start": Verb("actions", "start a VM that is stopped or suspended"),
    "wait": Verb("actions", "wait until a VM is ready, or in another state"),
    "ip": Verb("actions", "print a VM's address in its worker's network"),
    "drain": Verb("actions", "assign no new VMs to a worker, and end its VMs at a deadline"),
    "capacity": Verb("actions", "show what the fleet could still run"),
    "history": Verb("actions", "list the VMs that ended last"),
    "sessions": Verb("actions", "list who is connected: watches, tunnels, commands and workers"),
    "accept-state": Verb("actions", "accept the state of a restored controller; this ends VMs that are not in it"),
    "completion": Verb("completion", "print the script with which a shell completes words of this command"),
    "__complete": Verb("completion", ""),
    "version": Verb("version", "print the versions of this command and of the controller"),
    "controller": Verb("", "run a controller (see orchard controller --help), or install it as a service"),
    "worker": Verb("", "run a worker (see orchard worker --help), or install it as a service"),
    "demo": Verb("trial", "run a controller, a worker and a VM on this machine, step by step"),
    "dev": Verb("trial", "run a controller and workers to develop against"),
    "bootstrap-token": Verb("offline", "print a bootstrap token for a worker, on the controller's host"),
    "doctor": Verb("doctor", "find what keeps a worker, a controller or a client on this host from working"),
    "store": Verb("offline", "copy what a controller stores to another data directory or to etcd"),
    "check": Verb("offline", "report what is wrong in a controller's data directory, without changing it"),
}


# Modules of Python that Windows does not have. Only what runs VMs or keeps a controller's state needs them.
_UNIX_MODULES = frozenset({"fcntl", "grp", "pwd", "resource", "termios"})
# These verbs are the modules of the roles, whose command lines are their own.
ROLE_VERBS = frozenset({"controller", "worker"})
INSTALL_VERBS = ("install", "uninstall")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    _open_standard_streams()
    try:
        try:
            status = _run(words)
        finally:
            # Python writes what is still buffered at its exit, and a failure there has an exit status of Python's own.
            sys.stdout.flush()
    except CommandError as error:
        from orchard.cli.output import printable

        # It may repeat what a controller or a VM says.
        _complain(printable(str(error)))
        return error.status
    except HomeError as error:
        _complain(str(error))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of standard output is gone.
        discard_output(sys.stdout)
        return FAILED
    except OSError as error:
        # Such as a full disk below standard output.
        _complain(error.strerror or str(error))
        discard_output(sys.stdout)
        return FAILED
    return status


def _complain(text: str) -> None:
    try:
        print(f"orchard: {text}", file=sys.stderr, flush=True)
    except OSError:
        # Only the exit status can still tell it.
        discard_output(sys.stderr)


def _open_standard_streams() -> None:
    """Open standard streams that are closed: a socket that gets the number of one would receive what is printed.

    Characters that standard output cannot encode are printed as escapes: a VM's output may have any.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                # The lowest number that is free.
                setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(words: list[str]) -> int:
    if len(words) > 1 and words[0] == "help":
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else USAGE
    if words[0] == "--version":
        print(f"orchard {__version__}")
        return 0
    name, *rest = words
    if name.startswith("-"):
        raise CommandError(f"{name} comes before the verb, expected it after: orchard VERB ... {name}", USAGE)
    if name not in VERBS:
        verbs = [verb for verb in VERBS if VERBS[verb].help]
        known = ", ".join(verbs)
        raise CommandError(f"unknown verb {name}{suggest(name, verbs)}, expected one of {known}", USAGE)
    if name in ROLE_VERBS and rest and rest[0] in INSTALL_VERBS:
        return int(_load(name, "orchard.cli.install").run_install_verb(name, rest[0], rest[1:]))
    if name in ROLE_VERBS:
        # The existing command has the word "run" before the options.
        options_of_role = rest[1:] if rest[:1] == ["run"] else rest
        if name == "worker":
            return int(_load(name).main(options_of_role))
        from orchard.cli.session import remember_controller

        return int(_load(name).main(options_of_role, remember_controller))
    options = parse_options(make_parser(name), rest)
    return int(options.run(options))


def make_parser(name: str, part: str = "") -> CommandLine:
    """Return the parser of the options of a verb. Raises CommandError on a system that lacks what the verb needs.

    `part` is `install` or `uninstall` of a role.
    """
    if part in INSTALL_VERBS:
        installing: CommandLine = _load(name, "orchard.cli.install").install_parser(name, part)
        return installing
    module = _load(name)
    if name in ROLE_VERBS:
        parser: CommandLine = getattr(module, f"{name}_parser")()
        return parser
    about = VERBS[name].help
    parser = CommandLine(prog=f"orchard {name}", description=f"{about[:1].upper()}{about[1:]}.")
    module.add_verb(name, parser)
    return parser


def _load(name: str, module: str = "") -> ModuleType:
    """Import the module of a verb. Raises CommandError on a system that lacks what the module needs."""
    module = module or (f"orchard.{name}" if name in ROLE_VERBS else f"orchard.cli.{VERBS[name].module}")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name not in _UNIX_MODULES:
            raise
        raise CommandError(f"orchard {name} runs on macOS and Linux alone: this system has no {error.name}") from None


def parse_options(parser: CommandLine, words: list[str]) -> argparse.Namespace:
    """Parse the words after a verb, which may end with a command, with `--` before it or not."""
    options: argparse.Namespace
    if not parser.is_intermixed:
        options = parser.parse_args(words)
    else:
        at = words.index("--") if "--" in words else len(words)
        options = parser.parse_intermixed_args(words[:at])
        options.command += words[at + 1 :]
    return options


def usage() -> str:
    """Return what `orchard --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.help}" for name, verb in VERBS.items() if verb.help)
    return f"usage: orchard VERB ...\n\nAn orchestrator for Tart virtual machines.\n\n{verbs}\n\norchard VERB --help says more."
