"""The machines on which pages of the documentation run, and what a reader of such a page has before its first block."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

from harness.certificates import Authority
from harness.machines import Machine
from harness.programs import find_program
from harness.wheels import pack_all


def prepare_linux(found: dict[str, Machine], directory: Path) -> None:
    """Stand for the internet by a directory of wheels, for a CA by one of this test, and for vetu by our stand-in."""
    wheels = directory / "wheels"
    pack_all(wheels)
    machine = found["controller"]
    machine.path("/etc/pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {wheels}\nno-compile = true\n")
    certificates = machine.path("/etc/letsencrypt/live/controller.example.com")
    certificates.mkdir(parents=True)
    authority = Authority(directory)
    certificate, key = authority.issue("controller", ["controller.example.com"])
    machine.path(ssl.get_default_verify_paths().openssl_cafile).write_bytes(authority.certificate.read_bytes())
    shutil.copy(certificate, certificates / "fullchain.pem")
    shutil.copy(key, certificates / "privkey.pem")
    machine.run("useradd", "--create-home", "ci")
    machine.write_program("vetu", "#!/bin/sh\nexit 0\n")


def prepare_etcd(found: dict[str, Machine], directory: Path) -> None:
    """Install etcd, with certificates for its nodes, and a controller on the first machine."""
    authority = Authority(directory)
    for name, machine in found.items():
        machine.install_orchard()
        for program in ("etcd", "etcdctl", "etcdutl"):
            # Before etcd 3.5, etcdctl restores snapshots, too.
            source = find_program(program) or find_program("etcdctl")
            assert source is not None
            machine.path(f"/usr/local/bin/{program}").symlink_to(source)
        machine.path("/etc/etcd").mkdir()
        certificate, key = authority.issue(name, [f"{name}.example.com"])
        for file, target in ((certificate, "node.crt"), (key, "node.key"), (authority.certificate, "ca.crt")):
            shutil.copy(file, machine.path(f"/etc/etcd/{target}"))
    install = "orchard controller install --tls-name controller.example.com"
    found["a"].run("sh", "-c", f"{install} && systemctl enable --now orchard-controller")


# The machines of a page, and what has to be there before its first block.
MACHINES: dict[str, tuple[list[str], Callable[[dict[str, Machine], Path], None]]] = {
    "deploy-linux.md": (["controller"], prepare_linux),
    "etcd.md": (["a", "b", "c"], prepare_etcd),
}
