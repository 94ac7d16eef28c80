"""Each verb where something is wrong: it ends with a status and one line, and never with a traceback."""

from __future__ import annotations

import io
import re
import shlex
import signal
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness.forks import Fork, forked
from harness.processes import GENEROUS, LISTENING, PLAIN, call_main, finished

from orchard.auth import BootstrapToken
from orchard.cli.connection import ControllerConnection
from orchard.cli.context import Context
from orchard.cli.main import VERBS, main

# A command line of each verb that asks a controller; `no` is a name that nothing has.
ASKING = {
    "status": "",
    "top": "",
    "describe": "vm no",
    "login": "{url} --bootstrap-token-stdin",
    "context": "create {url} --name new",
    "create": "vm no --image i --wait",
    "list": "vms",
    "get": "vm no",
    "delete": "vm no",
    "update": "vm no --metadata a=b",
    "apply": "-f {file}",
    "set": "cluster-settings --scheduler-profile distribute-load",
    "rotate": "token no",
    "pause": "worker no",
    "resume": "worker no",
    "logs": "vm no -f",
    "events": "vm no",
    "watch": "",
    "ssh": "vm no true",
    "exec": "vm no true",
    "cp": "no:a {file}",
    "vnc": "vm no",
    "__tunnel": "no 22",
    "restart": "vm no",
    "stop": "vm no",
    "suspend": "vm no",
    "start": "vm no",
    "wait": "vm no",
    "ip": "vm no",
    "drain": "worker no",
    "capacity": "",
    "history": "",
    "sessions": "",
    "accept-state": "",
    "version": "",
    "ui": "",
    "doctor": "client --url {url}",
}
# They ask no controller, or only when they are used.
OTHERS = {
    "port-forward", "ssh-config", "completion", "__complete", "demo", "dev", "bootstrap-token", "check", "store", "controller", "worker",
}  # fmt: skip
NAMING = {verb for verb, words in ASKING.items() if " no" in f" {words}"} - {"create"}
# It prints what it finds to standard output.
REPORTING = {"doctor"}
# A shell shows both as 130.
INTERRUPTED = (-signal.SIGINT, 130)
HAS_TRACEBACK = re.compile("Traceback|Exception ignored|Error:")


def test_each_verb_is_in_the_table() -> None:
    assert set(ASKING) | OTHERS == set(VERBS)
    assert not set(ASKING) & OTHERS


def words_of(verb: str, url: str, home: Path) -> list[str]:
    file = home / "vm.json"
    file.write_text('{"name": "no", "image": "i"}')
    return [verb, *ASKING[verb].format(url=url, file=file).split()]


