"""`orchard doctor`: what each check says of what was observed, the observations, and the verb."""

from __future__ import annotations

import datetime
import errno
import json
import os
import platform
import pwd
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from harness.clients import ADMIN_ENV
from harness.processes import ORCHARD, PLAIN, call_main, controller, environment
from harness.programs import need

from orchard.auth import BootstrapToken
from orchard.base.files import write_private
from orchard.cli import diagnosis, doctor, host_checks
from orchard.cli.diagnosis import Finding
from orchard.cli.main import main
from orchard.vm.host import check_dhcp_lease

STANDIN = Path(__file__).parent.parent / "standin" / "tart"
NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
GB = 10**9

# ---- what each check says -------------------------------------------------------------------------------------------

JUDGED: dict[str, list[tuple[str, Callable[[], Finding], str]]] = {
    "tart": [
        ("ok", partial(diagnosis.check_tart, "", "/bin/tart", (2, 39, 0)), "2.39.0"),
        ("warning", partial(diagnosis.check_tart, "", "/bin/tart", (2, 38, 9)), "2.38.9"),
        ("warning", partial(diagnosis.check_tart, "", "/bin/tart", ()), "unknown"),
        ("failure", partial(diagnosis.check_tart, "there is no tart on PATH", "", ()), "no tart"),
    ],
    "vetu": [
        ("ok", partial(diagnosis.check_vetu, "", "/bin/vetu", (0, 3, 0)), "0.3.0"),
        ("failure", partial(diagnosis.check_vetu, "there is no vetu on PATH", "", ()), "no vetu"),
    ],
    "session": [
        ("ok", partial(diagnosis.check_session, "ci", "ci", keychain_is_open=False), "ci"),
        ("ok", partial(diagnosis.check_session, "ci", "root", keychain_is_open=True), "ci"),
        ("failure", partial(diagnosis.check_session, "ci", "root", keychain_is_open=False), "ci"),
        ("skipped", partial(diagnosis.check_session, "ci", None, keychain_is_open=False), "macOS"),
    ],
    "local network": [
        ("ok", partial(diagnosis.check_local_network, (14, 7), False, "unknown"), "no permission"),
        ("ok", partial(diagnosis.check_local_network, (15, 0), False, "reached"), "reached"),
        ("ok", partial(diagnosis.check_local_network, (26, 1), True, "unknown"), "root"),
        ("warning", partial(diagnosis.check_local_network, (15, 0), False, "unknown"), "no VM"),
        ("failure", partial(diagnosis.check_local_network, (15, 0), False, "denied"), "VMs"),
        ("skipped", partial(diagnosis.check_local_network, None, False, "unknown"), "macOS"),
    ],
    "DHCP lease time": [
        ("ok", partial(diagnosis.check_lease_time, None, is_macos=True), "hour"),
        ("skipped", partial(diagnosis.check_lease_time, None, is_macos=False), "macOS"),
    ],
    "DHCP addresses": [
        ("ok", partial(diagnosis.check_lease_pool, 200), "200"),
        ("warning", partial(diagnosis.check_lease_pool, 201), "201"),
        ("failure", partial(diagnosis.check_lease_pool, 253), "253"),
        ("skipped", partial(diagnosis.check_lease_pool, None), "macOS"),
    ],
    "tart prune": [
        ("ok", partial(diagnosis.check_pruning, is_off=False), "tart"),
        ("warning", partial(diagnosis.check_pruning, is_off=True), "TART_NO_AUTO_PRUNE"),
    ],
    "TART_HOME": [
        ("ok", partial(diagnosis.check_home, "TART_HOME", "/home/.tart", ""), "/home/.tart"),
        ("failure", partial(diagnosis.check_home, "TART_HOME", "/home/.tart", "is a file"), "/home/.tart is a file"),
    ],
    "disk": [
        ("ok", partial(diagnosis.check_disk, "worker", "/data", 100 * GB), "/data"),
        ("warning", partial(diagnosis.check_disk, "worker", "/data", 99 * GB), "99.0 GB"),
        ("failure", partial(diagnosis.check_disk, "worker", "/data", 19 * GB), "19.0 GB"),
        ("ok", partial(diagnosis.check_disk, "controller", "/data", 5 * GB), "5.0 GB"),
        ("warning", partial(diagnosis.check_disk, "controller", "/data", 4 * GB), "4.0 GB"),
        ("failure", partial(diagnosis.check_disk, "controller", "/data", GB // 2), "0.5 GB"),
        ("failure", partial(diagnosis.check_disk, "worker", "/data", None), "/data"),
    ],
    "descriptors": [
        ("ok", partial(diagnosis.check_descriptors, float("inf")), "unlimited"),
        ("ok", partial(diagnosis.check_descriptors, 10_240), "10240"),
        ("warning", partial(diagnosis.check_descriptors, 1_024), "1024"),
        ("failure", partial(diagnosis.check_descriptors, 256), "256"),
    ],
    "DNS": [
        ("ok", partial(diagnosis.check_dns, "c.example", ["10.0.0.1", "fd00::1"], "", ""), "10.0.0.1, fd00::1"),
        ("ok", partial(diagnosis.check_dns, "10.0.0.1", ["10.0.0.1"], "", ""), "10.0.0.1"),
        ("ok", partial(diagnosis.check_dns, "c.example", [], "", "the proxy p:80"), "the proxy p:80"),
        ("failure", partial(diagnosis.check_dns, "c.example", [], "name unknown", ""), "c.example"),
    ],
    "controller": [
        ("ok", partial(diagnosis.check_reach, "https://c", ""), "https://c"),
        ("failure", partial(diagnosis.check_reach, "https://c", "no answer from https://c"), "https://c"),
    ],
    "TLS name": [
        ("ok", partial(diagnosis.check_trust, "c", {"a"}, is_pinned=True, is_covered=False, error=""), "known"),
        ("ok", partial(diagnosis.check_trust, "c", {"c"}, is_pinned=False, is_covered=True, error=""), "c"),
        (
            "failure",
            partial(diagnosis.check_trust, "c", {"a", "b"}, is_pinned=False, is_covered=False, error="x"),
            "a, b",
        ),
        ("failure", partial(diagnosis.check_trust, "c", {"c"}, is_pinned=False, is_covered=True, error="CA"), "CA"),
        (
            "failure",
            partial(diagnosis.check_trust, "c", {"a"}, is_pinned=True, is_covered=False, error="other"),
            "other",
        ),
    ],
    "TLS expiry": [
        ("ok", partial(diagnosis.check_expiry, NOW + datetime.timedelta(days=31), NOW), "2026-02-02"),
        ("warning", partial(diagnosis.check_expiry, NOW + datetime.timedelta(days=29), NOW), "2026-01-31"),
        ("failure", partial(diagnosis.check_expiry, NOW, NOW), "2026-01-02"),
    ],
    "clock": [
        ("ok", partial(diagnosis.check_clock, -4.9), "agrees"),
        ("warning", partial(diagnosis.check_clock, 5.0), "5 s ahead"),
        ("failure", partial(diagnosis.check_clock, -60.0), "60 s behind"),
    ],
    "account": [
        ("ok", partial(diagnosis.check_account, "ci", ""), "ci"),
        ("ok", partial(diagnosis.check_account, "", ""), "no account"),
        ("failure", partial(diagnosis.check_account, "ci", "wrong token"), "ci: wrong token"),
    ],
    "port": [
        ("ok", partial(diagnosis.check_port, ":6120", "", is_own=False), ":6120"),
        ("ok", partial(diagnosis.check_port, ":6120", "address already in use", is_own=True), ":6120"),
        ("failure", partial(diagnosis.check_port, ":6120", "address already in use", is_own=False), ":6120"),
    ],
    "data directory": [
        ("ok", partial(diagnosis.check_state_directory, "/data", []), "/data"),
        ("warning", partial(diagnosis.check_state_directory, "/data", [], "no state"), "no state"),
        (
            "failure",
            partial(diagnosis.check_state_directory, "/data", ["a key is readable", "db"]),
            "a key is readable; db",
        ),
    ],
    "certificate": [
        ("ok", partial(diagnosis.check_certificate, [], None, ""), "first start"),
        ("ok", partial(diagnosis.check_certificate, [], Finding("", "ok", "until 2027"), ""), "until 2027"),
        ("warning", partial(diagnosis.check_certificate, ["c"], Finding("", "ok", "until 2027"), ""), "c"),
        ("failure", partial(diagnosis.check_certificate, ["c"], Finding("", "failure", "expired", "r"), ""), "expired"),
        ("failure", partial(diagnosis.check_certificate, [], None, "no key"), "no key"),
        ("failure", partial(diagnosis.check_certificate, [], None, "", has_openssl=False), "openssl"),
    ],
}


@pytest.mark.parametrize("check", JUDGED)
def test_check_says_ok_warning_or_failure_with_a_remedy(check: str) -> None:
    for status, judge, datum in JUDGED[check]:
        finding = judge()
        assert (finding.check, finding.status) == (check, status), finding
        assert datum in finding.message
        assert bool(finding.remedy) is (status in ("warning", "failure"))


def test_lease_time_has_the_command_that_shortens_it_as_its_remedy(tmp_path: Path) -> None:
    complaint = check_dhcp_lease(tmp_path / "none.plist")
    finding = diagnosis.check_lease_time(complaint, is_macos=True)
    assert finding.status == "warning"
    assert str(tmp_path / "none.plist") in finding.message
    assert finding.remedy.partition(": ")[2].startswith("sudo defaults write")


# ---- what is observed -----------------------------------------------------------------------------------------------


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_tart_that_is_missing_fails_or_is_old_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none" in host_checks.observe_program(str(tmp_path / "none"), "tart")[1]
    broken = program(tmp_path / "broken", "exit 3")
    assert "status 3" in host_checks.observe_program(str(broken), "tart")[1]
    monkeypatch.setenv("TART_HOME", str(tmp_path))
    monkeypatch.setenv("TART_VERSION", "2.38.1")
    assert host_checks.observe_program(str(STANDIN), "tart") == (str(STANDIN), "", (2, 38, 1))


def test_user_at_the_screen_is_the_owner_of_the_console(tmp_path: Path) -> None:
    (tmp_path / "console").touch()
    assert host_checks.console_user(tmp_path / "console") == pwd.getpwuid(os.geteuid()).pw_name
    assert host_checks.console_user(tmp_path / "none") == "unknown"


@pytest.mark.parametrize(("status", "is_open"), [(0, True), (36, False)])
def test_keychain_is_open_if_security_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, is_open: bool
) -> None:
    program(tmp_path / "security", f'[ "$1" = show-keychain-info ] && exit {status}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert host_checks.keychain_is_open() is is_open


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.create_server((host, 0)) as server:
        yield server.getsockname()[1]


def test_connection_to_a_running_vm_shows_whether_the_system_lets_it(tmp_path: Path) -> None:
    vms = [{"Name": "stopped", "State": "stopped"}, {"Name": "vm", "State": "running"}]
    text = f"[ $1 = list ] && echo '{json.dumps(vms)}' || echo $(cat {tmp_path}/$2)"
    tart = str(program(tmp_path / "bin" / "tart", text))
    (tmp_path / "vm").write_text("127.0.0.1")
    with listening() as port:
        assert host_checks.reach_of_vm(tart, port) == "reached"
    assert host_checks.reach_of_vm(tart, port) == "reached"
    (tmp_path / "vm").write_text("no address")
    assert host_checks.reach_of_vm(tart) == "unknown"
    assert host_checks.reach_of_vm(str(program(tmp_path / "bin" / "broken", "exit 1"))) == "unknown"
    known = {errno.ECONNREFUSED: "reached", errno.EHOSTUNREACH: "denied", errno.ETIMEDOUT: "unknown", None: "unknown"}
    assert {number: diagnosis.reach_of(number) for number in known} == known


def test_leases_that_have_not_expired_are_counted(tmp_path: Path) -> None:
    ends = (0x65E8A1B0, 0x65E8A1B1, 0x65E8A1B2)
    text = "".join(f"{{\n\tname=vm\n\tip_address=192.168.64.{end % 256}\n\tlease=0x{end:x}\n}}\n" for end in ends)
    (tmp_path / "leases").write_text(text)
    assert host_checks.observe_leases(tmp_path / "leases", 0x65E8A1B0) == 2
    assert host_checks.observe_leases(tmp_path / "none", 0) == 0


def test_directory_that_cannot_be_used_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "none")
    for path, is_usable in (("", True), ("new/er", True), ("file", False), ("link", False), ("file/below", False)):
        assert (host_checks.problem_of_directory(tmp_path / path) == "") is is_usable


def test_host_without_an_address_is_noticed() -> None:
    assert doctor.addresses_of("localhost")[0]
    addresses, error = doctor.addresses_of("controller.invalid")
    assert (addresses, bool(error)) == ([], True)
    assert doctor.addresses_of("a" * 64 + ".example")[1]


def test_port_in_use_is_noticed() -> None:
    with listening() as port:
        assert "in use" in host_checks.listen_error("127.0.0.1", port)
    assert host_checks.listen_error("127.0.0.1", port) == ""
    with listening("") as port:
        assert host_checks.listen_error(None, port)


# ---- the way to the controller --------------------------------------------------------------------------------------


class Pair:
    """A certificate and its key, made by openssl."""

    def __init__(self, directory: Path, names: str, days: int) -> None:
        self.certificate, self.key = directory / f"{names}{days}.crt", directory / f"{names}{days}.key"
        request = directory / "request"
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
                "-addext", f"subjectAltName={names}", "-keyout", self.key, "-out", request)  # fmt: skip
        openssl("x509", "-req", "-in", request, "-signkey", self.key, "-days", days, "-copy_extensions", "copy",
                "-out", self.certificate)  # fmt: skip


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], capture_output=True, check=True)


