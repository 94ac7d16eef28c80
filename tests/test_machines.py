"""The machines of the tests (harness/machines.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.machines import machines, need_machines

pytestmark = pytest.mark.slow


async def test_links_in_a_machine_lead_to_files_of_the_machine(tmp_path: Path) -> None:
    """A link to a path that this host has, too, such as that of its certificates."""
    need_machines()
    name = f"/var/tmp/{tmp_path.parent.name}-{tmp_path.name}"
    async with machines(tmp_path, ["one"]) as found:
        found["one"].run("ln", "-s", f"{name}-target", f"{name}-link")
        found["one"].path(f"{name}-link").write_text("of the machine")
        written_here = Path(f"{name}-target").exists()
        Path(f"{name}-target").unlink(missing_ok=True)
        assert not written_here
        found["one"].run("grep", "machine", f"{name}-target")
