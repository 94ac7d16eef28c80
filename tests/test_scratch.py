"""The directories of a run of the tests: the next run removes those of one that was killed, and no others."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

# Ends with its standard input, and removes nothing then.
RUN = """import sys
from pathlib import Path
from harness import scratch
scratch._DISK, scratch._MEMORY, scratch._YOUNG_SECONDS = Path(sys.argv[1], "disk"), Path(sys.argv[1], "memory"), -1.0
scratch.begin_run()
print(scratch.os.environ["TMPDIR"], flush=True)
sys.stdin.read()
"""


def test_next_run_removes_what_a_killed_run_left_and_nothing_of_one_that_lives(tmp_path: Path) -> None:
    places = [tmp_path / "disk", tmp_path / "memory"]
    for place in places:
        place.mkdir()
        (place / "of-another-program").mkdir()
    with ExitStack() as stack:

        def begin() -> tuple[subprocess.Popen[str], str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RUN, tmp_path],
                    cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
            assert process.stdout is not None
            directory = Path(process.stdout.readline().strip())
            for place in places:
                (place / directory.name / "file").touch()
            return process, directory.name

        killed, first = begin()
        _, second = begin()
        assert [sorted(entry.name for entry in place.iterdir()) for place in places] == [
            sorted(["of-another-program", first, second])
        ] * 2
        killed.kill()
        killed.wait()
        _, third = begin()
        assert [sorted(entry.name for entry in place.iterdir()) for place in places] == [
            sorted(["of-another-program", second, third])
        ] * 2
