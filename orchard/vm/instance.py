"""The worker's task for one VM, from its creation on this host to its removal.

An `Instance` is one (name, uid, restart_count) on this host. Its task, `tend`, performs driver verbs in plain sequence:

    wait until ending instances have released their slots -> pull, clone -> set -> run, with the script
    -> newer generation? -> stop or suspend -> set -> run ...
    -> failed, or told to end: stop -> when the controller does not have the VM any more: delete

instance_state.py has the decisions: the table of phases, and what the instance reports. Only the task changes the
phase; the worker gives orders by `follow`, `fail` and `remove`. A VM is reported as failed only when its guest has
ended, since the controller may start the VM elsewhere as soon as it knows.

A guest that runs and is told to end runs its shutdown script before: when the VM is deleted, restarted or stopped, or
its worker is drained. It is not run when the VM has failed, is suspended, or its lease or its guest has ended.

When the task is cancelled (the worker ends), running VMs and VMs at rest stay on the host, and half-made ones are
deleted. A note kept with the driver says under which generation each VM runs and how far its script has come. So the
next worker can adopt the VM, even if this worker was killed. A VM whose shutdown script is cut off by the worker's end
stays, too, and the next worker runs the script anew.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from orchard.base.nursery import Wakeup, first_exception, growing_pause
from orchard.schema import PULLING, VM, Event, HostDirPolicy, VMSpec
from orchard.vm.driver import (
    Driver,
    DriverError,
    LocalState,
    LocalVM,
    NoteTrouble,
    NotRunning,
    Script,
    ScriptFailed,
    SupervisorLost,
    Trouble,
)
from orchard.vm.ending import delete_with_retries, shut_down, stop_with_retries
from orchard.vm.host import resolve_dirs
from orchard.vm.images import ImageCache
from orchard.vm.instance_state import (
    Note,
    Startup,
    Step,
    hardware_of,
    initial_state,
    shutdown_of,
    startup_of,
)

# Limit for stopping and deleting a VM when the worker ends.
REMOVE_SECONDS = 60.0  # seconds
# The first and the longest pause between looks for the address of a VM that has none yet.
_ADDRESS_SECONDS, _LAST_ADDRESS_SECONDS = 1.0, 60.0  # seconds
# Lines of script output that may wait for delivery. When the queue is full, the script waits.
QUEUED_LINES = 256
# Output in one request: far below the request limit, however JSON escapes it.
_BATCH_CHARACTERS = 256 * 1024

STOPPED = "ended with its worker, which was told to stop its VMs"
SHUT_DOWN = "the VM shut down by itself"
CUT_OFF = "the worker was restarted while the startup script ran, so how the script ended is unknown"
UNNOTED = "lost: the VM runs, but the worker's note about it is missing or unreadable"

SendEvents = Callable[[VM, Sequence[Event]], Awaitable[None]]

_logger = logging.getLogger("orchard.vm")


# ---- the task ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class InstanceHost:
    """What all instances of one worker share.

    `changed` is called when an instance has something new to report, `freed` with its local name when it has ended and
    holds no resource of the host except its disk, and `task_ended` when its task has ended. `send_events` delivers the
    output of scripts. `fetch_policies` returns the cluster's hostDirPolicies, None if the controller does not send them.
    `clock` returns seconds since 1970, for the events. `outlives`: running VMs stay when the worker ends. `worker` is
    the worker's name.
    """

    worker: str
    driver: Driver
    changed: Callable[[], None]
    freed: Callable[[str], None]
    task_ended: Callable[[Instance], None]
    send_events: SendEvents
    note_trouble: NoteTrouble
    fetch_policies: Callable[[], Awaitable[Sequence[HostDirPolicy] | None]]
    clock: Callable[[], float]
    images: ImageCache
    outlives: bool


class Instance:
    """A VM on this host. `found` is its local state if an earlier worker left it here, None for a VM to be created."""

    def __init__(self, vm: VM, host: InstanceHost, *, found: LocalState | None = None) -> None:
        # The VM as the controller last sent it.
        self.vm = vm
        # The VM's name on this host.
        self.name = vm.tart_name
        # The report that the controller has acknowledged; the worker sets it.
        self.reported: dict[str, Any] | None = None
        self.state = initial_state(vm, found)
        self._host = host
        self._note = Note(0, hardware_of(vm), suspendable=False)
        # Cancelled when the VM has to end at once, or was told to end and its shutdown script has ended.
        self._scope = trio.CancelScope()
        # Whether the VM was told to end.
        self._told = False
        self._unwanted = False
        # Set when there is an order, or the guest has ended.
        self._news = Wakeup()

    # -- orders and answers

    def follow(self, vm: VM) -> None:
        """Replace the VM by what the controller has now."""
        self.vm = vm
        self._news.set()

    def fail(self, reason: str, *, orderly: bool = False) -> None:
        """End the VM as failed; `orderly`: after its shutdown script. The first reason counts."""
        if self.state.reason is None:
            self.state = replace(self.state, reason=reason)
        self._tell_to_end(orderly=orderly)

    def remove(self) -> None:
        """End the VM, after its shutdown script, and delete it from the host."""
        self._unwanted = True
        self._tell_to_end(orderly=True)

    def _tell_to_end(self, *, orderly: bool) -> None:
        self._told = True
        runs = self.state.phase in ("adopting", "running", "finishing")
        if not (orderly and runs and self._shutdown is not None):
            self._scope.cancel()
        self._news.set()

    @property
    def _shutdown(self) -> Script | None:
        return shutdown_of(self.vm, self._host.worker)

    @property
    def ending(self) -> bool:
        """Whether the VM was told to end and may still hold resources."""
        return self._told and not self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether the VM has ended, and holds no resource of the host except its disk."""
        return self.state.phase in ("ended", "removed")

    @property
    def holds_resources(self) -> bool:
        """Whether the VM uses, or is about to use, more than the disk of the host."""
        will_begin = self.state.phase != "waiting" or not self._told
        return will_begin and not self.has_ended and self.state.phase != "resting"

    @property
    def has_unreported_failure(self) -> bool:
        """Whether the VM has failed, and the controller still has the VM and has not acknowledged the failure."""
        return self.state.status == "failed" and not self._unwanted and self.report() != self.reported

    def report(self) -> dict[str, Any]:
        """Return the report of this instance for the controller, in its JSON form."""
        return {"uid": self.vm.uid, "restart_count": self.vm.state.restart_count, **self.state.report()}

    def _show(self, step: Step | None = None, **changes: Any) -> None:
        """Change the state, by a step if one is given, and request a report."""
        state = self.state if step is None else self.state.after(step)
        self.state = replace(state, **changes)
        self._host.changed()

    # -- the task

    async def tend(self, slots_free: trio.Event | None = None, waiting_for: str = "") -> None:
        """Create the VM once `slots_free` is set, or adopt it, and keep it as specified until it is removed.

        `waiting_for` says what `slots_free` waits for.
        """
        try:
            try:
                with self._scope:
                    # The VM may have been told to end before its task began.
                    await trio.lowlevel.checkpoint()
                    if slots_free is not None and not slots_free.is_set():
                        self._show(progress=waiting_for)
                        await slots_free.wait()
                    await self._live()
            except* DriverError as group:
                self.fail(str(first_exception(group)))
            except* Exception as group:
                _logger.exception("the task of a VM failed", extra={"vm": self.vm.name}, exc_info=group)
                self.fail("internal error of the worker; its log says more")
            await self._end()
            while not self._unwanted:
                await self._news.wait()
            await self._delete()
        finally:
            if not self._stays():
                # Shielded, because the worker's end cancels the task. The deadline keeps the worker's end bounded.
                with trio.move_on_after(REMOVE_SECONDS, shield=True):
                    if self.state.has_guest:
                        self.fail(STOPPED)
                    await self._end()
                    await self._delete()
            self._host.task_ended(self)

    def _stays(self) -> bool:
        """Return whether the VM is left as it is when its task is cancelled."""
        if self.state.phase == "removed":
            return True
        if self._scope.cancel_called:
            return False
        if self.state.has_guest:
            return self._host.outlives
        rests = self.state.phase in ("stopped", "resting") and self.vm.spec.power_state != "running"
        return rests and self.state.status == "running"

    async def _live(self) -> None:
        """Keep the VM as its specification says, generation by generation. Raises DriverError when the VM fails."""
        if self.state.phase == "waiting":
            await self._create(self.vm)
        elif self.state.phase == "adopting":
            await self._adopt()
        while True:
            vm = self.vm
            if hardware_of(vm) != self._note.hardware and vm.spec.power_state != "suspended":
                self._note = replace(self._note, hardware=hardware_of(vm))
                await self._host.driver.configure(self.name, self._note.hardware)
            if vm.spec.power_state == "running":
                spec, shutdown = await self._resolved(vm.spec), self._shutdown
                self._write(
                    replace(
                        self._note,
                        generation=vm.meta.generation,
                        suspendable=vm.spec.suspendable,
                        shutdown=shutdown,
                        resources=None if shutdown is None else dict(vm.spec.resources),
                    )
                )
                self.state = self.state.after("start")
                await self._run(partial(self._host.driver.run, spec=spec))
            else:
                self._show("rest", progress="", observed=vm.meta.generation)
                while self.vm.meta.generation == vm.meta.generation:
                    await self._news.wait()

    async def _resolved(self, spec: VMSpec) -> VMSpec:
        """Return a specification with resolved paths of hostDirs. Raises DriverError for one that may not be mounted."""
        if not spec.host_dirs:
            return spec
        policies = await self._host.fetch_policies()
        with self._noting("hostDirs"):
            return replace(spec, host_dirs=await resolve_dirs(spec.host_dirs, policies))

    async def _create(self, vm: VM) -> None:
        driver, spec = self._host.driver, vm.spec
        pulls = spec.image_pull_policy == "Always"

        def show_progress(percent: int) -> None:
            self._show(progress=f"{PULLING}: {percent} %")

        self._show("create", progress=PULLING if pulls else "cloning image")
        # Only a local VM can be suspended, and only an image has a slash in its name.
        sources: Sequence[LocalVM] = []
        async with self._host.images.transfer(spec.image, show_progress, always=pulls) as on_progress:
            if pulls:
                with self._noting("pull"):
                    await driver.pull(spec.image, on_progress)
                self._show(progress="cloning image")
            with self._noting("clone"):
                sources = [] if "/" in spec.image else await driver.list_vms()
                await driver.clone(spec.image, self.name, on_progress)

        async def look_up_fqn() -> None:
            image_fqn = await driver.fqn(spec.image)
            self.state = replace(self.state, image_fqn=image_fqn)

        async with trio.open_nursery() as nursery:
            # Concurrently with `configure`, which does not need it, so that the VM runs one call earlier.
            nursery.start_soon(look_up_fqn)
            # A suspended VM can resume only with the hardware that it had.
            if LocalVM(spec.image, "suspended") not in sources:
                await driver.configure(self.name, hardware_of(vm), random_mac=True, random_serial=spec.random_serial)
        self._note = replace(self._note, hardware=hardware_of(vm))
        self._show("created", progress="starting")

    async def _adopt(self) -> None:
        """Stay with a VM that an earlier worker started, until there is a newer generation. Raises DriverError."""
        try:
            self._note = Note.parse(self._host.driver.noted(self.name))
        except ValueError:
            raise DriverError(UNNOTED) from None
        self.state = replace(self.state, startup=self._note.startup)
        if self._note.script == "begun" and not self._told:
            self._note_startup(self.vm, DriverError(CUT_OFF))
        if not self.state.image_fqn:
            image_fqn = await self._host.driver.fqn(self.vm.spec.image)
            self.state = replace(self.state, image_fqn=image_fqn)
        try:
            await self._run(self._host.driver.attach)
        except* NotRunning as group:
            # The VM has ended since it was seen running. It has not failed if an earlier worker stopped it for a newer
            # generation. A VM that runs without a supervisor fails.
            same = self._note.generation == self.vm.meta.generation
            if same or LocalVM(self.name, "running") in await self._host.driver.list_vms():
                raise first_exception(group) from None
            self.state = self.state.after("down")

    async def _run(self, stay: Callable[..., Awaitable[None]]) -> None:
        """Run `stay`, the driver's `run` or `attach`, until the guest ends; end the guest for a newer generation.

        Runs the startup script meanwhile. Raises DriverError if the guest ends without a newer generation.
        """
        # The guest's task ends last, and with it everything that uses the guest.
        async with trio.open_nursery() as nursery:
            with self._noting("start"):
                await nursery.start(self._stay_with_guest, stay)
            # A guest may end at once, before its start is seen here.
            if self.state.has_guest:
                self._show("up", progress="", observed=self._note.generation)
            async with trio.open_nursery() as using:
                using.start_soon(self._make_ready, self.vm)
                while self.vm.meta.generation == self._note.generation and self.state.has_guest and not self._told:
                    await self._news.wait()
                using.cancel_scope.cancel()
            if self.state.has_guest:
                await self._finish()
            elif self._told or self._note.generation == self.vm.meta.generation:
                raise DriverError(SHUT_DOWN)
            # An earlier worker may have stopped the guest for the newer generation, before this one does.
            if self.state.has_guest:
                await self._end_guest()
        self._host.changed()

    async def _finish(self) -> None:
        """Run the shutdown script, if the guest is to end for good. Ends the task if the VM was told to end."""
        script = self._shutdown
        if script is not None and (self._told or self.vm.spec.power_state == "stopped"):
            self._show("finish", progress="running the shutdown script")
            await shut_down(self._host.driver, self.name, script)
        if self._told:
            self._scope.cancel()
            await trio.lowlevel.checkpoint()

    async def _end_guest(self) -> None:
        """Stop or suspend the guest for a newer generation. Raises DriverError."""
        self.state = self.state.after("change")
        spec = self.vm.spec
        same_hardware = self._note.hardware == hardware_of(self.vm)
        suspend = self._note.suspendable and spec.power_state != "stopped" and same_hardware
        # NotRunning: the guest has just ended by itself.
        with suppress(NotRunning):
            await (self._host.driver.suspend(self.name) if suspend else self._host.driver.stop(self.name))

    async def _stay_with_guest(
        self, stay: Callable[..., Awaitable[None]], *, task_status: trio.TaskStatus[None]
    ) -> None:
        try:
            await stay(self.name, task_status=task_status)
        except NotRunning:
            # The driver does not know the guest, which may run nevertheless.
            raise
        except DriverError as error:
            if isinstance(error, SupervisorLost):
                self._host.note_trouble("supervisor", "", f"{self.vm.name}: {error}")
            self.state = self.state.after("down")
            raise
        self.state = self.state.after("down")
        self._news.set()

    async def _end(self) -> None:
        """Stop the guest, take the step "over", free its resources, and report a failure."""
        if self.state.has_guest:
            await stop_with_retries(self._host.driver, self.name, self._host.note_trouble, "cannot stop a VM, retrying")
        self.state = self.state.after("over")
        self._host.freed(self.name)
        if self.state.reason is not None:
            self._host.changed()

    async def _delete(self) -> None:
        """Delete the VM from the host, and take the step "deleted"."""
        await delete_with_retries(self._host.driver, self.name, self._host.note_trouble, "cannot delete a VM, retrying")
        self.state = self.state.after("deleted")

    @contextmanager
    def _noting(self, kind: Trouble) -> Iterator[None]:
        """Report to `note_trouble` whether the block, an operation of this kind, fails."""
        try:
            yield
        except DriverError as error:
            # NotRunning: a VM that was to be adopted has ended meanwhile, and nothing failed.
            if not isinstance(error, NotRunning):
                self._host.note_trouble(kind, "", f"{self.vm.name}: {error}")
            raise
        self._host.note_trouble(kind, "", "")

    def _write(self, note: Note) -> None:
        self._host.driver.note(self.name, str(note))
        self._note = note

    # -- the script

    async def _make_ready(self, vm: VM) -> None:
        """Run the startup script unless it has run, or else find out when the guest can be reached. Raises DriverError.

        A script that a newer generation interrupted is run again.
        """
        script = startup_of(vm, self._host.worker)
        if script is not None and self._note.script != "done":
            self._write(replace(self._note, script="begun"))
            self._note_startup(vm, await self._run_script(vm, script))
        else:
            await self._wait_address(vm)
        self._show(reached=True, progress="")

    def _note_startup(self, vm: VM, failure: DriverError | None) -> None:
        """Note how the startup script has ended. Raises `failure` unless the VM is kept nevertheless."""
        code = failure.exit_code if isinstance(failure, ScriptFailed) else None if failure is not None else 0
        is_kept = vm.spec.startup_on_failure == "keep"
        startup = Startup(code, self._host.clock(), str(failure) if failure is not None and is_kept else "")
        self._show(startup=startup)
        if failure is not None and not is_kept:
            raise failure
        self._write(replace(self._note, script="done", startup=startup))

    async def _wait_address(self, vm: VM) -> None:
        for failures in itertools.count(1):
            try:
                await self._host.driver.ip(self.name, bridged=bool(vm.spec.net_bridged))
                return
            except DriverError as error:
                self._show(progress=f"waiting for its address: {error}")
                await trio.sleep(growing_pause(failures, _ADDRESS_SECONDS, _LAST_ADDRESS_SECONDS))

    async def _run_script(self, vm: VM, script: Script) -> DriverError | None:
        """Run the startup script, and deliver its output. Return why it has failed."""
        send, receive = trio.open_memory_channel[Event](QUEUED_LINES)

        async def on_line(line: str) -> None:
            await send.send(Event(kind="log_line", payload=line, timestamp=int(self._host.clock())))

        failure: DriverError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, vm, receive)
            async with send:
                try:
                    await self._host.driver.run_script(self.name, script, on_line)
                except DriverError as error:
                    # Returned after the nursery, so that all output is delivered before the VM fails.
                    failure = error
        if failure is None or isinstance(failure, ScriptFailed):
            code = failure.exit_code if failure is not None else 0
            _logger.info("script ended", extra={"vm": vm.name, "code": code})
        return failure

    async def _deliver(self, vm: VM, lines: trio.MemoryReceiveChannel[Event]) -> None:
        """Send lines of output in batches, until the channel is closed."""
        async with lines:
            async for event in lines:
                batch, size = [event], len(event.payload)
                with suppress(trio.WouldBlock, trio.EndOfChannel):
                    while size < _BATCH_CHARACTERS:
                        batch.append(lines.receive_nowait())
                        size += len(batch[-1].payload)
                await self._host.send_events(vm, batch)
