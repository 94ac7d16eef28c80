"""A controller process under hostile conditions: no free file descriptor, old TLS, names with special meaning."""

from __future__ import annotations

import http.client
import re
import resource
import socket
import subprocess
import urllib.parse
from pathlib import Path

import pytest
from harness.clients import call, connect_http
from harness.processes import GENEROUS, PLAIN, at_last, controller

# Time-out of each socket, far more than needed.
SOCKET_SECONDS = 60.0


def status_of(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/v1/")
    answer = connection.getresponse()
    answer.read()
    return answer.status


def test_http_connections_wait_while_no_file_descriptor_is_free(tmp_path: Path) -> None:
    with controller(*PLAIN, home=tmp_path) as (role, url):
        existing = connect_http(url)
        assert status_of(existing) == 200
        pid = role.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        taken = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (taken + 1, before[1]))
        waiting = [connect_http(url) for _ in range(5)]
        for connection in waiting:
            connection.request("GET", "/v1/")
        for _ in range(50):
            assert status_of(existing) == 200
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        for connection in waiting:
            assert connection.getresponse().status == 200
            connection.close()
        existing.close()
        assert role.stop() == 0
    log = role.log.read_text()
    assert "Traceback" not in log
    complaints = [line for line in role.log_lines() if "Too many open files" in line]
    assert len(complaints) == 1
    assert "retrying" in complaints[0]


@pytest.mark.slow
def test_ssh_connections_wait_while_no_file_descriptor_is_free(tmp_path: Path) -> None:
    with controller(*PLAIN, "--listen-ssh", "127.0.0.1:0", home=tmp_path) as (role, _):
        port = int(re.findall(r"HOST:([0-9]+)", "".join(role.said))[0])
        pid = role.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        taken = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(taken) + 1)) - taken), before[1]))
        waiting = [socket.create_connection(("127.0.0.1", port), timeout=SOCKET_SECONDS) for _ in range(3)]
        at_last(lambda: "Too many open files" in role.log.read_text())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        for connection in waiting:
            assert connection.recv(8) == b"SSH-2.0-"
            connection.close()
        assert role.stop() == 0
    assert "Traceback" not in role.log.read_text()
    complaints = [line for line in role.log_lines() if "Too many open files" in line]
    assert len(complaints) < 10, "asyncio alone logs a hundred at once"
    assert "retrying" in complaints[0]


@pytest.mark.needs("openssl")
def test_tls_older_than_1_2_is_refused(tmp_path: Path) -> None:
    with controller("--insecure-no-auth", home=tmp_path) as (role, url):
        port = url.rpartition(":")[2]
        for version, accepted in (("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)):
            # The system's openssl with everything allowed, because Python's client would refuse old versions itself.
            command = ["openssl", "s_client", version, "-cipher", "ALL:@SECLEVEL=0", "-connect", f"127.0.0.1:{port}"]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GENEROUS, check=False
            )
            assert (done.returncode == 0) is accepted, done.stdout + done.stderr
        assert role.stop() == 0
    assert "Traceback" not in role.log.read_text()


# A leading dash is allowed, because no command line has a bare name: VMs are orchard-NAME-... on their hosts.
SPECIAL_NAMES = [
    "../up",
    "a/b",
    "a b",
    "a\nlevel=error msg=forged",
    "a\x1b[31m",
    "$(id)",
    "`id`",
    "a;b",
    "é",
    "",
]


def test_names_with_special_characters_are_refused_and_not_interpreted(tmp_path: Path) -> None:
    with controller(*PLAIN, home=tmp_path) as (role, url):
        for name in SPECIAL_NAMES:
            for path, body in (
                ("/v1/vms", {"name": name, "image": "image"}),
                ("/v1/workers", {"name": name, "machine_id": "m"}),
                ("/v1/service-accounts", {"name": name, "roles": []}),
            ):
                status, problem = call(url, "POST", path, body)
                assert status == 412, (path, name, problem)
            quoted = urllib.parse.quote(name, safe="")
            if name:
                assert call(url, "GET", f"/v1/vms/{quoted}")[0] == 404
        for image in ("-rf", "--help", "a\0b"):
            assert call(url, "POST", "/v1/vms", {"name": "vm", "image": image})[0] == 412, image
        assert role.stop() == 0
    assert not any(line.startswith("level=") for line in role.log_lines())
    assert "\x1b" not in role.log.read_text()
