"""The recipes in docs/recipes, each run against a cluster."""

from __future__ import annotations

import ast
import datetime
import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import trio
from harness.documents import session
from harness.processes import GENEROUS, eventually
from harness.scripted import answer, scripted

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


# ---- scripts of CI systems, called as these call them ----------------------------------------------------------------

SCRIPTS = sorted(path for path in (DOCS / "recipes").rglob("*") if path.is_file() and path.read_bytes()[:2] == b"#!")
GITLAB = DOCS / "recipes" / "gitlab"
# GitLab Runner chooses these codes.
GITLAB_ENVIRONMENT = "export BUILD_FAILURE_EXIT_CODE=91 SYSTEM_FAILURE_EXIT_CODE=92 CUSTOM_ENV_CI_JOB_ID=7"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_a_program_of_the_shell_that_a_page_names(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
    assert f"({path.relative_to(DOCS)})" in (DOCS / "ci.md").read_text()


@pytest.mark.slow
@pytest.mark.needs("ssh")
async def test_gitlab_job_runs_each_step_in_one_vm_and_leaves_none(tmp_path: Path) -> None:
    async with cluster() as c, session(tmp_path, c) as shell:
        await shell.execute(GITLAB_ENVIRONMENT)
        for _ in range(2):
            # The runner repeats a stage that fails.
            assert (await shell.execute(f"{GITLAB}/prepare.sh"))[0] == 0
        (vm,) = await c.client.vms.list()
        assert (vm.spec.metadata or {})["gitlab.job"] == "7"
        steps = {
            "get_sources": "echo source > file",
            "step_script": "cat file",
            "after_script": "exit 3",
            "as_ssh": "exit 255",
        }
        ended = {}
        for name, text in steps.items():
            (tmp_path / name).write_text(f"{text}\n")
            ended[name] = await shell.execute(f"{GITLAB}/run.sh {tmp_path / name} {name}")
        assert (ended["get_sources"][0], ended["step_script"][0], ended["after_script"][0]) == (0, 0, 91)
        assert ended["as_ssh"][0] == 91
        assert ended["step_script"][1].splitlines()[-1] == "source"
        assert (await shell.execute(f"{GITLAB}/cleanup.sh"))[0] == 0
        assert await c.client.vms.list() == []
        # Without its VM, a step is the system's failure.
        await c.client.vms.create(name="gitlab-7", image="boot-fails")
        assert (await shell.execute("CUSTOM_ENV_CI_JOB_IMAGE=boot-fails " + f"{GITLAB}/prepare.sh"))[0] == 92
        step = f"{GITLAB}/run.sh {tmp_path / 'step_script'} step_script"
        assert (await shell.execute(step))[0] == 92
        await c.client.vms.delete("gitlab-7")
        assert (await shell.execute(step))[0] == 92
        assert (await shell.execute(f"ORCHARD_URL=http://127.0.0.1:1 {step}"))[0] == 92


@pytest.mark.slow
@pytest.mark.needs("ssh")
async def test_command_in_a_vm_has_the_directory_and_its_status_is_returned(tmp_path: Path) -> None:
    recipes = DOCS / "recipes"
    async with cluster() as c, session(tmp_path, c) as shell:
        await shell.execute("mkdir checkout; cd checkout; echo source > file")
        status, output = await shell.execute(f"{recipes}/in-vm.sh 'cat file; exit 7'")
        assert (status, output.splitlines()[-1]) == (7, "source")
        hook = f"ORCHARD_RECIPES={recipes} BUILDKITE_COMMAND='cat file' {recipes}/buildkite/command"
        status, output = await shell.execute(hook)
        assert (status, output.splitlines()[-1]) == (0, "source")
        assert (await shell.execute(f"IMAGE=boot-fails {recipes}/in-vm.sh true"))[0] == 255
        assert (await shell.execute(f"ORCHARD_URL=http://127.0.0.1:1 {recipes}/in-vm.sh true"))[0] == 255
        assert await c.client.vms.list() == []


@pytest.mark.slow
@pytest.mark.needs("curl")
async def test_github_runner_takes_one_job_and_leaves_no_vm(tmp_path: Path) -> None:
    runner = tmp_path / "run.sh"
    runner.write_text('#!/bin/sh\necho "took a job with $2"\n')
    runner.chmod(0o755)
    configuration = b'{"encoded_jit_config": "c2VjcmV0"}'
    created = answer("201 Created", configuration)
    async with cluster() as c, session(tmp_path, c) as shell, scripted([created]) as (api, script):
        environment = f"GITHUB_API_URL={api.url} GITHUB_ORG=example GITHUB_TOKEN=hidden RUNNER_DIR={tmp_path}"
        status, output = await shell.execute(f"{environment} {DOCS}/recipes/github-runner.sh macos m4")
        assert (status, output.splitlines()[-1:]) == (0, ["took a job with c2VjcmV0"]), output
        (request,) = script.requests
        head, _, body = request.partition(b"\r\n\r\n")
        assert head.startswith(b"POST /orgs/example/actions/runners/generate-jitconfig ")
        assert b"Authorization: Bearer hidden" in head
        assert json.loads(body)["labels"] == ["macos", "m4"]
        assert await c.client.vms.list() == []
