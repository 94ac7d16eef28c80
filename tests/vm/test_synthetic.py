"""VMs without a hypervisor: no process and no file of a deleted VM is left, whatever its script did.

What the synthetic driver has in common with the other drivers is in test_drivers.py.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.processes import GENEROUS, eventually, processes_in

from orchard.schema import VMSpec
from orchard.vm import local_processes
from orchard.vm.driver import DriverError, Hardware, LocalVM, NotRunning, Script
from orchard.vm.synthetic import VM_ADDRESS, SyntheticDriver

IMAGE = "example.com/image:latest"
NAME = "orchard-vm-uid-0"
# A name that begins with the other.
LONGER = f"{NAME}0"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


@pytest.fixture
def driver(home: Path) -> SyntheticDriver:
    return SyntheticDriver(home)


async def create(driver: SyntheticDriver, name: str = NAME, source: str = IMAGE) -> None:
    await driver.clone(source, name, lambda _: None)


@asynccontextmanager
async def running(driver: SyntheticDriver, name: str = NAME) -> AsyncIterator[trio.Nursery]:
    """Run a VM during the block."""
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, name, VMSpec())
        try:
            yield nursery
        finally:
            with trio.CancelScope(shield=True):
                for vm in await driver.list_vms():
                    if (vm.name, vm.state) == (name, "running"):
                        await driver.stop(name)


async def script(driver: SyntheticDriver, text: str, lines: list[str] | None = None) -> list[str]:
    """Run a script in the running VM, and return its lines, which `lines` gets as they come."""
    told: list[str] = [] if lines is None else lines

    async def on_line(line: str) -> None:
        told.append(line)

    with trio.fail_after(GENEROUS):
        await driver.run_script(NAME, Script(text, username="alice"), on_line)
    return told


# ---- what a script sees --------------------------------------------------------------------------------------------


async def test_script_has_its_own_home_and_temporary_directory(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    async with running(driver):
        assert await driver.ip(NAME) == VM_ADDRESS
        lines = await script(driver, 'pwd; echo "$HOME"; echo "$TMPDIR"; echo "$USER $LOGNAME"; touch "$TMPDIR/file"')
    root = home / NAME / "root"
    assert lines == [str(root), str(root), str(root / "tmp"), "alice alice"]
    assert (root / "tmp" / "file").exists()


async def test_relative_home_is_made_absolute_for_a_script(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.parent)
    driver = SyntheticDriver(Path(home.name))
    await create(driver)
    async with running(driver):
        assert await script(driver, 'cd /; echo "$HOME"') == [str(home / NAME / "root")]


async def test_vm_json_is_readable_by_people(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    await driver.configure(NAME, Hardware(cpu=2, memory=1024, disk_size=60))
    text = (home / NAME / "vm.json").read_text()
    assert json.loads(text) == {"source": IMAGE, "state": "stopped", "cpu": 2, "memory": 1024, "disk": 60}
    assert len(text.splitlines()) > 5


# ---- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["stop", "suspend"])
async def test_background_processes_of_a_script_end_with_the_vm(driver: SyntheticDriver, home: Path, verb: str) -> None:
    await create(driver)
    async with running(driver):
        await script(driver, "trap '' INT TERM HUP; (sleep 1000 & sleep 1000) & echo begun")
        assert processes_in(home) != []
        await getattr(driver, verb)(NAME)
    await eventually(lambda: processes_in(home) == [])
    assert await driver.list_vms() == [LocalVM(NAME, "suspended" if verb == "suspend" else "stopped")]


async def test_script_ends_with_its_vm(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    lines: list[str] = []

    async def stop() -> None:
        await eventually(lambda: bool(lines))
        await driver.stop(NAME)

    async with running(driver) as nursery:
        nursery.start_soon(stop)
        with pytest.raises(DriverError, match="the VM ended while its startup script ran"):
            await script(driver, "echo begun; sleep 1000; echo never", lines)
    assert lines == ["begun"]
    await eventually(lambda: processes_in(home) == [])


KILLED = """
import sys, trio
from pathlib import Path
from orchard.schema import VMSpec
from orchard.vm.synthetic import SyntheticDriver
from orchard.vm.driver import Script

async def main(home, *names):
    driver = SyntheticDriver(Path(home))

    async def on_line(line):
        print(line, flush=True)

    async with trio.open_nursery() as nursery:
        for name in names:
            await driver.clone("image", name, lambda _: None)
            await nursery.start(driver.run, name, VMSpec())
            text = "sleep 1000 & setsid sleep 1000 & echo begun; sleep 1000"
            nursery.start_soon(driver.run_script, name, Script(text), on_line)

