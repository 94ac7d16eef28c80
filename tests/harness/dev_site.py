"""A running cluster for the tests of the command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.processes import ORCHARD, started
from orchard.cli.connection import ControllerConnection, path_of
from orchard.cli.context import Context, Contexts, read_contexts

LISTENING = re.compile(r".*(http://127\.0\.0\.1:[0-9]+)")


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the context of `orchard dev --synthetic`."""
    home = tmp_path_factory.mktemp("dev")
    with started("", "dev", "--synthetic", "--port", "0", "--directory", str(home / "dev"), home=home) as role:
        url = role.wait_for(LISTENING)[1]
        assert read_contexts(home / ORCHARD / "orchard.yml") == Contexts("local-dev", {"local-dev": Context(url)})
        yield home
        role.stop()


@pytest.fixture
def api(dev: Path) -> Iterator[ControllerConnection]:
    context = read_contexts(dev / ORCHARD / "orchard.yml").find("local-dev")
    with ControllerConnection(context) as connection:
        yield connection
        for vm in connection.call("GET", "/vms"):
            connection.call("DELETE", path_of("vms", vm["name"]))
