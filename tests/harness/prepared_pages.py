"""What the readers of a page of the documentation have before its first block: a cluster, files, or machines."""

from __future__ import annotations

import os
import shutil
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pip

from harness.certificates import Authority
from harness.machines import BASE_PYTHON, ROOT, Machine
from harness.programs import find_program
from harness.wheels import pack_needed, pack_project
from orchard.schema import TART_VMS, Worker

# Options of the cluster of a page, where it is not like that of `orchard dev`.
WITH_ACCOUNTS = {"auth": True, "tls": True}
CLUSTERS: dict[str, dict[str, Any]] = {
    "access.md": {"ssh": True},
    "api.md": {"workers": [Worker(labels={"xcode": "27"}, resources={TART_VMS: 40}) for _ in range(2)]},
    "ci.md": WITH_ACCOUNTS,
    "command.md": WITH_ACCOUNTS,
    "doctor.md": WITH_ACCOUNTS,
}
STANDINS = Path(__file__).parent.parent / "standin"
CONTROLLER = """
set -e
orchard controller install --tls-name controller.example.com
systemctl enable --now orchard-controller
export ORCHARD_HOME=/var/lib/orchard/
until orchard list workers; do sleep 0.1; done
orchard create service-account workers --roles compute:read,compute:write
for account in workers bootstrap-admin; do orchard get bootstrap-token $account > "$0/$account.token"; done
"""


def run_controller(machine: Machine, directory: Path) -> None:
    """Start a controller with an account for workers. Bootstrap tokens of that and of the administrator are in `directory`."""
    machine.run("sh", "-c", CONTROLLER, str(directory))


# The pip of a new environment: that of these tests. To install one takes more CPU than all that a page does with it.
PYTHON = f"""#!/bin/sh
[ "$1 $2" = "-m venv" ] || exec "{BASE_PYTHON}" "$@"
"{BASE_PYTHON}" -m venv --without-pip "$3"
ln -s "{Path(pip.__file__).parent}" "$3"/lib/python*/site-packages/
printf '#!/bin/sh\\nexec "%s" -m pip "$@"\\n' "$3/bin/python" > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


def set_pip_up(machine: Machine, *settings: str) -> None:
    """Set the pip of a machine up, which compiles nothing: Python compiles what runs, and not all that is installed."""
    machine.write_program("python3", PYTHON)
    machine.path("/etc/pip.conf").write_text("\n".join(["[global]", "no-compile = true", *settings, ""]))


def lend_wheels(machine: Machine, directory: Path) -> None:
    """Let pip take packages from a directory, which stands for the internet."""
    pack_needed(directory / "wheels")
    # For pip, "0" switches the isolation off: setuptools is there.
    set_pip_up(machine, "no-index = true", f"find-links = {directory / 'wheels'}", "no-build-isolation = 0")


def prepare_clone(found: dict[str, Machine], directory: Path) -> None:
    """Make the environment of this clone that of these tests, on the first machine."""
    machine, *_ = found.values()
    lend_wheels(machine, directory)
    if not (ROOT / ".venv").exists():
        machine.path(ROOT / ".venv").symlink_to(sys.prefix)
    # What `orchard dev` has left there before.
    machine.run("rm", "-rf", str(ROOT / ".dev-data"))


def prepare_offline(found: dict[str, Machine], directory: Path) -> None:
    """Make a clone for the first machine, and for the other one what is copied to a host without internet."""
    prepare_clone(found, directory)
    control, laptop = found.values()
    control.write_program("tart", TART.replace("/opt/clone", str(ROOT)))
    set_pip_up(laptop)
    shutil.copytree(ROOT / "orchard", directory / "clone" / "orchard", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory / "clone" / name)
    # As the first call of ./run makes it.
    (directory / "clone" / ".venv").symlink_to("/opt/orchard-cluster")


def prepare_linux(found: dict[str, Machine], directory: Path) -> None:
    """Stand for the internet by a directory of wheels, for a CA by one of this test, and for vetu by our stand-in."""
    (machine,) = found.values()
    lend_wheels(machine, directory)
    pack_project(directory / "wheels")
    certificates = machine.path("/etc/letsencrypt/live/controller.example.com")
    certificates.mkdir(parents=True)
    authority = Authority(directory)
    certificate, key = authority.issue("controller", ["controller.example.com"])
    machine.path(ssl.get_default_verify_paths().openssl_cafile).write_bytes(authority.certificate.read_bytes())
    shutil.copy(certificate, certificates / "fullchain.pem")
    shutil.copy(key, certificates / "privkey.pem")
    machine.run("useradd", "--create-home", "ci")
    machine.write_program("vetu", "#!/bin/sh\nexit 0\n")


def prepare_deployment(found: dict[str, Machine], _directory: Path) -> None:
    """Install Orchard everywhere, with our stand-in for tart, and add the user of the worker."""
    for machine in found.values():
        machine.install_orchard()
        machine.write_program("sudo", SUDO)
        machine.write_program("tart", TART)
        machine.run("useradd", "--create-home", "ci")


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


# `orchard` chooses the service manager by the system.
MAC_ORCHARD = """#!/bin/sh
case "$2" in install | uninstall) set -- "$@" --format launchd ;; esac
exec /opt/orchard-cluster/bin/python -P -m orchard "$@"
"""
SUDO = """#!/bin/sh
# Of its options, only -u NAME is known.
[ "$1" = -u ] || exec env SUDO_USER=root "$@"
user=$2
shift 2
exec runuser -u "$user" -- env SUDO_USER=root "$@"
"""
TART = """#!/bin/sh
export TART_HOME=${TART_HOME:-$HOME/.tart}
mkdir -p "$TART_HOME"
exec /opt/clone/tests/standin/tart "$@"
"""
# There is nothing to install.
SOFTWARE_UPDATE = """#!/bin/sh
[ "$*" = "--install --all --restart" ]
"""


def prepare_mac(found: dict[str, Machine], directory: Path) -> None:
    """Stand for a Mac, and run a controller elsewhere: its administrator is the user of the page."""
    mac, control = found.values()
    for machine in (mac, control):
        machine.install_orchard()
    mac.run("useradd", "--create-home", "--home-dir", "/Users/ci", "ci")
    mac.write_program("launchctl", (STANDINS / "launchctl").read_text())
    for name, text in {"orchard": MAC_ORCHARD, "sudo": SUDO, "tart": TART, "softwareupdate": SOFTWARE_UPDATE}.items():
        mac.write_program(name, text)
    run_controller(control, directory)


@dataclass(frozen=True)
class Prepared:
    """The machines of a page, what makes them ready, and commands that were given on the first one."""

    names: Sequence[str]
    # With the machines and the directory in which their shells begin.
    prepare: Callable[[dict[str, Machine], Path], None]
    earlier: str = ""


GITHUB_API = """
import http.server, json

