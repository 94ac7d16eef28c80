"""The verbs and flags that users of the existing command know: each is accepted, and means what they know."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from harness.processes import LISTENING, ORCHARD, at_last, call_main, finished, started

from orchard.cli.connection import ControllerConnection
from orchard.cli.context import Context, Contexts, read_contexts, write_contexts
from orchard.cli.create import specification
from orchard.cli.main import main, make_parser, parse_options
from orchard.codec import attrs_of
from orchard.schema import ClusterSettings, VMSpec

CONTROLLER = "controller"
# (verb, flags, what they are read as)
KNOWN: list[tuple[str, str, Mapping[str, object]]] = [
    ("context", "create h --name n --bootstrap-token t --force", {"name": "n", "bootstrap_token": "t", "force": True}),
    ("context", "create h --service-account-name a --service-account-token t --no-pki", {"service_account_name": "a", "no_pki": True}),
    ("context", "list", {}),
    ("context", "default n", {"name": "n"}),
    ("context", "delete n", {"name": "n"}),
    ("create", "service-account n --roles compute:read --roles admin:read --token t", {"roles": ["compute:read", "admin:read"], "token": "t"}),
    ("list", "vms -q", {"quiet": True}),
    ("list", "workers --quiet", {"quiet": True}),
    ("list", "service-accounts", {}),
    ("get", "vm n/status", {"name": "n/status"}),
    ("get", "worker n", {}),
    ("get", "service-account n", {}),
    ("get", "cluster-settings", {}),
    ("get", "bootstrap-token a", {}),
    ("get", "vm-access-token n", {}),
    ("set", "cluster-settings --host-dir-policies /a:ro,/b --scheduler-profile distribute-load", {"schedulerProfile": "distribute-load"}),
    ("delete", "vm n", {}),
    ("delete", "worker n", {}),
    ("delete", "service-account n", {}),
    ("pause", "worker n --wait 90", {"wait": 90}),
    ("pause", "worker n --wait 0", {"wait": 0}),
    ("resume", "worker n", {}),
    ("logs", "vm n --tail 5", {"tail": 5}),
    ("port-forward", "vm n 8080:80", {"ports": (8080, 80)}),
    ("port-forward", "vm n :80 -t 5", {"ports": (0, 80), "wait": 5}),
    ("port-forward", "vm n :80 -t 0", {"ports": (0, 80), "wait": 0}),
    ("port-forward", "worker n 80 --wait 5", {"ports": (0, 80), "wait": 5}),
    ("ssh", "vm n -u admin -p secret -t 5 uptime", {"username": "admin", "password": "secret", "wait": 5, "command": ["uptime"]}),
    ("vnc", "vm n -u admin -p secret -w 5", {"username": "admin", "wait": 5}),
    ("vnc", "worker n --wait 5", {"wait": 5}),
    ("ssh", "vm n --wait 0", {"wait": 0}),
    (CONTROLLER, "-l :6120", {"listen": (None, 6120)}),
    (CONTROLLER, "--listen 127.0.0.1:80 --data-dir d --api-prefix /orchard", {"listen": ("127.0.0.1", 80), "api_prefix": "/orchard"}),
    (CONTROLLER, "--controller-cert c --controller-key k", {"controller_cert": Path("c")}),
    (CONTROLLER, "--insecure-no-tls --insecure-ssh-no-client-auth --debug", {"insecure_no_tls": True}),
    (CONTROLLER, "--listen-ssh :22 --ssh-host-key f", {"listen_ssh": (None, 22)}),
    (CONTROLLER, "--worker-offline-timeout 3m0s --experimental-ping-interval 30s", {"worker_offline_timeout": 180, "ping_interval": 30}),
    ("worker", "http://h --bootstrap-token t --name n --labels a=b --resources c=1", {"name": "n", "labels": {"a": "b"}, "resources": {"c": 1}}),
    ("worker", "h --bootstrap-token-stdin --default-cpu 2 --default-memory 1024 --no-pki --debug", {"default_cpu": 2, "default_memory": 1024}),
    ("worker", "h --default-cpu 0 --default-memory 0 --synthetic-images 0", {"default_cpu": 0, "default_memory": 0}),
    ("worker", "h --log-file f", {}),
    ("dev", "-d d --resources a=1 --api-prefix /p --synthetic --workers 2", {"directory": Path("d"), "resources": {"a": 1}, "workers": 2}),
    ("worker", "h --user ci --default-cpu 4", {"user": "ci", "default_cpu": 4}),
    ("dev", "--data-dir d", {"directory": Path("d")}),
    ("create", "vm n --startup-script @- --host-dirs src:/a:ro,out:/b", {"hostDirs": [{"name": "src", "path": "/a", "ro": True}, {"name": "out", "path": "/b"}]}),
    ("ssh", "vm n --wait 1h30m -- bash -s", {"wait": 5400, "command": ["bash", "-s"]}),
    ("vnc", "vm n --username u --password p", {"username": "u", "password": "p"}),
    # Without options.
    ("context", "create h", {"name": "default", "force": False, "no_pki": False}),
    ("create", "service-account n", {"roles": [], "token": ""}),
    ("port-forward", "vm n 22", {"wait": 60}),
    ("ssh", "vm n", {"wait": 60, "username": "", "password": "", "command": []}),
    ("vnc", "vm n", {"wait": 60}),
    (CONTROLLER, "", {"listen": (None, 6120), "listen_ssh": None, "worker_offline_timeout": 180, "api_prefix": "", "insecure_no_tls": False}),
    ("worker", "h", {"default_cpu": 4, "default_memory": 8192, "labels": {}, "no_pki": False}),
    ("dev", "", {"directory": Path(".dev-data"), "workers": 1, "resources": {}, "synthetic": False}),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "flags", "read"), KNOWN, ids=[f"{verb} {flags}" for verb, flags, _ in KNOWN])
def test_known_flags_are_read(
    verb: str, flags: str, read: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PORT", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("uptime"))
    options = vars(parse_options(make_parser(verb), flags.split()))
    assert {name: options[name] for name in read} == read


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("3m", 180), ("3m0s", 180), ("1h30m", 5400)])
@pytest.mark.parametrize(
    "words",
    [
        "pause worker n --wait",
        "ssh vm n -t",
        "port-forward vm n 1 -t",
        "vnc vm n -w",
        "controller --worker-offline-timeout",
    ],
)
def test_known_spellings_of_durations_are_read(words: str, text: str, seconds: int) -> None:
    verb, *rest, flag = words.split()
    read = vars(parse_options(make_parser(verb), [*rest, flag, text]))
    assert read["worker_offline_timeout" if verb == CONTROLLER else "wait"] == seconds


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--image i", "image", "i"),
        ("--image-pull-policy Always", "imagePullPolicy", "Always"),
        ("--cpu 2", "cpu", 2),
        ("--memory 1024", "memory", 1024),
        ("--disk-size 50", "diskSize", 50),
        ("--os linux", "os", "linux"),
        ("--arch amd64", "arch", "amd64"),
        ("--runtime vetu", "runtime", "vetu"),
        ("--headless=true", "headless", True),
        ("--nested", "nested", True),
        ("--suspendable", "suspendable", True),
        ("--random-serial", "randomSerial", True),
        ("--net-softnet", "netSoftnet", True),
        ("--net-softnet-allow 10.0.0.0/8,192.168.0.0/16", "netSoftnetAllow", ["10.0.0.0/8", "192.168.0.0/16"]),
        ("--net-softnet-block 0.0.0.0/0", "netSoftnetBlock", ["0.0.0.0/0"]),
        ("--net-bridged en0", "net-bridged", "en0"),
        ("--username u", "username", "u"),
        ("--password p", "password", "p"),
        ("--resources a=1,b=2", "resources", {"a": 1, "b": 2}),
        ("--labels a=b,c=d", "labels", {"a": "b", "c": "d"}),
        ("--restart-policy OnFailure", "restart_policy", "OnFailure"),
        ("--startup-script uptime", "startup_script", {"script_content": "uptime"}),
        ("--host-dirs a:/b:ro,c:/d", "hostDirs", [{"name": "a", "path": "/b", "ro": True}, {"name": "c", "path": "/d"}]),
    ],
)  # fmt: skip
def test_known_flags_of_create_vm_become_fields(flags: str, field: str, value: object) -> None:
    assert specification(make_parser("create").parse_args(["vm", "n", *flags.split()]))[field] == value


def flag_of(field: str) -> str:
    """Return the option for a field: `--default-ttl` for defaultTTLSeconds."""
    name = field.removesuffix("Seconds").removesuffix("GB")
    return "--" + re.sub("[A-Z]+", lambda found: f"-{found[0].lower()}", name)


def test_each_number_may_be_0_as_in_the_api(dev: Path, api: ControllerConnection) -> None:
    numbers, settings = (
        {field.json for field in attrs_of(cls) if field.type is int} for cls in (VMSpec, ClusterSettings)
    )
    worker = api.fetch_list("/workers")[0]["name"]
    for words, fields in (
        ("create vm vm", numbers),
        ("update vm vm", numbers - {"startupTimeoutSeconds"}),
        ("set cluster-settings", settings),
        (f"drain worker {worker}", {"deadline"}),
        (f"drain worker {worker} --cancel", set()),
    ):
        flags = [word for field in fields for word in (flag_of(field), "0")]
        assert call_main(main, *words.split(), *flags, home=dev) == (0, "", "")
    vm = api.fetch("GET", "/vms/vm")
    assert {field: vm.get(field, 0) for field in numbers} == dict.fromkeys(numbers, 0)


def test_defaults_of_create_vm_are_known() -> None:
    read = specification(make_parser("create").parse_args(["vm", "n"]))
    assert read == {
        "name": "n",
        "image": "ghcr.io/cirruslabs/macos-tahoe-base:latest",
        "cpu": 4,
        "memory": 8192,
        "headless": True,
    }


IGNORED = (
    "--experimental-disable-db-compression",
    "--no-experimental-rpc-v2",
    "--listen-pprof",
    "--exec-session-retention-ttl",
    "--exec-ssh-connection-keepalive-interval",
)


def test_controller_says_which_flags_have_no_effect_and_becomes_the_default_context(tmp_path: Path) -> None:
    flags = [word for flag in IGNORED for word in (flag, *(["1m"] if flag in IGNORED[2:] else []))]
    env = {"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": "a-token"}
    with started(
        "", CONTROLLER, "run", "-l", "127.0.0.1:0", "--listen-pprof", "x", *flags, home=tmp_path, env=env
    ) as role:
        url = role.wait_for(LISTENING)[1]
        said = role.log_lines()[: len(IGNORED)]
        assert sorted(line.split()[2] for line in said) == sorted(IGNORED)
        contexts = read_contexts(tmp_path / ORCHARD / "orchard.yml")
        assert contexts.default == "bootstrap-context"
        context = contexts.find(contexts.default)
        assert (context.url, context.account, context.token) == (url, "bootstrap-admin", "a-token")
        assert call_main(main, "list", "workers", "-q", home=tmp_path) == (0, "", "")
        assert role.stop() == 0


def test_first_start_of_a_controller_stores_its_context_beside_others(tmp_path: Path) -> None:
    path = tmp_path / ORCHARD / "orchard.yml"
    mine = Context("https://elsewhere:6120", None, "me", "mine")
    write_contexts(path, Contexts("mine", {"mine": mine}))
    with started("", CONTROLLER, "run", "--listen", "127.0.0.1:0", home=tmp_path) as role:
        url = role.wait_for(LISTENING)[1]
        contexts = read_contexts(path)
        assert (contexts.default, contexts.find("mine")) == ("mine", mine)
        assert contexts.find("bootstrap-context").url == url
        words = ("get", "bootstrap-token", "bootstrap-admin", "--context", "bootstrap-context")
        assert call_main(main, *words, home=tmp_path)[0] == 0
        role.stop()
    # Of another start, the command would not know the token.
    with started("", CONTROLLER, "run", "--listen", "127.0.0.1:0", home=tmp_path) as role:
        role.wait_for(LISTENING)
        assert read_contexts(path) == contexts


def test_controller_runs_where_no_context_can_be_stored(tmp_path: Path) -> None:
    (tmp_path / ORCHARD).mkdir()
    (tmp_path / ORCHARD / "orchard.yml").mkdir()
    with started("", CONTROLLER, "run", "--listen", "127.0.0.1:0", home=tmp_path) as role:
        role.wait_for(LISTENING)
        (line,) = [line for line in role.log_lines() if line.startswith("orchard:")]
        assert "bootstrap-context" in line


def test_dev_serves_as_its_flags_say_and_writes_its_ready_file(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    flags = (
        "--data-dir",
        str(tmp_path / "data"),
        "--resources",
        "gpu=1",
        "--api-prefix",
        "/p",
        "--ready-file",
        str(ready),
    )
    with started("", "dev", "--synthetic", "--port", "0", *flags, home=tmp_path) as role:
        role.wait_for(re.compile("Any program on this host"))
        at_last(ready.exists)
        url = json.loads(ready.read_text())["url"]
        assert url.endswith("/p")
        context = read_contexts(tmp_path / ORCHARD / "orchard.yml").find("local-dev")
        assert context.url == url
        with ControllerConnection(context) as api:
            (worker,) = api.call("GET", "/workers")
            assert worker["resources"] == {"gpu": 1, "org.cirruslabs.tart-vms": 2}
        assert (tmp_path / "data" / "controller").is_dir()
        assert role.stop() == 0
    nowhere = str(tmp_path / "none" / "ready")
    again = ("--directory", str(tmp_path / "data"), "--ready-file", nowhere)
    failed = finished("", "dev", "--synthetic", "--port", "0", *again, home=tmp_path)
    assert failed.returncode == 1
    assert nowhere in failed.stderr


@pytest.mark.slow
def test_pause_waits_for_the_vms_of_a_worker(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    assert call_main(main, "wait", "vm", "vm", home=dev)[0] == 0
    # A failed VM stays on its worker until it is deleted, and uses nothing there.
    api.call("POST", "/vms", body={"name": "failed", "image": "pull-fails"})
    assert call_main(main, "wait", "vm", "failed", "--for", "failed", home=dev)[0] == 0
    try:
        status, _, said = call_main(main, "pause", "worker", "worker-1", "--wait", "1", home=dev)
        assert (status, "1 VMs" in said) == (124, True)
        assert call_main(main, "delete", "vm", "vm", home=dev)[0] == 0
        assert call_main(main, "pause", "worker", "worker-1", "--wait", "60", home=dev) == (0, "", "")
        assert api.call("GET", "/workers/worker-1")["scheduling_paused"] is True
    finally:
        assert call_main(main, "resume", "worker", "worker-1", home=dev) == (0, "", "")
        assert call_main(main, "delete", "vm", "failed", home=dev)[0] == 0