class DatedServer(HTTPServer):
    """An HTTP server that refuses everything, with a clock that is `late` seconds behind, for one pair of TLS."""

    def __init__(self, pair: Pair | None, late: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Refusal)
        self.late = late
        if pair is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pair.certificate, pair.key)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet about clients that go away."""


class Refusal(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        assert isinstance(self.server, DatedServer)
        now = datetime.datetime.now(datetime.UTC).timestamp() - self.server.late
        return super().date_time_string(int(now))

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(pair: Pair | None, late: float = 0.0) -> Iterator[str]:
    with DatedServer(pair, late) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"{'https' if pair else 'http'}://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Pair]:
    need("openssl")
    return partial(Pair, tmp_path_factory.mktemp("pairs"))


def examined(*words: str, home: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run the verb, and return its status and the findings by the names of their checks."""
    status, out, err = call_main(main, "doctor", *words, "-o", "json", home=home)
    assert err == ""
    return status, {finding["check"]: finding for finding in json.loads(out)}


def statuses(findings: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: finding["status"] for name, finding in findings.items()}


@pytest.mark.parametrize(
    ("names", "days", "name_status", "expiry_status"),
    [
        ("IP:127.0.0.1", 365, "ok", "ok"),
        ("IP:127.0.0.1", 10, "ok", "warning"),
        ("IP:127.0.0.1", -1, "failure", "failure"),
        ("DNS:other.example", 365, "failure", "ok"),
    ],
)
def test_certificate_of_the_controller_is_examined(
    pairs: Callable[[str, int], Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    days: int,
    name_status: str,
    expiry_status: str,
) -> None:
    pair = pairs(names, days)
    # The certificate is its own CA, which this host trusts.
    monkeypatch.setenv("SSL_CERT_FILE", str(pair.certificate))
    with serving(pair) as url:
        status, findings = examined("client", "--url", url, home=tmp_path)
    assert status == 1
    assert (findings["TLS name"]["status"], findings["TLS expiry"]["status"]) == (name_status, expiry_status)
    assert (findings["DNS"]["status"], findings["clock"]["status"]) == ("ok", "ok")
    if "other" in names:
        assert "other.example" in findings["TLS name"]["message"]
    # No credentials are sent to a server that is not trusted.
    assert ("account" in findings) is (name_status == "ok")


def test_certificate_that_is_not_the_known_one_is_a_failure(pairs: Callable[[str, int], Pair], tmp_path: Path) -> None:
    pair, other = pairs("IP:127.0.0.1", 365), pairs("DNS:other.example", 365)
    with serving(pair) as url:
        for known, expected in ((pair, "ok"), (other, "failure")):
            token = BootstrapToken("workers", "secret-token", known.certificate.read_bytes())
            (tmp_path / "token").write_text(str(token))
            words = ("worker", "--url", url, "--token-file", str(tmp_path / "token"))
            findings = examined(*words, home=tmp_path)[1]
            assert findings["TLS name"]["status"] == expected
            assert ("account" in findings) is (expected == "ok")
            assert "secret-token" not in json.dumps(findings)


@pytest.mark.parametrize(
    ("late", "expected"), [(0.0, "ok"), (20.0, "warning"), (-20.0, "warning"), (3600.0, "failure")]
)
def test_clock_is_compared_with_the_controllers(tmp_path: Path, late: float, expected: str) -> None:
    with serving(None, late) as url:
        findings = examined("client", "--url", url, home=tmp_path)[1]
    assert statuses(findings) == {"DNS": "ok", "controller": "ok", "clock": expected, "account": "failure"}


def test_controller_that_does_not_answer_or_has_no_address_is_a_failure(tmp_path: Path) -> None:
    with listening() as port:
        pass
    for url, found in (
        (f"http://127.0.0.1:{port}", {"DNS": "ok", "controller": "failure"}),
        ("http://controller.invalid", {"DNS": "failure"}),
    ):
        status, findings = examined("client", "--url", url, home=tmp_path)
        assert (status, statuses(findings)) == (1, found)


# ---- the verb -------------------------------------------------------------------------------------------------------


@pytest.mark.needs("openssl")
def test_healthy_controller_and_client_are_ok_and_a_wrong_token_is_a_failure(tmp_path: Path) -> None:
    with controller(home=tmp_path, env=ADMIN_ENV) as (_, url):
        port = url.rpartition(":")[2]
        status, findings = examined("controller", "--listen", f"127.0.0.1:{port}", home=tmp_path)
        assert status == 0
        assert findings["port"]["status"] == "ok"
        certificate = (tmp_path / ORCHARD / "controller" / "controller.crt").read_bytes()
        for secret, expected in (("admin-token", 0), ("wrong-token", 1)):
            (tmp_path / "token").write_text(str(BootstrapToken("bootstrap-admin", secret, certificate)))
            findings = examined("worker", "--url", url, "--token-file", str(tmp_path / "token"), home=tmp_path)[1]
            assert findings["account"]["status"] == ("failure" if expected else "ok")
    assert examined("controller", "--listen", f"127.0.0.1:{port}", home=tmp_path)[1]["port"]["status"] == "ok"


def test_faults_of_a_controllers_host_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ("controller", "--data-dir", str(data))
    with listening() as port:
        status, findings = examined(*words, "--listen", f"127.0.0.1:{port}", home=tmp_path)
    assert status == 1
    assert statuses(findings) | {"disk": "", "descriptors": ""} == {
        "data directory": "ok",
        "certificate": "failure",
        "port": "failure",
        "disk": "",
        "descriptors": "",
    }
    data.chmod(0o777)
    assert examined(*words, home=tmp_path)[1]["data directory"]["status"] == "failure"
    data.chmod(0o700)
    (data / "access-token.key").touch(0o600)
    assert examined(*words, home=tmp_path)[1]["data directory"]["status"] == "warning"
    (data / "db").mkdir()
    assert examined(*words, home=tmp_path)[1]["data directory"]["status"] == "failure"


def test_certificate_of_a_data_directory_is_examined(
    pairs: Callable[[str, int], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "mac.example")
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    for names, days, expected in (
        ("DNS:mac.example", 365, "ok"),
        ("DNS:other.example", 365, "warning"),
        ("DNS:mac.example", -1, "failure"),
    ):
        pair = pairs(names, days)
        (data / "controller.crt").write_bytes(pair.certificate.read_bytes())
        write_private(data / "controller.key", pair.key.read_bytes())
        findings = examined("controller", "--data-dir", str(data), "--listen", "127.0.0.1:0", home=tmp_path)[1]
        assert findings["certificate"]["status"] == expected
    for spoil in (lambda key: key.write_text("no key"), Path.unlink):
        spoil(data / "controller.key")
        findings = examined("controller", "--data-dir", str(data), "--listen", "127.0.0.1:0", home=tmp_path)[1]
        assert findings["certificate"]["status"] == "failure"
        assert "openssl" not in findings["certificate"]["remedy"]


@pytest.mark.slow
def test_faults_of_a_workers_host_are_found_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "tart-home").touch()
    command = f"ulimit -n 512; exec {sys.executable} -m orchard doctor worker -o json --tart {tmp_path}/none"
    env = {"TART_HOME": str(tmp_path / "tart-home"), "TART_NO_AUTO_PRUNE": "1"}
    done = subprocess.run(
        ["sh", "-c", command],
        env=environment(tmp_path, env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    found = {finding["check"]: finding["status"] for finding in json.loads(done.stdout)}
    assert (found.pop("disk"), found) in [
        (disk, {
            "tart": "failure",
            "session": "skipped",
            "local network": "skipped",
            "DHCP lease time": "skipped",
            "DHCP addresses": "skipped",
            "TART_HOME": "failure",
            "tart prune": "warning",
            "descriptors": "failure",
        })
        for disk in ("ok", "warning", "failure")
    ]  # fmt: skip


@pytest.mark.parametrize(("version", "local_network", "calls"), [
    ("2.39.0", "failure", ["--version", "list", "ip"]),
    ("2.38.0", "warning", ["--version"]),
])  # fmt: skip
def test_host_of_macos_is_examined_and_an_old_tart_lists_no_vms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, local_network: str, calls: list[str]
) -> None:
    """A list by an old tart would make a VM fail that starts at the same time."""
    tart = program(
        tmp_path / "tart",
        f"""\
        echo $1 >> {tmp_path}/calls
        case $1 in
        --version) echo {version};;
        list) echo '[{{"Name": "vm", "State": "running"}}]';;
        ip) echo 192.168.64.7;;
        esac""",
    )
    program(tmp_path / "security", "exit 36")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(os, "geteuid", lambda: pwd.getpwnam("nobody").pw_uid)

    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr(socket, "create_connection", refuse)
    status, findings = examined("worker", "--tart", str(tart), home=tmp_path)
    assert (status, findings["session"]["status"], findings["DHCP lease time"]["status"]) == (1, "failure", "warning")
    assert (findings["local network"]["status"], findings["DHCP addresses"]["status"]) == (local_network, "ok")
    assert (tmp_path / "calls").read_text().split() == calls


def test_host_of_vetu_needs_no_tart(tmp_path: Path) -> None:
    vetu = program(tmp_path / "vetu", "echo 0.3.1")
    findings = examined("worker", "--runtime", "vetu", "--tart", str(vetu), home=tmp_path)[1]
    assert (findings["vetu"]["status"], findings["VETU_HOME"]["status"]) == ("ok", "ok")
    assert {"tart", "tart prune", "TART_HOME", "session"}.isdisjoint(findings)


def test_roles_that_have_data_on_this_host_are_examined(tmp_path: Path) -> None:
    status, _, err = call_main(main, "doctor", home=tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    with controller(*PLAIN, home=tmp_path) as (_, url):
        (tmp_path / ORCHARD / "worker.lock").touch()
        out = call_main(main, "doctor", "--url", url, home=tmp_path)[1]
        assert [line for line in out.splitlines() if line.endswith(":")] == ["worker:", "controller:", "client:"]
        out = call_main(main, "doctor", "--url", url, "-o", "json", home=tmp_path)[1]
    assert {finding["role"] for finding in json.loads(out)} == {"worker", "controller", "client"}
    # As the data directory of a controller with its state in etcd.
    (tmp_path / ORCHARD / "controller" / "state.jsonl").unlink()
    assert "controller:" in call_main(main, "doctor", home=tmp_path)[1].splitlines()
