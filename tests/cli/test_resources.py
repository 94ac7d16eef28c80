"""The verbs list, get, delete, pause and resume, called against a controller with TLS."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.processes import ORCHARD, call_main, controller, environment, started

from orchard.auth import BootstrapToken
from orchard.base.files import TLS_CERTIFICATE_FILE
from orchard.cli.connection import ControllerConnection
from orchard.cli.context import Context, Contexts, read_contexts, write_contexts
from orchard.cli.https import open_http
from orchard.cli.main import main
from orchard.net.urls import parse_url

TOKEN = "an-admin-token-of-the-tests"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the context of a controller, which has a worker without a process, and two VMs."""
    home = tmp_path_factory.mktemp("site")
    data = home / ORCHARD / "controller"
    with controller("--data-dir", str(data), home=home, env={"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": TOKEN}) as (_, url):
        context = Context(url, (data / TLS_CERTIFICATE_FILE).read_bytes(), "bootstrap-admin", TOKEN)
        write_contexts(home / ORCHARD / "orchard.yml", Contexts("site", {"site": context}))
        with ControllerConnection(context) as api:
            worker = {"name": "mac-1", "machine_id": "m\n", "resources": {"org.cirruslabs.tart-vms": 2}}
            api.call("POST", "/workers", body=worker)
            for name in ("first", "second"):
                api.call(
                    "POST", "/vms", body={"name": name, "image": "ghcr.io/org/image:latest", "labels": {"xcode": "27"}}
                )
        yield home


def run(site: Path, *words: str) -> list[str]:
    status, out, err = call_main(main, *words, home=site)
    assert (status, err) == (0, "")
    return out.splitlines()


def refused(site: Path, *words: str) -> tuple[int, str]:
    status, out, err = call_main(main, *words, home=site)
    assert out == ""
    assert len(err.splitlines()) == 1
    return status, err


def test_lists_have_names_first_and_workers_whether_they_are_paused_last(site: Path) -> None:
    header, *rows = run(site, "list", "vms")
    assert [row.split()[0] for row in rows] == ["first", "second"]
    assert re.split(r"  +", header) == ["Name", "Created", "Image", "Status", "Restart policy", "Assigned worker"]
    assert "Never (0 restarts)" in rows[0]
    assert run(site, "list", "vms", "-q") == ["first", "second"]
    assert run(site, "list", "vm", "-o", "name") == ["first", "second"]
    assert [vm["name"] for vm in json.loads("\n".join(run(site, "list", "vms", "-o", "json")))] == ["first", "second"]
    (row,) = run(site, "list", "workers")[1:]
    assert (row.split()[0], row.split()[-1]) == ("mac-1", "false")
    (row,) = run(site, "list", "service-accounts")[1:]
    assert row.split()[0] == "bootstrap-admin"


def test_one_resource_is_shown_in_pairs_or_as_json(site: Path) -> None:
    pairs = dict(re.split(r"  +", line, maxsplit=1) for line in run(site, "get", "vm", "first") if "  " in line)
    assert (pairs["Name"], pairs["Image"], pairs["Status"]) == ("first", "ghcr.io/org/image:latest", "pending")
    assert "org.cirruslabs.tart-vms: 2" in "\n".join(run(site, "get", "worker", "mac-1"))
    assert json.loads("\n".join(run(site, "get", "vm", "first", "-o", "json")))["labels"] == {"xcode": "27"}
    assert any("schedulerProfile" in line for line in run(site, "get", "cluster-settings"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vm/first/status", "pending"),
        ("vm/first/worker", ""),
        ("vm/first/labels/xcode", "27"),
        ("vm/first/labels", '{"xcode": "27"}'),
        ("vm/first/conditions/0/type", "scheduled"),
        ("vm/first/restart_count", ""),
        ("vm/first/restartPolicy", "Never"),
        ("worker/mac-1/machineID", "m\n"),
        ("cluster-settings//schedulerprofile", "optimize-utilization"),
    ],
)
def test_a_field_is_printed_alone(site: Path, path: str, value: str) -> None:
    kind, name, field = path.split("/", 2)
    assert "\n".join(run(site, "get", kind, f"{name}/{field}")) == value.removesuffix("\n") + (
        "" if value != "m\n" else "\n"
    )


def test_bootstrap_token_has_the_account_and_the_certificate_of_the_context(site: Path) -> None:
    context = read_contexts(site / ORCHARD / "orchard.yml").find("site")
    (text,) = run(site, "get", "bootstrap-token", "bootstrap-admin")
    assert BootstrapToken.parse(text) == BootstrapToken("bootstrap-admin", TOKEN, context.certificate)
    assert refused(site, "get", "bootstrap-token", "none")[0] == 1
    assert len(run(site, "get", "vm-access-token", "first")) == 1


def test_a_worker_is_paused_and_resumed(site: Path) -> None:
    for verb, paused in (("pause", "true"), ("resume", "false")):
        assert run(site, verb, "worker", "mac-1") == []
        assert run(site, "list", "workers")[1].split()[-1] == paused


