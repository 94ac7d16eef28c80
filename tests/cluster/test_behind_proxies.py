"""Controller and worker with a proxy between them that ends TLS, configured as docs/proxies.md says."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from harness.clients import ADMIN_ENV, echo, listening, receive_exactly, wait_workers
from harness.processes import GENEROUS, REALLY, controller, eventually, free_port, started

from orchard.auth import BootstrapToken
from orchard.client import Client

PAGE = Path(__file__).parents[2] / "docs" / "proxies.md"
ROLES = ["compute:read", "compute:write"]
# What nginx needs for a run without root and that the page does not show.
NGINX = """
daemon off;
pid {home}/pid;
error_log {home}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
{page}
}}
"""
COMMANDS = {"nginx": ["nginx", "-c"], "haproxy": ["haproxy", "-db", "-f"]}


def configuration(program: str, home: Path, port: int, upstream: int) -> str:
    """Return the configuration that the page shows, with the ports and the certificate of this test."""
    found = re.search(rf"```{program}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    text = found[1].replace("/etc/ssl/orchard.pem", str(home / "both.pem")).replace(":6120", f":{upstream}")
    text = text.replace("listen 443", f"listen 127.0.0.1:{port}").replace("bind :443", f"bind 127.0.0.1:{port}")
    return NGINX.format(home=home, page=text) if program == "nginx" else text


def make_certificate(home: Path) -> bytes:
    certificate, key = home / "cert.pem", home / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost -keyout"
    subprocess.run([*command.split(), key, "-out", certificate], check=True, capture_output=True)
    (home / "both.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    return certificate.read_bytes()


@contextmanager
def running(program: str, home: Path, port: int, upstream: int) -> Iterator[None]:
    config = home / "config"
    config.write_text(configuration(program, home, port, upstream))
    with (home / "output").open("w") as output:
        process = subprocess.Popen([*COMMANDS[program], config], stdout=output, stderr=output)
    try:
        yield
        assert process.poll() is None, (home / "output").read_text()
    finally:
        process.terminate()
        process.wait(GENEROUS)


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@asynccontextmanager
async def proxied(program: str, home: Path) -> AsyncIterator[Client]:
    """Yield a client of a controller behind a proxy, with a worker that reaches it in the same way."""
    certificate, port = make_certificate(home), free_port()
    with (
        controller("--insecure-no-tls", home=home, env=ADMIN_ENV) as (_, direct),
        running(program, home, port, int(direct.rpartition(":")[2])),
    ):
        await eventually(lambda: accepts(port))
        url = f"https://localhost:{port}"
        async with Client(url, account="bootstrap-admin", token="admin-token", certificate=certificate) as client:
            await client.service_accounts.create("workers", token="token-of-workers", roles=ROLES)
            token = BootstrapToken("workers", "token-of-workers", certificate)
            arguments = (url, "--runtime", "synthetic", "--name", "mac", "--bootstrap-token", str(token))
            # A VM has the servers of the process that starts the worker.
            with started("worker", *arguments, home=home, before=REALLY):
                await wait_workers(client, 1)
                yield client


async def pass_through(program: str, home: Path) -> None:
    async with proxied(program, home) as client, listening(echo) as port:
        await client.vms.create(name="vm", image="any")
        await client.vms.wait("vm")
        async with client.vms.watch("vm") as changes:
            kind, vm = await anext(changes)
            assert kind == "ADDED"
            # A proxy that holds answers back would show the change when the watch ends.
            changed = await client.vms.patch("vm", metadata={"a": "change that reboots nothing"})
            with trio.fail_after(GENEROUS):
                while vm.meta.version < changed.meta.version:
                    kind, vm = await anext(changes)
            assert (kind, vm) == ("MODIFIED", changed)
        async with client.vms.port_forward("vm", port) as stream:
            await stream.send_all(bytes(range(256)) * 1024)
            assert await receive_exactly(stream, 256 * 1024) == bytes(range(256)) * 1024
        await client.vms.delete("vm")


@pytest.mark.slow
@pytest.mark.needs("nginx", "openssl")
async def test_worker_watch_and_port_forward_pass_through_nginx(tmp_path: Path) -> None:
    await pass_through("nginx", tmp_path)


@pytest.mark.slow
@pytest.mark.needs("haproxy", "openssl")
async def test_worker_watch_and_port_forward_pass_through_haproxy(tmp_path: Path) -> None:
    await pass_through("haproxy", tmp_path)
