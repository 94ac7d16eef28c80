"""Forked processes (harness/starts.py) are to a test as processes that are started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
from harness.processes import GENEROUS, PLAIN, REALLY, controller, environment, processes_in, started
from harness.starts import TESTS, ForkedProcess, fork, write_forking_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


def probed(words: list[str], env: dict[str, str], out: IO[str], err: IO[str] | None, *, is_forked: bool) -> int:
    """Run harness/probe.py, forked or started, and return its exit status. Without `err`, its standard error is closed."""
    if is_forked:
        with Path(os.devnull).open() as stdin:
            descriptors = {0: stdin.fileno(), 1: out.fileno(), **({2: err.fileno()} if err else {})}
            return fork("harness.probe:main", words, env=env, descriptors=descriptors).wait(GENEROUS)
    command = [sys.executable, "-m", "harness.probe", *words]
    closing = None if err else partial(os.close, 2)
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, preexec_fn=closing, check=False
    ).returncode


@pytest.mark.parametrize("end", ["3", "raise", "signal", "closed"])
def test_forked_process_sees_what_a_started_one_does(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = environment(tmp_path, {"PYTHONPATH": str(TESTS), "TZ": "Asia/Tokyo", "PWD": str(tmp_path)})
    ended: list[tuple[int, Any, str]] = []
    for is_forked in (False, True):
        with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as err:
            words = ["0" if end == "closed" else end, "a b", ""]
            status = probed(words, env, out, None if end == "closed" else err, is_forked=is_forked)
            out.seek(0)
            err.seek(0)
            seen = json.loads(out.read() or "null")
            ended.append((status, seen, "".join(err.read().splitlines()[-1:])))
    (started_status, started_seen, started_said), (status, seen, said) = ended
    assert (status, said) == (started_status, started_said)
    assert {name: (value, seen[name]) for name, value in started_seen.items() if seen[name] != value} == {}


def test_forked_process_is_found_and_ends_by_a_signal(tmp_path: Path) -> None:
    with controller(*PLAIN, home=tmp_path) as (role, _):
        assert isinstance(role.process, ForkedProcess)
        number = role.process.pid
        assert processes_in(tmp_path) == [number]
        assert "orchard.controller" in Path(f"/proc/{number}/cmdline").read_text().split("\0")
        assert os.getsid(number) == number
        with pytest.raises(subprocess.TimeoutExpired):
            role.process.wait(0)
        assert role.process.poll() is None
        role.process.kill()
        assert (role.process.wait(), role.process.poll(), role.process.returncode) == (-9, -9, -9)
        # It has ended: a signal would reach another process.
        role.process.terminate()


@pytest.mark.slow
def test_process_is_really_started_where_a_test_wants_that(tmp_path: Path) -> None:
    for env, before in (({}, REALLY), ({"PYTHONHASHSEED": "1"}, ())):
        with started("controller", "--version", home=tmp_path, env=env, before=before) as role:
            assert isinstance(role.process, subprocess.Popen)
            assert role.process.wait(GENEROUS) == 0


def test_program_for_shells_passes_on_words_streams_signals_and_status(tmp_path: Path) -> None:
    probe, pause = tmp_path / "probe", tmp_path / "pause"
    write_forking_program(probe, "harness.probe:main", "3")
    done = subprocess.run([probe, "a b"], stdin=subprocess.DEVNULL, capture_output=True, cwd=tmp_path, check=False)
    seen = json.loads(done.stdout)
    assert (done.returncode, done.stderr, seen["argv"], seen["directory"]) == (3, b"", ["3", "a b"], str(tmp_path))
    write_forking_program(pause, "signal:pause")
    with subprocess.Popen([pause], stdin=subprocess.DEVNULL) as process:
        process.terminate()
        assert process.wait(GENEROUS) == -signal.SIGTERM