def test_what_cannot_be_is_refused_in_one_line(site: Path, tmp_path: Path) -> None:
    assert refused(site, "get", "vm", "none")[0] == 1
    assert refused(site, "delete", "worker", "none")[0] == 1
    status, said = refused(site, "list", "workrs")
    assert (status, "did you mean worker?" in said) == (2, True)
    status, said = refused(site, "get", "vm", "first/stats")
    assert (status, "status" in said) == (2, True)
    assert refused(site, "get", "vm")[0] == 2
    status, said = refused(site, "lst")
    assert (status, "list" in said) == (2, True)
    assert refused(site, "list", "vms", "--context", "other")[0] == 1
    assert refused(tmp_path, "list", "vms")[0] == 1


def test_a_vm_is_deleted(site: Path) -> None:
    with ControllerConnection(read_contexts(site / ORCHARD / "orchard.yml").find("site")) as api:
        api.call("POST", "/vms", body={"name": "third", "image": "i"})
    assert run(site, "delete", "vm", "third") == []
    assert refused(site, "get", "vm", "third")[0] == 1


def test_another_certificate_than_the_pinned_one_is_refused_before_credentials_are_sent(
    site: Path, tmp_path: Path
) -> None:
    known = read_contexts(site / ORCHARD / "orchard.yml").find("site")
    with controller("--data-dir", str(tmp_path / "c"), home=tmp_path) as (role, url):
        write_contexts(
            tmp_path / ORCHARD / "orchard.yml", Contexts("a", {"a": Context(url, known.certificate, "a", "t")})
        )
        assert "certificate" in refused(tmp_path, "list", "vms")[1]
        write_contexts(tmp_path / ORCHARD / "orchard.yml", Contexts("a", {"a": Context(url, None, "a", "t")}))
        assert "certificate" in refused(tmp_path, "list", "vms")[1]
        assert "unknown service account" not in role.log.read_text()


def test_verb_that_sends_one_request_imports_no_server_and_no_trio(site: Path) -> None:
    program = (
        "import sys; from orchard.__main__ import main; sys.argv = ['orchard', 'list', 'vms', '-q']; assert main() == 0;"
        "print(*sorted({'trio', 'h11', 'orchard.controller', 'orchard.schema'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(site), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["first", "second", ""]


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        ({}, "10.1.2.3"),
        ({"HTTP_PROXY": "http://user:pass@proxy.example.com:3128"}, "proxy.example.com"),
        ({"HTTP_PROXY": "http://proxy.example.com:3128", "NO_PROXY": "10.0.0.0/8"}, "10.1.2.3"),
        ({"HTTPS_PROXY": "http://proxy.example.com:3128"}, "10.1.2.3"),
    ],
)
def test_proxies_of_the_environment_are_used_as_by_workers(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], host: str
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        for spelling in (name, name.lower()):
            monkeypatch.delenv(spelling, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert open_http(parse_url("http://10.1.2.3"), None, 1).host == host


def test_proxy_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHARD_URL", "http://10.1.2.3")
    monkeypatch.setenv("http_proxy", "http://user:secret@proxy.example.com:notaport")
    status, said = refused(tmp_path, "list", "vms")
    assert (status, "HTTP_PROXY" in said, "secret" in said) == (1, True, False)


def test_one_line_alone_has_the_vms_that_a_worker_offers_while_some_run(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    assert call_main(main, "wait", "vm", "vm", home=dev)[0] == 0
    lines = [line for line in run(dev, "get", "worker", "worker-1") if "org.cirruslabs.tart-vms" in line]
    assert [line.split(maxsplit=1) for line in lines] == [["Resources", "org.cirruslabs.tart-vms: 2"]]
    assert any(line.split() == ["Used", "1", "tart-vms"] for line in run(dev, "get", "worker", "worker-1"))


def test_settings_of_the_cluster_are_shown_as_json_has_them(dev: Path, api: ControllerConnection) -> None:
    before = api.call("GET", "/cluster-settings")
    words = ("set", "cluster-settings", "--host-dir-policies", "/a:ro,/b")
    assert call_main(main, *words, home=dev) == (0, "", "")
    try:
        assert "hostDirPolicies   pathPrefix: /a, ro: true; pathPrefix: /b" in run(dev, "get", "cluster-settings")
    finally:
        api.call("PUT", "/cluster-settings", body=before)


def test_list_has_the_vms_that_match_a_filter(dev: Path, api: ControllerConnection) -> None:
    for name in ("one", "other"):
        api.call("POST", "/vms", body={"name": name, "image": "i", "metadata": {"job": name}})
    words = ("list", "vms", "--filter", "metadata.job=one")
    assert run(dev, *words, "-q") == ["one"]
    assert run(dev, *words, "--filter", "name=other", "-q") == []
    with started("", *words, "-w", home=dev) as role:
        role.wait_for(re.compile("one "))
        api.call("PATCH", "/vms/other", body={"metadata": {"job": "one"}})
        role.wait_for(re.compile("other "))
        api.call("PATCH", "/vms/one", body={"metadata": {"job": "two"}})
        role.wait_for(re.compile("one .* no longer matches "))
    assert refused(dev, "list", "vms", "--filter", "colour=red")[0] == 1
    assert refused(dev, "list", "workers", "--filter", "name=a")[0] == 2
