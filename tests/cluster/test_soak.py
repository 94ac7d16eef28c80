"""A short run of the soak benchmark: random use leaves no process, file, task, descriptor or object behind."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.processes import GENEROUS

SOAK = Path(__file__).parent.parent.parent / "bench" / "soak.py"


@pytest.mark.slow(8)
@pytest.mark.needs("ps")
def test_random_use_leaves_nothing_behind() -> None:
    soak = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", SOAK, "--seconds", "0", "--actions", "100", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=GENEROUS,
        check=False,
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert soak.stderr == ""


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SOAK.parent)
    return importlib.import_module("soak")


def test_growth_is_told_from_chance(soak: Any) -> None:
    def left(tasks: str = "", memory: str = "", objects: str = "") -> list[str]:
        rounds = [values.split() for values in (tasks, memory, objects)]
        number = max(map(len, rounds))
        each = zip(*(map(int, values or ["5"] * number) for values in rounds), strict=True)
        return list(soak.grown([soak.Count(5, t, 5, 5, 5, m, Counter({"orchard.schema.VM": o})) for t, m, o in each]))

    assert left(tasks="5 6 5") == []
    assert left(tasks="5 5 6") == []
    assert left(tasks="5 6 7") == ["tasks"]
    assert left(tasks="5 6 5 6 7 7 7 8") == ["tasks"], "also what few actions leave"
    assert left(objects="5 15 25") == ["objects of orchard.schema.VM"]
    assert left(objects="5 40 5") == [], "a cache holds now more, now less"
    assert left(objects="5 6 7") == []
    assert left(memory="100 150 200") == [], "three rounds say nothing about memory"
    assert left(memory="100 " * 9 + "106") == ["memory"]
    assert left(memory="100 150 200 250 300 " + "310 " * 5) == []


def test_objects_that_something_holds_are_counted(soak: Any) -> None:
    kind: Any = dataclass(type("Leaked", (), {"__module__": "orchard.test"}))
    held = [kind() for _ in range(3)]
    assert soak.live_objects()["orchard.test.Leaked"] == 3
    held.clear()
    assert soak.live_objects()["orchard.test.Leaked"] == 0
