"""`orchard controller install`, `orchard worker install` and `uninstall`: the files, and services that run as they say."""

from __future__ import annotations

import json
import os
import plistlib
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness.clients import ADMIN_ENV, admin_client, make_bootstrap_token, wait_workers
from harness.processes import GENEROUS, LISTENING, PLAIN, Role, call_main, controller, environment
from harness.programs import ROOT_REASON
from harness.users import OTHER, home_of_other, python_of_other

from orchard.auth import BootstrapToken
from orchard.cli.failure import CommandError
from orchard.cli.install import ServiceManager, install, run_install_verb, uninstall
from orchard.cli.main import main
from orchard.cli.services import ServiceDefinition, launchd_plist, systemd_unit
from orchard.client import Client

ROOT = Path(__file__).parent.parent.parent
TOKEN = str(BootstrapToken("workers", "secret-token"))
URL = "https://controller.example.com:6120"
WORKER = ("worker", "install", "--url", URL, "--token-file", "/etc/orchard/token", "--print")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason=ROOT_REASON)
# A word of a unit's command line or list.
WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')


def unquoted(text: str) -> list[str]:
    """Return the words of a command line as systemd.service(5) describes it. It may have no variables and specifiers."""
    words = [re.sub(r"\\(.)", r"\1", quoted) if quoted or not bare else bare for quoted, bare in WORD.findall(text)]
    for word in words:
        assert re.fullmatch(r"(?:[^$%]|\$\$|%%)*", word), word
    return [word.replace("%%", "%").replace("$$", "$") for word in words]