trio.run(main, *sys.argv[1:])
"""


async def test_processes_of_a_killed_worker_are_removed_by_the_next(driver: SyntheticDriver, home: Path) -> None:
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", KILLED, home, NAME, LONGER], stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        for _ in (NAME, LONGER):
            assert await trio.to_thread.run_sync(worker.stdout.readline) == "begun\n"
        worker.send_signal(signal.SIGKILL)
        worker.wait(GENEROUS)
    assert await driver.list_vms() == [LocalVM(NAME, "stopped"), LocalVM(LONGER, "stopped")]
    await driver.delete(NAME)
    await eventually(lambda: processes_in(home / NAME / "root") == [])
    assert processes_in(home / LONGER / "root") != []
    await driver.delete(LONGER)
    await eventually(lambda: processes_in(home) == [])
    assert list(home.iterdir()) == []


async def test_processes_that_start_while_leftovers_are_killed_are_killed_too(
    driver: SyntheticDriver, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(driver)
    (home / NAME / "scripted").touch()
    environ = {**os.environ, "ORCHARD_VM": str(home / NAME)}
    started: list[subprocess.Popen[bytes]] = []
    list_processes = local_processes._processes_of

    def fork() -> None:
        started.append(subprocess.Popen(["sleep", "1000"], env=environ, start_new_session=True))

    def list_and_fork(directory: Path) -> Iterator[int]:
        """Start another process after the list was read, as one that is about to be killed may do."""
        found = list(list_processes(directory))
        if len(started) < 3:
            fork()
        return iter(found)

    monkeypatch.setattr(local_processes, "_processes_of", list_and_fork)
    fork()
    await driver.delete(NAME)
    assert [process.wait(GENEROUS) for process in started] == [-signal.SIGKILL] * 3


async def test_vm_of_a_killed_worker_can_run_again(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    (home / NAME / "scripted").touch()
    async with running(driver):
        assert await script(driver, "echo again") == ["again"]
    assert not (home / NAME / "scripted").exists()


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last",
    [
        "mkdir -p a/b; touch a/b/c; chmod 0 a/b; chmod 500 a",
        "mkdir -p a/b; chmod 0 a/b; chmod 0 a; chmod 0 .",
        "rm -rf ~",
        "touch ~/../more",
        "rm ../scripted; mkdir ../scripted",
        "rm -rf ../root; touch ../root",
    ],
)
async def test_vm_can_be_deleted_whatever_its_script_did_to_the_disk(
    driver: SyntheticDriver, home: Path, last: str
) -> None:
    await create(driver)
    async with running(driver):
        await script(driver, last)
        await driver.stop(NAME)
    await driver.delete(NAME)
    assert list(home.iterdir()) == []


async def test_deletion_does_not_follow_symbolic_links(driver: SyntheticDriver, home: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o550)
    await create(driver)
    async with running(driver):
        await script(driver, f"ln -s {outside} link; rm -rf $TMPDIR; ln -s {outside} $TMPDIR; ln -s {outside} ../link")
    await driver.delete(NAME)
    assert list(home.iterdir()) == []
    assert stat.S_IMODE(outside.stat().st_mode) == 0o550


async def test_clone_has_its_own_disk(driver: SyntheticDriver, home: Path) -> None:
    await create(driver, "orchard-first")
    await create(driver, NAME, "orchard-first")
    async with running(driver):
        await script(driver, "echo mine > file; ln -s /none link")
    await create(driver, "orchard-second", NAME)
    await driver.delete(NAME)
    assert list((home / "orchard-first" / "root").iterdir()) == []
    assert (home / "orchard-second" / "root" / "file").read_text() == "mine\n"
    assert (home / "orchard-second" / "root" / "link").is_symlink()


async def test_running_vm_can_not_be_cloned(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    async with running(driver):
        with pytest.raises(DriverError, match=f'VM "{NAME}" is running and cannot be cloned'):
            await create(driver, "orchard-second", NAME)
    with pytest.raises(DriverError, match=f'VM "{NAME}" already exists'):
        await create(driver)
    assert [path.name for path in home.iterdir()] == [NAME]


async def test_failed_clone_leaves_nothing(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    async with running(driver):
        await script(driver, "mkdir closed; touch closed/file; chmod 500 closed; mkfifo pipe")
    with pytest.raises(DriverError, match=r'cannot make VM "orchard-second" in .*pipe'):
        await create(driver, "orchard-second", NAME)
    assert [path.name for path in home.iterdir()] == [NAME]


async def test_leftovers_of_an_interrupted_deletion_are_replaced(driver: SyntheticDriver, home: Path) -> None:
    for left in (f".{NAME}.old", f".{NAME}.new"):
        (home / left / "root" / "tmp").mkdir(parents=True)
        (home / left / "vm.json").write_text("{}")
        (home / left / "root").chmod(0o500)
    assert await driver.list_vms() == []
    await create(driver)
    await driver.delete(NAME)
    assert list(home.iterdir()) == []


# The first three lead to directories that look like VMs.
LEAVING = ["../outside", f"{NAME}/root", f"{NAME}/../../outside", "..", ".", ".hidden", "/", "a/b", "~", "a\n", "é"]


@pytest.mark.parametrize("name", LEAVING)
async def test_name_that_leads_out_of_the_directory_is_refused(
    driver: SyntheticDriver, home: Path, tmp_path: Path, name: str
) -> None:
    await create(driver)
    for place in (tmp_path / "outside", home / NAME / "root", home / ".hidden"):
        (place / "root").mkdir(parents=True)
        (place / "vm.json").write_text('{"source": "image", "state": "suspended"}')
    before = sorted(tmp_path.rglob("*"))
    for call in (
        partial(driver.clone, IMAGE, name, lambda _: None),
        partial(driver.clone, NAME, name, lambda _: None),
        partial(driver.configure, name, Hardware(cpu=2)),
        partial(driver.run, name, VMSpec()),
        partial(driver.ip, name),
        partial(driver.stop, name),
        partial(driver.suspend, name),
        partial(driver.delete, name),
        partial(script_in, driver, name),
    ):
        with pytest.raises(DriverError, match="the VM name is"):
            await call()
    if name.startswith("orchard-"):
        with pytest.raises(DriverError, match="the VM name is"):
            await create(driver, "orchard-second", name)
    assert sorted(tmp_path.rglob("*")) == before
    assert await driver.list_vms() == [LocalVM(NAME, "stopped")]


async def script_in(driver: SyntheticDriver, name: str) -> None:
    async def on_line(line: str) -> None:
        raise AssertionError(line)

    await driver.run_script(name, Script("echo"), on_line)


async def test_unwritable_directory_raises_driver_error(driver: SyntheticDriver, home: Path) -> None:
    (home / "file").touch()
    with pytest.raises(DriverError, match=f'cannot make VM "{NAME}" in .*/file: Not a directory'):
        await create(SyntheticDriver(home / "file"))
    await create(driver)
    (home / NAME / "vm.json.new").mkdir()
    with pytest.raises(DriverError, match=r"cannot write .*/vm\.json: Is a directory"):
        await driver.configure(NAME, Hardware(cpu=2))
    for damaged in ("torn {", "[" * 100_000):
        (home / NAME / "vm.json").write_text(damaged)
        with pytest.raises(DriverError, match="cannot read the file of VM"):
            await driver.run(NAME, VMSpec())


async def test_script_in_a_vm_without_a_disk_raises_driver_error(driver: SyntheticDriver) -> None:
    await create(driver)
    async with running(driver):
        await script(driver, "rm -rf ~")
        with pytest.raises(DriverError, match=r".*/root: No such file"):
            await script(driver, "echo")


async def test_script_with_nul_raises_driver_error(driver: SyntheticDriver) -> None:
    await create(driver)
    async with running(driver):
        with pytest.raises(DriverError, match="the script contains a NUL character"):
            await script(driver, "echo \0")


# ---- time ----------------------------------------------------------------------------------------------------------


async def test_pull_and_boot_take_the_configured_time(home: Path, autojump_clock: trio.testing.MockClock) -> None:
    driver = SyntheticDriver(home, boot_seconds=30, pull_seconds=60)
    began = trio.current_time()
    told: list[int] = []
    await driver.clone(IMAGE, NAME, told.append)
    assert told == list(range(10, 101, 10))
    assert trio.current_time() - began == pytest.approx(60)
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, NAME, VMSpec())
        assert trio.current_time() - began == pytest.approx(90)
        await driver.suspend(NAME)
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, NAME, VMSpec())
        assert trio.current_time() - began == pytest.approx(90)
        await driver.stop(NAME)


async def test_vm_can_be_stopped_while_it_boots(home: Path, autojump_clock: trio.testing.MockClock) -> None:
    driver = SyntheticDriver(home, boot_seconds=30)
    await create(driver)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.run, NAME, VMSpec())
        await trio.testing.wait_all_tasks_blocked()
        await driver.stop(NAME)
    assert trio.current_time() == pytest.approx(0)
    assert await driver.list_vms() == [LocalVM(NAME, "stopped")]


async def test_cancelled_deletion_is_completed(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    async with running(driver):
        await script(driver, "touch file")
    with trio.CancelScope() as scope:
        scope.cancel()
        await driver.delete(NAME)
    assert list(home.iterdir()) == []


async def test_recover_removes_half_made_and_half_deleted_vms(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    for left in (f".{LONGER}.new", f".{LONGER}.old"):
        (home / left / "root").mkdir(parents=True)
        (home / left / "root" / "file").touch()
    await driver.recover()
    assert [path.name for path in home.iterdir()] == [NAME]


# ---- ports ---------------------------------------------------------------------------------------------------------

# A server that prints its port; the interpreter's path is quoted by the caller.
SERVE = "-c 'import socket, time; s = socket.create_server((\"127.0.0.1\", 0)); print(s.getsockname()[1], flush=True); time.sleep(1000)'"


@pytest.mark.slow
async def test_port_is_found_where_the_vm_itself_listens(driver: SyntheticDriver) -> None:
    other = "orchard-other-uid-0"
    await create(driver)
    await create(driver, other)
    async with running(driver), running(driver, other):
        (line,) = await script(
            driver, f"{shlex.quote(sys.executable)} {SERVE} >port & while [ ! -s port ]; do :; done; cat port"
        )
        port = int(line)
        assert await driver.find_port(NAME, port) == port
        with pytest.raises(DriverError, match=f"port {port} of the VM"):
            await driver.find_port(other, port)
    with pytest.raises(NotRunning):
        await driver.find_port(NAME, port)


async def test_server_of_this_process_stands_for_a_vm_and_one_of_another_does_not(driver: SyntheticDriver) -> None:
    await create(driver)
    async with running(driver):
        with socket.create_server(("127.0.0.1", 0)) as mine:
            port = mine.getsockname()[1]
            assert await driver.find_port(NAME, port) == port
        with pytest.raises(DriverError, match=f"port {port} of the VM"):
            await driver.find_port(NAME, port)
        # A child of a child that has ended: not of this process any more.
        words = f"{shlex.quote(sys.executable)} {SERVE} & exit"
        with subprocess.Popen(["/bin/sh", "-c", words], stdout=subprocess.PIPE, text=True) as shell:  # noqa: ASYNC220
            assert shell.stdout is not None
            shell.wait(GENEROUS)
            port = int(shell.stdout.readline())
            with pytest.raises(DriverError, match=f"port {port} of the VM"):
                await driver.find_port(NAME, port)
            os.kill(next(n for n, p in local_processes._processes() if _listens_on(n, port)), signal.SIGKILL)


def _listens_on(number: int, port: int) -> bool:
    return local_processes._holds(number, local_processes._listening_sockets(port))


async def test_ssh_port_may_lead_elsewhere(driver: SyntheticDriver) -> None:
    async def ssh_port(name: str) -> int:
        return {NAME: 2222}[name]

    await create(driver)
    driver.ssh_port = ssh_port
    async with running(driver):
        assert await driver.find_port(NAME, 22) == 2222


async def test_program_that_entered_a_vm_ends_with_it(driver: SyntheticDriver, home: Path) -> None:
    await create(driver)
    async with running(driver):
        directory, environ = driver.enter(NAME, "alice")
        assert (directory, environ["USER"]) == (home / NAME / "root", "alice")
        program = subprocess.Popen(["sleep", "1000"], cwd=directory, env=environ, start_new_session=True)  # noqa: ASYNC220
        await driver.stop(NAME)
        assert program.wait(GENEROUS) == -signal.SIGKILL
    with pytest.raises(NotRunning):
        driver.enter(NAME, "alice")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this system has no /proc")
def test_environment_of_a_program_that_begins_is_read() -> None:
    """Popen returns before the kernel shows it, so that a single read of some finds none."""
    found = []
    for _ in range(300):
        with subprocess.Popen(["sleep", "1000"], env={"ORCHARD_VM": "one"}, start_new_session=True) as program:
            found.append(local_processes._read_environment(Path(f"/proc/{program.pid}")))
            program.kill()
    assert set(found) == {"ORCHARD_VM=one\0"}


async def test_files_of_the_driver_are_private_under_any_umask(home: Path) -> None:
    before = os.umask(0)
    try:
        driver = SyntheticDriver(home / "new")
        await create(driver)
        driver.note(NAME, "text")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (home / "new", *(home / "new").rglob(f"{NAME}*"))}
    assert set(modes.values()) == {0o700}
    files = [path for path in (home / "new" / NAME).iterdir() if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {"vm.json": 0o600, "note": 0o600}


# ---- images that say how they behave -------------------------------------------------------------------------------


async def test_name_of_an_image_says_how_long_pull_and_boot_take(
    home: Path, autojump_clock: trio.testing.MockClock
) -> None:
    driver = SyntheticDriver(home, boot_seconds=1000, pull_seconds=1000)
    image = "example.com/pull-5s/x_boot-0.5s:latest"
    told: list[int] = []
    await driver.clone(image, NAME, told.append)
    assert (trio.current_time(), told) == (5, list(range(10, 101, 10)))
    await create(driver, "orchard-second", image)
    assert trio.current_time() == 5, "the image is cached"
    await driver.pull(image, told.append)
    assert trio.current_time() == 10
    async with running(driver):
        assert trio.current_time() == 10.5


@pytest.mark.parametrize("image", ["host/pull-fails:1", "host/pull-5s-pull-fails", "pull-fails"])
async def test_image_that_cannot_be_pulled_leaves_nothing(
    driver: SyntheticDriver, home: Path, autojump_clock: trio.testing.MockClock, image: str
) -> None:
    with pytest.raises(DriverError, match="pull"):
        await driver.clone(image, NAME, lambda _: None)
    assert (await driver.list_images(), await driver.list_vms(), list(home.iterdir())) == ([], [], [])
    assert trio.current_time() == (5 if "5s" in image else 0)


async def test_image_that_does_not_boot_fails_its_vm_which_can_be_deleted(
    driver: SyntheticDriver, home: Path, autojump_clock: trio.testing.MockClock
) -> None:
    await create(driver, NAME, "host/boot-3s/boot-fails:1")
    for attempt in (1, 2):
        with pytest.raises(DriverError, match="boot"):
            await driver.run(NAME, VMSpec())
        assert trio.current_time() == 3 * attempt
    assert await driver.list_vms() == [LocalVM(NAME, "stopped")]
    await driver.delete(NAME)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("image", ["host/spull-5s:1", "host/pull-5sx:1", "host/pull-fails2:1", "host/PULL-5s:1"])
async def test_other_words_in_the_name_of_an_image_mean_nothing(
    driver: SyntheticDriver, autojump_clock: trio.testing.MockClock, image: str
) -> None:
    await create(driver, NAME, image)
    assert trio.current_time() == 0


async def test_disk_holds_images_until_they_are_pruned(driver: SyntheticDriver) -> None:
    driver.disk_bytes, driver.used_bytes = 100 * 10**9, 10 * 10**9
    await create(driver, NAME, "host/size-40gb:1")
    await create(driver, "orchard-second", "host/size-40gb:2")
    disk = await driver.disk()
    assert (disk.total_bytes, disk.free_bytes) == (100 * 10**9, 10 * 10**9)
    await create(driver, "orchard-third", "host/size-40gb:1")
    await driver.pull("host/size-20.5gb:1", lambda _: None)
    assert [image.name for image in await driver.list_images()] == ["host/size-40gb:1", "host/size-20.5gb:1"]
    assert (await driver.disk()).free_bytes == 29_500_000_000


async def test_guest_agent_that_never_answers_runs_no_script(driver: SyntheticDriver) -> None:
    await create(driver, NAME, "host/no-agent:1")
    lines: list[str] = []

    async def run_script(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        with pytest.raises(DriverError, match="agent"):
            await driver.run_script(NAME, Script("echo", agent=True), lines.append)  # type: ignore[arg-type]

    async with running(driver) as nursery:
        assert await script(driver, "echo over SSH") == ["over SSH"]
        await nursery.start(run_script)
        await trio.testing.wait_all_tasks_blocked()
        await driver.stop(NAME)
    assert lines == []


def test_lines_of_ps_without_a_command_hide_no_process(home: Path) -> None:
    lines = ["    7     1 ", "and=a second line", f"    9     7 sleep 100 ORCHARD_VM={home} HOME=/"]
    assert [number for number, process in local_processes._processes_in(lines) if process.is_of(home)] == [9]
