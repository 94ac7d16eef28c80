"""Resources: which values are valid, and how an object that a client sends becomes a resource."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from harness.every_field import EVERY_FIELD, EVERY_SETTING
from harness.go_client import GO_FIELDS, GO_SETTINGS, go_vm, without_zeros
from harness.strategies import QUICK, any_vm, failed, json_values, pending, resources, resting, running, spec, vm_json
from hypothesis import given
from hypothesis import strategies as st

from orchard.codec import (
    MAX_UINT,
    InvalidError,
    MalformedError,
    ValidationError,
    attrs_of,
    dump_json,
    parse_json,
)
from orchard.resources.bodies import VMAccessToken, VMReport
from orchard.resources.json_text import encode
from orchard.resources.validation import (
    MAX_PAYLOAD,
    MAX_REPORTED,
    _check_name,
    _merge,
    account_from_client,
    events_from_client,
    patched_account,
    patched_spec,
    replaced_settings,
    replaced_spec,
    report_from_worker,
    vm_from_client,
    worker_from_client,
)
from orchard.schema import (
    MAX_NAME,
    TART_VMS,
    VM,
    ClusterSettings,
    Condition,
    Event,
    HostDir,
    HostDirPolicy,
    ServiceAccount,
    StartupScript,
    VMMeta,
    VMSpec,
    VMState,
    Worker,
    is_allowed,
    vm_from_json,
)
from orchard.transitions import change

MINIMAL = {"name": "vm", "image": "base"}


def created(**fields: Any) -> VMSpec:
    """Return the specification of a VM that a client creates with these fields, which have their JSON names."""
    return vm_from_client({**MINIMAL, **fields}, [])[1]


def refusal_of(call: Callable[[], object]) -> tuple[type[ValidationError], str]:
    with pytest.raises(ValidationError) as refusal:
        call()
    return type(refusal.value), str(refusal.value)


def outcome_of(call: Callable[[], object]) -> ValidationError | None:
    """Return the ValidationError of a call, or None if the call succeeds."""
    try:
        call()
    except ValidationError as refusal:
        return refusal
    return None


# ---- creating -------------------------------------------------------------------------------------------------------


def test_defaults_of_a_new_vm() -> None:
    assert created() == VMSpec(
        image="base",
        image_pull_policy="IfNotPresent",
        restart_policy="Never",
        power_state="running",
        os="darwin",
        arch="arm64",
        runtime="tart",
        username="admin",
        password="admin",
        resources={TART_VMS: 1},
    )
    assert created(username="", password="") == created()


@pytest.mark.parametrize(
    ("fields", "resources"),
    [
        ({}, {TART_VMS: 1}),
        ({"resources": None}, {TART_VMS: 1}),
        ({"resources": {}}, {TART_VMS: 1}),
        ({"resources": {"gpu": 2}}, {"gpu": 2, TART_VMS: 1}),
        ({"resources": {TART_VMS: 2}}, {TART_VMS: 2}),
        ({"resources": {TART_VMS: 0}}, {TART_VMS: 1}),
        ({"os": "", "runtime": ""}, {TART_VMS: 1}),
        ({"OS": "linux", "Resources": {}}, {}),
        ({"os": "linux"}, {}),
        ({"runtime": "vetu"}, {}),
        ({"os": "linux", "resources": {"gpu": 1}}, {"gpu": 1}),
    ],
)
def test_macos_vm_takes_one_tart_vms_resource(fields: dict[str, Any], resources: dict[str, int]) -> None:
    assert created(**fields).resources == resources


def test_every_specification_field_is_read_by_its_json_name() -> None:
    unknown: list[str] = []
    _, read = vm_from_client({**EVERY_FIELD, "name": "vm"}, unknown)
    assert unknown == []
    assert [
        field.json for field in attrs_of(VMSpec) if getattr(read, field.name) == getattr(VMSpec(), field.name)
    ] == []
    assert encode(read) == {**EVERY_FIELD, "net-softnet": True}


CREATE: list[tuple[Any, type[ValidationError], str]] = [
    # Values of the wrong type.
    (None, MalformedError, "the body is null, expected a JSON object"),
    ([], MalformedError, "the body is [], expected a JSON object"),
    ({"image": 5}, MalformedError, "image is 5, expected a string"),
    ({"cpu": "4"}, MalformedError, 'cpu is "4", expected a whole number from 0'),
    ({"cpu": -1}, MalformedError, "cpu is -1, expected a whole number from 0"),
    ({"memory": 1.5}, MalformedError, "memory is 1.5, expected a whole number from 0"),
    ({"diskSize": MAX_UINT + 1}, MalformedError, f"diskSize is {MAX_UINT + 1}, expected a whole number from 0"),
    ({"headless": "yes"}, MalformedError, 'headless is "yes", expected true or false'),
    ({"net-softnet": "yes"}, MalformedError, 'net-softnet is "yes", expected true or false'),
    ({"netSoftnet": 1}, MalformedError, "netSoftnet is 1, expected true or false"),
    ({"resources": {"gpu": -1}}, MalformedError, 'resources["gpu"] is -1, expected a whole number from 0'),
    ({"resources": {"gpu": "1"}}, MalformedError, 'resources["gpu"] is "1", expected a whole number from 0'),
    ({"labels": {"a": 1}}, MalformedError, 'labels["a"] is 1, expected a string'),
    ({"labels": ["a"]}, MalformedError, 'labels is ["a"], expected a JSON object'),
    ({"hostDirs": [5]}, MalformedError, "hostDirs[0] is 5, expected a JSON object"),
    ({"startup_script": "echo"}, MalformedError, "startup_script is a string, expected a JSON object"),
    ({"startup_script": {"env": {"A": 1}}}, MalformedError, 'startup_script.env["A"] is a number, expected a string'),
    # Well-formed values that a rule refuses.
    ({"image": ""}, InvalidError, 'image is "", expected the name of a VM image'),
    ({"image": None}, InvalidError, 'image is "", expected the name of a VM image'),
    (
        {"imagePullPolicy": "Sometimes"},
        InvalidError,
        'imagePullPolicy is "Sometimes", expected one of IfNotPresent, Always',
    ),
    ({"restart_policy": "Always"}, InvalidError, 'restart_policy is "Always", expected one of Never, OnFailure'),
    ({"powerState": "off"}, InvalidError, 'powerState is "off", expected one of running, stopped, suspended'),
    ({"os": "windows"}, InvalidError, 'os is "windows", expected one of darwin, linux'),
    ({"arch": "x86_64"}, InvalidError, 'arch is "x86_64", expected one of arm64, amd64'),
    ({"runtime": "docker"}, InvalidError, 'runtime is "docker", expected one of tart, vetu'),
    ({"powerState": "suspended"}, InvalidError, 'powerState is "suspended"'),
    # Values that a command line could take as an option or as two words.
    ({"image": "--help"}, InvalidError, 'image is "--help", expected no spaces'),
    ({"image": "a b"}, InvalidError, 'image is "a b", expected'),
    ({"image": "a\nb"}, InvalidError, 'image is "a\\nb", expected'),
    ({"image": "a\0"}, InvalidError, 'image is "a\\u0000", expected'),
    ({"username": "-oProxyCommand=sh"}, InvalidError, 'username is "-oProxyCommand=sh", expected'),
    ({"username": "ci\r"}, InvalidError, 'username is "ci\\r", expected'),
    ({"net-bridged": "--nested"}, InvalidError, 'net-bridged is "--nested", expected'),
    ({"net-bridged": "en0,en1"}, InvalidError, 'net-bridged is "en0,en1", expected'),
    ({"password": "secret\n"}, InvalidError, "password has a control character"),
    ({"netSoftnetAllow": ["--nested"]}, InvalidError, 'netSoftnetAllow[0] is "--nested", expected a network such as'),
    ({"netSoftnetAllow": ["10.0.0.0/8", "a"]}, InvalidError, 'netSoftnetAllow[1] is "a", expected a network such as'),
    ({"netSoftnetAllow": ["10.0.0.0/8,0.0.0.0/0"]}, InvalidError, "netSoftnetAllow[0] is"),
    ({"netSoftnetAllow": [""]}, InvalidError, 'netSoftnetAllow[0] is "", expected a network such as'),
    ({"netSoftnetAllow": ["10.0.0.0/33"]}, InvalidError, "netSoftnetAllow[0] is"),
    ({"netSoftnetAllow": ["10.0.0.0/255.0.0.0"]}, InvalidError, "netSoftnetAllow[0] is"),
    (
        {"netSoftnetBlock": ["fe80::%a,0.0.0.0/64"]},
        InvalidError,
        'netSoftnetBlock[0] is "fe80::%a,0.0.0.0/64", expected',
    ),
    ({"labels": {"a": "b\nforged"}}, InvalidError, 'labels["a"] is "b\\nforged", expected no control characters'),
    ({"labels": {"a\x1b[2J": "b"}}, InvalidError, 'labels["a\\u001b[2J"] is "b", expected no control characters'),
    ({"resources": {"gpu\u2028": 1}}, InvalidError, 'resources["gpu\\u2028"] is 1, expected no control characters'),
    # Environment variables.
    ({"startup_script": {"env": {"": "x"}}}, InvalidError, 'startup_script.env has the name "", expected'),
    ({"startup_script": {"env": {"1A": "x"}}}, InvalidError, 'startup_script.env has the name "1A", expected'),
    ({"startup_script": {"env": {"A-B": "x"}}}, InvalidError, 'startup_script.env has the name "A-B", expected'),
    (
        {"startup_script": {"env": {"A=b; rm": "x"}}},
        InvalidError,
        'startup_script.env has the name "A=b; rm", expected',
    ),
    ({"startup_script": {"env": {"A\n": "x"}}}, InvalidError, 'startup_script.env has the name "A\\n", expected'),
    ({"startup_script": {"env": {"Ä": "x"}}}, InvalidError, "startup_script.env has the name"),
    ({"startup_script": {"env": {"A": "\0"}}}, InvalidError, 'startup_script.env["A"] has a NUL character'),
    (
        {"startup_script": {"script_content": "a\0b"}},
        InvalidError,
        "startup_script.script_content has a NUL character",
    ),
    ({"shutdown_script": {"env": {"A-B": "x"}}}, InvalidError, 'shutdown_script.env has the name "A-B", expected'),
    (
        {"shutdown_script": {"script_content": "a\0"}},
        InvalidError,
        "shutdown_script.script_content has a NUL character",
    ),
    ({"shutdown_script": "sync"}, MalformedError, "shutdown_script is a string, expected a JSON object"),
    (
        {"startup_script": {"transport": "telnet"}},
        InvalidError,
        'startup_script.transport is "telnet", expected one of ssh, tart-guest-agent',
    ),
    (
        {"startup_script": {"transport": "tart-guest-agent"}, "os": "linux", "runtime": "vetu"},
        InvalidError,
        'startup_script.transport is "tart-guest-agent", expected "ssh" with the runtime vetu',
    ),
    ({"startupOnFailure": "ignore"}, InvalidError, 'startupOnFailure is "ignore", expected one of fail, keep'),
    # Metadata and preferred labels.
    ({"metadata": {"a": 1}}, MalformedError, 'metadata["a"] is 1, expected a string'),
    ({"metadata": ["a"]}, MalformedError, 'metadata is ["a"], expected a JSON object'),
    ({"metadata": {"": "a"}}, InvalidError, 'metadata has the key "", expected'),
    ({"metadata": {"a b": "c"}}, InvalidError, 'metadata has the key "a b", expected'),
    ({"metadata": {"a\n": "c"}}, InvalidError, 'metadata["a\\n"] is "c", expected no control characters'),
    ({"metadata": {"\u00e4": "c"}}, InvalidError, 'metadata has the key "\\u00e4", expected'),
    ({"metadata": {"k" * 129: "c"}}, InvalidError, "metadata has the key"),
    ({"metadata": {"a": "b\tc"}}, InvalidError, 'metadata["a"] is "b\\tc", expected no control characters'),
    ({"metadata": {"a": "b" * 1025}}, InvalidError, 'metadata["a"] has 1025 characters, expected at most 1024'),
    (
        {"metadata": {f"k{number}": "" for number in range(65)}},
        InvalidError,
        "metadata has 65 items, expected at most 64",
    ),
    (
        {"metadata": {f"k{number:02}": "\u20ac" * 683 for number in range(8)}},
        InvalidError,
        "metadata has 16416 bytes of keys and values, expected at most 16384",
    ),
    ({"preferredLabels": {"a": "b\n"}}, InvalidError, 'preferredLabels["a"] is "b\\n", expected no control characters'),
    # Directories of the host.
    ({"hostDirs": [{"path": "/a"}]}, InvalidError, "hostDirs[0].name is missing"),
    ({"hostDirs": [{"name": "a"}]}, InvalidError, "hostDirs[0].path is missing"),
    (
        {"hostDirs": [{"name": "a", "path": "/a"}, {"name": "a", "path": "/b"}]},
        InvalidError,
        'hostDirs[1].name is "a", expected',
    ),
    ({"hostDirs": [{"name": "a:/etc", "path": "/a"}]}, InvalidError, 'hostDirs[0].name is "a:/etc", expected'),
    ({"hostDirs": [{"name": "a,b", "path": "/a"}]}, InvalidError, 'hostDirs[0].name is "a,b", expected no commas'),
    ({"hostDirs": [{"name": "a/b", "path": "/a"}]}, InvalidError, 'hostDirs[0].name is "a/b", expected'),
    ({"hostDirs": [{"name": "..", "path": "/a"}]}, InvalidError, 'hostDirs[0].name is "..", expected'),
    ({"hostDirs": [{"name": "-a", "path": "/a"}]}, InvalidError, 'hostDirs[0].name is "-a", expected'),
    (
        {"hostDirs": [{"name": "a\n", "path": "/a"}]},
        InvalidError,
        'hostDirs[0].name is "a\\n", expected no commas or control',
    ),
    ({"hostDirs": [{"name": "a", "path": "a"}]}, InvalidError, 'hostDirs[0].path is "a", expected an absolute path'),
    (
        {"hostDirs": [{"name": "a", "path": "~/a"}]},
        InvalidError,
        'hostDirs[0].path is "~/a", expected an absolute path',
    ),
    (
        {"hostDirs": [{"name": "a", "path": "/a:rw"}]},
        InvalidError,
        'hostDirs[0].path is "/a:rw", expected an absolute path',
    ),
    (
        {"hostDirs": [{"name": "a", "path": "/a,/etc"}]},
        InvalidError,
        'hostDirs[0].path is "/a,/etc", expected no commas',
    ),
    ({"hostDirs": [{"name": "a", "path": "/a\0"}]}, InvalidError, 'hostDirs[0].path is "/a\\u0000", expected'),
    ({"hostDirs": [{"name": "a", "path": "http://a/b"}]}, InvalidError, 'hostDirs[0].path is "http://a/b", expected'),
    ({"hostDirs": [{"name": "a", "path": "HTTPS://a/b"}]}, InvalidError, 'hostDirs[0].path is "HTTPS://a/b", expected'),
    ({"hostDirs": [{"name": "a", "path": "file:///etc"}]}, InvalidError, 'hostDirs[0].path is "file:///etc", expected'),
    (
        {"hostDirs": [{"name": "a", "path": "https://a/b:tag=c"}]},
        InvalidError,
        'hostDirs[0].path is "https://a/b:tag=c"',
    ),
    ({"hostDirs": [{"name": "a", "path": "https://u:p@a/b"}]}, InvalidError, 'hostDirs[0].path is "https://u:p@a/b"'),
    ({"hostDirs": [{"name": "a", "path": "https:///b"}]}, InvalidError, 'hostDirs[0].path is "https:///b", expected'),
    ({"hostDirs": [{"name": "a", "path": "https://./b"}]}, InvalidError, 'hostDirs[0].path is "https://./b", expected'),
]


@pytest.mark.parametrize(("fields", "kind", "words"), CREATE, ids=[json.dumps(row[0])[:60] for row in CREATE])
def test_invalid_new_vm_is_refused(fields: Any, kind: type[ValidationError], words: str) -> None:
    raw = {**MINIMAL, **fields} if isinstance(fields, dict) else fields
    refused = refusal_of(lambda: vm_from_client(raw, []))
    assert refused[0] is kind
    assert words in refused[1]
    assert "secret" not in refused[1]
    # PUT and PATCH apply the same rules.
    if isinstance(fields, dict) and fields.get("image") is not None:
        assert refusal_of(lambda: replaced_spec(spec(), raw, [])) == refused
    if isinstance(fields, dict):
        assert refusal_of(lambda: patched_spec(spec(), fields, [])) == refused


BOUNDED = {field.json: field.maximum for field in attrs_of(VMSpec) if field.maximum != MAX_UINT}


def test_bounds_of_a_vms_numbers_are_those_of_the_contract() -> None:
    assert BOUNDED == {
        "startupTimeoutSeconds": 86_400,
        "shutdownTimeoutSeconds": 600,
        "ttlSeconds": 31_536_000,
        "pendingTimeoutSeconds": 604_800,
        "priority": 1000,
    }


@pytest.mark.parametrize("field", BOUNDED)
def test_number_outside_of_its_bounds_breaks_a_rule(field: str) -> None:
    most = BOUNDED[field]
    for value in (0, 1, most, float(most), None):
        vm_from_client({**MINIMAL, field: value}, [])
        patched_spec(created(), {field: value}, [])
    for value in (-1, most + 1, MAX_UINT + 1, float(most + 1)):
        for read in (
            partial(vm_from_client, {**MINIMAL, field: value}),
            partial(patched_spec, created(), {field: value}),
        ):
            kind, message = refusal_of(partial(read, []))
            assert kind is InvalidError, value
            assert field in message
            assert f"from 0 to {most}" in message
    wrong: object
    for wrong in (0.5, "1", True, [], {}):
        assert refusal_of(partial(vm_from_client, {**MINIMAL, field: wrong}, []))[0] is MalformedError


def test_largest_metadata_are_accepted() -> None:
    metadata = {"k" * 128: "\u20ac" * 1024, **{f"Az09._/-{number:02}": "v" * 150 for number in range(63)}}
    assert created(metadata=metadata).metadata == metadata


def test_host_dir_path_may_be_an_archive_url() -> None:
    for path in ("https://example.com/a.tar.gz", "https://example.com:8443/a/b.tar.gz", "https://example.com"):
        assert created(hostDirs=[{"name": "a", "path": path}]).host_dirs == (HostDir("a", path),)


@pytest.mark.parametrize("name", ["a", "A.b_c-d:e", "0", "...", "-", "a" * MAX_NAME])
def test_valid_names_are_accepted(name: str) -> None:
    _check_name("name", name)


@pytest.mark.parametrize("name", ["", ".", "..", "a b", "a/b", "a\n", "ä", "a%2f", "a?", "a\0", "a" * (MAX_NAME + 1)])
def test_invalid_names_are_refused(name: str) -> None:
    kind, message = refusal_of(lambda: _check_name("name", name))
    assert kind is InvalidError
    assert message.startswith("name is ")
    assert f"expected 1 to {MAX_NAME} characters of A-Z a-z 0-9 : _ . -" in message


def test_name_of_a_new_vm_is_required_and_a_string() -> None:
    assert vm_from_client({**MINIMAL, "name": "other", "uid": 5}, [])[0] == "other"
    for raw in ({"image": "base"}, {"image": "base", "name": None}, {"image": "base", "name": ""}):
        assert refusal_of(lambda raw=raw: vm_from_client(raw, []))[0] is InvalidError  # type: ignore[misc]
    wrongs: list[object] = [5, 0, False, []]
    for name in wrongs:
        kind, message = refusal_of(lambda name=name: vm_from_client({**MINIMAL, "name": name}, []))  # type: ignore[misc]
        assert kind is MalformedError
        assert message.startswith("name is ")


# ---- the two names of netSoftnet ------------------------------------------------------------------------------------

TWINS: list[tuple[dict[str, Any], bool, bool]] = [
    # Body, then the result for a VM without Softnet, and for a VM with it.
    ({"netSoftnet": True}, True, True),
    ({"net-softnet": True}, True, True),
    ({"netSoftnet": True, "net-softnet": True}, True, True),
    ({"netSoftnet": False}, False, False),
    ({"net-softnet": False}, False, False),
    ({"netSoftnet": False, "net-softnet": False}, False, False),
    ({"netSoftnet": None, "net-softnet": True}, True, True),
    ({"netSoftnet": True, "net-softnet": None}, True, True),
    ({"netSoftnet": None, "net-softnet": None}, False, False),
    # A client changed one of the two in an object that it had read. The changed one counts.
    ({"netSoftnet": True, "net-softnet": False}, True, False),
    ({"netSoftnet": False, "net-softnet": True}, True, False),
]
WITH, WITHOUT = spec(net_softnet=True), spec(net_softnet=False)


@pytest.mark.parametrize(("body", "was_off", "was_on"), TWINS, ids=[json.dumps(row[0]) for row in TWINS])
def test_netsoftnet_and_its_twin_set_each_other(body: dict[str, Any], was_off: bool, was_on: bool) -> None:
    assert created(**body).net_softnet is was_off
    for change_spec in (replaced_spec, patched_spec):
        assert change_spec(WITHOUT, body, []).net_softnet is was_off
        assert change_spec(WITH, body, []).net_softnet is was_on


def test_absent_netsoftnet_is_false_in_put_and_unchanged_in_patch() -> None:
    assert created().net_softnet is False
    assert replaced_spec(WITH, {}, []).net_softnet is False
    assert patched_spec(WITH, {}, []).net_softnet is True
    assert patched_spec(WITHOUT, {}, []).net_softnet is False


@pytest.mark.parametrize("field", ["netSoftnetAllow", "netSoftnetBlock"])
def test_allow_and_block_lists_turn_softnet_on(field: str) -> None:
    networks = {field: ["10.0.0.0/8"]}
    for body in (networks, {**networks, "netSoftnet": False}, {**networks, "net-softnet": False}):
        assert created(**body).net_softnet is True
        assert replaced_spec(WITHOUT, body, []).net_softnet is True
        assert patched_spec(WITHOUT, body, []).net_softnet is True
    assert created(**{field: []}).net_softnet is False
    listed = created(**networks)
    assert patched_spec(listed, {field: []}, []).net_softnet is True
    assert replaced_spec(listed, {}, []).net_softnet is False


@pytest.mark.parametrize("body", [row[0] for row in TWINS[:9]], ids=[json.dumps(row[0]) for row in TWINS[:9]])
def test_put_and_patch_are_idempotent(body: dict[str, Any]) -> None:
    for change_spec in (replaced_spec, patched_spec):
        for old in (WITH, WITHOUT):
            once = change_spec(old, body, [])
            assert change_spec(once, body, []) == once


TWO_LINES: dict[str, Any] = {field.json: "a\n--b" for field in attrs_of(VMSpec) if field.type is str} | {
    field.json: {"a\n--b": next(iter(EVERY_FIELD[field.json].values()))}
    for field in attrs_of(VMSpec)
    if typing.get_origin(field.type) is Mapping
}


@pytest.mark.parametrize("field", TWO_LINES)
def test_no_text_of_a_vm_has_two_lines(field: str) -> None:
    """The second one could be taken for another line of a log, or for an option of a command."""
    with pytest.raises(InvalidError, match=f"^{field}"):
        created(**{field: TWO_LINES[field]})


# ---- PUT ------------------------------------------------------------------------------------------------------------

FULL = created(
    cpu=8,
    memory=16384,
    diskSize=100,
    imagePullPolicy="Always",
    netSoftnetAllow=["10.0.0.0/8"],
    netSoftnetBlock=["0.0.0.0/0"],
    headless=True,
    nested=True,
    suspendable=True,
    randomSerial=True,
    username="ci",
    password="pw",
    startup_script={"script_content": "echo", "env": {"A": "b"}},
    restart_policy="OnFailure",
    labels={"model": "macstudio"},
    hostDirs=[{"name": "src", "path": "/src"}],
    powerState="suspended",
    **{"net-bridged": "en0"},
)


def test_put_zeroes_absent_booleans_and_lists_and_keeps_the_rest() -> None:
    for absent in ({"powerState": "stopped"}, {"powerState": "stopped", **dict.fromkeys(["headless", "cpu"])}):
        put = replaced_spec(FULL, absent, [])
        assert put == replace(
            FULL,
            power_state="stopped",
            net_softnet=False,
            net_softnet_allow=(),
            net_softnet_block=(),
            headless=False,
            nested=False,
            suspendable=False,
            random_serial=False,
            host_dirs=(),
        )


@pytest.mark.slow
@QUICK
@given(any_vm())
def test_put_of_an_object_as_go_writes_it_changes_nothing(vm: VM) -> None:
    valid = replace(vm, spec=replace(FULL, headless=vm.spec.headless, cpu=vm.spec.cpu, nested=vm.spec.nested))
    body = without_zeros(vm_json(valid))
    assert replaced_spec(valid.spec, body, []) == valid.spec


EVERY = created(**EVERY_FIELD)
# The fields of a specification that existing Go clients do not know.
NEW_FIELDS = {field.name for field in attrs_of(VMSpec) if field.json not in GO_FIELDS}


@pytest.mark.parametrize("transport", ["", "ssh", "tart-guest-agent"])
def test_put_of_a_go_client_loses_no_field_that_it_does_not_know(transport: Any) -> None:
    script = StartupScript("echo", {"A": "b"}, transport)
    vm = VM(VMMeta("vm"), replace(EVERY, runtime="tart", startup_script=script), VMState())
    assert all(getattr(vm.spec, name) for name in NEW_FIELDS)
    body = go_vm(vm_json(vm))
    assert replaced_spec(vm.spec, body, []) == vm.spec
    # Together with a change of what it does know.
    assert replaced_spec(vm.spec, {**body, "cpu": 3}, []) == replace(vm.spec, cpu=3)


@pytest.mark.parametrize(
    ("old", "new", "put", "patched"),
    [
        ("", None, "", ""),
        ("ssh", None, "ssh", "ssh"),
        ("tart-guest-agent", None, "tart-guest-agent", "tart-guest-agent"),
        ("", "ssh", "", ""),
        ("ssh", "", "ssh", "ssh"),
        ("tart-guest-agent", "", "tart-guest-agent", ""),
        ("tart-guest-agent", "ssh", "ssh", "ssh"),
        ("", "tart-guest-agent", "tart-guest-agent", "tart-guest-agent"),
    ],
)
def test_transport_of_a_startup_script_is_kept_unless_another_one_is_named(
    old: Any, new: str | None, put: str, patched: str
) -> None:
    spec = created(startup_script={"script_content": "echo", "env": {"A": "b"}, "transport": old})
    script = {"script_content": "echo", "env": {"A": "b"}} | ({} if new is None else {"transport": new})
    assert replaced_spec(spec, {"startup_script": script}, []).startup_script == StartupScript("echo", {"A": "b"}, put)  # type: ignore[arg-type]
    changed = patched_spec(spec, {"startup_script": script}, []).startup_script
    assert changed == StartupScript("echo", {"A": "b"}, patched)  # type: ignore[arg-type]


def test_put_replaces_maps_that_patch_merges() -> None:
    spec = created(metadata={"a": "1", "b": "2"}, preferredLabels={"c": "3", "d": "4"})
    change = {"metadata": {"a": "5"}, "preferredLabels": {"d": "6"}}
    put = replaced_spec(spec, change, [])
    assert (put.metadata, put.preferred_labels) == ({"a": "5"}, {"d": "6"})
    assert replaced_spec(spec, {"metadata": {}}, []).metadata == {}
    merged = patched_spec(spec, {**change, "metadata": {"a": "5", "b": None, "new": "7"}}, [])
    assert (merged.metadata, merged.preferred_labels) == ({"a": "5", "new": "7"}, {"c": "3", "d": "6"})


@pytest.mark.parametrize("field", sorted(NEW_FIELDS))
def test_null_resets_a_new_field_in_patch_and_is_absent_in_put(field: str) -> None:
    zero = getattr(VMSpec(image="base"), field)
    null: dict[str, Any] = {next(each.json for each in attrs_of(VMSpec) if each.name == field): None}
    assert replaced_spec(EVERY, {**EVERY_FIELD, **null}, []) == EVERY
    assert patched_spec(EVERY, null, []) == replace(EVERY, **{field: zero})


def test_put_sets_fields_to_explicit_zero_values() -> None:
    body = {**encode(FULL), "net-bridged": "", "cpu": 0, "labels": {}, "startup_script": {"script_content": "new"}}
    expected = replace(FULL, net_bridged="", cpu=0, labels={}, startup_script=StartupScript("new"))
    assert replaced_spec(FULL, body, []) == expected


def test_put_does_not_add_the_default_resource() -> None:
    without = replace(FULL, resources={})
    assert replaced_spec(without, encode(without), []).resources == {}


# ---- PATCH ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    # RFC 7396, appendix A.
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_test_vectors_of_rfc_7396(target: Any, patch: Any, result: Any) -> None:
    before = json.dumps([target, patch])
    assert _merge(target, patch) == result
    assert json.dumps([target, patch]) == before


@pytest.mark.parametrize(
    ("patch", "changed"),
    [
        ({}, {}),
        ({"cpu": 2}, {"cpu": 2}),
        ({"cpu": None}, {"cpu": 0}),
        ({"headless": False}, {"headless": False}),
        ({"headless": None}, {"headless": False}),
        ({"hostDirs": None}, {"host_dirs": ()}),
        ({"hostDirs": []}, {"host_dirs": ()}),
        ({"hostDirs": [{"name": "o", "path": "/o"}]}, {"host_dirs": (HostDir("o", "/o"),)}),
        ({"labels": {"zone": "a"}}, {"labels": {"model": "macstudio", "zone": "a"}}),
        ({"labels": {"model": None}}, {"labels": {}}),
        ({"labels": None}, {"labels": {}}),
        ({"resources": {"gpu": 1}}, {"resources": {TART_VMS: 1, "gpu": 1}}),
        ({"startup_script": None}, {"startup_script": None}),
        ({"startup_script": {"env": {"A": None}}}, {"startup_script": StartupScript("echo", {})}),
        ({"startup_script": {"env": {"B": "c"}}}, {"startup_script": StartupScript("echo", {"A": "b", "B": "c"})}),
        ({"startup_script": {"script_content": "x"}}, {"startup_script": StartupScript("x", {"A": "b"})}),
        ({"username": None}, {"username": "admin"}),
        ({"net-bridged": None}, {"net_bridged": ""}),
        ({"powerState": None}, {"power_state": "running"}),
        ({"netSoftnetAllow": ["10.1.0.0/16"]}, {"net_softnet_allow": ("10.1.0.0/16",)}),
    ],
)
def test_patch_changes_only_the_named_fields(patch: dict[str, Any], changed: dict[str, Any]) -> None:
    assert patched_spec(FULL, patch, []) == replace(FULL, **changed)


@pytest.mark.parametrize("patch", [None, [], "x", 5, [{"cpu": 1}]])
def test_patch_must_be_an_object(patch: object) -> None:
    assert refusal_of(lambda: patched_spec(FULL, patch, []))[0] is MalformedError


@pytest.mark.parametrize(
    ("patch", "kind", "words"),
    [
        ({"image": None}, InvalidError, 'image is "", expected'),
        ({"labels": "x"}, MalformedError, 'labels is "x", expected a JSON object'),
        ({"resources": {"gpu": "x"}}, MalformedError, 'resources["gpu"] is "x", expected a whole number'),
        ({"suspendable": False}, InvalidError, 'powerState is "suspended"'),
    ],
)
def test_invalid_patch_is_refused(patch: object, kind: type[ValidationError], words: str) -> None:
    refused = refusal_of(lambda: patched_spec(FULL, patch, []))
    assert refused[0] is kind
    assert words in refused[1]


def test_change_leaves_the_old_specification_unmodified() -> None:
    before = dump_json(encode(FULL))
    patched_spec(FULL, {"labels": {"model": None, "a": "b"}, "startup_script": {"env": {"A": None}}}, [])
    replaced_spec(FULL, {"labels": {"a": "b"}, "powerState": "stopped"}, [])
    assert dump_json(encode(FULL)) == before


# ---- whole objects, read-only and unknown fields --------------------------------------------------------------------

FORGED = {
    "name": "another",
    "uid": "another",
    "createdAt": "0001-01-01T00:00:00Z",
    "version": 1e6,
    "generation": 99,
    "status": "failed",
    "status_message": "forged",
    "worker": "another",
    "assignedCPU": 99,
    "assignedMemory": 99,
    "scheduled_at": "not even a time",
    "started_at": "0001-01-01T00:00:00Z",
    "restarted_at": None,
    "restart_count": -1,
    "image_fqn": "forged",
    "observedGeneration": 99,
    "conditions": [{"type": "no such"}, 7],
    "localName": "forged",
    "tartName": 5,
    "createdBy": "another",
    "expiresAt": "2000-01-01T00:00:00Z",
    "startupExitCode": 99,
    "startupEndedAt": "not even a time",
    "waitingSince": "2000-01-01T00:00:00Z",
    "endRequest": "restart",
    "endedAt": 7,
}
LIVES = {
    "pending": pending(),
    "running": running(pending(restart_policy="OnFailure")),
    "resting": resting(pending()),
    "failed": failed(pending()),
}


@pytest.mark.parametrize("vm", LIVES.values(), ids=LIVES)
@pytest.mark.parametrize("change_spec", [replaced_spec, patched_spec])
def test_changed_read_only_fields_are_ignored(
    vm: VM, change_spec: Callable[[VMSpec, object, list[str]], VMSpec]
) -> None:
    for body in (vm_json(vm), {**vm_json(vm), **FORGED}, {**without_zeros(vm_json(vm)), **FORGED}):
        unknown: list[str] = []
        assert change(vm, change_spec(vm.spec, body, unknown)) is vm
        assert unknown == []


def test_read_only_fields_of_a_new_vm_are_ignored() -> None:
    read_only = {field.json for part in (VMMeta, VMState) for field in attrs_of(part)}
    assert FORGED.keys() == read_only | {"localName", "tartName"}
    unknown: list[str] = []
    assert vm_from_client({**FORGED, **MINIMAL}, unknown) == ("vm", created())
    assert unknown == []


def test_long_texts_of_workers_are_cut() -> None:
    long = "x" * 100_000
    texts = [field for field in attrs_of(VMReport) if field.type in (str, str | None)]
    seen = report_from_worker({"status": "failed", **{field.json: long for field in texts}}, [])
    for field in texts:
        text = getattr(seen, field.name)
        assert (len(text), text[-4:]) == (MAX_REPORTED, "x..."), field.json
    (event,) = events_from_client([{"kind": "log_line", "payload": long}], [])
    assert (len(event.payload), event.payload[-4:]) == (MAX_PAYLOAD, "x...")
    with pytest.raises(InvalidError, match="10001 items, expected at most 10000"):
        events_from_client([{"kind": "log_line"}] * 10_001, [])


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"startupScript": {}}, ["startupScript, did you mean startup_script?"]),
        ({"endpoints": None, "hostProcesses": [], "netSoftnetExpose": "", "usbAccessories": []}, []),
        ({"observedEndpoints": [{"name": "a"}]}, []),
        ({"netSoftnetExpose": ["22:22"]}, ["netSoftnetExpose, did you mean netSoftnet?"]),
        ({"startup_script": {"script_content": "", "transport": "ssh"}}, []),
        ({"startup_script": {"transport": "tart-guest-agent"}}, []),
    ],
)
def test_fields_of_newer_programs_are_unknown_only_if_they_ask_for_something(
    raw: dict[str, Any], told: list[str]
) -> None:
    for read in (vm_from_client, partial(replaced_spec, spec()), partial(patched_spec, spec())):
        unknown: list[str] = []
        read({**MINIMAL, **raw}, unknown)
        assert unknown == told


def test_nested_names_of_a_patch_are_read_in_any_case() -> None:
    old = spec(startup_script=StartupScript("a", {"B": "c"}))
    unknown: list[str] = []
    patch = {"Startup_Script": {"SCRIPT_CONTENT": "d", "Env": {"b": "e"}}, "HeadLess": True, "Labels": None}
    new = patched_spec(old, patch, unknown)
    assert new == replace(old, startup_script=StartupScript("d", {"B": "c", "b": "e"}), headless=True)
    assert unknown == []


@pytest.mark.parametrize("field", [field.json for field in attrs_of(VMSpec) if field.is_closed_set()])
def test_empty_text_of_a_closed_set_leaves_a_vm_as_it_is(field: str) -> None:
    old = spec(image_pull_policy="Always", restart_policy="OnFailure", os="linux", arch="amd64", runtime="vetu")
    old = replace(old, power_state="stopped")
    assert replaced_spec(old, {field: ""}, []) == old
    assert patched_spec(old, {field: ""}, []) == old
    assert created(**{field: ""}) == created()


def test_audio_and_clipboard_are_left_by_put_and_named_by_patch() -> None:
    old = spec(audio=True)
    assert replaced_spec(old, {"audio": False, "clipboard": True}, []) == old
    assert patched_spec(old, {"clipboard": True}, []) == replace(old, clipboard=True)


def test_secrets_are_not_in_the_repr() -> None:
    secret = "s3cret"
    made = [
        spec(password=secret, startup_script=StartupScript(secret, {"TOKEN": secret})),
        ServiceAccount("ci", secret),
        VMAccessToken(secret),
        Event("log_line", secret),
    ]
    for item in made:
        assert secret not in repr(item)


def test_unknown_fields_are_collected_in_create_put_and_patch() -> None:
    strange = {"sparkle": 1, "startup_script": {"shell": "zsh"}, "hostDirs": [{"name": "a", "path": "/a", "tag": "x"}]}
    names = ["hostDirs[0].tag", "sparkle", "startup_script.shell"]
    reads: list[Callable[[list[str]], object]] = [
        lambda unknown: vm_from_client({**MINIMAL, **strange}, unknown),
        lambda unknown: replaced_spec(spec(), strange, unknown),
        lambda unknown: patched_spec(spec(), strange, unknown),
    ]
    for read in reads:
        unknown: list[str] = []
        read(unknown)
        assert sorted(unknown) == names


@pytest.mark.slow
@QUICK
@given(any_vm())
def test_vm_round_trips_through_json(vm: VM) -> None:
    assert vm_from_json(vm_json(vm)) == vm


@pytest.mark.slow
@QUICK
@given(
    st.dictionaries(st.sampled_from([field.json for field in attrs_of(VMSpec)]) | st.text(), json_values(), max_size=4)
)
def test_arbitrary_objects_are_accepted_or_refused(raw: dict[str, Any]) -> None:
    for read in (
        lambda: vm_from_client(raw, []),
        lambda: replaced_spec(FULL, raw, []),
        lambda: patched_spec(FULL, raw, []),
        lambda: worker_from_client(raw, []),
        lambda: account_from_client(raw, []),
        lambda: report_from_worker(raw, []),
        lambda: replaced_settings(ClusterSettings(), raw, []),
        lambda: events_from_client([raw], []),
    ):
        refusal = outcome_of(read)
        assert refusal is None or "\n" not in str(refusal)


# ---- hostDirs and policies ------------------------------------------------------------------------------------------

ALLOWED = {
    "/allowed": ["/allowed", "/allowed/", "/allowed/a", "//allowed//a", "/allowed/./a", "/./allowed", "/allowed/..."],
    "/allowed/": ["/allowed", "/allowed/a/b"],
    "/a/b": ["/a/b", "/a/b/c"],
    "/": ["/", "/etc"],
    "https://": ["https://example.com/a.tar.gz"],
    "https://example.com": ["https://example.com", "https://example.com/", "https://example.com/a.tar.gz"],
    "https://example.com/a/": ["https://example.com/a", "https://example.com/a/b"],
    "https://example.com:8443/a": ["https://example.com:8443/a/b"],
}
ESCAPES = {
    "/allowed": [
        "/allowed-evil",
        "/allowedevil",
        "/allowe",
        "/Allowed",
        "/ALLOWED/a",
        "/",
        "",
        "allowed",
        "/other/allowed",
        "/allowed/..",
        "/allowed/../etc",
        "/allowed/a/../../etc",
        "/allowed/../allowed/a",
        "/allowed//../etc",
        "/../allowed",
        "https://allowed",
        "/allowed%2fa",
    ],
    "/a/b": ["/a", "/a/bc", "/a/c/b"],
    "https://example.com/a": [
        "https://example.com/b",
        "https://example.com/ab",
        "https://example.com",
        "https://example.com.evil/a",
        "https://example.community/a",
        "https://evil/example.com/a",
        "https://EXAMPLE.com/a",
        "https://example.com:8443/a",
        "https://example.com@evil/a",
        "https://user@example.com/a",
        "https:///example.com/a",
        "https://./example.com/a",
        "https://example.com//a",
        "https://example.com/./a",
        "https://example.com/a/.",
        "https://example.com/a/../b",
        "https://example.com/a/..",
        "https://example.com/a/%2e%2e/b",
        "https://example.com/a/%2E./b",
        "https://example.com/a/.%2e/b",
        "https://example.com/a/..%2fb",
        "https://example.com/a%2F..%2Fb",
        "https://example.com/a%5c..%5Cb",
        "https://example.com/a\\..\\b",
        "https://example.com/a?/../b",
        "https://example.com/a#b",
        "http://example.com/a",
        "HTTPS://example.com/a",
        "/https:/example.com/a",
        "/example.com/a",
    ],
    "https://": ["/etc", "http://example.com"],
    "/": ["https://example.com", "https:/example.com", "etc"],
}


def pairs(table: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    return [(prefix, path) for prefix, paths in table.items() for path in paths]


@pytest.mark.parametrize(("prefix", "path"), pairs(ALLOWED))
def test_policy_covers_paths_below_its_prefix(prefix: str, path: str) -> None:
    assert is_allowed([HostDirPolicy(prefix)], HostDir("a", path))


@pytest.mark.parametrize(("prefix", "path"), pairs(ESCAPES))
def test_policy_does_not_cover_other_paths(prefix: str, path: str) -> None:
    assert not is_allowed([HostDirPolicy(prefix)], HostDir("a", path))


def test_read_only_policy_needs_a_read_only_host_dir() -> None:
    reading, writing = HostDir("a", "/a/b", ro=True), HostDir("a", "/a/b", ro=False)
    assert not is_allowed([], reading)
    assert is_allowed([HostDirPolicy("/a", ro=True)], reading)
    assert not is_allowed([HostDirPolicy("/a", ro=True)], writing)
    assert is_allowed([HostDirPolicy("/a")], reading)
    assert is_allowed([HostDirPolicy("/a", ro=True), HostDirPolicy("/a/b")], writing)
    assert not is_allowed([HostDirPolicy("/a", ro=True), HostDirPolicy("/b")], writing)


# ---- the other resources --------------------------------------------------------------------------------------------


def test_registering_worker_has_defaults_and_cannot_set_created_at() -> None:
    unknown: list[str] = []
    raw = {"name": "mac", "machine_id": "m", "createdAt": "2026-01-31T12:00:00Z", "sparkle": 1, "last_seen": None}
    assert worker_from_client(raw, unknown) == Worker(name="mac", machine_id="m", arch="arm64", runtime="tart")
    assert unknown == ["sparkle"]
    full = {
        "name": "mac",
        "arch": "amd64",
        "runtime": "vetu",
        "resources": {TART_VMS: 2},
        "labels": {"a": "b"},
        "defaultCPU": 2,
        "defaultMemory": 4096,
        "machine_id": "m",
        "last_seen": "2026-01-31T12:00:00Z",
        "scheduling_paused": True,
    }
    assert encode(worker_from_client(full, unknown)) == full
    # The content of /etc/machine-id.
    assert worker_from_client({**full, "machine_id": "0123456789abcdef\n"}, []).machine_id == "0123456789abcdef\n"


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        ({}, InvalidError, 'name is "", expected'),
        ({"name": "a/b"}, InvalidError, 'name is "a/b", expected'),
        ({"name": "w", "arch": "sparc"}, InvalidError, 'arch is "sparc", expected one of'),
        ({"name": "w", "resources": {"a": -1}}, MalformedError, 'resources["a"] is -1'),
        ({"name": "w", "resources": {"a\n": 1}}, InvalidError, 'resources["a\\n"] is 1, expected no control'),
        ({"name": "w", "labels": {"a": "\n"}}, InvalidError, 'labels["a"] is "\\n", expected no control'),
        ({"name": "w", "machine_id": "m" * 1025}, InvalidError, "machine_id has 1025 characters, expected at most"),
        ({"name": "w", "scheduling_paused": 1}, MalformedError, "scheduling_paused is 1, expected true or false"),
        ({"name": "w", "last_seen": "x"}, MalformedError, 'last_seen is "x", expected an RFC 3339 time'),
    ],
)
def test_invalid_worker_is_refused(raw: object, kind: type[ValidationError], words: str) -> None:
    refused = refusal_of(lambda: worker_from_client(raw, []))
    assert refused[0] is kind
    assert words in refused[1]


def test_absent_account_fields_are_kept() -> None:
    old = account_from_client(
        {"name": "ci", "token": "t" * 8, "roles": ["admin:read", "compute:read", "admin:read"]}, []
    )
    assert old == ServiceAccount("ci", "t" * 8, ("admin:read", "compute:read"))
    assert account_from_client({"name": "ci"}, [], base=old) == old
    assert account_from_client({"token": "u" * 8, "createdAt": "x"}, [], base=old) == replace(old, token="u" * 8)
    assert account_from_client({"roles": []}, [], base=old) == replace(old, roles=())
    # Go clients send null for an empty list.
    assert account_from_client({"roles": None}, [], base=old) == old
    assert patched_account({"roles": None}, [], base=old) == replace(old, roles=())
    stored = replace(old, token="short")
    assert account_from_client({"token": "short"}, [], base=stored) == stored


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKf4KBPutqudG6TVh2xybn7EUscXTQFDP27xh3GM9u9b ci"
KEYS = [
    KEY,
    KEY.rpartition(" ")[0],
    "ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQAAAAIbmlz"
    "dHAzODQAAABhBB9HussqmHoOEk8FtV5qjFn5Uq3ATVrJEbG2el9KD4+Vs9Cf"
    "JHFkDeQYC8loYkF2mbU0eV2797a7rrtj0klMjZTx1p/wWxRrdMrbvHjZc80H"
    "J/7vU+sv5fx7VTP8FLebYw== ci",
]


def test_authorized_keys_of_an_account_are_kept_replaced_and_cleared() -> None:
    account = account_from_client({"name": "ci", "authorizedKeys": KEYS}, [])
    assert account.authorized_keys == tuple(KEYS)
    assert account_from_client({"name": "ci"}, [], base=account) == account
    assert account_from_client({"authorizedKeys": KEYS[:1]}, [], base=account).authorized_keys == (KEY,)
    assert account_from_client({"authorizedKeys": []}, [], base=account).authorized_keys == ()
    assert patched_account({"AuthorizedKeys": None}, [], base=account).authorized_keys == ()


@pytest.mark.parametrize(
    "key",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 !",
        "ssh-ed25519 AAAA",
        KEY[:-20],
        KEY.replace("ssh-ed25519", "ssh-rsa"),
        'command="sh" ' + KEY,
        KEY + "\n" + KEY,
        KEY + "x" * 4096,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_text_that_is_no_public_key_is_refused(key: str) -> None:
    kind, words = refusal_of(lambda: account_from_client({"name": "ci", "authorizedKeys": [key]}, []))
    assert kind is InvalidError
    assert words.startswith("authorizedKeys[0] is ")


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        ({}, InvalidError, 'name is "", expected'),
        (
            {"name": "a", "roles": ["root"]},
            InvalidError,
            'roles[0] is "root", expected one of compute:read, compute:write',
        ),
        ({"name": "a", "roles": "admin:read"}, MalformedError, 'roles is "admin:read", expected a list'),
        ({"name": "a", "token": "secret\n"}, InvalidError, "token has 7 characters"),
        ({"name": "a", "token": "secret, \n"}, InvalidError, "token has a control character"),
        ({"name": "a", "authorizedKeys": [KEY] * 17}, InvalidError, "authorizedKeys has 17 items, expected at most 16"),
    ],
)
def test_invalid_account_is_refused(raw: object, kind: type[ValidationError], words: str) -> None:
    refused = refusal_of(lambda: account_from_client(raw, []))
    assert refused[0] is kind
    assert words in refused[1]
    assert "secret" not in refused[1]


def test_put_of_a_go_client_loses_no_setting_that_it_does_not_know() -> None:
    unknown: list[str] = []
    stored = replaced_settings(ClusterSettings(unknown={"newer": 1}), EVERY_SETTING, unknown)
    assert (encode(stored), unknown) == ({**EVERY_SETTING, "newer": 1}, [])
    for field in attrs_of(ClusterSettings):
        assert getattr(stored, field.name) != getattr(ClusterSettings(), field.name), field.json
    known = {name: value for name, value in EVERY_SETTING.items() if name in GO_SETTINGS}
    assert replaced_settings(stored, known, []) == stored
    without = replaced_settings(stored, {}, [])
    assert encode(without) == {**EVERY_SETTING, **encode(ClusterSettings()), "newer": 1}
    assert replaced_settings(stored, {**known, **dict.fromkeys(EVERY_SETTING.keys() - GO_SETTINGS)}, []) == stored


@pytest.mark.parametrize("field", sorted(EVERY_SETTING.keys() - GO_SETTINGS))
def test_zero_or_an_empty_list_clears_a_new_setting(field: str) -> None:
    stored = replaced_settings(ClusterSettings(), EVERY_SETTING, [])
    cleared = replaced_settings(stored, {**EVERY_SETTING, field: [] if field in ("prepull", "webhooks") else 0}, [])
    assert encode(cleared) == {name: value for name, value in EVERY_SETTING.items() if name != field}


def test_settings_have_defaults() -> None:
    assert replaced_settings(ClusterSettings(), {}, []) == ClusterSettings((), "optimize-utilization")
    assert encode(ClusterSettings()) == {"hostDirPolicies": [], "schedulerProfile": "optimize-utilization"}
    unknown: list[str] = []
    raw = {"hostDirPolicies": [{"pathPrefix": "/a", "ro": True, "x": 1}], "schedulerProfile": "distribute-load"}
    assert replaced_settings(ClusterSettings(), raw, unknown) == ClusterSettings(
        (HostDirPolicy("/a", ro=True),), "distribute-load"
    )
    assert unknown == ["hostDirPolicies[0].x"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"schedulerProfile": "random"}, 'schedulerProfile is "random", expected one of optimize-utilization, distri'),
        ({"hostDirPolicies": {}}, "hostDirPolicies is {}, expected a list"),
        ({"hostDirPolicies": [{}]}, 'hostDirPolicies[0].pathPrefix is "", expected an absolute path'),
        ({"hostDirPolicies": [{"pathPrefix": "a"}]}, 'hostDirPolicies[0].pathPrefix is "a", expected an absolute'),
        ({"hostDirPolicies": [{"pathPrefix": "/a/../b"}]}, 'hostDirPolicies[0].pathPrefix is "/a/../b", expected'),
        ({"hostDirPolicies": [{"pathPrefix": "http://a"}]}, 'hostDirPolicies[0].pathPrefix is "http://a", expected'),
        ({"hostDirPolicies": [{"pathPrefix": "/a\n"}]}, 'hostDirPolicies[0].pathPrefix is "/a\\n", expected'),
        (
            {"defaultTTLSeconds": 31_536_001},
            "defaultTTLSeconds is 31536001, expected a whole number from 0 to 31536000",
        ),
        ({"maxTTLSeconds": -1}, "maxTTLSeconds is -1, expected a whole number from 0 to 31536000"),
        (
            {"defaultTTLSeconds": 61, "maxTTLSeconds": 60},
            "maxTTLSeconds is 60, expected at least the defaultTTLSeconds of 61",
        ),
        ({"minFreeDiskGB": "1"}, 'minFreeDiskGB is "1", expected a whole number'),
        ({"workerPruneSeconds": 0.5}, "workerPruneSeconds is 0.5, expected a whole number"),
        ({"prepull": {}}, "prepull is {}, expected a list"),
        ({"prepull": [{"labels": {}}]}, 'prepull[0].image is "", expected the name of a VM image'),
        ({"prepull": [{"image": "a"}, {"image": "--b"}]}, 'prepull[1].image is "--b", expected no spaces'),
        ({"prepull": [{"image": "a", "labels": {"b": 1}}]}, 'prepull[0].labels["b"] is 1, expected a string'),
        ({"prepull": [{"image": "a", "labels": {"b": "\n"}}]}, 'prepull[0].labels["b"] is "\\n", expected no control'),
        ({"prepull": [{"image": "a"}] * 51}, "prepull has 51 items, expected at most 50"),
    ],
)
def test_invalid_cluster_setting_is_malformed(raw: object, words: str) -> None:
    kind, message = refusal_of(lambda: replaced_settings(ClusterSettings(), raw, []))
    assert kind is MalformedError
    assert words in message


def test_events_keep_their_order_and_null_is_empty() -> None:
    assert events_from_client(None, []) == events_from_client([], []) == []
    raw = [{"kind": "log_line", "payload": "b", "timestamp": 2}, {"kind": "log_line", "new": 1}]
    unknown: list[str] = []
    assert events_from_client(raw, unknown) == [Event("log_line", "b", 2), Event("log_line", "", 0)]
    assert unknown == ["[1].new"]


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        ({}, MalformedError, "the body is {}, expected a JSON array"),
        ([{"kind": "log_line"}, None], MalformedError, "[1] is null, expected a JSON object"),
        ([{"kind": "log_line", "timestamp": "now"}], MalformedError, '[0].timestamp is "now", expected a whole number'),
        ([{"payload": "x"}], InvalidError, '[0].kind is "", expected a kind of event'),
        ([{"kind": "a\nb"}], InvalidError, '[0].kind is "a\\nb", expected a kind of event'),
    ],
)
def test_invalid_event_is_refused(raw: object, kind: type[ValidationError], words: str) -> None:
    refused = refusal_of(lambda: events_from_client(raw, []))
    assert refused[0] is kind
    assert words in refused[1]


# ---- the worker's report --------------------------------------------------------------------------------------------


def test_report_is_read_from_a_whole_vm() -> None:
    vm = running(pending(labels={"a": "b"}))
    unknown: list[str] = []
    assert report_from_worker(vm_json(vm), unknown) == VMReport(
        uid="uid-vm", status="running", observed_generation=0, conditions=vm.state.conditions
    )
    assert unknown == []
    assert report_from_worker({}, []) == VMReport()
    assert report_from_worker({"status_message": "", "conditions": []}, []) == VMReport(
        status_message="", conditions=()
    )


def test_condition_of_unknown_type_is_ignored_and_named() -> None:
    unknown: list[str] = []
    raw = {
        "conditions": [
            {"type": "dreaming", "state": "maybe"},
            # Of newer workers of the existing Orchard, which send it with each report.
            {"type": "suspending", "state": "maybe"},
            {"type": "running", "state": "true"},
        ]
    }
    assert report_from_worker(raw, unknown).conditions == (Condition("running", "true"),)
    assert unknown == ["conditions[0].type"]
    assert len(raw["conditions"]) == 3


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        (None, MalformedError, "the body is null, expected a JSON object"),
        ({"status": "asleep"}, InvalidError, 'status is "asleep", expected one of pending, running, failed'),
        ({"status": 5}, MalformedError, "status is 5, expected a string"),
        ({"restart_count": -1}, MalformedError, "restart_count is -1, expected a whole number"),
        ({"conditions": {}}, MalformedError, "conditions is {}, expected a list"),
        ({"conditions": [{}]}, MalformedError, "conditions[0].type is missing"),
        ({"conditions": [{"type": "running"}]}, MalformedError, "conditions[0].state is missing"),
        (
            {"conditions": [{"type": "running", "state": True}]},
            MalformedError,
            "conditions[0].state is true, expected a string",
        ),
        (
            {"conditions": [{"type": "running", "state": "yes"}]},
            InvalidError,
            'conditions[0].state is "yes", expected one of',
        ),
    ],
)
def test_invalid_report_is_refused(raw: object, kind: type[ValidationError], words: str) -> None:
    refused = refusal_of(lambda: report_from_worker(raw, []))
    assert refused[0] is kind
    assert words in refused[1]


@QUICK
@given(resources(VMReport))
def test_report_round_trips_through_json(report: VMReport) -> None:
    assert report_from_worker(parse_json(dump_json(encode(report))), []) == report
