"""The examples of the documents, run against a cluster: each block in its document's order, in curl and in Python."""

from __future__ import annotations

import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from orchard import client, schema
from orchard.client import Client
from orchard.codec import attrs_of
from orchard.schema import TART_VMS, ClusterSettings, VMSpec, Worker
from orchard.testing import Cluster, cluster
from orchard.transitions import LIVE

DOCS = Path(__file__).parent.parent / "docs"
API = DOCS / "api.md"
LIVE_FIELDS = [field.json for field in attrs_of(VMSpec) if field.name in LIVE]
SETTINGS = [field.json for field in attrs_of(ClusterSettings)]


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(found[1], text.count("\n", 0, found.start()) + 1, found[2])


def sections(document: Path) -> Iterator[tuple[str, str]]:
    """Yield title and text of each section."""
    parts = re.split(r"^## (.*)$", document.read_text(), flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


@pytest.mark.needs("curl")
async def test_examples_of_the_api_reference_work() -> None:
    described = [Worker(labels={"xcode": "27"}, resources={TART_VMS: 40}) for _ in range(2)]
    async with cluster(workers=described) as c:
        for block in blocks(API):
            with trio.fail_after(60):
                await {"sh": run_shell, "python": run_python}[block.language](block, c)


async def run_shell(block: Block, c: Cluster) -> None:
    # An error of the controller fails a command, and an endless answer is read until its first line.
    functions = 'curl() { command curl -sS --fail-with-body "$@"; }; '
    if "$ORCHARD/watch" in block.text:
        functions = 'curl() { command curl -sS --fail-with-body "$@" | head -n 1; }; '
    done = await trio.run_process(
        ["bash", "-euc", functions + block.text],
        env={"ORCHARD": f"{c.url}/v1", "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, f"{API}:{block.line}: {done.stdout.decode()}"


async def run_python(block: Block, c: Cluster) -> None:
    # Behind as many lines as in the document, for the traceback.
    body = textwrap.indent(block.text, "    ")
    source = "\n" * (block.line - 1) + f"async def example(client):\n{body}"
    names: dict[str, Any] = {**vars(schema), **vars(client)}
    exec(compile(source, str(API), "exec"), names)
    async with Client(c.url) as fresh:
        await names["example"](fresh)


def test_each_section_of_the_api_reference_has_examples_in_both_languages() -> None:
    missing = [
        (title, language)
        for title, text in sections(API)
        for language in ("sh", "python")
        if f"```{language}\n" not in text
    ]
    # `exec` needs a WebSocket.
    assert missing == [("Rules", "sh"), ("Rules", "python"), ("Running a script", "sh")]


async def test_each_capability_of_the_controller_and_no_other_is_described() -> None:
    async with cluster(workers=0) as c:
        listed = set((await c.client.info()).capabilities) - {"rpc-v2", "vm-state-endpoint"}
    assert set(re.findall(r"\[`([a-z-]+)`\](?!\()", API.read_text())) == listed


@pytest.mark.parametrize("name", [*LIVE_FIELDS, *SETTINGS])
def test_each_live_field_and_each_setting_is_described(name: str) -> None:
    assert f"`{name}`" in API.read_text()


def test_each_link_of_the_api_reference_has_a_target() -> None:
    text = API.read_text()
    targets = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title, _ in sections(API)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= targets
