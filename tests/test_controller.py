"""The controller as a process: its command line, its first start, its data directory, its log, and its stop."""

from __future__ import annotations

import errno
import json
import re
import signal
import ssl
import stat
import threading
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.clients import call, connect_http, connected_worker
from harness.disks import FailingDisk
from harness.processes import GENEROUS, ORCHARD, PLAIN, at_last, call_main, controller, finished

from orchard import auth
from orchard import controller as program
from orchard.control import stored_data
from orchard.decisions.login_limit import MAX_FAILURES
from orchard.net import tls
from orchard.schema import TART_VMS, ServiceAccount
from orchard.storage.events import EventLog, event_files
from orchard.storage.file_engine import FileEngine
from orchard.storage.history import History, history_file
from orchard.store import Store


@pytest.mark.slow
@pytest.mark.needs("openssl")
def test_first_start_creates_account_and_certificate_and_prints_them_once(tmp_path: Path) -> None:
    with controller(home=tmp_path) as (role, url):
        printed = "".join(role.said)
        token = re.search(r"token: ([A-Za-z0-9]{32})\n", printed)
        assert token is not None, printed
        certificate = tmp_path / ORCHARD / "controller" / "controller.crt"
        assert tls.fingerprint(certificate.read_bytes()) in printed
        context = ssl.create_default_context(cafile=str(certificate))
        context.check_hostname = False
        assert call(url, "GET", "/v1/", token=token[1], context=context) == (200, None)
        assert call(url, "GET", "/v1/", token="wrong", context=context)[0] == 401
        account = call(url, "GET", "/v1/service-accounts/bootstrap-admin", token=token[1], context=context)[1]
        assert account["roles"] == list(auth.ROLES)
        assert role.stop() == 0
        assert token[1] not in role.log.read_text()
    with controller(home=tmp_path) as (role, url):
        assert len(role.said) == 1, "the token is shown once"
        assert call(url, "GET", "/v1/", token=token[1], context=context) == (200, None)
    for path in (tmp_path / ORCHARD / "controller").rglob("*"):
        expected = 0o700 if path.is_dir() else 0o600
        if path != certificate:
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.slow
def test_admin_token_from_the_environment_is_updated_and_never_printed(tmp_path: Path) -> None:
    for token in ("first-token", "second-token"):
        env = {"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": token}
        with controller("--insecure-no-tls", home=tmp_path, env=env) as (role, url):
            assert call(url, "GET", "/v1/", token=token)[0] == 200
            assert call(url, "GET", "/v1/", token="first-token")[0] == (200 if token == "first-token" else 401)
            assert role.stop() == 0
            assert token not in "".join(role.said) + role.log.read_text()


@pytest.mark.slow
def test_failed_logins_get_429_and_correct_credentials_still_work(tmp_path: Path) -> None:
    env = {"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": "right"}
    with controller("--insecure-no-tls", home=tmp_path, env=env) as (role, url):
        for _ in range(MAX_FAILURES):
            assert call(url, "GET", "/v1/vms", token="wrong")[0] == 401
        begun = time.monotonic()
        status, problem = call(url, "GET", "/v1/vms", token="wrong")
        assert status == 429
        assert time.monotonic() - begun >= 1.0
        assert re.search(r"10 wrong credentials came from 127\.0\.0\.1 within a minute", problem["message"])
        assert call(url, "GET", "/v1/vms", token="right") == (200, [])
        assert call(url, "GET", "/v1/vms")[0] == 401, "a request without credentials is not a failed login"
        assert call(url, "GET", "/v1/vms", token="wrong")[0] == 429
        assert role.stop() == 0
    # One line for the address and one for the account, and none for each further guess.
    assert sum("many failed logins" in line for line in role.log_lines()) == 2
    assert not any("status=429" in line for line in role.log_lines())


