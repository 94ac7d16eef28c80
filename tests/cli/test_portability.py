"""What the command's verbs import: little, so that they start fast, and nothing that Windows does not have."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from harness.processes import ORCHARD, call_main, environment

import orchard
from orchard.cli.connection import ControllerConnection
from orchard.cli.main import VERBS, main

# Tells the modules that a verb has loaded beside those of argparse, which loads dataclasses in Python 3.14.
RUN_AND_TELL = """
import argparse, functools, sys
argparse.ArgumentParser(formatter_class=functools.partial(argparse.HelpFormatter, width=80)).add_argument("--option")
before = set(sys.modules)
from orchard.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
print(status, *set(sys.modules) - before, file=sys.stderr)
"""
# Not needed by a verb that sends a request and prints the answer.
HEAVY = {
    "asyncio",
    "dataclasses",
    "h11",
    "trio",
    "orchard.client",
    "orchard.codec",
    "orchard.controller",
    "orchard.schema",
    "unittest",
}
# Not needed by a verb that sends no request.
FOR_REQUESTS = {"datetime", "email", "http.client", "shutil", "ssl"}
# Not needed by what only reads the command line.
FOR_CONTEXTS = {"base64", "json", "pathlib", "typing", "urllib.parse", "orchard.cli.connection", "orchard.cli.context"}


def loaded_modules(home: Path, words: str, *, status: int = 0) -> set[str]:
    """Run the command, which must end with `status`, and return the modules that it loads.

    Those that an installation's .pth files load before it, such as the one of an editable installation, count, too.
    """
    path = os.pathsep.join([str(Path(orchard.__file__).parents[1]), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", "-c", RUN_AND_TELL, *words.split()]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(home, {"PYTHONPATH": path}), check=True
    )
    ended_with, *modules = done.stderr.splitlines()[-1].split()
    assert int(ended_with) == status, done.stderr
    return set(modules)


@pytest.mark.parametrize(
    "words",
    ["version", "list vms", "list workers", "status", "get vm vm", "create vm new --image i", "logs vm vm", "delete vm vm", "sessions", "__complete zsh get vm v"],
)  # fmt: skip
def test_verbs_that_send_a_request_import_little(dev: Path, api: ControllerConnection, words: str) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    assert not HEAVY & loaded_modules(dev, words)


@pytest.mark.parametrize("words", ["context list", "ssh-config", "completion zsh", "__complete zsh list"])
def test_verbs_that_send_no_request_import_less(dev: Path, words: str) -> None:
    # The file of ssh-config has the verb ssh, too, which makes temporary files.
    needed = {"shutil"} if words == "ssh-config" else set()
    assert not (HEAVY | FOR_REQUESTS) - needed & loaded_modules(dev, words)


@pytest.mark.parametrize(
    ("words", "status"), [("--help", 0), ("--version", 0), ("version --client", 0), ("version --help", 0), ("version --clint", 2)]
)  # fmt: skip
def test_what_only_reads_the_command_line_imports_little_more_than_argparse(
    tmp_path: Path, words: str, status: int
) -> None:
    needed = {"shutil"} if words == "version --help" else set()
    assert not (HEAVY | FOR_REQUESTS | FOR_CONTEXTS) - needed & loaded_modules(tmp_path, words, status=status)


def test_ssh_imports_little_since_it_starts_a_program_that_imports_more(dev: Path) -> None:
    assert not HEAVY & loaded_modules(dev, "ssh vm none", status=1)


@pytest.mark.slow
def test_tunnel_of_ssh_imports_the_transport_and_no_client(dev: Path) -> None:
    unneeded = {"orchard.client", "orchard.schema", "orchard.resources.bodies"}
    assert not unneeded & loaded_modules(dev, "__tunnel --wait 1 none 22", status=1)


# As on Windows: without the modules that it does not have, and without names of `os` and `signal`. Verbs that go on
# are interrupted when they have printed something.
ON_WINDOWS = """
import json, os, signal, sys
import trio
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
del os.O_DIRECTORY, os.fchmod, os.geteuid, signal.SIGWINCH, signal.SIGHUP
from orchard.cli.main import VERBS, main

class Output:
    def __init__(self, stream): self.stream, self.ends = stream, False
    def write(self, text):
        if self.ends and text.strip(): raise KeyboardInterrupt
        return self.stream.write(text)
    def __getattr__(self, name): return getattr(self.stream, name)

sys.stdout = output = Output(sys.stdout)
statuses = {}
for line in sys.stdin.read().splitlines():
    words = line.split()
    output.ends = words[0] in ("watch", "top", "port-forward", "vnc") or "-w" in words
    try:
        statuses[line] = main(words)
    except SystemExit as ended:
        statuses[line] = ended.code
