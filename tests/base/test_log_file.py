"""The log file: rotation, SIGUSR1, a full disk."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.clients import call
from harness.processes import ORCHARD, PLAIN, at_last, controller, finished

from orchard.base.log_file import LogFileHandler
from orchard.base.logs import JSONFormatter


@contextmanager
def logging_to(path: Path, limit: int = 10**9) -> Iterator[logging.Logger]:
    """Yield a logger that writes its messages to a file."""
    logger = logging.getLogger(f"test{path}")
    handler = LogFileHandler(path, limit)
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        handler.close()


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def older(path: Path) -> Path:
    return path.with_name(path.name + ".1")


@pytest.mark.parametrize("seed", range(5))
def test_rotation_loses_and_splits_no_line(tmp_path: Path, seed: int) -> None:
    path, chosen, limit = tmp_path / "log", random.Random(seed), 1000
    written = ""
    with logging_to(path, limit) as logger:
        for number in range(300):
            line = f"{number} {'x' * chosen.randrange(400)}"
            logger.warning(line)
            written += f"{line}\n"
            kept = text_of(older(path)) + text_of(path)
            assert written.endswith(kept)
            assert written == kept or written.removesuffix(kept).endswith("\n")
            assert path.stat().st_size <= limit
            assert len(kept) >= min(len(written), limit - 400)
    assert sorted(tmp_path.iterdir()) == [path, older(path)]


def test_line_that_is_longer_than_the_limit_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logging_to(path, 10) as logger:
        for line in ("x" * 50, "y" * 60):
            logger.warning(line)
    assert (text_of(older(path)), text_of(path)) == ("x" * 50 + "\n", "y" * 60 + "\n")


def test_rotation_under_several_threads_keeps_each_line_whole_and_in_order(tmp_path: Path) -> None:
    path, threads, lines = tmp_path / "log", 4, 250
    with logging_to(path, 12_000) as logger:

        def write(name: int) -> None:
            for number in range(lines):
                logger.warning("%d %04d %s", name, number, "x" * 10)

        writers = [threading.Thread(target=write, args=(name,)) for name in range(threads)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    assert older(path).exists()
    words = [line.split() for line in (text_of(older(path)) + text_of(path)).splitlines()]
    for name in range(threads):
        assert [(int(n), x) for who, n, x in words if int(who) == name] == [(n, "x" * 10) for n in range(lines)]


def test_rotated_file_and_the_new_one_have_the_mode_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = os.umask(0o077)
    try:
        with logging_to(path, 100) as logger:
            assert path.stat().st_mode & 0o777 == 0o600
            path.chmod(0o640)
            for _ in range(3):
                logger.warning("x" * 60)
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (older(path), path)] == [0o640, 0o640]


def test_file_that_cannot_be_rotated_takes_all_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    (older(path) / "not empty").mkdir(parents=True)
    with logging_to(path, 100) as logger:
        for number in range(50):
            logger.warning(f"line {number}")
        (older(path) / "not empty").rmdir()
        older(path).rmdir()
        for number in range(50, 70):
            logger.warning(f"line {number}")
    assert (text_of(older(path)) + text_of(path)).splitlines() == [f"line {number}" for number in range(70)]
    assert text_of(path).count("\n") < 20


def test_file_that_another_program_has_renamed_is_not_renamed_again(tmp_path: Path) -> None:
    path, renamed = tmp_path / "log", tmp_path / "log.2026-01-01"
    with logging_to(path, 100) as logger:
        logger.warning("x" * 90)
        path.rename(renamed)
        path.write_text("of another program\n")
        logger.warning("y" * 50)
    assert (text_of(renamed), text_of(path)) == ("x" * 90 + "\n", "of another program\n" + "y" * 50 + "\n")


def test_file_that_another_program_has_truncated_is_rotated_by_its_new_size(tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with logging_to(path, 100) as logger:
        logger.warning("x" * 90)
        os.truncate(path, 0)
        logger.warning("y" * 50)
        assert (older(path).exists(), text_of(path)) == (False, "y" * 50 + "\n")
        os.truncate(path, 0)
        # A line of which only a part can be written leaves no hole.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
        try:
            logger.warning("z" * 50)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert text_of(path) == ""


def test_full_disk_drops_whole_lines_and_the_next_line_is_followed_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with logging_to(path) as logger:
        logger.handlers[0].setFormatter(JSONFormatter())
        logger.warning("first")
        size = path.stat().st_size
        # The kernel writes a part of the next line, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        try:
            for number in range(3):
                logger.warning(f"lost {number}")
                assert path.stat().st_size == size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        for number in range(2):
            logger.warning(f"later {number}")
    shown = [json.loads(line) for line in text_of(path).splitlines()]
    assert [line["message"] for line in (shown[0], shown[1], shown[3])] == ["first", "later 0", "later 1"]
    assert (len(shown), shown[2]["level"], shown[2]["lines"]) == (4, "warning", 3)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["file", "stderr"])
def test_controller_works_on_while_its_log_cannot_be_written(tmp_path: Path, where: str) -> None:
    words = ("--log-file", "/dev/full") if where == "file" else ()
    before = ("sh", "-c", 'exec "$@" 2>/dev/full', "sh") if where == "stderr" else ()
    with controller(*PLAIN, *words, home=tmp_path, before=before) as (role, url):
        assert [call(url, "GET", "/v1/vms")[0] for _ in range(3)] == [200] * 3
        assert role.stop() == 0
    assert Path("/dev/full").is_char_device()


@pytest.mark.slow
def test_reopening_on_sigusr1_after_a_rename_loses_no_line(tmp_path: Path) -> None:
    path, renamed = tmp_path / "log", tmp_path / "renamed"
    with controller(*PLAIN, "--log-file", str(path), "--log-format", "json", "--debug", home=tmp_path) as (role, url):
        assert call(url, "GET", "/v1/vms")[0] == 200
        path.rename(renamed)
        assert call(url, "GET", "/v1/workers")[0] == 200
        role.process.send_signal(signal.SIGUSR1)
        at_last(path.exists)
        assert call(url, "GET", "/v1/service-accounts")[0] == 200
        assert role.stop() == 0
        assert role.log.read_text() == ""

    def requested(file: Path) -> list[str]:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [line["path"] for line in lines if line["message"] == "request"]

    assert requested(renamed) + requested(path) == ["/v1/vms", "/v1/workers", "/v1/service-accounts"]
    assert (requested(renamed)[0], requested(path)[-1]) == ("/v1/vms", "/v1/service-accounts")
    assert '"message": "stopping"' in path.read_text()


def test_log_file_has_the_error_that_ended_the_process(tmp_path: Path) -> None:
    path = tmp_path / "log"
    words = ("--log-file", str(path), "--log-format", "json")
    with controller(*PLAIN, home=tmp_path):
        ended = finished("controller", "--listen", "127.0.0.1:0", *PLAIN, *words, home=tmp_path)
    (line,) = (json.loads(line) for line in path.read_text().splitlines())
    assert (ended.returncode, ended.stderr.count("\n"), line["level"]) == (1, 1, "error")
    assert str(tmp_path / ORCHARD / "controller") in line["message"]
    program = (
        "from pathlib import Path\nfrom orchard.base import daemon, logs\n"
        "async def fail(): raise KeyError('unexpected')\n"
        f"daemon.run_main('program', fail, {{}}, logs.LogSettings(file=Path({str(path)!r}), format='json'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    line = json.loads(path.read_text().splitlines()[-1])
    assert (done.returncode, line["level"]) == (1, "error")
    assert "KeyError: 'unexpected'" in line["traceback"]
    assert "KeyError: 'unexpected'" in done.stderr


def test_log_file_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    for role, *words in (("controller", *PLAIN), ("worker", "http://127.0.0.1:1", "--runtime", "synthetic")):
        path = tmp_path / "none" / "log"
        ended = finished(role, *words, "--log-file", str(path), home=tmp_path)
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
        assert str(path) in ended.stderr
