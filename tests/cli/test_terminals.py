"""Interactive verbs as a user has them: on a terminal, with its keys, its size, job control, and its end."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest
from harness.processes import GENEROUS, at_last, call_main, command, environment, started
from harness.terminals import PROMPT, Terminal, shell, terminal

from orchard.cli.connection import ControllerConnection
from orchard.cli.main import main


@pytest.fixture
def vm(dev: Path, api: ControllerConnection) -> str:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    assert call_main(main, "wait", "vm", "vm", home=dev)[0] == 0
    return "vm"


@pytest.mark.slow
def test_keys_of_a_terminal_reach_the_command_as_they_are(dev: Path, vm: str) -> None:
    script = "stty raw -echo; printf ready; head -c 3 | od -An -c; exit 9"
    with terminal(command("", "exec", "vm", vm, "-it", script), environment(dev)) as shown:
        shown.read_until("ready")
        shown.type("a\x03\x1a")
        shown.read_until(r"a +003 +032")
        assert shown.finish() == 9


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["exec", pytest.param("ssh", marks=pytest.mark.needs("ssh"))])
def test_size_of_the_terminal_and_its_change_reach_the_vm(dev: Path, vm: str, tmp_path: Path, verb: str) -> None:
    waiting = tmp_path / "file"
    waiting.write_text("waiting\n")
    # `ssh` gives a terminal to a login shell.
    words = ["exec", "vm", vm, "-it", "--", "bash", "--norc"] if verb == "exec" else ["ssh", "vm", vm]
    with terminal(command("", *words), environment(dev), rows=33, columns=111) as shown:
        shown.read_until("[$#] ")
        shown.type("PS1='rea''dy> '; echo si''ze $(stty size)\r")
        shown.read_until(rf"[\r\n]size 33 111[^\0]*{PROMPT}")
        shown.resize(44, 99)
        _ask_until_size(shown, "44 99")
        # Ctrl-C ends the command there and not the connection. The command itself says that it has the keys: what the
        # shell prints is there before.
        shown.type(f"tail -f {waiting}\r")
        shown.read_until(r"[\r\n]waiting")
        shown.type("\x03")
        shown.read_until(rf"\^C[^\0]*{PROMPT}")
        shown.type("exit 7\r")
        assert shown.finish() == 7


def _ask_until_size(shown: Terminal, size: str) -> None:
    """Wait until the VM's terminal has a size, which is sent while keys are."""
    while True:
        shown.type("echo si''ze $(stty size)\r")
        if shown.read_until(rf"[\r\n]size ([0-9 ]+)\r[^\0]*{PROMPT}")[1].strip() == size:
            return


@pytest.mark.slow
def test_terminal_is_as_before_after_a_command_on_it(dev: Path, vm: str) -> None:
    with shell(environment(dev)) as shown:
        words = " ".join(command("", "exec", "vm", vm, "-it", "true"))
        shown.type(f'before=$(stty -g); {words}; [ "$before" = "$(stty -g)" ] && echo as be\'\'fore\r')
        shown.read_until(r"[\r\n]as before")


# Verbs that go on, and what each prints at once.
LASTING = {
    "top": "VMs: 1",
    "watch": "added vm vm",
    "list vms -w": r"vm +[0-9a-z ]+ +i +running",
    "events vm vm -f": "assigned",
    "port-forward vm vm :22": "forwarding 127",
}


@pytest.mark.parametrize(("words", "begins"), LASTING.items())
def test_lasting_verbs_stop_and_go_on_by_job_control_and_end_with_ctrl_c(
    dev: Path, vm: str, words: str, begins: str
) -> None:
    with shell(environment(dev)) as shown:
        shown.type(f"{' '.join(command('', *words.split()))}\r")
        shown.read_until(begins)
        shown.type("\x1a")
        shown.read_until(rf"Stopped[^\0]*{PROMPT}")
        shown.type("fg\r")
        at_last(lambda: not shown.is_in_foreground)
        shown.type("\x03")
        shown.read_until(rf"\^C[^\0]*{PROMPT}")
        shown.type("echo sta''tus $?\r")
        status = shown.read_until(r"[\r\n]status ([0-9]+)")
        assert status[1] == "130"
        assert "Traceback" not in shown.said


@pytest.mark.parametrize(("words", "begins"), {**LASTING, "exec vm vm -it -- sh": "[$#] "}.items())
def test_verbs_end_when_the_terminal_is_closed(dev: Path, vm: str, words: str, begins: str) -> None:
    with terminal(command("", *words.split()), environment(dev)) as shown:
        shown.read_until(begins)
        shown.hang_up()
        assert shown.process.wait(GENEROUS) in (-signal.SIGHUP, 1, 129, 255)


# Verbs that print what is there, and then go on.
GO_ON = ("watch", "list vms -w", "events vm vm -f")


@pytest.mark.parametrize(
    "words", [*GO_ON, "logs vm vm -f", "list vms", "describe vm vm", "top", "exec vm vm yes", "get vm vm"]
)
def test_verbs_end_quietly_with_their_reader(dev: Path, vm: str, words: str) -> None:
    """Nothing happens to the VM, which prints nothing: verbs that go on do not wait for a line to write."""
    with subprocess.Popen(
        command("", *words.split()), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(dev)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if words in GO_ON:
            process.stdout.readline()
        process.stdout.close()
        assert process.wait(GENEROUS) in (1, -signal.SIGPIPE)
        assert process.stderr.read() == ""


def test_list_is_shown_again_on_a_terminal_after_each_change(dev: Path, vm: str, api: ControllerConnection) -> None:
    with terminal(command("", "list", "vms", "-w"), environment(dev), rows=4, columns=90) as shown:
        shown.read_until(r"\x1b\[H\x1b\[JName[^\x1b]*vm +[0-9a-z ]+ +i +running")
        for name in ("another", "last"):
            api.call("POST", "/vms", body={"name": name, "image": "a-long-image-name" * 5, "labels": {"no": "worker"}})
        # Of a list that is longer than the terminal, the first lines; of a long image, what fits beside the rest.
        painted = shown.read_until(r"\x1b\[H\x1b\[JName[^\x1b]*another[^\x1b]*and 2 more lines")[0]
        assert len(painted.splitlines()) == 3
        assert all(len(line) <= 90 + len("\x1b[H\x1b[J") for line in painted.splitlines())
        api.call("DELETE", "/vms/another")
        shown.read_until(r"\x1b\[H\x1b\[JName[^\x1b]*\nlast ")


def test_list_is_continued_in_a_pipe(dev: Path, vm: str, api: ControllerConnection) -> None:
    with started("", "list", "vms", "-w", home=dev) as role:
        role.wait_for(re.compile("Name "))
        role.wait_for(re.compile("vm .* running "))
        api.call("POST", "/vms", body={"name": "new", "image": "i", "labels": {"no": "worker"}})
        role.wait_for(re.compile("new .* pending "))
        api.call("DELETE", "/vms/new")
        role.wait_for(re.compile("new .* deleted "))
        assert role.stop(signal.SIGINT) in (130, -signal.SIGINT)
    with started("", "list", "workers", "-w", home=dev) as role:
        role.wait_for(re.compile("worker-1 .* online "))
    for words in (("service-accounts",), ("vms", "-q"), ("vms", "-o", "json")):
        assert call_main(main, "list", *words, "-w", home=dev)[0] == 2