print(json.dumps([statuses, [m for m in sys.modules if m.startswith("orchard.")]]), file=sys.stderr)
"""
# What needs more than a controller: it runs VMs or keeps a state.
ROLES = {"controller", "worker", "demo", "dev", "bootstrap-token", "check", "store"}
# Command lines, and their statuses where they are not 0.
CLIENT_VERBS = """\
login {url} --service-account-name ci --name other
context list
context default local-dev
context delete other
create service-account of-windows
rotate token of-windows
create vm vm --image i --wait --metadata a=b
create token vm vm
list vms
list vms -w 130
get vm vm/status
get bootstrap-token of-windows
describe vm vm
update vm vm --metadata a=c
apply -f {file}
set cluster-settings --scheduler-profile optimize-utilization
logs vm vm --since 1m
events vm vm
watch 130
top 130
ip vm vm
exec vm vm true
cp {file} vm:
cp vm:file {directory}
port-forward vm vm :22 130
vnc vm vm 130
__tunnel vm 9 1
ssh vm none true 1
ssh-config
restart vm vm
wait vm vm
suspend vm vm 1
stop vm vm
start vm vm 1
pause worker worker-1
resume worker worker-1
drain worker worker-1 --cancel
status
capacity
history
sessions
accept-state
completion zsh
__complete bash orchard
version
doctor client
ui --no-open
delete vms --filter metadata.a=c
delete service-account of-windows
"""
# Names that Windows does not have, from the documentation of Python.
UNIX = {
    "os": {"O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "chown", "chroot", "confstr", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups", "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "initgroups", "killpg", "lchown", "mkfifo", "nice", "openpty", "pipe2", "posix_spawn", "pread", "pwrite", "sched_getaffinity", "sendfile", "set_blocking", "setegid", "seteuid", "setgid", "setgroups", "setpgid", "setsid", "setuid", "statvfs", "sync", "sysconf", "tcgetpgrp", "tcsetpgrp", "ttyname", "uname", "wait", "wait3", "wait4", "waitid", "WEXITSTATUS", "WIFEXITED", "WIFSIGNALED", "WNOHANG", "WTERMSIG"},
    "signal": {"SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGUSR1", "SIGUSR2", "SIGWINCH", "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigpending", "sigwait"},
    "socket": {"AF_UNIX", "MSG_DONTWAIT", "SO_PEERCRED", "SO_REUSEPORT", "socketpair", "TCP_USER_TIMEOUT", "TCP_INFO"},
    "select": {"epoll", "kqueue", "poll"},
    "time": {"clock_gettime", "CLOCK_MONOTONIC", "CLOCK_BOOTTIME", "tzset"},
}  # fmt: skip
UNIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
# Where client verbs reach none of them on Windows: a file that is locked, a disk's cache on macOS and a directory of names
# (looked for before, as poll is), options that Linux alone has, and what a terminal is changed with (its import fails first).
PASSED_OVER = {
    "orchard.base.files": {"fcntl", "O_CLOEXEC", "O_DIRECTORY", "fchmod"},
    "orchard.cli.commands": {"SIGWINCH", "termios", "tty"},
    "orchard.cli.failure": {"poll"},
    "orchard.net.tcp": {"TCP_INFO"},
}


def names_of_unix(module: str) -> set[str]:
    """Return the modules and their names in a file of the package that Windows does not have."""
    found = set()
    for node in ast.walk(ast.parse(Path(str(importlib.import_module(module).__file__)).read_text())):
        match node:
            case ast.Import(names=names):
                found |= {name.name for name in names} & UNIX_MODULES
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if name in UNIX.get(owner, ()):
                found.add(name)
    return found


@pytest.mark.slow
def test_client_verbs_run_without_what_windows_lacks(dev: Path, api: ControllerConnection, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text('{"name": "applied", "image": "i", "metadata": {"a": "c"}}')
    (tmp_path / ORCHARD).mkdir()
    (tmp_path / ORCHARD / "orchard.yml").write_bytes((dev / ORCHARD / "orchard.yml").read_bytes())
    (tmp_path / "directory").mkdir()
    wanted = {}
    for line in CLIENT_VERBS.format(url=api.url, file=file, directory=tmp_path / "directory").splitlines():
        words = line.split(" ")
        status = int(words.pop()) if words[-1] in ("1", "130") else 0
        wanted[" ".join(words)] = status
    done = subprocess.run(
        [sys.executable, "-c", ON_WINDOWS],
        input="".join(f"{line}\n" for line in wanted),
        capture_output=True,
        text=True,
        env=environment(tmp_path, {"ORCHARD_SERVICE_ACCOUNT_TOKEN": "t", "BROWSER": "true"}),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses, modules = json.loads(done.stderr.splitlines()[-1])
    assert statuses == wanted, done.stderr
    assert {line.split()[0] for line in wanted} == set(VERBS) - ROLES
    assert {module: names for module in modules if (names := names_of_unix(module))} == PASSED_OVER
    assert [vm["name"] for vm in api.call("GET", "/vms")] == []


@pytest.mark.slow
def test_what_runs_vms_says_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ON_WINDOWS]
    lines = "controller run\nworker run http://h\ndemo\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment(tmp_path), check=True)
    *said, found = done.stderr.splitlines()
    assert list(json.loads(found)[0].values()) == [1, 1, 1]
    assert len(said) == 3
    assert call_main(main, "demo", "--help", home=tmp_path)[0] == 0
