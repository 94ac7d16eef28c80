"""The verbs update, apply, set and rotate, and the deletion of all VMs that match, against a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.processes import ORCHARD, call_main, finished

from orchard.cli.changes import is_changed
from orchard.cli.connection import ControllerConnection
from orchard.cli.context import Context, Contexts, read_contexts, write_contexts
from orchard.cli.main import main, make_parser
from orchard.codec import attrs_of
from orchard.schema import ClusterSettings


def run(dev: Path, *words: str) -> list[str]:
    status, out, err = call_main(main, *words, home=dev)
    assert (status, err) == (0, "")
    return out.splitlines()


def test_fields_of_a_vm_are_changed_and_removed(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i", "metadata": {"a": "1", "b": "2"}, "ttlSeconds": 900})
    words = [
        "--ttl",
        "2h",
        "--metadata",
        "a=,c=3",
        "--priority",
        "7",
        "--cpu",
        "6",
        "--net-softnet",
        "true",
        "--net-softnet-allow",
        "10.0.0.0/8,@host",
    ]
    assert run(dev, "update", "vm", "vm", *words) == []
    vm = api.call("GET", "/vms/vm")
    assert {
        name: vm[name] for name in ("ttlSeconds", "metadata", "priority", "cpu", "netSoftnetAllow", "generation")
    } == {
        "ttlSeconds": 7200,
        "metadata": {"b": "2", "c": "3"},
        "priority": 7,
        "cpu": 6,
        "netSoftnetAllow": ["10.0.0.0/8", "@host"],
        "generation": 1,
    }
    assert run(dev, "update", "vm", "vm", "--ttl", "none") == []
    assert "expiresAt" not in api.call("GET", "/vms/vm")
    assert call_main(main, "update", "vm", "vm", home=dev)[0] == 2
    assert call_main(main, "update", "vm", "vm", "--nested", "perhaps", home=dev)[0] == 2
    assert call_main(main, "update", "vm", "none", "--cpu", "2", home=dev)[0] == 1


def test_file_of_vms_is_applied(dev: Path, api: ControllerConnection, tmp_path: Path) -> None:
    file = tmp_path / "vms.json"
    vms: list[dict[str, object]] = [{"name": "a", "image": "i"}, {"name": "b", "image": "i", "metadata": {"k": "v"}}]
    file.write_text(json.dumps(vms))
    assert run(dev, "apply", "-f", str(file)) == ["vm/a created", "vm/b created"]
    vms[1]["metadata"] = {"k": "w"}
    done = finished("", "apply", "-f", "-", home=dev, stdin=json.dumps(vms))
    assert (done.returncode, done.stdout.splitlines()) == (0, ["vm/a unchanged", "vm/b changed"])
    assert api.call("GET", "/vms/b")["metadata"] == {"k": "w"}


def test_vm_whose_state_changes_meanwhile_is_unchanged() -> None:
    before = {"name": "a", "cpu": 4, "status": "pending", "version": 1}
    assert not is_changed(["name", "cpu", "memory"], before, {**before, "status": "running", "version": 2})
    assert is_changed(["name", "cpu"], before, {**before, "cpu": 6, "version": 2})


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"image": "i"}]', '{"name": 5}', "[" * 100_000])
def test_file_that_is_not_understood_changes_nothing(
    dev: Path, api: ControllerConnection, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "vms.json"
    file.write_text(text)
    status, out, err = call_main(main, "apply", "-f", str(file), home=dev)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert call_main(main, "apply", "-f", str(tmp_path / "none"), home=dev)[0] == 1
    assert api.call("GET", "/vms") == []


def test_matching_vms_are_deleted_unless_it_is_a_dry_run(dev: Path, api: ControllerConnection) -> None:
    for name, job in (("a", "1"), ("b", "2"), ("c", "1")):
        api.call("POST", "/vms", body={"name": name, "image": "i", "metadata": {"job": job}})
    matching = ("delete", "vms", "--filter", "metadata.job=1")
    assert run(dev, *matching, "--dry-run") == ["a", "c"]
    assert len(api.call("GET", "/vms")) == 3
    assert run(dev, *matching) == ["a", "c"]
    assert [vm["name"] for vm in api.call("GET", "/vms")] == ["b"]
    for words in (
        ("vms",),
        ("vm", "b", "--dry-run"),
        ("vm", "b", "--filter", "name=b"),
        ("workers", "--filter", "name=b"),
    ):
        assert call_main(main, "delete", *words, home=dev)[0] == 2
    assert call_main(main, "delete", "vms", "--filter", "name=", home=dev)[0] == 1
    assert [vm["name"] for vm in api.call("GET", "/vms")] == ["b"]


def test_webhooks_are_read_from_a_file_and_keep_their_secrets(
    dev: Path, api: ControllerConnection, tmp_path: Path
) -> None:
    file = tmp_path / "webhooks.json"
    webhook = {"url": "https://receiver.example/hook", "events": ["vm.failed"], "secret": "a secret of a receiver"}
    try:
        file.write_text(json.dumps([webhook]))
        assert run(dev, "set", "cluster-settings", "--webhooks", str(file)) == []
        # Another setting, and the webhook as it is shown.
        assert run(dev, "set", "cluster-settings", "--min-free-disk", "0") == []
        file.write_text(json.dumps(api.call("GET", "/cluster-settings")["webhooks"]))
        assert run(dev, "set", "cluster-settings", "--webhooks", str(file)) == []
        assert api.call("GET", "/cluster-settings")["webhooks"] == [
            {"url": webhook["url"], "events": webhook["events"]}
        ]
        for text in ("{}", "[", '[{"url": "https://other.example/"}]'):
            file.write_text(text)
            assert call_main(main, "set", "cluster-settings", "--webhooks", str(file), home=dev)[0] == 1
        assert call_main(main, "set", "cluster-settings", "--webhooks", str(tmp_path / "none"), home=dev)[0] == 1
    finally:
        run(dev, "set", "cluster-settings", "--webhooks", "[]")
    assert "webhooks" not in api.call("GET", "/cluster-settings")


def test_settings_that_are_not_named_stay(dev: Path, api: ControllerConnection) -> None:
    before = api.call("GET", "/cluster-settings")
    try:
        words = [
            "--host-dir-policies",
            "/src:ro,/out",
            "--default-ttl",
            "1h",
            "--max-ttl",
            "2h",
            "--min-free-disk",
            "10",
            "--worker-prune",
            "1d",
        ]
        assert run(dev, "set", "cluster-settings", *words) == []
        assert run(dev, "set", "cluster-settings", "--scheduler-profile", "distribute-load", "--default-ttl", "0") == []
        settings = api.call("GET", "/cluster-settings")
        assert settings["hostDirPolicies"] == [{"pathPrefix": "/src", "ro": True}, {"pathPrefix": "/out"}]
        assert (settings["schedulerProfile"], settings["maxTTLSeconds"]) == ("distribute-load", 7200)
        assert (settings.get("defaultTTLSeconds", 0), settings["minFreeDiskGB"]) == (0, 10)
        assert settings["workerPruneSeconds"] == 86_400
        assert call_main(main, "set", "cluster-settings", "--default-ttl", "3h", home=dev)[0] == 1
        assert call_main(main, "set", "cluster-settings", home=dev)[0] == 2
    finally:
        words = ["--max-ttl", "0", "--min-free-disk", "0", "--worker-prune", "0"]
        run(
            dev,
            "set",
            "cluster-settings",
            "--host-dir-policies",
            "",
            "--scheduler-profile",
            before["schedulerProfile"],
            *words,
        )


def test_each_setting_has_an_option() -> None:
    declared = {action.dest for action in make_parser("set")._actions}
    assert {field.json for field in attrs_of(ClusterSettings)} - declared == set()


def test_new_token_of_an_account_replaces_the_one_in_its_contexts(
    dev: Path, api: ControllerConnection, tmp_path: Path
) -> None:
    url = read_contexts(dev / ORCHARD / "orchard.yml").find("local-dev").url
    api.call(
        "POST", "/service-accounts", body={"name": "rotated", "token": "the-token-before", "roles": ["compute:read"]}
    )
    known = {
        "a": Context(url, None, "rotated", "the-token-before"),
        "b": Context(url),
        "c": Context("http://h", None, "rotated", "t"),
    }
    write_contexts(tmp_path / ORCHARD / "orchard.yml", Contexts("b", known))
    (token,) = run(tmp_path, "rotate", "token", "rotated")
    assert api.call("GET", "/service-accounts/rotated")["token"] == token != "the-token-before"
    stored = read_contexts(tmp_path / ORCHARD / "orchard.yml").by_name
    assert [context.token for context in stored.values()] == [token, "", "t"]
    assert call_main(main, "rotate", "token", "none", home=tmp_path)[0] == 1
