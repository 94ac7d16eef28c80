"""The pytest plugin: the fixture `orchard_cluster`, a whole cluster for one test. Law: imports nothing until it is asked.

pytest finds it by the entry point `orchard`. `@pytest.mark.orchard(workers=3, vms_per_worker=4)` on a test passes
options to `orchard.testing.start_cluster`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from orchard.testing import BlockingCluster


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "orchard(workers=1, ...): options of the fixture orchard_cluster")


@pytest.fixture
def orchard_cluster(request: pytest.FixtureRequest) -> Iterator[BlockingCluster]:
    """A controller and two workers with synthetic VMs, for this test alone: `url`, and `client`, whose methods block."""
    from orchard.testing import start_cluster

    marker = request.node.get_closest_marker("orchard")
    options = {"workers": 2, **(marker.kwargs if marker is not None else {})}
    with start_cluster(**options) as running:
        yield running
