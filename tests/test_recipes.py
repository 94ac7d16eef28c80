"""The recipes in docs/recipes, each run against a cluster."""

from __future__ import annotations

import ast
import datetime
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import trio
from harness.processes import GENEROUS, eventually

from orchard.client import Client, VMFailed
from orchard.schema import VM, Worker
from orchard.testing import cluster

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = sorted((DOCS / "recipes").glob("*.py"))


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_ten_lines_and_is_in_the_table(path: Path) -> None:
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.AsyncFunctionDef)]
    lines = sum(
        node.end_lineno - node.lineno + 1 - bool(ast.get_docstring(node)) for node in functions if node.end_lineno
    )
    assert lines <= 10
    assert f"(recipes/{path.name})" in (DOCS / "clients.md").read_text()


async def test_state_view_stays_current(nursery: trio.Nursery) -> None:
    async with cluster() as c:
        await c.client.vms.create(name="a", image="any")
        view: dict[str, VM] = {}
        nursery.start_soon(recipe("state_view").keep_view, c.client, view)

        async def is_current() -> bool:
            return view == {vm.name: vm for vm in await c.client.vms.list()}

        await eventually(is_current)
        await c.client.vms.create(name="b", image="any")
        await c.client.vms.delete("a")
        await c.client.vms.wait("b")
        await eventually(is_current)
        assert view["b"].state.status == "running"
        nursery.cancel_scope.cancel()


async def test_as_many_runners_start_as_fit() -> None:
    count = recipe("free_runners").count_free_runners
    async with cluster(workers=[Worker(labels={"xcode": "27"}), Worker()], vms_per_worker=3) as c:
        assert await count(c.client, {"xcode": "27"}) == 3
        for number in range(3):
            await c.client.vms.create(name=f"r{number}", image="any", labels={"xcode": "27"}, queue="never")
        assert await count(c.client, {"xcode": "27"}) == 0
        assert await count(c.client, {}) == 3


async def test_cleanup_deletes_old_vms_of_its_owner_and_pool_only() -> None:
    delete_old = recipe("cleanup").delete_old
    async with cluster(workers=0, auth=True) as c:
        account = await c.client.service_accounts.create("ci", roles=["compute:read", "compute:write"])
        async with Client(c.url, account="ci", token=account.token) as ci:
            await ci.vms.create(name="mine", image="any", metadata={"pool": "p"})
            await ci.vms.create(name="mine-too", image="any", metadata={"pool": "q"})
            await c.client.vms.create(name="other", image="any", metadata={"pool": "p"})
            assert await delete_old(ci, "ci", "p", datetime.timedelta(hours=1)) == []
            assert await delete_old(ci, "ci", "p", datetime.timedelta(0)) == ["mine"]
            assert [vm.name for vm in await ci.vms.list()] == ["mine-too", "other"]


@pytest.mark.slow
async def test_leased_vm_is_renewed_in_the_block_and_deleted_after_it() -> None:
    async with cluster() as c:
        async with recipe("leased_vm").leased_vm(c.client, "vm", "any", 1):
            first = await c.client.vms.get("vm")

            async def is_renewed() -> bool:
                now = await c.client.vms.get("vm")
                assert now.meta.expires_at is not None
                assert first.meta.expires_at is not None
                return now.meta.expires_at > first.meta.expires_at + datetime.timedelta(seconds=1)

            await eventually(is_renewed)
        with trio.fail_after(GENEROUS), pytest.raises(VMFailed):
            await c.client.vms.wait("vm", until="failed")


async def test_ready_vm_has_run_its_script() -> None:
    create = recipe("ready_vm").create_ready_vm
    async with cluster() as c:
        vm = await create(c.client, "good", "any", "echo done")
        assert (vm.condition("ready"), vm.state.startup_exit_code) == (True, 0)
        with pytest.raises(VMFailed) as failure:
            await create(c.client, "bad", "any", "exit 3")
        assert failure.value.vm.state.startup_exit_code == 3
