"""The pytest plugin: the fixtures `orchard_cluster` and `orchard_session_cluster`, and the log of a failed test.

    def test_vm_runs(orchard_cluster):
        orchard_cluster.client.vms.create(name="vm", image="any")
        assert orchard_cluster.client.vms.wait("vm").state.status == "running"

It is installed with Orchard, by the entry point `orchard` of the group `pytest11`.

* `orchard_cluster` is a cluster for one test. The marker `@pytest.mark.orchard(workers=3, vms_per_worker=4)` passes
  arguments to `orchard.testing.start_cluster`.
* `orchard_session_cluster` is one cluster for all tests, which share its VMs. A project passes arguments to it by a
  session-scoped fixture `orchard_session_options` of its own, which returns them as a dictionary.
* The report of a failed test has a section with what clusters have logged since the test began.

pytest loads this module at every start, so it imports the rest of Orchard only when a test uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from orchard.testing import BlockingCluster, ClusterLog

_WORKERS = 2
# The number of lines in the log when a test began.
_LINES_BEFORE = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "orchard(workers=2, vms_per_worker=2, ...): arguments of the fixture orchard_cluster"
    )


@pytest.fixture
def orchard_cluster(request: pytest.FixtureRequest) -> Iterator[BlockingCluster]:
    """A running cluster for one test, with two workers by default: an `orchard.testing.BlockingCluster`."""
    from orchard.testing import start_cluster

    marker = request.node.get_closest_marker("orchard")
    options = {"workers": _WORKERS, **(marker.kwargs if marker is not None else {})}
    with start_cluster(**options) as running:
        yield running


@pytest.fixture(scope="session")
def orchard_session_options() -> Mapping[str, Any]:
    """The arguments of `orchard_session_cluster`. Define a fixture of this name to change them."""
    return {"workers": _WORKERS}


@pytest.fixture(scope="session")
def orchard_session_cluster(orchard_session_options: Mapping[str, Any]) -> Iterator[BlockingCluster]:
    """A running cluster for all tests: an `orchard.testing.BlockingCluster`."""
    from orchard.testing import start_cluster

    with start_cluster(**orchard_session_options) as running:
        yield running


def _cluster_log() -> ClusterLog | None:
    """Return the log of the clusters of this process, None before the first."""
    testing = sys.modules.get("orchard.testing")
    return testing.CLUSTER_LOG if testing is not None else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    log = _cluster_log()
    item.stash[_LINES_BEFORE] = log.count if log is not None else 0


# Not `wrapper=True`, which early versions of pytest 7 do not have.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    log = _cluster_log()
    if report.failed and log is not None and (lines := log.since(item.stash.get(_LINES_BEFORE, 0))):
        report.sections.append((f"Orchard cluster log, {report.when}", "\n".join(lines)))