class API(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_known = (self.path, self.headers["Authorization"], asked["labels"]) == (
            "/orgs/example/actions/runners/generate-jitconfig", "Bearer TOKEN", ["self-hosted", "macos", "tahoe"]
        )
        self.answer(201 if is_known else 404)

    def answer(self, status):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b'{"encoded_jit_config": "secret"}')

http.server.HTTPServer(("127.0.0.1", 8000), API).serve_forever()
"""
# Commands that were given before, in the shell of the page.
EARLIER = {
    # The system's ssh looks for its files in the home of this user, and not in that of the session.
    "access.md": """
        mkdir -m 700 ~/.ssh
        ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
        printf '%s\n' "IdentityFile ~/.ssh/id_ed25519" "UserKnownHostsFile ~/.ssh/known_hosts" \
            "StrictHostKeyChecking accept-new" "LogLevel ERROR" | sed "s:~:$HOME:" > ~/.ssh/config
        ssh() { command ssh -F ~/.ssh/config "$@"; }
        printf '#!/bin/sh\necho admin\n' > ~/password
        chmod +x ~/password
        export SSH_ASKPASS=~/password SSH_ASKPASS_REQUIRE=force""",
    # GitHub's API, and its runner in an image.
    "ci.md": f"""
        printf '%s\\n' '#!/bin/sh' '[ "$*" = "--jitconfig secret" ] && echo "√ Connected to GitHub"' > run.sh
        chmod +x run.sh
        cat > api.py <<'END'
{GITHUB_API}
END
        set -m
        python3 api.py > /dev/null 2>&1 &
        set +m
        export GITHUB_API_URL=http://127.0.0.1:8000 RUNNER_DIR=$PWD
        until curl -o /dev/null http://127.0.0.1:8000/; do sleep 0.01; done
        cp -R {STANDINS}/../../docs/recipes .""",
    "command.md": """
        orchard create service-account ci --roles compute:read,compute:write > ci.token
        orchard get bootstrap-token bootstrap-admin > bootstrap.token
        shown=$(openssl s_client -connect controller.example.com:6120 < /dev/null 2> /dev/null)
        FINGERPRINT=$(echo "$shown" | openssl x509 -noout -fingerprint -sha256 | cut -d = -f 2)""",
    "doctor.md": f"""
        export PATH="{STANDINS}:$PATH" TART_HOME=~/.tart
        orchard create service-account workers --roles compute:read,compute:write
        orchard get bootstrap-token workers > workers.token""",
    "images.md": f"""
        export PATH="{STANDINS}:$PATH" TART_HOME=~/.tart REGISTRY_TOKEN=secret""",
}
LOGIN = "orchard login controller.example.com --bootstrap-token-stdin < bootstrap-admin.token"
CLONE = f"cd {ROOT}"
# For these machines alone, into the directory in which the shells begin.
COLLECT = './run wheelhouse "$OLDPWD/wheelhouse" --platform linux-{} --python {}.{}'.format(
    os.uname().machine.replace("aarch64", "arm64"), *sys.version_info[:2]
)
MACHINES = {
    "README.md": Prepared(["laptop"], prepare_clone, CLONE),
    "quickstart.md": Prepared(["laptop"], prepare_clone, f'{CLONE}; export PATH="$PWD/.venv/bin:$PATH"'),
    "offline.md": Prepared(["controller", "laptop"], prepare_offline, f"{CLONE}; {COLLECT}"),
    "deploy.md": Prepared(["controller", "mac-1", "mac-2"], prepare_deployment),
    "deploy-linux.md": Prepared(["controller"], prepare_linux),
    "deploy-macos.md": Prepared(["mac-1", "controller"], prepare_mac, LOGIN),
    "etcd.md": Prepared(["a", "b", "c"], prepare_etcd),
}
