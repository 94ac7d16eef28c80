"""`orchard controller install`, `orchard worker install` and `uninstall`: a role as a service of launchd or systemd.

The service runs the program that installs it: this archive, or this environment's Python. `install` writes one file and
the directories that the service needs, and prints how to start it; it may be repeated. `uninstall` stops the service
and removes that file. State, logs and VMs stay. services.py has the texts of the files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchard.auth import BootstrapToken
from orchard.base.command_line import CommandLine, running_program
from orchard.base.files import make_private, write_private
from orchard.cli.failure import CommandError
from orchard.cli.services import STATE_DIRECTORY, ServiceDefinition, launchd_label, launchd_plist, systemd_unit
from orchard.controller import controller_parser
from orchard.net.urls import join_urls, parse_urls
from orchard.worker import worker_parser

_KINDS = {"darwin": "launchd", "linux": "systemd"}
_PATHS = {
    # Homebrew's directory first: tart is usually there.
    "launchd": "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "systemd": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
# Of users that do not exist on this host, for --print.
_HOMES = {"launchd": Path("/Users"), "systemd": Path("/home")}
_LOGS = Path("/var/log")
# tools/pyz_main.py reads the variable.
_UNPACKED_VARIABLE = "ORCHARD_PYZ_DIRECTORY"
_UNPACKED = Path("/Library/Application Support/Orchard/pyz")
_BOOTSTRAP_TOKEN_BYTES = 64 * 1024  # bytes
_FIRST_FREE_PORT = 1024
# A user number without rights of its own. Files are tested with it if systemd makes the service's user at its start.
_STRANGER = 65_534


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """The system's manager of services, and its directory of service files."""

    kind: str
    directory: Path
    # Exists while systemd runs, and not while an image is made.
    running: Path = Path("/run/systemd/system")

    def file(self, role: str) -> Path:
        name = f"{launchd_label(role)}.plist" if self.kind == "launchd" else f"orchard-{role}.service"
        return self.directory / name

    def text(self, service: ServiceDefinition) -> bytes:
        return launchd_plist(service) if self.kind == "launchd" else systemd_unit(service).encode()

    def start_commands(self, role: str, *, is_changed: bool) -> list[str]:
        """Return what starts a service whose file was written; with `is_changed` it may run already."""
        if self.kind == "launchd":
            stop = [f"launchctl bootout system/{launchd_label(role)}"] if is_changed else []
            return [*stop, f"launchctl bootstrap system {self.file(role)}"]
        again = [f"systemctl restart orchard-{role}"] if is_changed else []
        return ["systemctl daemon-reload", f"systemctl enable --now orchard-{role}", *again]

    def stop(self, role: str) -> None:
        """Stop a service and do not start it again. Raises CommandError."""
        if self.kind == "launchd":
            service = f"system/{launchd_label(role)}"
            if _has_succeeded("launchctl", "print", service):
                _call("launchctl", "bootout", service)
        else:
            now = ["--now"] if self.running.exists() else []
            _call("systemctl", "disable", *now, f"orchard-{role}.service")

    def forget(self) -> None:
        """Let the manager notice that a file has been removed. Raises CommandError."""
        if self.kind == "systemd" and self.running.exists():
            _call("systemctl", "daemon-reload")


MANAGERS = {
    "launchd": ServiceManager("launchd", Path("/Library/LaunchDaemons")),
    "systemd": ServiceManager("systemd", Path("/etc/systemd/system")),
}


# ---- command line --------------------------------------------------------------------------------------------------


def run_install_verb(role: str, verb: str, words: Sequence[str]) -> int:
    """Run `orchard ROLE install` or `orchard ROLE uninstall`, and return the exit status. Raises CommandError."""
    parser = install_parser(role, verb)
    # argparse's own method: options that this parser does not know are the role's.
    options, rest = argparse.ArgumentParser.parse_known_args(parser, [word for word in words if word != "--"])
    kind = options.format or _KINDS.get(sys.platform)
    if kind is None:
        raise CommandError(f"services of {sys.platform} are unknown here, expected --format launchd or systemd")
    manager = MANAGERS[kind]
    if verb == "uninstall":
        if rest:
            parser.error(f"unknown option {rest[0]}")
        return uninstall(role, manager)
    describe = _describe_worker if role == "worker" else _describe_controller
    service = describe(kind, options, rest)
    if options.print:
        sys.stdout.write(manager.text(service).decode())
        return 0
    return install(service, manager)


