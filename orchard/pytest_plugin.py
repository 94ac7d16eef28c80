"""The pytest plugin: the fixture `orchard_cluster`, a whole cluster for one test.

    def test_vm_runs(orchard_cluster):
        orchard_cluster.client.vms.create(name="vm", image="any")
        assert orchard_cluster.client.vms.wait("vm").state.status == "running"

It is installed with Orchard, by the entry point `orchard` of the group `pytest11`. The marker
`@pytest.mark.orchard(workers=3, vms_per_worker=4)` passes arguments to `orchard.testing.start_cluster`.

pytest loads this module at every start, so it imports the rest of Orchard only when a test uses the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from orchard.testing import BlockingCluster


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "orchard(workers=2, vms_per_worker=2, ...): arguments of the fixture orchard_cluster"
    )


@pytest.fixture
def orchard_cluster(request: pytest.FixtureRequest) -> Iterator[BlockingCluster]:
    """A running cluster for one test, with two workers by default: an `orchard.testing.BlockingCluster`."""
    from orchard.testing import start_cluster

    marker = request.node.get_closest_marker("orchard")
    options = {"workers": 2, **(marker.kwargs if marker is not None else {})}
    with start_cluster(**options) as running:
        yield running
