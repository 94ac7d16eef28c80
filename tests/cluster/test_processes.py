"""Controller and worker as real processes, as they are deployed: over TLS, let in by a bootstrap token."""

from __future__ import annotations

import io
import re
import signal
import sys
from pathlib import Path

import pytest
from harness.clients import ADMIN_ENV, admin_client, make_bootstrap_token, wait_workers
from harness.processes import (
    ORCHARD,
    REALLY,
    Role,
    call_main,
    controller,
    eventually,
    finished,
    free_port,
    processes_in,
    started,
)

from orchard import worker
from orchard.auth import BootstrapToken
from orchard.client import Client
from orchard.schema import TART_VMS, WORKER_NAME_LABEL

SCRIPT = 'echo begins; echo "$TEXT"; read line || echo end of file; echo over >&2\n'
TEXT = "quotes ' and \" and `backticks` and $HOME\nand a second line"


async def lines_of(client: Client, name: str, count: int) -> list[str]:
    lines: list[str] = []

    async def printed() -> bool:
        lines[:] = [event.payload async for event in client.vms.events(name)]
        return len(lines) >= count

    await eventually(printed)
    return lines


async def gone(directory: Path) -> None:
    await eventually(lambda: not list(directory.glob("orchard-*")))


@pytest.mark.needs("openssl")
@pytest.mark.slow
async def test_vm_from_creation_to_deletion_over_tls_with_a_bootstrap_token(tmp_path: Path) -> None:
    with controller(home=tmp_path, env=ADMIN_ENV, before=REALLY) as (control, url):
        async with admin_client(url, tmp_path) as client:
            token = await make_bootstrap_token(client, tmp_path)
            words = (url, "--runtime", "synthetic", "--name", "mac", "--bootstrap-token", token)
            with started("worker", *words, home=tmp_path, before=REALLY) as worker:
                await wait_workers(client, 1)
                script = {"script_content": SCRIPT, "env": {"TEXT": TEXT}}
                await client.vms.create(name="vm", image="ghcr.io/cirruslabs/macos:latest", startup_script=script)
                vm = await client.vms.wait("vm")
                assert vm.state.image_fqn.startswith("ghcr.io/cirruslabs/macos:latest@sha256:")
                assert vm.state.observed_generation == 0
                assert vm.condition("running")
                lines = await lines_of(client, "vm", 5)
                assert lines == ["begins", *TEXT.split("\n"), "end of file", "over"]
                await client.vms.delete("vm")
                await gone(tmp_path / ORCHARD / "synthetic" / "mac" / "mac")
                assert worker.stop() == 0
            assert control.stop() == 0
            said = control.log.read_text() + worker.log.read_text()
            assert "Traceback" not in said
            assert "level=error" not in said
            for secret in ("admin-token", token, BootstrapToken.parse(token).token):
                assert secret not in said


@pytest.mark.slow
async def test_worker_that_was_killed_removes_its_vms_when_it_is_back(tmp_path: Path) -> None:
    with controller("--insecure-no-tls", "--insecure-no-auth", home=tmp_path) as (_, url):
        async with Client(url) as client:
            arguments = (url, "--runtime", "synthetic", "--name", "mac")
            homes = tmp_path / ORCHARD / "synthetic" / "mac" / "mac"
            with started("worker", *arguments, home=tmp_path) as worker:
                await wait_workers(client, 1)
                script = {"script_content": "echo begins; sleep 1000 & sleep 1000"}
                await client.vms.create(name="lost", image="any", startup_script=script)
                await client.vms.create(name="deleted", image="any", startup_script=script)
                await lines_of(client, "lost", 1)
                await lines_of(client, "deleted", 1)
                worker.stop(signal.SIGKILL)
            await client.vms.delete("deleted")
            stranger = homes / "somebody-elses"
            stranger.mkdir()
            with started("worker", *arguments, home=tmp_path) as worker:
                async with client.vms.watch("lost") as changes:
                    async for _, vm in changes:
                        if vm.state.status == "failed":
                            break
                assert vm.state.status_message.startswith("lost: ")
                await client.vms.delete("lost")
                await gone(homes)
                assert stranger.exists()
                await eventually(lambda: processes_in(homes) == [])
                assert worker.stop() == 0


@pytest.mark.slow
async def test_vms_run_on_while_the_controller_is_away(tmp_path: Path) -> None:
    port = free_port()
    listen = ("--listen", f"127.0.0.1:{port}", "--insecure-no-tls", "--insecure-no-auth")
    url = f"http://127.0.0.1:{port}"
    with started("worker", url, "--runtime", "synthetic", "--name", "mac", home=tmp_path) as worker:
        with started("controller", *listen, home=tmp_path) as first:
            first.wait_for(re.compile("orchard controller .* listening"))
            async with Client(url) as client:
                await wait_workers(client, 1)
                await client.vms.create(name="vm", image="any")
                before = await client.vms.wait("vm")
            first.stop(signal.SIGKILL)
        with started("controller", *listen, home=tmp_path) as second:
            second.wait_for(re.compile("orchard controller .* listening"))
            async with Client(url) as client:
                await client.vms.create(name="another", image="any")
                assert (await client.vms.wait("another")).state.worker == "mac"
                after = await client.vms.get("vm")
                assert (after.uid, after.state.status, after.state.restart_count) == (before.uid, "running", 0)
            assert second.stop() == 0
        assert worker.stop() == 0