def install_parser(role: str, verb: str) -> CommandLine:
    """Return the parser of `install` or `uninstall`."""
    what = (
        f"Write a service file for the {role}, and say how to start it. All other options are the {role}'s."
        if verb == "install"
        else f"Stop the {role}'s service and remove its file. State, logs and VMs stay."
    )
    parser = CommandLine(prog=f"orchard {role} {verb}", description=what)
    add = parser.add_argument
    add("--format", choices=tuple(_PATHS), help="kind of the service; default: that of this system")
    if verb == "uninstall":
        return parser
    add("--print", action="store_true", help="print the service file and change nothing; works on any system")
    add("--user", metavar="NAME", default="",
        help="user that the service runs as; default: "
        + ("who calls this, or sudo" if role == "worker" else "one that systemd makes, or who calls this or sudo"))  # fmt: skip
    if role == "worker":
        add(
            "--url",
            metavar="CONTROLLER_URL",
            required=True,
            help="URL of the controller; of several, separated by commas",
        )
        add("--token-file", metavar="FILE", type=Path, required=True,
            help="file with the bootstrap token, which only its owner can read")  # fmt: skip
    else:
        add("--data-dir", metavar="DIR", type=Path,
            help="data directory; default: .orchard/controller in the user's home directory, with systemd in"
            " /var/lib/orchard")  # fmt: skip
        add("--environment-file", metavar="FILE", type=Path,
            help="with systemd: file with variables such as ORCHARD_ETCD_PASSWORD, which only root has to be able to read")  # fmt: skip
    return parser


# ---- what the service is -------------------------------------------------------------------------------------------


def _describe_worker(kind: str, options: argparse.Namespace, rest: Sequence[str]) -> ServiceDefinition:
    """Return the service that the options ask for; `rest` are options of the worker. Raises CommandError."""
    try:
        url = join_urls(parse_urls(options.url))
    except ValueError as error:
        raise CommandError(f"--url: {error}") from None
    words = [url, "--bootstrap-token-stdin", *rest]
    parsed = worker_parser().parse_args(words)
    _require_absolute(parsed)
    log_file = _log_file("worker", kind, parsed)
    user = options.user or _caller()
    program, environ = running_program(), _orchard_home()
    if kind == "launchd" and user != "root":
        # It starts as root, and keeps the right to connect to VMs.
        words += ["--user", user]
        if "-m" not in program:
            # The archive unpacks itself where all users can read it and only root can change it.
            environ[_UNPACKED_VARIABLE] = str(_UNPACKED)
    home = _home_of(user, kind)
    runtime = shutil.which(parsed.tart or parsed.runtime)
    before = [str(Path(runtime).parent.absolute())] if runtime and not parsed.tart else []
    return ServiceDefinition(
        role="worker",
        words=[*program, "worker", "run", *words, *_log_words(log_file, parsed)],
        user=user,
        directory=home,
        environ={"PATH": ":".join(dict.fromkeys([*before, *_PATHS[kind].split(":")])), "HOME": str(home), **environ},
        token_file=options.token_file.absolute(),
        log_file=log_file,
    )


