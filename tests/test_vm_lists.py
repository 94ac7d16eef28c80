"""Lists of VMs: filters, pages, and the deletion of all VMs that match a filter."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.disks import FailingDisk, HeldDisk, UnsyncedDisk
from harness.served import Answered, Served, served
from harness.strategies import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.client import ResponseError
from orchard.handlers import vms
from orchard.resources.filters import VMFilter
from orchard.schema import VM, Role, ServiceAccount
from orchard.testing import cluster


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, disk=UnsyncedDisk()) as serving:
        yield serving


async def names(api: Served, query: str, **more: Any) -> list[str]:
    answered = await api.call("GET", f"/vms?{query}", **more)
    assert answered.status == 200, answered
    return [vm["name"] for vm in answered.body]


def account(name: str, *roles: Role) -> ServiceAccount:
    return ServiceAccount(name, token=name * 16, roles=roles)


def signed(name: str) -> tuple[str, str]:
    return name, name * 16


# ---- filters --------------------------------------------------------------------------------------------------------


async def test_filters_of_all_paths(api: Served) -> None:
    await api.register("w")
    await api.create("ci-1", metadata={"team": "a,b"}, labels={"x": "1"})
    await api.create("ci-2", image="other", metadata={"team": "c"})
    await api.create("dev", resources={"org.cirruslabs.tart-vms": 3})
    api.schedule()
    await api.ok("PUT", "/vms/ci-2/state", {"status": "failed"})
    for query, found in {
        "filter=worker=w": ["ci-2"],
        "filter=worker!=w": ["ci-1", "dev"],
        "filter=status=failed": ["ci-2"],
        "filter=image=other": ["ci-2"],
        "filter=name=ci-*": ["ci-1", "ci-2"],
        "filter=name=dev": ["dev"],
        "filter=name!=ci-*": ["dev"],
        "filter=name=*": ["ci-1", "ci-2", "dev"],
        "filter=metadata.team=a%252Cb": ["ci-1"],
        "filter=metadata.team!=a%252Cb": ["ci-2", "dev"],
        "filter=label.x=1": ["ci-1"],
        "filter=name=ci-*,status=pending": ["ci-1"],
        "filter=name=ci-*&filter=status=failed": ["ci-2"],
        "filter=name=ci-*&filter=status=failed,image=image": [],
        "filter=createdBy=": ["ci-1", "ci-2", "dev"],
        "filter=": ["ci-1", "ci-2", "dev"],
    }.items():
        assert await names(api, query) == found, query


async def test_creator_of_a_vm_is_its_account_and_cannot_be_forged(tmp_path: Path) -> None:
    async with served(tmp_path, account("a", "compute:write", "compute:read"), account("b", "compute:write")) as api:
        for name in ("a", "b"):
            body = {"name": f"of-{name}", "image": "i", "createdBy": "another"}
            made = await api.call("POST", "/vms", body, account=signed(name))
            assert made.body["createdBy"] == name
            changed = await api.call("PATCH", f"/vms/of-{name}", {"createdBy": "a", "cpu": 2}, account=signed("b"))
            assert changed.body["createdBy"] == name
        assert await names(api, "filter=createdBy=a", account=signed("a")) == ["of-a"]


async def test_metadata_are_replaced_by_put_and_merged_by_patch(api: Served) -> None:
    vm = await api.create("vm", metadata={"a": "1", "b": "2"})
    patched = await api.ok("PATCH", "/vms/vm", {"metadata": {"a": None, "c": "3"}})
    assert (patched["metadata"], patched["generation"]) == ({"b": "2", "c": "3"}, vm["generation"])
    assert patched["version"] > vm["version"]
    assert (await api.ok("PUT", "/vms/vm", {"metadata": {"d": "4"}}))["metadata"] == {"d": "4"}
    assert (await api.ok("PUT", "/vms/vm", {"image": "image"}))["metadata"] == {"d": "4"}
    refused = await api.call("PATCH", "/vms/vm", {"metadata": {"a b": "1"}})
    assert (refused.status, (await api.ok("GET", "/vms/vm"))["metadata"]) == (412, {"d": "4"})


async def test_only_a_whole_list_of_one_workers_vms_is_its_poll(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    accounts = account("w", "compute:write", "compute:read"), account("b", "compute:read")
    async with served(tmp_path, *accounts, disk=UnsyncedDisk()) as api:
        await api.call("POST", "/workers", {"name": "w", "machine_id": "m"}, account=signed("w"))
        contacts = api.loop.liveness.last_contact
        for query, sender, counts in (
            ("filter=worker=w", "b", False),
            ("filter=worker=w,status=pending", "w", False),
            ("filter=worker!=w", "w", False),
            ("filter=worker=w&limit=1", "w", False),
            ("filter=worker=w&filter=name=*", "w", False),
            ("filter=worker=w", "w", True),
            ("filter=worker=w&filter=worker=w", "w", True),
        ):
            await trio.sleep(10)
            before = contacts["w"]
            assert await names(api, query, account=signed(sender)) == []
            assert contacts["w"] == (trio.current_time() if counts else before), query


# ---- pages ----------------------------------------------------------------------------------------------------------


async def page(api: Served, query: str) -> tuple[list[str], str | None]:
    answered = await api.call("GET", f"/vms?{query}")
    assert answered.status == 200, answered
    return [vm["name"] for vm in answered.body], answered.headers.get("x-continue")


async def test_pages_end_with_the_last_vm(api: Served) -> None:
    for name in ("c", "a", "b", "d", "skipped"):
        await api.create(name, metadata={} if name == "skipped" else {"k": "v"})
    assert await page(api, "limit=5") == (["a", "b", "c", "d", "skipped"], None)
    found, token = await page(api, "limit=2&filter=metadata.k=v")
    assert (found, token is not None) == (["a", "b"], True)
    assert await page(api, f"limit=2&filter=metadata.k=v&continue={token}") == (["c", "d"], None)
    assert await page(api, f"continue={token}") == (["c", "d", "skipped"], None)
    # The VM that the first page ended with may be gone.
    await api.ok("DELETE", "/vms/b")
    assert await page(api, f"limit=1&continue={token}&filter=name=c") == (["c"], None)


@pytest.mark.slow
@settings(QUICK, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdefgh")), max_size=12), st.integers(1, 4))
def test_pages_skip_and_repeat_no_vm_that_is_there_throughout(changes: list[tuple[bool, str]], limit: int) -> None:
    """Between two pages, one VM is created or deleted."""

    async def run(directory: Path) -> None:
        async with served(directory, disk=UnsyncedDisk()) as api:
            for name in "bdfh":
                await api.create(name)
            throughout, ever = set("bdfh"), set("bdfh")
            seen: list[str] = []
            found, token = await page(api, f"limit={limit}")
            seen += found
            left = iter(changes)
            while token is not None:
                assert len(found) == limit
                is_new, name = next(left, (True, "b"))
                if is_new and name not in api.state.vms:
                    await api.create(name)
                    ever.add(name)
                elif not is_new and name in api.state.vms:
                    await api.ok("DELETE", f"/vms/{name}")
                    throughout.discard(name)
                found, token = await page(api, f"limit={limit}&continue={token}")
                seen += found
            assert seen == sorted(set(seen))
            assert throughout <= set(seen) <= ever

    with tempfile.TemporaryDirectory() as directory:
        trio.run(run, Path(directory))


async def test_list_in_several_steps_is_of_one_moment(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vms, "_TESTS_PER_STEP", 2)
    for number in range(6):
        await api.create(f"vm-{number}", metadata={"k": "v"})
    revision, select = api.state.revision, VMFilter.select

    def select_and_delete(self: VMFilter, tested: Sequence[VM]) -> Sequence[VM]:
        """Have all VMs deleted after the first step."""
        found = select(self, tested)
        with api.store.transaction() as tx:
            for vm in api.state.vms.values():
                tx.delete(vm)
        return found

    monkeypatch.setattr(VMFilter, "select", select_and_delete)
    answered = await api.call("GET", "/vms?filter=metadata.k=v")
    assert [vm["name"] for vm in answered.body] == [f"vm-{number}" for number in range(6)]
    assert answered.headers["x-stored-revision"] == str(revision)
    assert api.state.vms == {}


# ---- bulk deletion --------------------------------------------------------------------------------------------------


SLIPS = [
    "",
    "?",
    "?filter=",
    "?filter=&filter=status=failed",
    "?dryRun=true",
    "?filter=name=*",
    "?filter=name=%252A",
    "?filter=name=*,status=failed",
    "?filter=metadata.run=",
    "?filter=metadata.run!=",
    "?filter=createdBy=",
    "?filter=image!=",
    "?filter=worker=",
    "?filter=status=",
    "?filter=status!=faild",
    "?filter=cpu=1",
    "?filter=name=vm,",
    "?filter=name=vm&dryRun=",
    "?filter=name=vm&dryRun=yes",
    "?filter=name=vm&dryRun=true&dryRun=false",
    "?filter=name=vm&dryrun=true",
    "?filter=name=vm&dry_run",
    "?filter=name=vm&limit=1",
    "?filters=name=vm",
    "?filter=name=vm&fieldValidation=strange",
]


@pytest.mark.parametrize("query", SLIPS)
async def test_slip_in_a_bulk_deletion_deletes_nothing(api: Served, query: str) -> None:
    await api.create("vm")
    revision = api.state.revision
    assert (await api.call("DELETE", f"/vms{query}")).status == 400
    assert api.state.revision == revision
    assert list(api.state.vms) == ["vm"]


async def test_bulk_deletion_deletes_what_matches(api: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "orchard.controller")
    for name in ("a-2", "a-1", "a-3", "b"):
        await api.create(name, metadata={"run": "7"} if name != "a-3" else {})
    query = "/vms?filter=name=a-*,metadata.run=7"
    assert await api.ok("DELETE", f"{query}&dryRun=true") == {"deleted": ["a-1", "a-2"]}
    assert len(api.state.vms) == 4
    assert await api.ok("DELETE", f"{query}&dryRun=false") == {"deleted": ["a-1", "a-2"]}
    assert sorted(api.state.vms) == ["a-3", "b"]
    logged = [vars(record) for record in caplog.records if record.getMessage() == "VMs deleted"]
    assert [(fields["vm"], fields["account"]) for fields in logged] == [("a-1,a-2", "-")]
    assert await api.ok("DELETE", query) == {"deleted": []}
    # An absent key equals no value.
    assert await api.ok("DELETE", "/vms?filter=metadata.run!=7") == {"deleted": ["a-3"]}


async def test_bulk_deletion_has_at_most_24_vms_in_a_transaction(api: Served) -> None:
    for number in range(50):
        await api.create(f"vm-{number:02}")
    told: list[int] = []
    api.store.on_commit(lambda changes: told.append(len(changes)))
    assert len((await api.ok("DELETE", "/vms?filter=name=vm-*"))["deleted"]) == 50
    assert told == [24, 24, 2]


async def test_bulk_deletion_leaves_later_vms_of_the_same_names(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with served(tmp_path, disk=disk) as api:
        for number in range(30):
            await api.create(f"vm-{number:02}")
        answers: list[Any] = []

        async def delete() -> None:
            answers.append(await api.ok("DELETE", "/vms?filter=name=vm-*"))

        async with trio.open_nursery() as nursery:
            with disk.held():
                nursery.start_soon(delete)
                # The first transaction is being written. Two VMs of the second one are replaced, and one is changed.
                while len(api.state.vms) == 30:
                    await trio.testing.wait_all_tasks_blocked()
                uids = {}
                for name in ("vm-25", "vm-26"):
                    with api.store.transaction() as tx:
                        tx.delete(api.state.vms[name])
                    nursery.start_soon(api.create, name)
                    while name not in api.state.vms:
                        await trio.testing.wait_all_tasks_blocked()
                    uids[name] = api.state.vms[name].uid
                nursery.start_soon(api.create, "vm-99")
                nursery.start_soon(api.call, "PATCH", "/vms/vm-27", {"metadata": {"a": "b"}})
                await trio.testing.wait_all_tasks_blocked()
        assert answers[0]["deleted"] == [f"vm-{number:02}" for number in range(30) if number not in (25, 26)]
        assert sorted(api.state.vms) == ["vm-25", "vm-26", "vm-99"]
        assert {name: api.state.vms[name].uid for name in uids} == uids


async def test_failed_bulk_deletion_lists_what_was_deleted(tmp_path: Path) -> None:
    disk = FailingDisk()
    async with served(tmp_path, disk=disk) as api:
        for number in range(60):
            await api.create(f"vm-{number:02}")
        before = disk.calls.count("write")

        def second_write_fails(verb: str, number: int) -> int:
            return errno.EIO if verb == "write" and disk.calls.count("write") == before + 1 else 0

        disk.fault = second_write_fails
        refused = await api.call("DELETE", "/vms?filter=name=vm-*")
        assert refused.status == 503
        assert refused.body["deleted"] == [f"vm-{number:02}" for number in range(24)]
        assert sorted(api.state.vms) == [f"vm-{number:02}" for number in range(24, 60)]
        # It can be sent again.
        assert len((await api.ok("DELETE", "/vms?filter=name=vm-*"))["deleted"]) == 36
    async with served(tmp_path) as api:
        assert api.state.vms == {}


async def test_bulk_deletion_ends_with_its_accounts_role(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with served(tmp_path, account("a", "compute:write"), disk=disk) as api:
        for number in range(60):
            await api.call("POST", "/vms", {"name": f"vm-{number:02}", "image": "i"}, account=signed("a"))
        answers: list[Answered] = []

        async def delete() -> None:
            answers.append(await api.call("DELETE", "/vms?filter=name=vm-*", account=signed("a")))

        async with trio.open_nursery() as nursery:
            with disk.held():
                nursery.start_soon(delete)
                while len(api.state.vms) == 60:
                    await trio.testing.wait_all_tasks_blocked()
                with api.store.transaction() as tx:
                    tx.put(account("a", "compute:read"))
        # The role is lost once that is durable, which the second transaction shares.
        assert (answers[0].status, len(api.state.vms)) == (403, 12)
        assert answers[0].body["deleted"] == [f"vm-{number:02}" for number in range(48)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_bulk_deletion_amid_creations_deletes_exactly_what_matched(seed: int) -> None:
    """Clients create VMs under few names on real sockets. What a deletion saw, and no other VM, is gone."""
    rng, ticks = random.Random(seed), itertools.count()
    # By uid: name, run, when the creation was sent, when it was answered.
    born: dict[str, tuple[str, str, int, int]] = {}
    # When a deletion was sent, when it was answered, and the names.
    deletions: list[tuple[int, int, list[str]]] = []

    async with cluster(workers=0) as c:

        async def create() -> None:
            for _ in range(60):
                name, run, sent = f"vm-{rng.randrange(40)}", rng.choice("ab"), next(ticks)
                body = {"name": name, "image": "any", "metadata": {"run": run}}
                try:
                    vm = (await c.client.request("POST", "/vms", json=body)).json()
                except ResponseError as error:
                    if error.status != 409:
                        raise
                else:
                    born[vm["uid"]] = name, run, sent, next(ticks)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(create)
            for _ in range(12):
                sent = next(ticks)
                answer = await c.client.request("DELETE", "/vms?filter=metadata.run=a")
                deletions.append((sent, next(ticks), answer.json()["deleted"]))
        alive = {vm["uid"] for vm in (await c.client.request("GET", "/vms")).json()}
    assert sum(len(names) for _, _, names in deletions) == len(born.keys() - alive) > 0
    for uid, (name, run, sent, answered) in born.items():
        may = [names for began, ended, names in deletions if ended > sent]
        must = [names for began, ended, names in deletions if began > answered]
        if uid in alive:
            assert run == "b" or not must, (uid, name)
        else:
            assert run == "a"
            assert any(name in names for names in may), (uid, name)
