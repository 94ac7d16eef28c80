"""The decisions of a worker's task for one VM, without I/O: its phases, reports, note and scripts.

`InstanceState` is the phase of an `Instance` (instance.py) and the data of its reports. The phase changes only by
`TRANSITIONS`, a table from (phase, step) to the next phase. A `Note` tells the next worker about a VM. The functions
return what a VM asks of its driver.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import Any, Literal

from orchard.codec import format_time, load_json
from orchard.schema import SHUTDOWN_TIMEOUT, VM, GuestScript, Status
from orchard.vm.driver import Hardware, LocalState, Script, ScriptKind

Phase = Literal[
    # Nothing is on the host: slots have to become free first.
    "waiting",
    # Being pulled, cloned and configured: half-made.
    "creating",
    # An earlier worker started the guest, which may have ended meanwhile.
    "adopting",
    # Complete on the disk; no guest.
    "stopped",
    # The guest is being started for the generation in the note.
    "starting",
    # The guest runs.
    "running",
    # The guest runs and is about to end; its shutdown script runs.
    "finishing",
    # The guest was told to end because there is a newer generation.
    "stopping",
    # Stopped or suspended, as the specification says.
    "resting",
    # Failed, or told to end; no guest.
    "ended",
    # Deleted from the host.
    "removed",
]
Step = Literal["create", "created", "start", "up", "finish", "change", "down", "rest", "over", "deleted"]

# Every instance can be told to end in every phase. `over` comes when no guest is left then.
_ALWAYS: Mapping[Step, Phase] = {"over": "ended", "deleted": "removed"}
# A step that is not in a phase's row cannot happen in that phase.
TRANSITIONS: Mapping[Phase, Mapping[Step, Phase]] = {
    "waiting": {"create": "creating", **_ALWAYS},
    "creating": {"created": "stopped", **_ALWAYS},
    "adopting": {"up": "running", "down": "stopped", **_ALWAYS},
    "stopped": {"start": "starting", "rest": "resting", **_ALWAYS},
    "starting": {"up": "running", "down": "stopped", **_ALWAYS},
    "running": {"finish": "finishing", "change": "stopping", "down": "stopped", **_ALWAYS},
    "finishing": {"change": "stopping", "down": "stopped", **_ALWAYS},
    "stopping": {"down": "stopped", **_ALWAYS},
    "resting": {"start": "starting", "rest": "resting", **_ALWAYS},
    "ended": {**_ALWAYS},
    "removed": {},
}


@dataclass(frozen=True, slots=True)
class Startup:
    """How a startup script has ended.

    `exit_code` is None if the script did not begin or its end was not seen. `ended_at` is in seconds since 1970, None
    if unknown. `failure` says why the VM is not ready although it was kept, or is "".
    """

    exit_code: int | None
    ended_at: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class InstanceState:
    """The phase of an instance, and the data from which its reports are derived.

    `observed` is the generation that was last acted upon; None before the first run. `progress` says what a VM is
    waiting for, or is "". `reason` says why the VM fails; it is set before the VM has failed, while its guest ends.
    `reached`: the present guest has run its script or has an address.
    """

    phase: Phase
    observed: int | None = None
    progress: str = ""
    image_fqn: str = ""
    reason: str | None = None
    startup: Startup | None = None
    reached: bool = False

    def after(self, step: Step) -> InstanceState:
        """Return the state after a step. Raises ValueError for a step that cannot happen in this phase."""
        try:
            return replace(self, phase=TRANSITIONS[self.phase][step], reached=self.reached and step != "down")
        except KeyError:
            raise ValueError(
                f'step is "{step}" in phase {self.phase}, expected {list(TRANSITIONS[self.phase])}'
            ) from None

    @property
    def has_guest(self) -> bool:
        """Whether something of the VM may run on the host."""
        return self.phase == "starting" or self.running

    @property
    def status(self) -> Status:
        if self.reason is not None and self.phase in ("ended", "removed"):
            return "failed"
        return "pending" if self.observed is None else "running"

    @property
    def message(self) -> str:
        if self.status == "failed":
            return self.reason or ""
        kept = self.startup.failure if self.startup is not None else ""
        return self.progress or (f"kept running, but not ready: {kept}" if kept else "")

    @property
    def running(self) -> bool:
        """Whether the guest runs, as far as is known."""
        return self.phase in ("adopting", "running", "finishing", "stopping")

    @property
    def ready(self) -> bool:
        """Whether the guest runs, can be reached, and its startup script has not failed."""
        has_failed = self.startup is not None and bool(self.startup.failure)
        return self.reached and not has_failed and self.phase in ("adopting", "running")

    def report(self) -> dict[str, Any]:
        """Return the report for the controller, in its JSON form. It tells how the startup script has ended, if it has."""
        conditions = {"running": self.running, "ready": self.ready}
        told: dict[str, Any] = {
            "status": self.status,
            "status_message": self.message,
            "image_fqn": self.image_fqn,
            "observedGeneration": self.observed or 0,
            "conditions": [{"type": kind, "state": "true" if state else "false"} for kind, state in conditions.items()],
        }
        if self.startup is not None and self.startup.exit_code is not None:
            told["startupExitCode"] = self.startup.exit_code
        if self.startup is not None and self.startup.ended_at is not None:
            ended_at = datetime.datetime.fromtimestamp(self.startup.ended_at, datetime.UTC)
            told["startupEndedAt"] = format_time(ended_at)
        return told


@dataclass(frozen=True, slots=True)
class Note:
    """What the next worker has to know about a VM: the generation it runs under, how far its startup script has come,
    and what the controller does not have any more when the VM was deleted: its shutdown script, and the resources that
    it holds, which are noted for a VM with such a script.
    """

    generation: int
    hardware: Hardware
    suspendable: bool
    script: Literal["", "begun", "done"] = ""
    # Set when `script` is "done".
    startup: Startup | None = None
    shutdown: Script | None = None
    resources: Mapping[str, int] | None = None

    def __str__(self) -> str:
        values: list[Any] = [self.generation, astuple(self.hardware), self.suspendable, self.script]
        # A script that has succeeded is known by "done".
        failed = self.startup if self.startup is not None and self.startup.failure else None
        more = {
            "startup": None if failed is None else astuple(failed),
            "shutdown": None if self.shutdown is None else asdict(self.shutdown),
            "resources": self.resources,
        }
        # Workers of earlier versions can read only notes of four values.
        return json.dumps([*values, more] if any(more.values()) else values)

    @classmethod
    def parse(cls, text: str) -> Note:
        """Read what str() returned. Raises ValueError."""
        try:
            match load_json(text.encode()):
                case [
                    int(generation),
                    [int(cpu), int(memory), int(disk)],
                    bool(able),
                    "" | "begun" | "done" as script,
                    *rest,
                ]:
                    startup, shutdown, resources = _parse_more(*rest)
                    # When the script ended is not noted, since the controller knows it.
                    startup = Startup(0, None) if script == "done" and startup is None else startup
                    return cls(generation, Hardware(cpu, memory, disk), able, script, startup, shutdown, resources)
        except (ValueError, TypeError, KeyError):
            pass
        # The message does not show the text, which may hold secrets.
        raise ValueError(f"the note about a VM has {len(text)} characters and cannot be read")


def _parse_more(
    more: Mapping[str, Any] | None = None,
) -> tuple[Startup | None, Script | None, Mapping[str, int] | None]:
    """Raises ValueError, TypeError, KeyError for anything that no `Note` has."""
    if more is None:
        return None, None, None
    startup = shutdown = resources = None
    if more["startup"] is not None:
        code, at, failure = more["startup"]
        startup = Startup(None if code is None else int(code), None if at is None else float(at), str(failure))
    if more["shutdown"] is not None:
        shutdown = Script(**more["shutdown"])
        for field in fields(shutdown):
            if not isinstance(value := getattr(shutdown, field.name), (str, bool, int, float, dict)):
                raise TypeError(f"{field.name} is {value}")
    if more["resources"] is not None:
        resources = {str(kind): int(amount) for kind, amount in dict(more["resources"]).items()}
    return startup, shutdown, resources


def hardware_of(vm: VM) -> Hardware:
    """Return the hardware that a VM is to have at its next start."""
    return Hardware(vm.state.assigned_cpu, vm.state.assigned_memory, vm.spec.disk_size)


def startup_of(vm: VM, worker: str) -> Script | None:
    """Return the startup script of a VM on a worker; None if there is none."""
    script, seconds = vm.spec.startup_script, vm.spec.startup_timeout_seconds or math.inf
    return _script(vm, worker, script, "startup", seconds) if script and script.script_content else None


def shutdown_of(vm: VM, worker: str) -> Script | None:
    """Return the shutdown script of a VM on a worker; None if there is none."""
    script, seconds = vm.spec.shutdown_script, vm.spec.shutdown_timeout_seconds or SHUTDOWN_TIMEOUT
    return _script(vm, worker, script, "shutdown", seconds) if script and script.script_content else None


def _script(vm: VM, worker: str, script: GuestScript, kind: ScriptKind, seconds: float) -> Script:
    own = {
        "ORCHARD_VM_NAME": vm.name,
        "ORCHARD_VM_UID": vm.uid,
        "ORCHARD_WORKER_NAME": worker,
        "TART_IMAGE": vm.spec.image,
    }
    spec, startup = vm.spec, vm.spec.startup_script
    # An image whose startup script needs no SSH has no SSH for the other one either.
    agent = startup is not None and startup.transport == "tart-guest-agent"
    return Script(
        script.script_content,
        {**own, **script.env},
        spec.username,
        spec.password,
        bool(spec.net_bridged),
        agent,
        spec.os,
        seconds,
        kind,
    )


def initial_state(vm: VM, found: LocalState | None) -> InstanceState:
    """Return the state of an instance whose VM was `found` on the host in some state; None: it is to be created."""
    return InstanceState(
        phase="waiting" if found is None else "adopting" if found == "running" else "stopped",
        observed=None if found is None and vm.state.status == "pending" else vm.state.observed_generation,
        image_fqn="" if found is None else vm.state.image_fqn,
        reached=found == "running" and vm.condition("ready"),
    )