def call(verb: str, url: str, home: Path, **env: str) -> tuple[int, list[str]]:
    """Return the status of a verb that asks a controller, and what it prints to standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(f"{BootstrapToken('no', 'token')}\n"))
        for name, value in env.items():
            patch.setenv(name, value)
        status, _, said = call_main(main, *words_of(verb, url, home), home=home)
    return status, said.splitlines()


def check_failed(verb: str, found: tuple[int, list[str]]) -> str:
    """Check that a verb has failed with one line, and return that."""
    status, said = found
    assert (status, len(said)) == (1, verb not in REPORTING), (verb, said)
    assert not said or said[0].startswith("orchard: "), (verb, said)
    return "".join(said)


# ---- the controller ----------------------------------------------------------------------------------------------------


class Answers(socketserver.ThreadingTCPServer):
    """A server that answers each request with the same bytes and closes; None: it waits for the end of the client."""

    daemon_threads = True

    def __init__(self, reply: bytes | None) -> None:
        super().__init__(("127.0.0.1", 0), Answerer)
        self.reply = reply
        self.asked = threading.Semaphore(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answerer(socketserver.StreamRequestHandler):
    server: Answers

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.server.asked.release()
        self.wfile.write(self.server.reply or b"")
        if self.server.reply is None:
            self.rfile.read()


@contextmanager
def answering(reply: bytes | None) -> Iterator[Answers]:
    with Answers(reply) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def controller_at(home: Path, *words: str, **env: str) -> Iterator[tuple[Fork, str]]:
    """Run a controller that lets everybody guess for the time of the block, and yield it with its URL."""
    with forked(
        "--listen", "127.0.0.1:0", *words, home=home, env=env, entry="harness.lenient_controller:main"
    ) as process:
        process.wait_for("is listening on")
        found = LISTENING.search(process.out.read_text())
        assert found is not None
        yield process, found[1]


def test_without_a_controller_each_verb_fails_with_one_line(tmp_path: Path) -> None:
    url = "http://127.0.0.1:1"
    for verb in ASKING:
        check_failed(verb, call(verb, url, tmp_path, ORCHARD_URL=url))


def test_without_a_context_each_verb_names_the_remedy(tmp_path: Path) -> None:
    for verb in set(ASKING) - {"context", "login", "doctor"}:
        assert "orchard context create" in check_failed(verb, call(verb, "", tmp_path))


# What comes in place of a controller's answer.
BROKEN = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 2",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[{",
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[{",
    "another protocol": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "a page for people": b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
    "another address": b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n",
    "a failure of a proxy": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\n\r\n<html>",
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_where_an_answer_breaks_off_or_is_no_controllers_each_verb_fails_with_one_line(
    tmp_path: Path, reply: bytes
) -> None:
    with answering(reply) as server:
        for verb in ASKING:
            check_failed(verb, call(verb, server.url, tmp_path, ORCHARD_URL=server.url))


@pytest.mark.slow
def test_with_refused_credentials_or_a_wrong_name_each_verb_fails_with_one_line(tmp_path: Path) -> None:
    token = {"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": "a-token-of-the-tests"}
    with controller_at(tmp_path, "--insecure-no-tls", **token) as (_, url):
        env = {"ORCHARD_URL": url, "ORCHARD_SERVICE_ACCOUNT_NAME": "bootstrap-admin"}
        right = {**env, "ORCHARD_SERVICE_ACCOUNT_TOKEN": "a-token-of-the-tests"}
        for verb in NAMING:
            assert '"no"' in check_failed(verb, call(verb, url, tmp_path, **right)), verb
        wrong = {**env, "ORCHARD_SERVICE_ACCOUNT_TOKEN": "wrong"}
        for verb in ASKING:
            check_failed(verb, call(verb, url, tmp_path, **wrong))
        assert "orchard login" in check_failed("list", call("list", url, tmp_path, **wrong))


# ---- Ctrl-C, and a controller that dies in the middle ------------------------------------------------------------------


@pytest.mark.slow
def test_each_verb_that_waits_for_an_answer_ends_by_sigint(tmp_path: Path) -> None:
    token = f"{BootstrapToken('no', 'token')}\n"
    with answering(None) as server, ExitStack() as stack:
        env = {"ORCHARD_URL": server.url}
        # Before the first one starts: each call writes the file that `apply` reads.
        lines = {verb: words_of(verb, server.url, tmp_path) for verb in ASKING}
        running = {
            verb: stack.enter_context(forked(*words, home=tmp_path, env=env, stdin=token))
            for verb, words in lines.items()
        }
        for _ in ASKING:
            assert server.asked.acquire(timeout=GENEROUS), {verb: process.said for verb, process in running.items()}
        for verb, process in running.items():
            assert process.interrupt() in INTERRUPTED, verb
            assert process.said == [], verb
    assert not list(tmp_path.glob(".orchard-*")), "cp leaves nothing"


# Verbs that wait for something, and what they print first.
LASTING = {
    "top": ("", "VMs:"),
    "list": ("vms -w", "Name"),
    "watch": ("", "added"),
    "events": ("vm vm -f", "created"),
    "logs": ("vm vm -f", ""),
    "create": ("vm new --image i --wait", "pending"),
    "wait": ("vm vm", ""),
    "ip": ("vm vm", ""),
    "exec": ("vm vm true", ""),
    "cp": ("vm:a {home}", ""),
    "__tunnel": ("vm 22", ""),
}


@pytest.mark.slow
def test_verbs_whose_controller_is_killed_fail_with_one_line_or_wait_for_it_until_sigint(tmp_path: Path) -> None:
    with controller_at(tmp_path, *PLAIN) as (killed, url), ExitStack() as stack:
        with ControllerConnection(Context(url)) as api:
            api.call("POST", "/vms", body={"name": "vm", "image": "i"})
        running = {}
        for verb, (words, _) in LASTING.items():
            line = [verb, *words.format(home=tmp_path).split()]
            running[verb] = stack.enter_context(forked(*line, home=tmp_path, env={"ORCHARD_URL": url}))
        for verb, (_, begins) in LASTING.items():
            running[verb].wait_for(begins)
        killed.process.kill()
        killed.process.wait(GENEROUS)
        for verb, process in running.items():
            # None takes the end of the controller for the end of what it waits for.
            assert process.interrupt() in (1, *INTERRUPTED), verb
            assert not HAS_TRACEBACK.search("".join(process.said)), verb
    assert not list(tmp_path.glob(".orchard-*")), "cp leaves nothing"


# Verbs that lead into a VM, and what they print there.
LEADING = {
    "exec": "vm vm -- sh -c 'echo begun; sleep 1000'",
    "ssh": "vm vm -- echo begun; sleep 1000",
    "__tunnel": "vm 22",
    "port-forward": "vm vm :22",
    "vnc": "vm vm",
}


@pytest.mark.needs("ssh")
def test_verbs_that_lead_into_a_vm_end_by_sigint_and_leave_nothing(
    dev: Path, api: ControllerConnection, tmp_path: Path
) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    env = {"BROWSER": "true", "TMPDIR": str(tmp_path)}
    with ExitStack() as stack:
        running = {}
        for verb, words in LEADING.items():
            running[verb] = stack.enter_context(forked(verb, *shlex.split(words), home=dev, env=env))
        for verb, process in running.items():
            process.wait_for({"__tunnel": "SSH-"}.get(verb, "begun" if "begun" in LEADING[verb] else "forwarding"))
            assert process.interrupt() in (*INTERRUPTED, 255), verb
            assert process.said == [], verb
    assert not list(tmp_path.iterdir())


# ---- standard output ---------------------------------------------------------------------------------------------------

# A command line of each verb that prints, with the VM `vm` on the cluster of `dev`.
PRINTING = {
    "status": "",
    "top": "",
    "describe": "vm vm",
    "context": "list",
    "create": "token vm vm",
    "list": "vms",
    "get": "vm vm",
    "logs": "vm vm",
    "events": "vm vm",
    "watch": "",
    "exec": "vm vm echo text",
    "port-forward": "vm vm :22",
    "vnc": "vm vm",
    "__tunnel": "vm 22",
    "ssh-config": "",
    "completion": "bash",
    "__complete": "bash li",
    "ip": "vm vm",
    "capacity": "",
    "history": "",
    "sessions": "",
    "version": "",
    "ui": "--no-open",
    "doctor": "client",
    "check": "{data}",
    "store": "copy {data} {new}",
    "bootstrap-token": "a --data-dir {data}",
    "rotate": "token a",
    "demo": "--synthetic",
    "dev": "--synthetic --port 0 --directory {new}",
    "controller": "--version",
    "worker": "--version",
}
SILENT = {
    "login",
    "delete",
    "update",
    "apply",
    "set",
    "pause",
    "resume",
    "cp",
    "restart",
    "stop",
    "suspend",
    "start",
    "wait",
    "drain",
    "accept-state",
}
ENDLESS = {"top", "watch", "port-forward", "vnc", "__tunnel", "dev"}


def test_each_verb_prints_or_does_not() -> None:
    # What ssh prints is not the command's.
    assert set(PRINTING) | SILENT | {"ssh"} == set(VERBS)


@pytest.mark.slow
@pytest.mark.parametrize(("stdout", "status"), [(None, 0), ("/dev/full", 1)], ids=["closed", "full"])
def test_closed_and_full_outputs_are_no_traceback(
    dev: Path, api: ControllerConnection, tmp_path: Path, stdout: str | None, status: int
) -> None:
    script = {"script_content": "echo text"}
    api.call("POST", "/vms", body={"name": "vm", "image": "i", "startup_script": script})
    api.call(
        "POST", "/service-accounts", body={"name": "a", "token": "a-token-of-the-tests", "roles": ["compute:read"]}
    )
    assert call_main(main, "wait", "vm", "vm", home=dev)[0] == 0
    for verb, words in PRINTING.items():
        if verb in ENDLESS and stdout is None:
            continue
        places = {"data": dev / "dev" / "controller", "new": tmp_path / f"new-{verb}"}
        # A cluster of its own stores its address.
        home = tmp_path if verb == "dev" else dev
        with forked(
            verb, *words.format(**places).split(), home=home, env={"BROWSER": "true"}, stdout=stdout
        ) as process:
            found = process.finish(), process.said
        # The cluster uses the data that `store` would copy.
        expected = (1, 1) if verb == "store" else (status, status)
        assert (found[0], len(found[1])) == expected, (verb, found)
    api.call("DELETE", "/service-accounts/a")


def test_output_that_the_locale_cannot_encode_is_printed_as_escapes(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i", "startup_script": {"script_content": "echo 5 \u20ac"}})
    assert call_main(main, "wait", "vm", "vm", home=dev)[0] == 0
    done = finished("", "logs", "vm", "vm", home=dev, env={"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "5 \\u20ac\n", "")


@pytest.mark.parametrize(
    ("words", "nearest"),
    [("lst vms", "list"), ("list vmz", "vm"), ("get wroker x", "worker"), ("describe wokrer x", "worker"), ("create service-acount x", "service-account"), ("list vms --outptu json", "--output"), ("list vms -o jsn", "json"), ("completion zhs", "zsh")],
)  # fmt: skip
def test_the_nearest_known_word_is_named(tmp_path: Path, words: str, nearest: str) -> None:
    status, out, said = call_main(main, *words.split(), home=tmp_path)
    assert (status, out, len(said.splitlines())) == (2, "", 1)
    assert f"did you mean {nearest}?" in said


def test_empty_name_is_refused_and_never_taken_for_all(dev: Path) -> None:
    lines = [[verb, *("" if word == "no" else word for word in ASKING[verb].split())] for verb in NAMING - {"cp"}]
    lines += [["get", "bootstrap-token"], ["get", "vm-access-token"], ["delete", "vm"]]
    for words in lines:
        status, _, said = call_main(main, *words, home=dev)
        assert (status in (1, 2), len(said.splitlines())) == (True, 1), (words, status, said)