def _describe_controller(kind: str, options: argparse.Namespace, rest: Sequence[str]) -> ServiceDefinition:
    """Return the service that the options ask for; `rest` are options of the controller. Raises CommandError."""
    # systemd makes a user for the service, and that user's directories are those in /var/lib.
    is_made = kind == "systemd" and not options.user
    user = "" if is_made else options.user or _caller()
    home = STATE_DIRECTORY / "orchard" if kind == "systemd" else _home_of(user, kind)
    environ = {"ORCHARD_HOME": str(home)} if kind == "systemd" else _orchard_home()
    data = options.data_dir or Path(environ.get("ORCHARD_HOME", home)) / ".orchard" / "controller"
    data = data.absolute()
    if options.environment_file is not None and kind != "systemd":
        raise CommandError(f"--environment-file is for systemd only, and this is {kind}")
    words = [*(["--data-dir", str(data)] if options.data_dir else []), *rest]
    parsed = controller_parser().parse_args(words)
    _require_absolute(parsed)
    program, log_file = running_program(), _log_file("controller", kind, parsed)
    written = [data, *([log_file.parent] if log_file is not None else [])]
    for path in written:
        if is_made and STATE_DIRECTORY not in path.parents:
            raise CommandError(f"{path} is outside of {STATE_DIRECTORY}: add --user, with the user who may write to it")
    return ServiceDefinition(
        role="controller",
        words=[*program, "controller", "run", *words, *_log_words(log_file, parsed)],
        user=user,
        directory=home,
        environ={"PATH": _PATHS[kind], "HOME": str(home), **environ},
        environment_file=options.environment_file and options.environment_file.absolute(),
        log_file=log_file,
        used=[*map(Path, program[:2]), *map(Path, sys.path), *_paths(parsed)],
        written=written,
        has_low_port=any(0 < port < _FIRST_FREE_PORT for port in _ports(parsed)),
    )


def _orchard_home() -> dict[str, str]:
    value = os.environ.get("ORCHARD_HOME")
    return {"ORCHARD_HOME": os.path.abspath(value)} if value else {}  # noqa: PTH100


def _log_file(role: str, kind: str, parsed: argparse.Namespace) -> Path | None:
    """Return the log of a service of launchd; a service of systemd has a journal, if it is not told otherwise."""
    found: Path | None = parsed.log_file
    return found or (_LOGS / f"orchard-{role}" / f"{role}.log" if kind == "launchd" else None)


def _log_words(log_file: Path | None, parsed: argparse.Namespace) -> list[str]:
    return [] if log_file is None or parsed.log_file else ["--log-file", str(log_file)]


def _caller() -> str:
    """Return the name of the user who calls this, also through sudo."""
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name


def _home_of(user: str, kind: str) -> Path:
    try:
        return Path(pwd.getpwnam(user).pw_dir)
    except KeyError:
        return _HOMES[kind] / user


def _values(parsed: argparse.Namespace) -> list[object]:
    values = vars(parsed).values()
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


def _paths(parsed: argparse.Namespace) -> list[Path]:
    return [value for value in _values(parsed) if isinstance(value, Path)]


def _ports(parsed: argparse.Namespace) -> list[int]:
    """Return the ports of all options that are an address."""
    return [value[1] for value in _values(parsed) if isinstance(value, tuple) and isinstance(value[-1], int)]


def _require_absolute(parsed: argparse.Namespace) -> None:
    """Raise CommandError for a relative path among the role's options: a service starts in another directory."""
    for path in _paths(parsed):
        if not path.is_absolute():
            raise CommandError(f"{path} is relative, expected the whole path, such as {path.absolute()}")


# ---- writing and removing ------------------------------------------------------------------------------------------


def install(service: ServiceDefinition, manager: ServiceManager) -> int:
    """Write the file of a service, and return the exit status. Raises CommandError."""
    _require_root("install")
    user = _known_user(service.user)
    if service.token_file is not None:
        _check_token_file(service.token_file, user.pw_uid)
    if service.environment_file is not None:
        _read_private(service.environment_file, "variables", user.pw_uid)
    _check_program(service, user)
    file, text = manager.file(service.role), manager.text(service)
    try:
        _make_directories(service, user)
        is_changed = file.exists()
        if is_changed and file.read_bytes() == text:
            print(f"{file} is as it should be")
            return 0
        file.parent.mkdir(parents=True, exist_ok=True)
        write_private(file, text)
        # It contains no secret, and systemd wants it to be readable.
        file.chmod(0o644)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from None
    print(f"wrote {file}")
    if manager.kind == "launchd" and service.role == "worker" and service.user == "root":
        print(
            "VMs with macOS 15 and newer do not start as root: add --user with a user who is logged in", file=sys.stderr
        )
    print(
        f"user: {service.user or 'one that systemd makes'}; log: {service.log_file or 'journalctl -u ' + service.name}"
    )
    print("to start it:", *manager.start_commands(service.role, is_changed=is_changed), sep="\n  ")
    return 0