def test_acknowledged_changes_survive_a_kill(tmp_path: Path) -> None:
    with controller(*PLAIN, home=tmp_path) as (role, url):
        created = call(url, "POST", "/v1/vms", {"name": "vm", "image": "i"})[1]
        call(url, "POST", "/v1/vms/vm/events", [{"kind": "log_line", "payload": "x", "timestamp": 1}])
        role.stop(signal.SIGKILL)
    with controller(*PLAIN, home=tmp_path) as (role, url):
        status, found = call(url, "GET", "/v1/vms/vm")
        assert (status, found["uid"]) == (200, created["uid"])
        assert len(call(url, "GET", "/v1/vms/vm/events")[1]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_the_controller_with_status_0_while_clients_are_connected(
    tmp_path: Path, number: signal.Signals
) -> None:
    with controller(*PLAIN, home=tmp_path) as (role, url):
        call(url, "POST", "/v1/vms", {"name": "vm", "image": "i"})
        watching = connect_http(url)
        watching.request("GET", "/v1/vms/vm?watch=true")
        stream = watching.getresponse()
        assert json.loads(stream.readline())["type"] == "ADDED"
        idle = connect_http(url)
        assert role.stop(number) == 0
        assert b"ADDED" not in stream.read(), "the chunked body ended properly"
        watching.close()
        idle.close()


def test_each_request_is_logged_on_one_line(tmp_path: Path) -> None:
    with controller("--insecure-no-tls", home=tmp_path, env={"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": "s3cret"}) as (role, url):
        call(url, "GET", "/v1/vms/a%0Alevel=forged?filter=hidden", token="s3cret")
        call(url, "POST", "/v1/vms", {}, token="s3cret")
        role.stop()
    requests = [text for text in role.log_lines() if "method=" in text]
    assert len(requests) == 2
    first = dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', requests[0]))
    assert first["level"] == "info"
    assert (first["method"], first["path"], first["status"]) == ("GET", '"/v1/vms/a%0Alevel=forged"', "404")
    assert first["account"] == "bootstrap-admin"
    assert float(first["duration_ms"]) >= 0
    assert "hidden" not in role.log.read_text()


@pytest.mark.parametrize("debug", [False, True])
def test_what_workers_repeat_is_logged_at_debug(tmp_path: Path, debug: bool) -> None:
    worker = {"name": "w", "machine_id": "m", "resources": {TART_VMS: 1}}
    event = {"kind": "log_line", "payload": "x", "timestamp": 1}
    routine = [
        ("GET", "/v1/vms?filter=worker=w", None),
        ("GET", "/v1/workers/w", None),
        ("PUT", "/v1/workers/w", {**worker, "last_seen": "2100-01-01T00:00:00Z"}),
        ("POST", "/v1/vms/vm/events", [event]),
        ("PUT", "/v1/vms/vm/state", {"status": "pending"}),
    ]
    others = [
        ("POST", "/v1/workers", worker),
        ("POST", "/v1/vms", {"name": "other", "image": "any"}),
        ("GET", "/v1/vms/none", None),
        ("PUT", "/v1/workers/w", {**worker, "scheduling_paused": True}),
    ]
    with controller(*PLAIN, *["--debug"] * debug, home=tmp_path) as (role, url):
        with connected_worker(url, "w"):
            assert call(url, "POST", "/v1/vms", {"name": "vm", "image": "any"})[0] == 200
            at_last(lambda: call(url, "GET", "/v1/vms/vm")[1].get("worker") == "w")
        before = len(role.log.read_text())
        statuses = [call(url, *request)[0] for request in (*others, *routine)]
        assert statuses == [200, 200, 404, *[200] * 6]
        role.stop()
    logged = re.findall(r"level=(\w+) .* msg=request method=(\w+) path=(\S+)", role.log.read_text()[before:])
    expected = [("info", method, path) for method, path, _ in others]
    expected += [("debug", method, path.partition("?")[0]) for method, path, _ in routine] * debug
    assert logged == expected


def test_data_directory_in_use_is_refused(tmp_path: Path) -> None:
    with controller(*PLAIN, home=tmp_path) as (role, _):
        second = finished("controller", "--listen", "127.0.0.1:0", *PLAIN, home=tmp_path)
        assert second.returncode == 1
        assert f"in use by another process ({role.process.pid})" in second.stderr
        assert "Traceback" not in second.stderr


def test_damaged_state_file_stops_the_start_with_file_offset_and_remedy(tmp_path: Path) -> None:
    with controller(*PLAIN, home=tmp_path) as (role, url):
        call(url, "POST", "/v1/vms", {"name": "vm", "image": "i"})
        role.stop()
    path = tmp_path / ORCHARD / "controller" / "state.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused = finished("controller", "--listen", "127.0.0.1:0", *PLAIN, home=tmp_path)
    assert refused.returncode == 1
    assert re.search(rf"{re.escape(str(path))}.*byte [0-9]+", refused.stderr), refused.stderr
    assert "backup" in refused.stderr
    assert path.read_bytes() == data


def test_missing_state_file_in_a_used_directory_stops_the_start(tmp_path: Path) -> None:
    with controller(*PLAIN, home=tmp_path) as (_, url):
        assert call(url, "POST", "/v1/vms", {"name": "vm", "image": "any"})[0] == 200
        events = [{"kind": "log_line", "payload": "x", "timestamp": 1}]
        assert call(url, "POST", "/v1/vms/vm/events", events)[0] == 200
    directory = tmp_path / ORCHARD / "controller"
    state = directory / "state.jsonl"
    state.rename(tmp_path / "state.jsonl")
    refused = finished("controller", "--listen", "127.0.0.1:0", *PLAIN, home=tmp_path)
    assert refused.returncode == 1
    assert (
        f"{state}: the file is missing in a directory that a controller has used at byte 0; restore it"
        in refused.stderr
    )
    (tmp_path / "state.jsonl").rename(state)
    with controller(*PLAIN, home=tmp_path) as (_, url):
        assert len(call(url, "GET", "/v1/vms/vm/events")[1]) == 1


async def test_data_base_of_another_controller_stops_the_start_unless_a_state_is_there_too(tmp_path: Path) -> None:
    directory = tmp_path / ORCHARD / "controller"
    (directory / "db").mkdir(parents=True)
    with pytest.raises(program.StartError, match=str(directory / "db")):
        async with stored_data.open_data_directory(directory):
            raise AssertionError("it started")
    assert list(directory.iterdir()) == [directory / "db"]
    (directory / "db").rename(tmp_path / "db")
    async with stored_data.open_data_directory(directory):
        pass
    (tmp_path / "db").rename(directory / "db")
    async with stored_data.open_data_directory(directory):
        pass


async def test_failed_write_during_the_stop_is_logged(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    disk, stop, ended = FailingDisk(), trio.Event(), trio.Event()
    resume = threading.Event()
    stores: list[Store] = []

    def fail_when_resumed(verb: str, number: int) -> int:
        resume.wait()
        return errno.EIO if verb == "write" else 0

    @asynccontextmanager
    async def opened(directory: Path) -> AsyncIterator[stored_data.StoredData]:
        store = await Store.open(FileEngine(directory, disk), stored_data.utc_now())
        events = EventLog(*event_files(directory / "events"))
        events.open(set())
        stores.append(store)
        yield stored_data.StoredData(store, events, History(history_file(directory)))
        store.close()

    async def run(task_status: trio.TaskStatus[program.Running]) -> None:
        settings = program.ControllerSettings(
            data_dir=tmp_path / "data", host="127.0.0.1", port=0, tls=False, auth=False
        )
        await program.run(settings, stop=stop, platform=program.Platform(open_data=opened), task_status=task_status)
        ended.set()

    await nursery.start(run)
    disk.fault = fail_when_resumed
    with stores[0].transaction() as tx:
        tx.put(ServiceAccount(name="last", token="t"))
    stop.set()
    # Everything now waits for the disk.
    await trio.testing.wait_all_tasks_blocked()
    resume.set()
    await ended.wait()
    assert "last changes were not stored (and not acknowledged): cannot write" in caplog.text


def test_api_prefix_is_before_every_path(tmp_path: Path) -> None:
    with controller(*PLAIN, "--api-prefix", "/orchard/", home=tmp_path) as (_, url):
        assert url.endswith("/orchard")
        assert call(url, "GET", "/v1/vms") == (200, [])
        document = call(url, "GET", "/v1/openapi.json")[1]
        assert document["servers"] == [{"url": "/orchard/v1"}]
        assert call(url.removesuffix("/orchard"), "GET", "/v1/vms")[0] == 404


def test_metrics_have_a_port_of_their_own_on_request(tmp_path: Path) -> None:
    options = ("--metrics-listen", "127.0.0.1:0", "--metrics-per-worker")
    with controller(*PLAIN, *options, home=tmp_path) as (role, url):
        [port] = [line.rpartition(" ")[2].strip() for line in role.said if line.startswith("metrics")]
        call(url, "POST", "/v1/workers", {"name": "w"})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=GENEROUS) as answer:
            assert b'orchard_worker_vms{worker="w"} 0' in answer.read().splitlines()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metrics-listen", "here"], ["--metrics-listen", '"here"', "HOST:PORT"]),
        (["--listen", "here"], ["--listen", '"here"', "HOST:PORT"]),
        (["--listen", "127.0.0.1:99999"], ["99999", "HOST:PORT"]),
        (["--worker-offline-timeout", "0"], ["--worker-offline-timeout", '"0"', "above 0"]),
        (["--ping-interval", "nan"], ["--ping-interval", '"nan"']),
        (["--idle-timeout", "0"], ["--idle-timeout", '"0"']),
        (["--api-prefix", "x"], ["--api-prefix", '"x"', "/orchard"]),
        (["--controller-cert", "a.pem"], ["--controller-key"]),
        (
            ["--insecure-no-tls", "--controller-cert", "a", "--controller-key", "b"],
            ["--insecure-no-tls", "--controller-cert"],
        ),
        (["--lsten=:0"], ["--lsten,", "--listen?"]),
    ],
)
def test_invalid_command_line_exits_with_status_2(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    status, _, err = call_main(program.main, *arguments, home=tmp_path)
    assert status == 2
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["--controller-cert", "none.crt", "--controller-key", "none.key"], {}, ["none.crt"]),
        (["--listen", "192.0.2.1:0", "--insecure-no-tls"], {}, ["192.0.2.1:0"]),
        ([], {"PATH": "/nonexistent"}, ["openssl", "--controller-cert", "--insecure-no-tls"]),
        (["--data-dir", "/proc/none"], {}, ["/proc/none"]),
    ],
)
def test_start_error_names_the_cause_and_the_remedy(
    tmp_path: Path, arguments: list[str], env: dict[str, str], words: list[str]
) -> None:
    refused = finished("controller", *arguments, home=tmp_path, env=env)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    for word in words:
        assert word in refused.stderr