def unit_settings(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def printed(*words: str, home: Path) -> str:
    status, out, err = call_main(main, *words, home=home)
    assert status == 0, err
    return out


# ---- the files -----------------------------------------------------------------------------------------------------


def test_worker_of_launchd_keeps_its_vms_across_restarts_and_shows_no_token(tmp_path: Path) -> None:
    text = printed(*WORKER, "--format", "launchd", "--user", "ci", "--resources", "a=1", home=tmp_path)
    service = plistlib.loads(text.encode())
    assert service["AbandonProcessGroup"]
    assert service["KeepAlive"]
    assert service["ThrottleInterval"] > 0
    assert service["StandardInPath"] == "/etc/orchard/token"
    # It starts as root: only then may it connect to VMs without being asked for a permission.
    assert "UserName" not in service
    assert "--user ci" in " ".join(service["ProgramArguments"])
    assert service["WorkingDirectory"] == service["EnvironmentVariables"]["HOME"] == "/Users/ci"
    assert Path(service["StandardErrorPath"]).is_absolute()
    assert "/opt/homebrew/bin" in service["EnvironmentVariables"]["PATH"].split(":")
    # Other programs look for these words in the list of processes.
    words = " ".join(service["ProgramArguments"])
    assert f"orchard worker run {URL} " in words
    assert " --resources a=1 " in words


def test_controller_of_launchd_runs_as_its_user(tmp_path: Path) -> None:
    words = ("controller", "install", "--print", "--format", "launchd", "--user", "ci")
    service = plistlib.loads(printed(*words, home=tmp_path).encode())
    assert service["UserName"] == "ci"
    assert "AbandonProcessGroup" not in service


def test_service_on_etcd_has_its_password_in_a_file_of_variables(tmp_path: Path) -> None:
    words = ("controller", "install", "--print", "--environment-file", "/etc/orchard/etcd.env")
    on_etcd = ("--etcd", "https://a:2379,https://b:2379", "--etcd-user", "controllers", "--etcd-ca", "/etc/etcd/ca.crt")
    unit = unit_settings(printed(*words, *on_etcd, "--format", "systemd", home=tmp_path))
    assert unit["EnvironmentFile"] == ["/etc/orchard/etcd.env"]
    assert unquoted(unit["ExecStart"][0])[-len(on_etcd) :] == list(on_etcd)
    status, _, err = call_main(main, *words, "--format", "launchd", home=tmp_path)
    assert status == 1
    assert "--environment-file" in err


def test_path_of_the_service_finds_tart_where_the_caller_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tart = tmp_path / "tart"
    tart.write_text("#!/bin/sh\n")
    tart.chmod(0o755)
    monkeypatch.setenv("PATH", f"/nowhere:{tmp_path}")
    for kind in ("launchd", "systemd"):
        text = printed(*WORKER, "--format", kind, home=tmp_path)
        assert re.search(rf"{re.escape(str(tmp_path))}:/", text), kind


def test_worker_of_systemd_keeps_its_vms_across_restarts(tmp_path: Path) -> None:
    unit = unit_settings(printed(*WORKER, "--format", "systemd", "--user", "ci", home=tmp_path))
    assert unit["KillMode"] == ["process"]
    assert unit["OOMPolicy"] == ["continue"]
    assert unit["StandardInput"] == ["file:/etc/orchard/token"]
    assert unit["User"] == ["ci"]
    # A directory that systemd removes at a stop must not be in use by VMs.
    assert not {"PrivateTmp", "RuntimeDirectory", "DynamicUser"} & set(unit)


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("options", [(), ("--user", "root"), ("--listen", ":443"), ("--data-dir", "/var/lib/a b/c%d")])
def test_units_are_valid_and_the_controller_has_few_rights(tmp_path: Path, options: Sequence[str]) -> None:
    control = tmp_path / "orchard-controller.service"
    control.write_text(printed("controller", "install", "--print", "--format", "systemd", *options, home=tmp_path))
    worker = tmp_path / "orchard-worker.service"
    words = ("--labels", 'a="$HOME" \\ %i')
    worker.write_text(printed(*WORKER, "--format", "systemd", "--user", "root", *words, home=tmp_path))
    done = subprocess.run(["systemd-analyze", "verify", control, worker], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--json=short", control],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)
    weight = sum(float(check["exposure"] or 0) for check in checks)
    assert weight < 3.0, [check["name"] for check in checks if check["exposure"]]


@pytest.mark.parametrize("word", ["", "a b", '"', "\\", "%n", "$HOME", "a;b", "'", "ü", "#"])
def test_each_argument_reaches_the_program_unchanged(word: str) -> None:
    service = ServiceDefinition("worker", ["/bin/python", "worker", word], user="root", directory=Path("/root"))
    assert plistlib.loads(launchd_plist(service))["ProgramArguments"] == service.words
    [command] = unit_settings(systemd_unit(service))["ExecStart"]
    assert unquoted(command) == service.words


@pytest.mark.parametrize("kind", ["launchd", "systemd"])
@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        (("worker", "install", "--url", "x y", "--token-file", "t", "--print"), 1, "--url"),
        ((*WORKER, "--resourcs", "a=1"), 2, "--resources"),
        ((*WORKER, "--bootstrap-token", "secret-token"), 2, "--bootstrap-token"),
        (("controller", "install", "--print", "--controller-cert", "c.pem", "--controller-key", "/k"), 1, "c.pem"),
        (("controller", "uninstall", "--lisen", ":1"), 2, "--lisen"),
    ],
)
def test_options_that_the_role_would_refuse_are_refused_before_anything_is_written(
    tmp_path: Path, kind: str, words: Sequence[str], status: int, named: str
) -> None:
    refused, out, err = call_main(main, *words, "--format", kind, home=tmp_path)
    assert (refused, out) == (status, "")
    assert named in err
    assert "secret-token" not in err


def test_directory_that_a_user_of_systemd_cannot_have_needs_a_user(tmp_path: Path) -> None:
    words = ("controller", "install", "--print", "--format", "systemd", "--data-dir", "/srv/orchard")
    status, _, err = call_main(main, *words, home=tmp_path)
    assert status == 1
    assert "--user" in err
    unit = unit_settings(printed(*words, "--user", "orchard", home=tmp_path))
    assert unit["ReadWritePaths"] == ["/srv/orchard"]


# ---- writing and removing ------------------------------------------------------------------------------------------


