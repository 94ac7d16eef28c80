"""The text of service files: launchd property lists and systemd units. Pure.

A worker's VMs must outlive its restart: launchd does not kill what is left of the job (`AbandonProcessGroup`), and
systemd ends the main process alone (`KillMode=process`). The bootstrap token is the worker's standard input, so it is
in no file that others can read and in no list of processes.
"""

from __future__ import annotations

import plistlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Between two starts of a service that ends at once. Six logins a minute with a wrong token are below the controller's limit.
RESTART_SECONDS = 10
# Until a service that was asked to end is killed. A controller gives the requests under way 10 s.
_STOP_SECONDS = 30
_OPEN_FILES = 65_536
# A directory below it is made, and given to the service's user, by systemd.
STATE_DIRECTORY = Path("/var/lib")
# What ProtectHome hides.
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
# Characters that need no quotes in a unit.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_UMASK = 0o077


@dataclass(frozen=True, slots=True)
class ServiceDefinition:
    """A controller or a worker as a service of a host. All paths are absolute."""

    # "controller" or "worker".
    role: str
    # The program and its arguments.
    words: Sequence[str]
    # "": a user that systemd makes for the service.
    user: str
    directory: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    # The service's standard input.
    token_file: Path | None = None
    # Has variables that no other user may read, for systemd.
    environment_file: Path | None = None
    # None: the journal of systemd.
    log_file: Path | None = None
    # What the service reads and writes beside its directory.
    used: Sequence[Path] = ()
    written: Sequence[Path] = ()
    has_low_port: bool = False

    @property
    def name(self) -> str:
        return f"orchard-{self.role}"


# ---- launchd -------------------------------------------------------------------------------------------------------


def launchd_label(role: str) -> str:
    return f"orchard.{role}"


def launchd_plist(service: ServiceDefinition) -> bytes:
    """Return the property list of a daemon of launchd."""
    settings: dict[str, object] = {
        "Label": launchd_label(service.role),
        "ProgramArguments": list(service.words),
        "WorkingDirectory": str(service.directory),
        "EnvironmentVariables": dict(service.environ),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": RESTART_SECONDS,
        "ExitTimeOut": _STOP_SECONDS,
        "Umask": _UMASK,
        "SoftResourceLimits": {"NumberOfFiles": _OPEN_FILES},
    }
    if service.role == "worker":
        settings["AbandonProcessGroup"] = True
        # A daemon gets less of the processors and the disk otherwise, and so do the VMs that it starts.
        settings["ProcessType"] = "Interactive"
    elif service.user != "root":
        # A worker becomes its user itself: launchd would start it without the right to connect to VMs.
        settings["UserName"] = service.user
    if service.token_file is not None:
        settings["StandardInPath"] = str(service.token_file)
    if service.log_file is not None:
        # What is printed beside the log, which the role writes and rotates itself.
        printed = service.log_file.with_suffix(".out")
        settings["StandardOutPath"] = settings["StandardErrorPath"] = str(printed)
    return plistlib.dumps(settings, sort_keys=False)


# ---- systemd -------------------------------------------------------------------------------------------------------


def systemd_unit(service: ServiceDefinition) -> str:
    """Return the text of a systemd unit."""
    environ = " ".join(_quoted(f"{name}={value}") for name, value in service.environ.items())
    lines = [
        "[Unit]",
        f"Description=Orchard {service.role}",
        "Wants=network-online.target",
        "After=network-online.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={' '.join(_quoted(word, is_command=True) for word in service.words)}",
        f"Environment={environ}",
        *([f"EnvironmentFile={_literal(service.environment_file)}"] if service.environment_file is not None else []),
        f"WorkingDirectory={_literal(service.directory)}",
        "Restart=always",
        f"RestartSec={RESTART_SECONDS}",
        f"TimeoutStopSec={_STOP_SECONDS}",
        f"LimitNOFILE={_OPEN_FILES}",
        f"UMask={_UMASK:04o}",
        f"User={_literal(service.user)}" if service.user else "DynamicUser=yes",
    ]
    if service.token_file is not None:
        lines.append(f"StandardInput=file:{_literal(service.token_file)}")
    lines += _worker_lines() if service.role == "worker" else _controller_lines(service)
    return "\n".join([*lines, "", "[Install]", "WantedBy=multi-user.target", ""])


def _worker_lines() -> list[str]:
    """Return the settings of a worker, whose VMs are processes of its unit and have all that VMs need."""
    return [
        "# VMs outlive the worker, and the next one adopts them.",
        "KillMode=process",
        "# A VM that the kernel ends for want of memory ends alone.",
        "OOMPolicy=continue",
        "TasksMax=infinity",
        "ProtectSystem=full",
        "ProtectControlGroups=yes",
    ]


def _controller_lines(service: ServiceDefinition) -> list[str]:
    """Return the settings of a controller, which writes to its directory and opens sockets, and needs nothing else."""
    is_home_used = any(path.is_relative_to(home) for path in (*service.used, *service.written) for home in _HOMES)
    places = [service.directory, *service.written]
    # The others are in one of these, or outside.
    tops = [path for path in places if not any(other in path.parents for other in places)]
    state = [path for path in tops if STATE_DIRECTORY in path.parents]
    elsewhere = [path for path in tops if path not in state]
    # A process in a user name space of its own has no rights over the host's ports.
    port = ["CAP_NET_BIND_SERVICE"] if service.has_low_port else []
    return [
        *(f"StateDirectory={_quoted(str(path.relative_to(STATE_DIRECTORY)))}" for path in state),
        "StateDirectoryMode=0700",
        *(f"ReadWritePaths={_quoted(str(path))}" for path in elsewhere),
        f"CapabilityBoundingSet={' '.join(port)}",
        f"AmbientCapabilities={' '.join(port)}",
        f"PrivateUsers={'no' if port else 'yes'}",
        f"ProtectHome={'read-only' if is_home_used else 'yes'}",
        "LockPersonality=yes",
        "MemoryDenyWriteExecute=yes",
        "NoNewPrivileges=yes",
        "PrivateDevices=yes",
        "PrivateTmp=yes",
        "ProcSubset=pid",
        "ProtectClock=yes",
        "ProtectControlGroups=yes",
        "ProtectHostname=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "ProtectProc=invisible",
        "ProtectSystem=strict",
        "RemoveIPC=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallFilter=~@privileged @resources",
        "SystemCallErrorNumber=EPERM",
    ]


def _quoted(word: str, *, is_command: bool = False) -> str:
    """Return a word as systemd reads it back, from a command line or from a list."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if is_command:
        escaped = escaped.replace("$", "$$")
    return escaped if _PLAIN.fullmatch(word) else f'"{escaped}"'


def _literal(value: Path | str) -> str:
    """Return the value of a setting that systemd reads to the end of its line."""
    return str(value).replace("%", "%%")
