"""The verbs `ssh` and `ssh-config`: the system's OpenSSH, which reaches a VM by `orchard __tunnel` as its ProxyCommand.

No extra package is needed for it, and scp, rsync, Ansible and editors go the same way. This file does without trio: `ssh`
starts the program that needs it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from orchard.base.command_line import CommandLine, running_program
from orchard.cli.connection import path_of
from orchard.cli.failure import USAGE, CommandError, cleaning_up
from orchard.cli.options import add_context_option, add_resource_arguments, add_wait_option
from orchard.cli.session import open_connection

_SSH_PORT = 22
# Names of VMs for the system's ssh, as `ssh-config` declares them.
SSH_DOMAIN = ".orchard"
# Prints the password that `ssh` asks for.
_ASKPASS = '#!/bin/sh\nprintf "%s\\n" "$ORCHARD_SSH_PASSWORD"\n'


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `ssh` or `ssh-config`."""
    if verb == "ssh-config":
        parser.set_defaults(run=_print_ssh_config)
    else:
        add_resource_arguments(parser, "vm")
        add_login_options(parser)
        add_wait_option(parser, "-t")
        parser.add_argument(
            "command", metavar="COMMAND", nargs="*", help="default: a login shell; options of it after --"
        )
        parser.is_intermixed = True
        parser.set_defaults(run=_ssh)
    add_context_option(parser)


def add_login_options(parser: CommandLine) -> None:
    """Declare the user name and the password for a VM."""
    parser.add_argument("-u", "--username", default="", help="default: the VM's")
    parser.add_argument("-p", "--password", default="", help="default: the VM's")


def login_of(options: argparse.Namespace) -> tuple[str, str]:
    """Return the user name and the password for a VM."""
    with open_connection(options) as controller:
        vm = controller.fetch("GET", path_of("vms", options.name))
    return options.username or vm.get("username", ""), options.password or vm.get("password", "")


def _ssh(options: argparse.Namespace) -> int:
    program = shutil.which("ssh")
    if program is None:
        raise CommandError("the program ssh is missing; install OpenSSH, or use: orchard exec vm NAME -it")
    user, password = login_of(options)
    if user.startswith("-"):
        raise CommandError(f'the user name is "{user}", expected no "-" at its start', USAGE)
    proxy = _proxy_command(options, "--wait", str(options.wait), options.name, str(_SSH_PORT))
    # ssh has Ctrl-C, too, and decides. An exception here could lose its status.
    with cleaning_up(lambda *_: None), tempfile.TemporaryDirectory() as directory:
        askpass = Path(directory) / "askpass"
        askpass.write_text(_ASKPASS)
        askpass.chmod(stat.S_IRWXU)
        env = {
            **os.environ,
            "SSH_ASKPASS": str(askpass),
            "SSH_ASKPASS_REQUIRE": "force",
            "ORCHARD_SSH_PASSWORD": password,
        }
        words = [program, *_ssh_options(proxy), "-l", user, f"{options.name}{SSH_DOMAIN}"]
        if options.command:
            words += ["--", *options.command]
        return _status(subprocess.run(words, env=env, check=False).returncode)  # noqa: S603


def _proxy_command(options: argparse.Namespace, *arguments: str) -> str:
    """Return the start of `__tunnel` as ssh reads a ProxyCommand."""
    context = ["--context", options.context] if options.context else []
    return shlex.join([*running_program(), "__tunnel", *context, *arguments]).replace("%", "%%")


def _ssh_options(proxy: str) -> list[str]:
    # Each clone of an image has the same host key as the image, and names are used again: a key proves nothing here. The
    # tunnel leads to this VM alone.
    settings: Mapping[str, str] = {
        "ProxyCommand": proxy,
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
    print(
        f"# For ~/.ssh/config: then `ssh NAME{SSH_DOMAIN}`, scp, rsync, Ansible and editors reach the VM NAME.\n"
        f"Host *{SSH_DOMAIN}\n"
        f"  ProxyCommand {_proxy_command(options)} %h %p\n"
        "  User admin\n"
        "  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile {os.devnull}\n"
        "  LogLevel ERROR"
    )
    return 0