def uninstall(role: str, manager: ServiceManager) -> int:
    """Stop a service and remove its file, if there is one, and return the exit status. Raises CommandError."""
    _require_root("uninstall")
    file = manager.file(role)
    if not file.exists():
        print(f"{file} does not exist")
        return 0
    manager.stop(role)
    try:
        file.unlink()
    except OSError as error:
        raise CommandError(f"cannot remove {file}: {error.strerror}") from None
    manager.forget()
    print(f"removed {file}; state, logs and VMs stay")
    return 0


def _require_root(verb: str) -> None:
    if os.geteuid() != 0:
        advice = "; --print shows the file without changing anything" if verb == "install" else ""
        raise CommandError(f"{verb} needs root: call it with sudo{advice}")


def _known_user(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name) if name else pwd.getpwuid(_STRANGER)
    except KeyError:
        raise CommandError(f'user "{name}" does not exist on this host, correct --user') from None


def _check_token_file(path: Path, user: int) -> None:
    """Raise CommandError unless a file holds a bootstrap token that only root and a user can read."""
    text = _read_private(path, "bootstrap token", user)
    try:
        BootstrapToken.parse(text.decode())
    except ValueError as error:
        raise CommandError(f"{path}: {error}; orchard get bootstrap-token ACCOUNT prints one") from None


def _read_private(path: Path, what: str, user: int) -> bytes:
    """Return the beginning of a file. Raise CommandError unless only root and a user can read it."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            text = file.read(_BOOTSTRAP_TOKEN_BYTES)
    except OSError as error:
        raise CommandError(f"cannot read the {what} in {path}: {error.strerror}") from None
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or found.st_uid not in (0, user):
        raise CommandError(
            f"other users can read {path}: chown it to the service's user or root, then chmod 600 {path}"
        )
    return text


def _check_program(service: ServiceDefinition, user: pwd.struct_passwd) -> None:
    """Raise CommandError unless the service's user can run the service's program in its environment."""
    words = [*service.words[: service.words.index(service.role)], "--version"]
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, user.pw_uid, user.pw_gid)
        env = {**service.environ, "ORCHARD_HOME": directory}
        env.pop(_UNPACKED_VARIABLE, None)
        try:
            done = subprocess.run(  # noqa: S603
                words, env=env, cwd="/", user=user.pw_uid, group=user.pw_gid, extra_groups=[],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except OSError as error:
            problem = error.strerror
        else:
            problem = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    if problem:
        who = f"user {service.user}" if service.user else "the service's user"
        raise CommandError(f"{who} cannot run {' '.join(words)}: {problem}; install it where that user can read it")


def _make_directories(service: ServiceDefinition, user: pwd.struct_passwd) -> None:
    """Make what the service writes to, and give it to the service's user. systemd makes what is in /var/lib."""
    logs = [service.log_file.parent] if service.log_file is not None else []
    for directory in (*logs, *service.written):
        if directory.exists() or STATE_DIRECTORY in directory.parents:
            continue
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        make_private(directory)
        for path in missing:
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


# ---- the manager's programs ----------------------------------------------------------------------------------------


def _has_succeeded(*words: str) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0  # noqa: S603
    return False


def _call(*words: str) -> None:
    """Run a program of the manager. Raises CommandError with what it said."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise CommandError(f"cannot run {words[0]}: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}"
        raise CommandError(f"{' '.join(words)} failed: {said}")