def test_insecure_allow_host_dirs_is_accepted_with_a_note(tmp_path: Path) -> None:
    with controller(*PLAIN, "--insecure-allow-host-dirs", home=tmp_path) as (role, _):
        assert "hostDirPolicies" in role.log_lines()[0]


def test_default_port_comes_from_the_environment(tmp_path: Path) -> None:
    refused = finished("controller", *PLAIN, home=tmp_path, env={"PORT": "http"})
    assert refused.returncode == 2
    assert ":http" in refused.stderr


@asynccontextmanager
async def pinned(port: int, certificate: bytes) -> AsyncIterator[trio.abc.Stream]:
    """Connect to a controller of this host that has the certificate. Raises NotTrustedError."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield await tls.Trust(certificate).secure(stream, "localhost")


async def ask(stream: trio.abc.Stream) -> None:
    """Send a request without credentials and receive the answer."""
    await stream.send_all(b"GET /v1/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 401 ")


@pytest.mark.needs("openssl")
async def test_exchanged_certificate_is_presented_without_a_restart(
    tmp_path: Path, mock_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    places = [tmp_path / name for name in ("data", "other")]
    for place in places:
        place.mkdir(mode=0o700)
    (certificate, key), (new, new_key) = [await tls.self_signed(place) for place in places]
    old = certificate.read_bytes()
    settings = program.ControllerSettings(
        places[0], host="127.0.0.1", port=0, certificate=certificate, key=key, admin_token="long-enough"
    )
    running = await nursery.start(program.run, settings)
    port = int(running.url.rpartition(":")[2])
    async with pinned(port, old) as before:
        await ask(before)
        new_key.replace(key)
        new.replace(certificate)
        mock_clock.jump(61)
        await trio.testing.wait_all_tasks_blocked()
        async with pinned(port, certificate.read_bytes()) as after:
            await ask(after)
        with pytest.raises(tls.NotTrustedError):
            async with pinned(port, old):
                raise AssertionError("it was trusted")
        await ask(before)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("host", "names"), [(None, []), ("0.0.0.0", []), ("::", []), ("192.0.2.7", ["192.0.2.7"])])
def test_self_signed_certificate_is_for_the_address_of_listen(host: str | None, names: list[str]) -> None:
    assert program._listen_name(host) == names
