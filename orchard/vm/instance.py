"""One life of a VM on this host: made, booted, its script run, its specification followed, removed. Law: driver verbs.

An `Instance` is what the worker holds of one (name, uid, restart_count). Its task, `tend`, goes through the life in
plain sequence:

    wait for the slots of those that are ending -> pull, clone -> set -> run, with the script -> a newer generation? ->
    stop or suspend -> set -> run ... until the VM fails or is told to end -> removed when nobody wants it any more

What it says of itself (`status`, `message`, `running`, `observed`) changes only by `_show`, and each change is told at
once. Nobody else touches those fields; the worker gives orders by `follow`, `fail` and `remove`. A VM has failed when
its guest has ended, and not before that: the controller may start it elsewhere the moment it hears of it.

A task that is cancelled (the worker ends) leaves VMs that run and VMs at rest, and nothing half-made. With the driver
it notes for each VM that runs under which specification that is, and how far its script has come, so that the next
worker's `adopt` goes on where this one was, even if it was killed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import trio

from orchard.nursery import first_exception
from orchard.schema import VM, Event, Status
from orchard.vm.driver import Driver, DriverError, LocalVM, NoSuchVM, NotRunning, RunOptions, SharedDir

REMOVE_SECONDS = 60.0  # for stopping and deleting a VM that nobody waits for any more
LINES = 256  # of a script's output that may wait for the controller; then the script waits, too
BATCH_CHARACTERS = 256 * 1024  # of output in one request: well below its limit, whatever JSON makes of them
STOPPED = "ended with its worker, which was told to stop its VMs"
SHUT_DOWN = "the VM shut down by itself"
CUT_OFF = "the worker was restarted while the startup script ran, and nobody knows what it did"
UNNOTED = "lost: the VM runs, and nothing tells any more what an earlier worker did to it"
STOP_PAUSE = 5.0  # seconds between two attempts to end a guest that does not end

SendEvents = Callable[[VM, Sequence[Event]], Awaitable[None]]

Hardware = tuple[int, int, int]  # CPUs, MiB, GB of disk

_logger = logging.getLogger("orchard.vm.instance")


@dataclass(frozen=True, slots=True)
class Note:
    """What has to be known of a VM that runs: under which specification, and how far its script has come."""

    generation: int
    hardware: Hardware
    suspendable: bool
    script: Literal["", "begun", "done"] = ""

    def __str__(self) -> str:
        return json.dumps([self.generation, self.hardware, self.suspendable, self.script])

    @classmethod
    def parse(cls, text: str) -> Note:
        """Read what str() gave. Raises ValueError."""
        try:
            match json.loads(text):
                case [int(generation), [int(cpu), int(memory), int(disk)], bool(able), "" | "begun" | "done" as script]:
                    return cls(generation, (cpu, memory, disk), able, script)
        except ValueError:
            pass
        raise ValueError(f'"{text}" is no note about a VM')


class Instance:
    """A VM on this host. `changed` is called when it has something new to say, `send_events` delivers its output.

    `runs`: an earlier worker has started it, and it is to be adopted. `outlives`: whether it is left running when its
    task is cancelled.
    """

    def __init__(
        self,
        vm: VM,
        driver: Driver,
        *,
        changed: Callable[[], None],
        send_events: SendEvents,
        clock: Callable[[], float],
        runs: bool = False,
        outlives: bool = True,
    ) -> None:
        """`clock` gives seconds since 1970, for the events."""
        self.vm = vm  # as the controller has it
        self.name = vm.tart_name
        self.status: Status = "running" if runs else "pending"
        self.message = ""
        self.running = runs
        self.observed = vm.state.observed_generation if runs else 0  # the generation that was last acted upon
        self.image_fqn = ""
        self.reported: dict[str, Any] | None = None  # what the controller has acknowledged
        self.stopped = False  # its guest was ended because its task was cancelled
        self.ended = trio.Event()  # it holds none of the host's resources any more, but for its disk
        self._driver = driver
        self._changed = changed
        self._send_events = send_events
        self._clock = clock
        self._outlives = outlives
        self._life = trio.CancelScope()
        self._news = trio.Event()  # that the specification has changed, or the guest has ended
        self._unwanted = trio.Event()
        self._exists = runs  # whole, on the disk
        self._guest = runs  # whether something of it may run
        self._hardware = hardware(vm)  # that it was last given
        self._note = Note(0, self._hardware, suspendable=False)
        self._reason: str | None = None  # why it fails

    # -- orders and answers

    def follow(self, vm: VM) -> None:
        """Take over what the controller says now."""
        self.vm = vm
        self._tell_self()

    def fail(self, reason: str) -> None:
        """End this life, as failed for a reason: the first that is given."""
        self._reason = reason if self._reason is None else self._reason
        self._life.cancel()

    def remove(self) -> None:
        """End this life, and leave nothing of it on the host."""
        self._life.cancel()
        self._unwanted.set()

    @property
    def ending(self) -> bool:
        """Whether it was told to end, and may still hold something."""
        return self._life.cancel_called and not self.ended.is_set()

    def report(self) -> dict[str, Any]:
        """What the controller is to know."""
        return {
            "uid": self.vm.uid,
            "restart_count": self.vm.state.restart_count,
            "status": self.status,
            "status_message": self.message,
            "image_fqn": self.image_fqn,
            "observedGeneration": self.observed,
            "conditions": [{"type": "running", "state": "true" if self.running else "false"}],
        }

    def _show(
        self,
        *,
        status: Status | None = None,
        message: str | None = None,
        running: bool | None = None,
        observed: int | None = None,
    ) -> None:
        if self.status == "failed":
            return  # for good; what happens while it ends is no news
        self.status = self.status if status is None else status
        self.message = self.message if message is None else message
        self.running = self.running if running is None else running
        self.observed = self.observed if observed is None else observed
        self._changed()

    def _tell_self(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # -- the task

    async def tend(self, after: Sequence[trio.Event] = ()) -> None:
        """Live, once all of `after` have come to pass, until the VM is removed."""
        await self._whole(partial(self._begin, after))

    async def adopt(self) -> None:
        """Go on with a VM that an earlier worker has started and that runs, until it is removed."""
        await self._whole(self._go_on)

    async def keep(self) -> None:
        """Watch over a VM that an earlier worker left at rest, or not at all, until it is removed."""
        self._exists = True
        await self._whole(self._stay)

    async def _whole(self, live: Callable[[], Awaitable[None]]) -> None:
        removed = False
        try:
            try:
                with self._life:
                    await trio.lowlevel.checkpoint()  # it may have ended before it began
                    await live()
            except* DriverError as group:
                self.fail(str(first_exception(group)))
            except* Exception as group:
                _logger.exception("the task of a VM failed", extra={"vm": self.vm.name}, exc_info=group)
                self.fail("internal error of the worker; its log says more")
            await self._end_guest()
            if self._reason is not None:
                self._show(status="failed", message=self._reason, running=False)
            self.ended.set()
            while not removed:
                await self._unwanted.wait()
                self._unwanted = trio.Event()
                removed = await self._remove()
        finally:
            if not removed and not self._left():
                ran = self._guest
                with trio.move_on_after(REMOVE_SECONDS, shield=True):
                    await self._end_guest()
                    self.stopped = ran
                    await self._remove()
                if self.stopped:
                    self._show(status="failed", message=self._reason or STOPPED, running=False)
            self.ended.set()

    def _left(self) -> bool:
        """Whether it stays on the host when its task is cancelled."""
        if self._life.cancel_called:  # it was to end anyway
            return False
        if self._guest:
            return self._outlives
        return self._exists and self.vm.spec.power_state != "running" and self.status == "running"

    async def _end_guest(self) -> None:
        """Return when nothing of the VM runs any more."""
        while self._guest:
            try:
                await self._driver.stop(self.name)
            except (NotRunning, NoSuchVM):
                pass
            except DriverError as error:
                _logger.error("a VM could not be stopped", extra={"vm": self.name, "reason": str(error)})
                await trio.sleep(STOP_PAUSE)
                continue
            self._guest = False

    async def _begin(self, after: Sequence[trio.Event]) -> None:
        for event in after:
            await event.wait()
        await self._create(self.vm)
        await self._stay()

    async def _go_on(self) -> None:
        try:
            self._note = Note.parse(self._driver.noted(self.name))
        except ValueError:
            raise DriverError(UNNOTED) from None
        if self._note.script == "begun":
            raise DriverError(CUT_OFF)
        self._hardware = self._note.hardware
        self.image_fqn = self.vm.state.image_fqn or await self._driver.fqn(self.vm.spec.image)
        try:
            await self._be_run(self._driver.attach)
        except* NotRunning as group:
            # It has ended since it was seen to run: no failure if an earlier worker had asked it to, for a change.
            if self._note.generation == self.vm.meta.generation or await self._runs():
                raise first_exception(group) from None
            self._guest = False
        await self._stay()

    async def _runs(self) -> bool:
        """Whether the VM runs, whoever has started it."""
        return LocalVM(self.name, "running") in await self._driver.list_vms()

    async def _stay(self) -> None:
        """Be as the specification says, generation by generation."""
        while True:
            vm = self.vm
            if hardware(vm) != self._hardware and vm.spec.power_state != "suspended":
                cpu, memory, disk_size = self._hardware = hardware(vm)
                await self._driver.configure(self.name, cpu=cpu, memory=memory, disk_size=disk_size)
            if vm.spec.power_state == "running":
                await self._run(vm)
            else:
                await self._rest(vm)

    async def _create(self, vm: VM) -> None:
        spec = vm.spec

        def pulling(percent: int) -> None:
            self._show(message=f"pulling image: {percent} %")

        self._show(message="pulling image" if spec.image_pull_policy == "Always" else "cloning image")
        if spec.image_pull_policy == "Always":
            await self._driver.pull(spec.image, pulling)
            self._show(message="cloning image")
        # Only a local VM can be suspended, and its name has no slash in it.
        sources = [] if "/" in spec.image else await self._driver.list_vms()
        resumes = any(source.name == spec.image and source.state == "suspended" for source in sources)
        await self._driver.clone(spec.image, self.name, pulling)

        async def note_fqn() -> None:
            self.image_fqn = await self._driver.fqn(spec.image)

        async with trio.open_nursery() as nursery:  # neither needs the other: the VM runs a call earlier
            nursery.start_soon(note_fqn)
            if not resumes:  # what was suspended can only go on as the machine that it was
                cpu, memory, disk_size = hardware(vm)
                await self._driver.configure(
                    self.name,
                    cpu=cpu,
                    memory=memory,
                    disk_size=disk_size,
                    random_mac=True,
                    random_serial=spec.random_serial,
                )
        self._exists, self._hardware = True, hardware(vm)
        self._show(message="starting")

    async def _rest(self, vm: VM) -> None:
        """Be stopped or suspended, until there is a newer generation."""
        self._show(status="running", message="", running=False, observed=vm.meta.generation)
        await self._newer(vm)

    async def _newer(self, vm: VM) -> None:
        while self.vm.meta.generation == vm.meta.generation:
            await self._news.wait()

    async def _run(self, vm: VM) -> None:
        """Run the VM until there is a newer generation, and end it then. Raises DriverError."""
        self._write(Note(vm.meta.generation, self._hardware, vm.spec.suspendable, self._note.script))
        self._guest = True
        await self._be_run(partial(self._driver.run, options=run_options(vm)))

    async def _be_run(self, run: Callable[..., Awaitable[None]]) -> None:
        """Have `run` stay with the guest until there is a newer generation, and end it then. Raises DriverError."""
        ended = trio.Event()

        async def guest(task_status: trio.TaskStatus[None]) -> None:
            try:
                await run(self.name, task_status=task_status)
            except NotRunning:  # but something of it may, that the driver knows nothing of
                raise
            except DriverError:
                self._guest = False
                raise
            self._guest = False
            ended.set()
            self._tell_self()

        async with trio.open_nursery() as nursery:  # the guest ends last, and with it everything that uses it
            await nursery.start(guest)
            self._show(status="running", message="", running=True, observed=self._note.generation)
            async with trio.open_nursery() as using:
                using.start_soon(self._run_script, self.vm)
                while self.vm.meta.generation == self._note.generation and not ended.is_set():
                    await self._news.wait()
                using.cancel_scope.cancel()
            if ended.is_set():
                raise DriverError(SHUT_DOWN)
            await self._shut_down(self.vm)
            await ended.wait()
        self._show(running=False)

    async def _shut_down(self, new: VM) -> None:
        """End the guest so that it can go on as `new` says."""
        suspend = self._note.suspendable and new.spec.power_state != "stopped" and self._hardware == hardware(new)
        with suppress(NotRunning):  # then it has just ended, which is what was wanted
            await (self._driver.suspend(self.name) if suspend else self._driver.stop(self.name))

    def _write(self, note: Note) -> None:
        self._driver.note(self.name, str(note))
        self._note = note

    async def _run_script(self, vm: VM) -> None:
        """Run the startup script, and deliver what it prints. Raises DriverError.

        It runs once in a life. One that was cut off by a new generation is run again.
        """
        script, spec = vm.spec.startup_script, vm.spec
        if script is None or not script.script_content or self._note.script == "done":
            return
        self._write(replace(self._note, script="begun"))
        send, receive = trio.open_memory_channel[Event](LINES)

        async def on_line(line: str) -> None:
            await send.send(Event(kind="log_line", payload=line, timestamp=int(self._clock())))

        failure: DriverError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, vm, receive)
            async with send:
                try:
                    await self._driver.run_script(
                        self.name,
                        script.script_content,
                        env=script.env,
                        username=spec.username,
                        password=spec.password,
                        bridged=bool(spec.net_bridged),
                        on_line=on_line,
                    )
                except DriverError as error:
                    failure = error  # told after all that was printed before it
        if failure is not None:
            raise failure
        self._write(replace(self._note, script="done"))

    async def _deliver(self, vm: VM, lines: trio.MemoryReceiveChannel[Event]) -> None:
        async with lines:
            async for event in lines:
                batch = [event]
                size = len(event.payload)
                while size < BATCH_CHARACTERS:
                    try:
                        event = lines.receive_nowait()
                    except (trio.WouldBlock, trio.EndOfChannel):
                        break
                    batch.append(event)
                    size += len(event.payload)
                await self._send_events(vm, batch)

    async def _remove(self) -> bool:
        """Delete the VM from the host, and give whether it is gone."""
        try:
            try:
                await self._driver.delete(self.name)
            except NoSuchVM:
                raise
            except DriverError:
                with suppress(NotRunning):
                    await self._driver.stop(self.name)
                await self._driver.delete(self.name)
        except NoSuchVM:
            return True
        except DriverError as error:
            _logger.error("a VM could not be deleted from this host", extra={"vm": self.name, "reason": str(error)})
            return False
        return True


def hardware(vm: VM) -> Hardware:
    """What is set while the VM does not run."""
    return vm.state.assigned_cpu, vm.state.assigned_memory, vm.spec.disk_size


def run_options(vm: VM) -> RunOptions:
    """What holds for one run."""
    spec = vm.spec
    return RunOptions(
        headless=spec.headless,
        softnet=spec.net_softnet,
        softnet_allow=spec.net_softnet_allow,
        softnet_block=spec.net_softnet_block,
        bridged=spec.net_bridged,
        nested=spec.nested,
        suspendable=spec.suspendable,
        dirs=tuple(SharedDir(dir_.name, dir_.path, dir_.ro) for dir_ in spec.host_dirs),
        leased=spec.restart_policy == "OnFailure",  # no other is ever started elsewhere
    )
