"""The command line of `tart` and `vetu` without I/O: argument lists, and parsing of output. tart.py makes the calls."""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from orchard.codec import MAX_UINT, ValidationError, parse_time
from orchard.resources.cluster import CachedImage
from orchard.schema import ARCHIVE, LOCAL_PREFIX, HostDir, VMSpec
from orchard.vm.driver import (
    DriverError,
    Hardware,
    LocalState,
    LocalVM,
    NoSuchVM,
    NotRunning,
    Progress,
    operand,
)
from orchard.vm.processes import find_complaint, presentable

# tart's exit status when the VM does not exist or does not run.
_ABSENT = 2
# `tart list` counts in decimal gigabytes.
_GIGABYTE = 10**9  # bytes
# The end of an unfinished line that is searched for a percentage.
_PROGRESS_BYTES = 4096  # bytes
# Before this version `tart list` fails while a VM with an ASIF disk runs (images of macOS 27), and breaks its start.
LISTS_SAFELY = (2, 39, 0)
_START_SECONDS = 10.0  # seconds
_VERSION = re.compile(rb"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?")
_FLAG = re.compile(rb"(?<![\w-])--[a-z][a-z-]*")
_UNKNOWN_VM = re.compile(r'\bVM "[^"]*" does not exist')
# Where a JSON array may begin.
_ARRAY = re.compile(r"^[ \t]*\[", re.MULTILINE)
# The most such places that are tried.
_MAX_ARRAYS = 100
_PERCENT = re.compile(rb"(\d{1,3})(?:\.\d+)?%")


def set_arguments(name: str, hardware: Hardware, *, random_mac: bool = False, random_serial: bool = False) -> list[str]:
    """Return the arguments of `tart set`, or an empty list when there is nothing to set."""
    numbers = (("--cpu", hardware.cpu), ("--memory", hardware.memory), ("--disk-size", hardware.disk_size))
    words = [word for flag, number in numbers if number for word in (flag, str(number))]
    words += ["--random-mac"] * random_mac + ["--random-serial"] * random_serial
    return ["set", operand("VM name", name), *words] if words else []


def run_arguments(name: str, spec: VMSpec, flags: AbstractSet[str] = frozenset()) -> list[str]:
    """Return the arguments of `tart run`. Raises DriverError for a specification that they cannot express.

    `flags` are those that the program at hand knows: not every version can keep the host's devices from a guest.
    """
    words = ["run"]
    words += ["--no-graphics"] * spec.headless
    for flag, shared in (
        ("--no-audio", spec.audio),
        ("--no-clipboard", spec.clipboard),
        ("--no-usb-accessories", False),
    ):
        words += [flag] * (flag in flags and not shared)
    words += ["--net-softnet"] * bool(spec.net_softnet or spec.net_softnet_allow or spec.net_softnet_block)
    for flag, networks in (
        ("--net-softnet-allow", spec.net_softnet_allow),
        ("--net-softnet-block", spec.net_softnet_block),
    ):
        if networks:
            words += [flag, ",".join(_network(flag, network) for network in networks)]
    if spec.net_bridged:
        words.append(f"--net-bridged={operand('interface to bridge to', spec.net_bridged)}")
    words += ["--nested"] * spec.nested
    words += ["--suspendable"] * spec.suspendable
    words += [_dir_flag(shared) for shared in spec.host_dirs]
    return [*words, operand("VM name", name)]


def _network(flag: str, network: str) -> str:
    if "," in network:
        raise DriverError(f'{flag} is "{network}", expected one network, without a comma')
    return operand(f"network of {flag}", network)


def _dir_flag(shared: HostDir) -> str:
    expressible = ARCHIVE.fullmatch(shared.path) or (shared.path and ":" not in shared.path)
    if not shared.name or ":" in shared.name or not expressible or re.search("[,\0]", shared.name + shared.path):
        raise DriverError(
            f'cannot share the directory "{shared.path}" as "{shared.name}": expected name and path without ":" and ","'
        )
    return f"--dir={shared.name}:{shared.path}" + ":ro" * shared.ro


def missing_in_vetu(spec: VMSpec) -> str:
    """Return the names of the features in a specification that vetu does not have, or ""."""
    wanted = {
        "Softnet": spec.net_softnet or spec.net_softnet_allow or spec.net_softnet_block,
        "suspending": spec.suspendable,
        "shared directories": spec.host_dirs,
    }
    return ", ".join(feature for feature, asked in wanted.items() if asked)


