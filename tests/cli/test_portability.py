"""What the command's verbs import: little, so that they start fast, and nothing that Windows does not have."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness.processes import ORCHARD, call_main, environment

from orchard.cli.connection import ControllerConnection
from orchard.cli.main import VERBS, main

# Prints the modules that a verb has loaded.
RUN_AND_TELL = """
import json, sys
before = set(sys.modules)
from orchard.cli.main import VERBS, main
status = main(sys.argv[1:])
print(json.dumps([status, sorted(set(sys.modules) - before)]), file=sys.stderr)
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


@pytest.mark.parametrize(
    "words",
    ["version --client", "version", "list vms", "list workers", "status", "get vm vm", "create vm new --image i", "logs vm vm", "delete vm vm", "sessions"],
)  # fmt: skip
def test_verbs_that_send_a_request_import_little(dev: Path, api: ControllerConnection, words: str) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    command = [sys.executable, "-c", RUN_AND_TELL, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(dev), check=True)
    status, modules = json.loads(done.stderr)
    assert (status, HEAVY & set(modules)) == (0, set())


# Not needed by a verb that sends no request.
FOR_REQUESTS = {"datetime", "email", "http.client", "shutil", "ssl"}


@pytest.mark.parametrize("words", ["version --client", "context list", "ssh-config", "completion zsh", "--help"])
def test_verbs_that_send_no_request_import_less(dev: Path, words: str) -> None:
    command = [sys.executable, "-c", RUN_AND_TELL, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(dev), check=True)
    status, modules = json.loads(done.stderr)
    # The file of ssh-config has the verb ssh, too, which makes temporary files.
    needed = {"dataclasses", "shutil"} if words == "ssh-config" else {"dataclasses"}
    assert (status, ((HEAVY | FOR_REQUESTS) - needed) & set(modules)) == (0, set())


def test_ssh_imports_little_since_it_starts_a_program_that_imports_more(dev: Path) -> None:
    command = [sys.executable, "-c", RUN_AND_TELL, "ssh", "vm", "none"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(dev), check=True)
    status, modules = json.loads(done.stderr.splitlines()[-1])
    assert (status, HEAVY & set(modules)) == (1, set())


def test_tunnel_of_ssh_imports_the_transport_and_no_client(dev: Path) -> None:
    command = [sys.executable, "-c", RUN_AND_TELL, "__tunnel", "--wait", "1", "none", "22"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(dev), check=True)
    status, modules = json.loads(done.stderr.splitlines()[-1])
    assert (status, {"orchard.client", "orchard.schema", "orchard.resources.bodies"} & set(modules)) == (1, set())


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


def test_what_runs_vms_says_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ON_WINDOWS]
    lines = "controller run\nworker run http://h\ndemo\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment(tmp_path), check=True)
    *said, found = done.stderr.splitlines()
    assert list(json.loads(found)[0].values()) == [1, 1, 1]
    assert len(said) == 3
    assert call_main(main, "demo", "--help", home=tmp_path)[0] == 0