@pytest.mark.slow
async def test_many_synthetic_workers_in_one_process(tmp_path: Path) -> None:
    with controller("--insecure-no-tls", "--insecure-no-auth", home=tmp_path) as (_, url):
        arguments = (url, "--runtime", "synthetic", "--name", "w", "--workers", "20")
        options = ("--resources", f"{TART_VMS}=1,gpu=2", "--labels", "model=mini", "--default-cpu", "3")
        with started("worker", *arguments, *options, home=tmp_path) as worker:
            async with Client(url) as client:
                await wait_workers(client, 20)
                one = await client.workers.get("w-20")
                assert one.labels == {"model": "mini", WORKER_NAME_LABEL: "w-20"}
                assert (one.resources[TART_VMS], one.resources["gpu"]) == (1, 2)
                for number in range(20):
                    await client.vms.create(name=f"vm-{number}", image="any")
                vms = [await client.vms.wait(f"vm-{number}") for number in range(20)]
                assert len({vm.state.worker for vm in vms}) == 20
                assert {vm.state.assigned_cpu for vm in vms} == {3}
            assert worker.stop(signal.SIGINT) == 0


# ---- errors and their messages ------------------------------------------------------------------------------------


async def wait_logged(role: Role, text: str) -> None:
    """Wait until the log contains a text."""

    def has_text() -> bool:
        assert role.process.poll() is None, role.log.read_text()
        return text in role.log.read_text()

    await eventually(has_text)


async def test_worker_logs_why_it_cannot_connect_and_retries(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with started("worker", url, "--runtime", "synthetic", "--name", "mac", home=tmp_path) as worker:
        await wait_logged(worker, f'reason="cannot reach {url}: connection refused"')
        listen = ("--listen", f"127.0.0.1:{port}", "--insecure-no-tls", "--insecure-no-auth")
        with started("controller", *listen, home=tmp_path):
            await wait_logged(worker, "registered with the controller")
        assert worker.stop() == 0
        assert "Traceback" not in worker.log.read_text()


@pytest.mark.needs("openssl")
async def test_worker_with_refused_credentials_exits_with_2(tmp_path: Path) -> None:
    with controller(home=tmp_path, env=ADMIN_ENV) as (_, url):
        async with admin_client(url, tmp_path) as client:
            certificate = (tmp_path / ORCHARD / "controller" / "controller.crt").read_bytes()
            await client.service_accounts.create("reader", roles=["compute:read"], token="token-of-reader")
            for token, words in (
                (BootstrapToken("bootstrap-admin", "wrong", certificate), "wrong token"),
                (BootstrapToken("unknown", "token-of-reader", certificate), "unknown service account"),
                (BootstrapToken("reader", "token-of-reader", certificate), "compute:write"),
            ):
                arguments = (url, "--runtime", "synthetic", "--bootstrap-token", str(token))
                refused = finished("worker", *arguments, home=tmp_path)
                assert refused.returncode == 2, refused.stderr
                assert words in refused.stderr
                assert ("bootstrap-token" in refused.stderr) == (words != "compute:write")
                assert "Traceback" not in refused.stderr


@pytest.mark.needs("openssl")
async def test_worker_logs_that_it_does_not_trust_the_certificate(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with controller(home=other, env=ADMIN_ENV):
        wrong = (other / ORCHARD / "controller" / "controller.crt").read_bytes()
    with controller(home=tmp_path, env=ADMIN_ENV) as (_, url):
        for certificate, words in ((wrong, "fingerprint of its certificate"), (None, "not trusted")):
            token = BootstrapToken("bootstrap-admin", "admin-token", certificate)
            arguments = (url, "--runtime", "synthetic", "--name", "mac", "--bootstrap-token", str(token))
            with started("worker", *arguments, home=tmp_path) as worker:
                await wait_logged(worker, words)
                assert "remedy=" in worker.log.read_text()
                assert worker.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ftp://h"], ["ftp://h", "https://"]),
        (["http://h:1", "--bootstrap-token", "x"], ["orchard-bootstrap-token-v0"]),
        (["http://h:1", "--bootstrap-token", "orchard-bootstrap-token-v0.YQ"], ["1 parts", "expected 2 or 3"]),
        (["http://h:1", "--bootstrap-token", "orchard-bootstrap-token-v0.YQ.!"], ["part 2", "base64url"]),
        (["http://h:1", "--bootstrap-token-stdin"], ["orchard-bootstrap-token-v0"]),
        (["https://h:1", "--no-pki"], ["--no-pki", "certificate"]),
        (["http://h:1", "--runtime", "docker"], ["docker", "synthetic"]),
        (["http://h:1", "--resources", "a=-1"], ["a=-1", "WHOLE NUMBER"]),
        (["http://h:1", "--labels", "a"], ['"a"', "KEY=VALUE"]),
        (["http://h:1", "--name", "a b"], ["a b"]),
        (["http://h:1", "--workers", "2"], ["--workers", "synthetic"]),
        (["http://h:1", "--default-cpu", "-1"], ["-1", "--default-cpu"]),
    ],
)
def test_invalid_command_line_is_refused(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    stdin = io.StringIO("no token\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        status, out, err = call_main(worker.main, *arguments, home=tmp_path)
    assert (status, out) == (2, "")
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--runtime", "tart"], ["tart", "PATH", "--tart"]), (["--tart", "/none/tart"], ["/none/tart"])],
)
def test_missing_tart_is_an_error_on_stderr(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused = finished("worker", "http://h:1", *arguments, home=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "Traceback" not in refused.stderr
    for word in words:
        assert word in refused.stderr


async def test_second_worker_on_the_same_vms_is_refused(tmp_path: Path) -> None:
    with controller("--insecure-no-tls", "--insecure-no-auth", home=tmp_path) as (_, url):
        arguments = (url, "--runtime", "synthetic", "--name", "mac")
        with started("worker", *arguments, home=tmp_path) as worker:
            await wait_logged(worker, "registered with the controller")
            second = finished("worker", *arguments, home=tmp_path)
            assert second.returncode == 1
            assert f"in use by another process ({worker.process.pid})" in second.stderr