def parse_list(output: bytes) -> list[LocalVM]:
    """Read the output of `tart list --source local --format json`, in which other text may occur. Raises ValueError.

    A VM of another program in an unknown state is left out. One of ours counts as running, since it may hold a slot.
    """
    vms: list[LocalVM] = []
    for item in _find_array(output.decode("utf-8", "replace")):
        if not isinstance(item, dict) or not isinstance(name := item.get("Name"), str):
            raise ValueError(f"not a VM: {presentable(repr(item))}")
        state, runs = item.get("State"), item.get("Running")
        if state not in get_args(LocalState):
            if runs is None and not name.startswith(LOCAL_PREFIX):
                continue
            # Older versions print no state.
            state = "stopped" if state is None and runs is False else "running"
        vms.append(LocalVM(name, cast("LocalState", state)))
    return vms


def parse_images(output: bytes) -> list[CachedImage]:
    """Read the output of `tart list --source oci --format json`: cached images, by tag and by digest. Raises ValueError."""
    images: list[CachedImage] = []
    for item in _find_array(output.decode("utf-8", "replace")):
        if not isinstance(name := item.get("Name"), str):
            raise ValueError(f"not an image: {presentable(repr(item))}")
        size, accessed = item.get("Size"), item.get("Accessed")
        used: datetime.datetime | None = None
        with suppress(ValidationError):
            used = parse_time(accessed, "Accessed") if isinstance(accessed, str) else None
        _, _, digest = name.partition("@")
        size_bytes = size * _GIGABYTE if isinstance(size, int) and size > 0 else 0
        images.append(CachedImage(name, digest, min(size_bytes, MAX_UINT), used))
    return images


def with_digests(images: Iterable[CachedImage], fqns: Mapping[str, str]) -> list[CachedImage]:
    """Return each cached image once, where tart lists those with a tag by their digests, too.

    `fqns` maps names by tag to names with the digest, as far as they are known.
    """
    digests = {name: fqn.partition("@")[2] for name, fqn in fqns.items()}
    found = [replace(image, digest=image.digest or digests.get(image.name, "")) for image in images]
    by_tag = {name for image in found if "@" not in image.name for name in image.names()}
    return [image for image in found if "@" not in image.name or image.name not in by_tag]


def _find_array(text: str) -> list[Any]:
    for begin in itertools.islice(_ARRAY.finditer(text), _MAX_ARRAYS):
        with suppress(ValueError, RecursionError):
            found, end = json.JSONDecoder().raw_decode(text, begin.end() - 1)
            # "[1]" or "[] x" may be a line of a log.
            alone = not text[end:].partition("\n")[0].strip()
            if alone and isinstance(found, list) and all(isinstance(item, dict) for item in found):
                return found
    raise ValueError(f'no list of VMs in "{presentable(text)}"')


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a program can do: its version, () if that is unknown, and the flags of its `run`."""

    version: tuple[int, ...]
    flags: AbstractSet[str]

    @classmethod
    def parse(cls, version: bytes, run_help: bytes) -> Abilities:
        """Read the output of `tart --version` and `tart run --help`."""
        found = _VERSION.search(version)
        numbers = tuple(int(number or 0) for number in found.groups()) if found else ()
        return cls(numbers, frozenset(flag.decode() for flag in _FLAG.findall(run_help)))

    @property
    def lists_safely(self) -> bool:
        return self.version >= LISTS_SAFELY

    @property
    def remedy(self) -> str:
        """A sentence about a version that does not list safely, with the remedy."""
        wanted, found = (".".join(map(str, numbers)) for numbers in (LISTS_SAFELY, self.version))
        return (
            f"the version of tart is {found or 'unknown'}, expected {wanted} or newer, since older ones cannot list VMs"
            " while one with an image of macOS 27 runs; upgrade tart"
        )


def seconds_until_listable(starts: Iterable[float], now: float) -> float:
    """Return how long `tart list` must wait for VMs that began to start at some times, all in seconds since 1970."""
    # The clock may have been set back since a start.
    return max((_START_SECONDS - age for start in starts if 0 <= (age := now - start) < _START_SECONDS), default=0.0)


class Percentage:
    """Finds `N%` in the output of a transfer, and reports each number that differs from the last."""

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._last = -1
        self._open = b""

    def feed(self, data: bytes) -> None:
        *lines, rest = re.split(rb"[\r\n]", self._open + data)
        self._open = rest[-_PROGRESS_BYTES:]
        for line in lines:
            for number in _PERCENT.findall(line):
                percent = min(int(number), 100)
                if percent != self._last:
                    self._last = percent
                    self._report(percent)


def verb_error(program: str, verb: str, status: int, stderr: bytes) -> DriverError:
    """Return the error for a call that ended with another exit status than 0, with what its stderr complains of."""
    line = find_complaint(stderr) or f"{program} {verb} failed with exit status {status}"
    if _UNKNOWN_VM.search(line) or (status == _ABSENT and verb in ("clone", "delete")):
        return NoSuchVM(line)
    if status == _ABSENT and verb in ("stop", "suspend"):
        return NotRunning(line)
    return DriverError(line)