class Site:
    """A host with directories of its own, for one service."""

    def __init__(self, home: Path, kind: str, role: str) -> None:
        self.home = home
        self.role = role
        self.manager = ServiceManager(kind, home / "services", running=home)
        self.token = home / "token"
        self.token.write_text(TOKEN)
        self.token.chmod(0o600)
        self.service = self.described(f"{sys.executable}", "-m", "orchard")

    def described(self, *program: str, user: str = "root") -> ServiceDefinition:
        return ServiceDefinition(
            role=self.role,
            words=[*program, self.role, "run", "--debug"],
            user=user,
            directory=self.home,
            environ={"PATH": os.environ["PATH"]},
            token_file=self.token,
            log_file=self.home / "logs" / "log",
            written=[self.home / "data" / "state"],
        )

    def add_programs(self, status: str) -> Path:
        """Stand for the programs of the system's manager; return the file with their calls."""
        calls = self.home / "calls"
        (self.home / "bin").mkdir()
        for name in ("launchctl", "systemctl"):
            program = self.home / "bin" / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >>{shlex.quote(str(calls))}\n{status}\n')
            program.chmod(0o755)
        return calls


@pytest.fixture(params=["launchd", "systemd"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    return Site(tmp_path, request.param, "worker")


@needs_root
def test_installation_may_be_repeated_and_says_how_to_start_what_changed(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    file = site.manager.file("worker")
    assert install(site.service, site.manager) == 0
    first = capsys.readouterr().out
    assert str(file) in first
    assert file.read_bytes() == site.manager.text(site.service)
    assert file.stat().st_mode & 0o777 == 0o644
    assert TOKEN not in first + file.read_text()
    for directory in (site.home / "logs", site.home / "data", site.home / "data" / "state"):
        assert directory.stat().st_mode & 0o777 == 0o700
    written = file.stat().st_ino
    assert install(site.service, site.manager) == 0
    assert file.stat().st_ino == written, "an unchanged file is written again"
    assert "start" not in capsys.readouterr().out
    changed = site.described(sys.executable, "-P", "-m", "orchard")
    assert install(changed, site.manager) == 0
    assert re.search("bootout|restart", capsys.readouterr().out)
    assert file.read_bytes() == site.manager.text(changed)


@needs_root
def test_directories_belong_to_the_user_of_the_service(site: Site) -> None:
    service = site.described("/bin/true", user="nobody")
    assert install(service, site.manager) == 0
    nobody = pwd.getpwnam("nobody").pw_uid
    for directory in (site.home / "logs", site.home / "data", site.home / "data" / "state"):
        assert directory.stat().st_uid == nobody
    assert site.home.stat().st_uid == 0


@needs_root
def test_removal_stops_the_service_and_keeps_state_and_logs(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site.service, site.manager)
    state = site.home / "data" / "state" / "state.jsonl"
    state.write_text("kept")
    calls = site.add_programs("exit 0")
    monkeypatch.setenv("PATH", f"{site.home / 'bin'}:{os.environ['PATH']}")
    assert uninstall("worker", site.manager) == 0
    assert not site.manager.file("worker").exists()
    assert re.search("bootout system/|disable --now", calls.read_text())
    assert (state.read_text(), site.token.read_text()) == ("kept", TOKEN)
    assert (site.home / "logs").exists()
    assert uninstall("worker", site.manager) == 0, "a removal may be repeated"
    capsys.readouterr()


@needs_root
def test_removal_from_an_image_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, "systemd", "worker")
    manager = ServiceManager("systemd", tmp_path / "services", running=tmp_path / "none")
    install(site.service, manager)
    calls = site.add_programs('[ "$1" = disable ] && [ "$2" != --now ]')
    monkeypatch.setenv("PATH", f"{site.home / 'bin'}:{os.environ['PATH']}")
    assert uninstall("worker", manager) == 0
    assert not manager.file("worker").exists()
    assert len(calls.read_text().splitlines()) == 1


@needs_root
def test_service_that_cannot_be_stopped_keeps_its_file(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site.service, site.manager)
    site.add_programs('case "$1" in bootout | disable) exit 1 ;; esac')
    monkeypatch.setenv("PATH", f"{site.home / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(CommandError, match=r"bootout|disable"):
        uninstall("worker", site.manager)
    assert site.manager.file("worker").exists()


@needs_root
@pytest.mark.parametrize("fault", ["readable", "foreign", "missing"])
def test_file_of_variables_that_others_can_read_is_refused(tmp_path: Path, fault: str) -> None:
    site = Site(tmp_path, "systemd", "controller")
    variables = tmp_path / "variables"
    if fault != "missing":
        variables.write_text("ORCHARD_ETCD_PASSWORD=secret\n")
        variables.chmod(0o640 if fault == "readable" else 0o600)
        os.chown(variables, 1234 if fault == "foreign" else 0, -1)
    service = replace(site.service, token_file=None, environment_file=variables)
    with pytest.raises(CommandError, match=re.escape(str(variables))):
        install(service, site.manager)
    assert not site.manager.file("controller").exists()


@needs_root
@pytest.mark.parametrize("fault", ["readable", "foreign", "missing", "no token"])
def test_token_file_that_others_can_read_or_that_holds_no_token_is_refused(site: Site, fault: str) -> None:
    if fault == "readable":
        site.token.chmod(0o640)
    elif fault == "foreign":
        os.chown(site.token, 1234, -1)
    elif fault == "missing":
        site.token.unlink()
    else:
        site.token.write_text("nonsense")
    with pytest.raises(CommandError, match=re.escape(str(site.token))):
        install(site.service, site.manager)
    assert not site.manager.file("worker").exists()


@needs_root
def test_program_or_user_that_the_service_could_not_use_is_refused(site: Site) -> None:
    hidden = site.home / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "program").write_text("#!/bin/sh\n")
    (hidden / "program").chmod(0o755)
    assert install(site.described(str(hidden / "program")), site.manager) == 0
    for service, named in [
        (site.described(str(hidden / "program"), user="nobody"), "hidden"),
        (site.described(str(site.home / "none")), "none"),
        (site.described(sys.executable, "-m", "orchard_none"), "orchard_none"),
        (site.described(sys.executable, user="no-such-user"), "no-such-user"),
    ]:
        if service.user == "nobody":
            os.chown(site.token, 0, 0)
        with pytest.raises(CommandError, match=named):
            install(service, site.manager)


def test_users_without_rights_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("ORCHARD_HOME", str(tmp_path))
    for words in (("install", "--url", URL, "--token-file", "/t"), ("uninstall",)):
        with pytest.raises(CommandError, match="sudo"):
            run_install_verb("worker", words[0], [*words[1:], "--format", "systemd"])


# ---- services that run ---------------------------------------------------------------------------------------------


@contextmanager
def run_by_launchd(service: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service for the time of the block as its property list says, with nothing of this environment."""
    with Path(service["StandardInPath"]).open("rb") as stdin, Path(service["StandardErrorPath"]).open("wb") as out:
        process = subprocess.Popen(
            service["ProgramArguments"],
            cwd=service["WorkingDirectory"],
            env=service["EnvironmentVariables"],
            stdin=stdin, stdout=out, stderr=out, umask=service["Umask"],
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(GENEROUS)


def from_venv(_directory: Path) -> list[str]:
    return [sys.executable, "-m", "orchard"]


def from_archive(directory: Path) -> list[str]:
    subprocess.run([sys.executable, ROOT / "tools" / "pyz.py", directory], check=True, capture_output=True)
    # By a relative path, as a user calls it.
    return [str(getattr(sys, "_base_executable", sys.executable)), os.path.relpath(directory / "orchard.pyz")]


def from_pip(directory: Path) -> list[str]:
    """Install the project as a package into a new environment, which has the other packages of this one."""
    made = directory / "environment"
    venv.create(made, symlinks=True)
    python = made / "bin" / "python3"
    copy = shutil.copytree(ROOT / "orchard", directory / "project" / "orchard").parent
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    program = f"from setuptools import build_meta; print(build_meta.build_wheel({str(directory)!r}))"
    subprocess.run([sys.executable, "-c", program], cwd=copy, check=True, capture_output=True)
    [wheel] = directory.glob("*.whl")
    site = made / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    shutil.unpack_archive(wheel, site, "zip")
    others = site / "others.pth"
    others.write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    script = made / "bin" / "orchard"
    script.write_text(f"#!{python}\nimport sys\nfrom orchard.__main__ import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return [str(script)]


@pytest.mark.needs("openssl")
@pytest.mark.slow
@pytest.mark.parametrize("packaged", [from_venv, from_archive, from_pip])
async def test_installed_worker_runs_by_the_program_that_installed_it(tmp_path: Path, packaged: Any) -> None:
    package = tmp_path / "package"
    package.mkdir()
    program = packaged(package)
    home = tmp_path / "worker"
    home.mkdir()
    with controller(home=tmp_path, env=ADMIN_ENV) as (_, url):
        async with admin_client(url, tmp_path) as client:
            token = tmp_path / "workers.token"
            token.write_text(await make_bootstrap_token(client, tmp_path))
            words = ["--url", url, "--token-file", str(token), "--format", "launchd", "--print"]
            made = subprocess.run(  # noqa: ASYNC221
                [*program, "worker", "install", *words, "--runtime", "synthetic", "--name", "mac",
                 "--log-file", str(tmp_path / "log")],
                env=environment(home), capture_output=True, check=True,
            )  # fmt: skip
            service = plistlib.loads(made.stdout)
            assert str(package) in " ".join(service["ProgramArguments"]) or packaged is from_venv
            with run_by_launchd(service) as process:
                await wait_workers(client, 1)
                process.terminate()
                assert process.wait(GENEROUS) == 0, (tmp_path / "log").read_text()


@pytest.mark.slow
async def test_archive_that_launchd_starts_as_root_runs_vms_as_its_user(tmp_path: Path) -> None:
    python, _ = python_of_other()
    with home_of_other() as home, controller(*PLAIN, home=tmp_path) as (_, url):
        archive = tmp_path / "package"
        archive.mkdir()
        from_archive(archive)
        program = shutil.copy(archive / "orchard.pyz", home)
        token = tmp_path / "token"
        token.write_text(TOKEN)
        words = ["--url", url, "--token-file", str(token), "--format", "launchd", "--print", "--user", OTHER]
        made = subprocess.run(  # noqa: ASYNC221
            [python, program, "worker", "install", *words, "--runtime", "synthetic", "--name", "mac",
             "--log-file", str(home / "log")],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ORCHARD_HOME": str(tmp_path)},
            capture_output=True, check=True,
        )  # fmt: skip
        service = plistlib.loads(made.stdout)
        service["EnvironmentVariables"]["ORCHARD_HOME"] = str(home)
        # Only root may write to the directory that is really named there.
        place = home.with_name(f"{home.name}-shared")
        assert service["EnvironmentVariables"].pop("ORCHARD_PYZ_DIRECTORY")
        service["EnvironmentVariables"]["ORCHARD_PYZ_DIRECTORY"] = str(place)
        service["WorkingDirectory"] = "/"
        service["StandardErrorPath"] = str(tmp_path / "out")
        try:
            async with Client(url) as client:
                with run_by_launchd(service) as process:
                    await wait_workers(client, 1)
                    await client.vms.create(name="vm", image="any")
                    vm = await client.vms.wait("vm", until="ready")
                    assert (home / ".orchard").stat().st_uid == pwd.getpwnam(OTHER).pw_uid
                    assert vm.state.worker == "mac"
                    process.terminate()
                    assert process.wait(GENEROUS) == 0, (tmp_path / "out").read_text()
            assert {path.stat().st_uid for path in place.rglob("*")} == {0}
        finally:
            shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_installed_controller_starts_with_the_words_of_its_unit(tmp_path: Path) -> None:
    data = tmp_path / "a directory" / "100%"
    words = ("--listen", "127.0.0.1:0", *PLAIN, "--data-dir", str(data), "--user", "root")
    unit = unit_settings(printed("controller", "install", "--format", "systemd", "--print", *words, home=tmp_path))
    environ = dict(word.split("=", 1) for word in unquoted(unit["Environment"][0]))
    assert unit["ReadWritePaths"] == [f'"{data}"'.replace("%", "%%")]
    with subprocess.Popen(
        unquoted(unit["ExecStart"][0]),
        env={**environ, "ORCHARD_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            Role(process, tmp_path / "log").wait_for(LISTENING)
            assert (data / "state.jsonl").exists()
            process.terminate()
            assert process.wait(GENEROUS) == 0
        finally:
            process.kill()
