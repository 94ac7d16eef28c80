"""The documentation: each block is run or checked (tests/README.md has the convention), and links, index and quotes are true."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
import trio
from harness import documents
from harness.certificates import Authority
from harness.documents import (
    BACKGROUND,
    ELSEWHERE,
    ROOT,
    SHELL,
    Block,
    blocks,
    check_syntax,
    matches,
    session,
    session_in,
)
from harness.machines import machines, need_machines
from harness.prepared_pages import CLUSTERS, EARLIER, MACHINES
from harness.processes import call_main
from harness.user_api import OPERATIONS as USERS_OPERATIONS
from test_layers import LAYERS

from orchard.cli import main as command
from orchard.cli.main import VERBS
from orchard.client import ClientError
from orchard.codec import attrs_of
from orchard.operations import OPERATIONS
from orchard.schema import ClusterSettings, VMSpec
from orchard.testing import Cluster, cluster

DOCS = ROOT / "docs"
API = DOCS / "api.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
# Pages that take more than a second, or 0.3 s of CPU.
SLOW = {
    "access.md",
    "api.md",
    "command.md",
    "concepts.md",
    "doctor.md",
    "embedding.md",
    "images.md",
    "operating-logs.md",
    "operating.md",
    "security.md",
}
# Pages about a certificate and a key that the reader has, `controller.crt` and `.key` in this directory of the home.
CERTIFICATES = {"coming.md": "old"}
# Options of other programs that pages name alone.
OPTIONS_OF_OTHERS = {
    "deploy-linux.md": {"--init", "--health-cmd"},
    "etcd.md": {"--listen-client-http-urls", "--client-cert-auth", "--cert-file"},
}
# How many blocks of a page are not run, and why: see tests/README.md.
NOT_RUN: dict[str, dict[str, int]] = {
    "README.md": {"itself": 1},
    "deploy-linux.md": {"internet": 2},
    "deploy-macos.md": {"macos": 2},
    "offline.md": {"internet": 2},
}
# Languages of blocks that show a file or a picture.
SHOWN = {"groovy", "haproxy", "ini", "javascript", "json", "nginx", "text", "toml", "xml", "yaml"}
LIVE_FIELDS = [field.json for field in attrs_of(VMSpec) if field.change == "at once"]
SETTINGS = [field.json for field in attrs_of(ClusterSettings)]


def page_named(name: str) -> Path:
    return ROOT / name if name == "README.md" else DOCS / name


def params(pages: list[Path]) -> list[object]:
    return [pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else (), id=page.name) for page in pages]


def starts_controller(page: Path) -> bool:
    return any(
        block.word == BACKGROUND and re.search(r"orchard (dev|controller)\b", block.text) for block in blocks(page)
    )


@pytest.mark.needs("curl", "openssl")
@pytest.mark.parametrize(
    "page",
    params([page for page in PAGES if page.name not in MACHINES and any(block.is_run for block in blocks(page))]),
)
async def test_page_is_a_session_that_works(page: Path, tmp_path: Path) -> None:
    if starts_controller(page):
        await run_page(page, tmp_path)
        return
    async with cluster(**CLUSTERS.get(page.name, {})) as c:
        await run_page(page, tmp_path, c)


@pytest.fixture
def machines_can_be_made() -> None:
    need_machines()


@pytest.mark.needs("curl", "openssl", "etcd", "etcdctl")
@pytest.mark.usefixtures("machines_can_be_made")
@pytest.mark.parametrize(
    "name",
    # That of etcd waits for fail-overs.
    [pytest.param(name, marks=pytest.mark.slow(17) if name == "etcd.md" else pytest.mark.slow) for name in MACHINES],
)
async def test_page_is_a_session_on_machines_that_works(name: str, tmp_path: Path) -> None:
    page, prepared = page_named(name), MACHINES[name]
    common = [] if "controller" in prepared.names else ["controller.example.com"]
    (tmp_path / "common").mkdir()
    async with machines(tmp_path, prepared.names, common) as found, AsyncExitStack() as stack:
        prepared.prepare(found, tmp_path / "common")
        shells = {
            host: await stack.enter_async_context(session_in(machine, tmp_path / host, tmp_path / "common"))
            for host, machine in found.items()
        }
        first, *_ = prepared.names
        status, said = await shells[first].execute(prepared.earlier, strict=True)
        assert status == 0, said
        for block in blocks(page):
            if block.is_run or block.is_file:
                async with trio.open_nursery() as nursery:
                    for host in block.hosts or [first]:
                        nursery.start_soon(shells[host].run, block, "")


async def run_page(page: Path, directory: Path, found: Cluster | None = None) -> None:
    """Run the blocks of a page in a session with a cluster."""
    async with session(directory, found) as shell:
        if name := CERTIFICATES.get(page.name):
            (directory / "home" / name).mkdir()
            Authority(directory / "home" / name).issue("controller")
        status, said = await shell.execute(EARLIER.get(page.name, ""), strict=True)
        assert status == 0, said
        for block in blocks(page):
            if block.is_run or block.is_file:
                await shell.run(block, found.url if found else "")


@pytest.mark.parametrize("page", params([page for page in PAGES if any(b.word in ELSEWHERE for b in blocks(page))]))
def test_commands_for_other_machines_exist_and_are_counted(page: Path, tmp_path: Path) -> None:
    left_out = [block for block in blocks(page) if block.word in ELSEWHERE]
    for block in left_out:
        check_syntax(block, tmp_path)
    assert NOT_RUN.get(page.name) == Counter(block.word for block in left_out)


def test_only_pages_with_blocks_that_are_not_run_are_listed() -> None:
    assert NOT_RUN.keys() <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_is_of_a_known_kind(page: Path) -> None:
    for block in blocks(page):
        assert block.language in {*SHELL, "python", *SHOWN}, f"{block}: unknown language"
        if not block.is_file:
            known = {"", *ELSEWHERE} if block.language in {*SHELL, "python"} else {""}
            assert block.word in known | ({BACKGROUND} if block.language == "console" else set()), block
    # Markdown has a second form of blocks, which would be passed over.
    text = re.sub(r"^( *)```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    paragraphs = re.split(r"\n\s*\n", text)
    indented = [each for before, each in pairwise(paragraphs) if is_code(before, each)]
    assert indented == []


def is_code(before: str, paragraph: str) -> bool:
    """Return whether a paragraph is indented by four and does not belong to a list."""
    in_list = re.search(r"^\s*([-*]|\d+\.) ", before, re.MULTILINE) or before.startswith("  ")
    return paragraph.startswith("    ") and not in_list


def is_used(block: Block) -> bool:
    """Return whether a later command of the page, or a later file, names the file of a block."""
    later = [each for each in blocks(block.page) if each.line > block.line]
    return any(Path(block.word).stem in each.text for each in later if each.is_run or each.is_file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_a_page_are_used_by_its_commands(page: Path) -> None:
    unused = [str(block) for block in blocks(page) if block.is_file and not is_used(block)]
    assert unused == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_that_a_page_names_exist(page: Path, tmp_path: Path) -> None:
    for text in re.findall(r"`orchard ([a-z][^`]*)`", prose(page)):
        # The verb and its kind, up to a name of the user.
        verb = list(takewhile(lambda word: re.fullmatch("[a-z][a-z-]*", word), text.split()))[:2]
        options = re.findall(r"(?<= )--?[a-z][a-z-]*", re.sub(r"\"[^\"]*\"", "", text))
        assert verb[0] in VERBS, text
        if options:
            help_text = call_main(command.main, *verb, "--help", home=tmp_path)[1]
            assert [option for option in options if option not in help_text] == [], text


def code(page: Path) -> list[str]:
    """Return what the prose of a page sets in code."""
    return re.findall(r"`([^`]+)`", prose(page))


@cache
def program_source() -> str:
    """Return all that can have the name of an option, of a variable of the environment or of a setting."""
    folders = [ROOT / name for name in ("orchard", "tools", "bench", "tests/simulation")]
    return "".join(path.read_text() for folder in folders for path in sorted(folder.rglob("*.py")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_variables_and_fields_that_a_page_names_exist(page: Path) -> None:
    names = [text.split()[0].partition("=")[0] for text in code(page) if text.startswith("--")]
    names += re.findall(r"\bORCHARD_[A-Z_]+", page.read_text())
    # As in minFreeDiskGB: the names of JSON.
    names += [text for text in code(page) if re.fullmatch(r"[a-z]+([A-Z]+[a-z]*)+", text)]
    missing = {name for name in names if not re.search(rf"{re.escape(name)}(?![\w-])", program_source())}
    assert missing == OPTIONS_OF_OTHERS.get(page.name, set())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_endpoints_that_a_page_names_exist(page: Path) -> None:
    named = [found for text in code(page) for found in re.findall(r"\b([A-Z]+) ((?:/[\w{}.-]*)+)", text)]
    served = [(operation.method, re.sub(r"\{\w+\}", "[^/]+", operation.path)) for operation in OPERATIONS]
    missing = [
        (method, path)
        for method, path in named
        if not any(method == each and re.fullmatch(f"(/v1)?{pattern}", path) for each, pattern in served)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_source_that_a_page_names_exist(page: Path) -> None:
    named = [text for text in code(page) if re.fullmatch(r"(orchard|tests|docs|bench|tools)/[\w/.-]+", text)]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_row_of_a_table_belongs_to_one_with_a_head(page: Path) -> None:
    lines = ["", *prose(page).splitlines(), ""]
    begun = [
        (line, below)
        for above, line, below in zip(lines, lines[1:], lines[2:], strict=False)
        if line.startswith("|") and not above.startswith("|")
    ]
    assert [line for line, below in begun if not re.fullmatch(r"\|[-|: ]+\|", below)] == []


def test_glossary_has_each_word_that_the_concepts_introduce_and_its_words_are_in_order() -> None:
    words = re.findall(r"^\| (.*?) \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)[1:]
    assert words == sorted(words, key=str.lower)
    introduced = re.findall(r"\*\*(\w+?)s?\*\*", (DOCS / "concepts.md").read_text())
    listed = ", ".join(words).lower()
    assert [word for word in introduced if word.lower() not in listed] == []


# ---- links and index -------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """Return a page without its blocks."""
    return re.sub(r"^( *)```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


LINKING = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "tests" / "README.md"]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in anchors(target), f"{link}: no such title"


def test_readme_is_short_and_lists_each_page() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 120
    listed = [link for link in links(readme) if link.startswith("docs/")]
    missing = {f"docs/{page.name}" for page in DOCS.glob("*.md")} - set(listed)
    assert missing == set()


def test_each_part_of_the_package_is_in_the_table_of_its_layers() -> None:
    named = set(re.findall(r"`(\w+)(?:\.py|/)`", (DOCS / "inside.md").read_text()))
    parts = {part.rstrip("/") for _, layer in LAYERS for part in layer} - {"__main__"}
    assert parts - named == set()


# ---- the machine itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "actual", "same"),
    [
        ("a\n", "a\n", True),
        ("a\n", "a\nb\n", False),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("uid ... end\n", "uid 7 end\n", True),
        ("12:00:01 created\n", "23:59:59 created\n", True),
        ("Name  Created\nvm  now\n", "Name   Created\nvm     3 seconds ago\n", True),
        ("0 VMs\n", "1 VMs\n", False),
        ("1.5\n", "1x5\n", False),
    ],
)
def test_output_is_compared_apart_from_what_differs_between_runs(shown: str, actual: str, same: bool) -> None:
    assert matches(shown, actual) is same


@pytest.mark.parametrize(
    ("text", "language", "word"),
    [
        ("$ echo a\nb\n", "console", ""),
        ("$ false\n", "console", ""),
        ("$ echo a; false\n...\n", "console", ""),
        ("false\ntrue\n", "sh", ""),
        ("raise SystemExit(3)\n", "python", ""),
        ("await client.vms.get('none')\n", "python", ""),
        ("$ echo a\nb\n", "console", BACKGROUND),
    ],
)
async def test_block_that_does_not_work_fails(text: str, language: str, word: str, tmp_path: Path) -> None:
    async with session(tmp_path) as shell:
        with pytest.raises((AssertionError, ClientError)):
            await shell.run(Block(API, 1, language, word, text), "http://127.0.0.1:1")


async def test_block_that_does_not_end_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_SECONDS", 0.1)
    monkeypatch.setattr(documents, "END_SECONDS", 0.1)
    with pytest.raises(AssertionError):
        async with session(tmp_path) as shell:
            await shell.run(Block(API, 1, "sh", "", "sleep 1000"), "")


@pytest.mark.parametrize(
    "text", ["orchard nonsense", "orchard list vms --nonsense", "a | orchard worker run --nonsense", "if"]
)
def test_command_for_another_machine_that_does_not_exist_fails(text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_syntax(Block(API, 1, "sh", "macos", text), tmp_path)


def test_command_for_another_machine_that_exists_passes(tmp_path: Path) -> None:
    text = 'X=1 orchard list vms -q | sort > f\nsudo orchard worker run "https://c:6120" --name "a b" < t && orchard demo &'
    check_syntax(Block(API, 1, "sh", "macos", text), tmp_path)


# ---- the API reference -----------------------------------------------------------------------------------------------


def sections(page: Path) -> Iterator[tuple[str, str]]:
    """Yield title and text of each section."""
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def test_each_section_of_the_api_reference_has_examples_in_both_languages() -> None:
    missing = [
        (title, language)
        for title, text in sections(API)
        for language, words in (("sh", ("sh", "console background")), ("python", ("python",)))
        if not any(f"```{word}\n" in text for word in words)
    ]
    # `exec` needs a WebSocket.
    assert missing == [("Rules", "python"), ("Running a script", "sh")]


async def test_each_capability_of_the_controller_and_no_other_is_described() -> None:
    async with cluster(workers=0) as c:
        listed = set((await c.client.info()).capabilities) - {"rpc-v2", "vm-state-endpoint"}
    assert set(re.findall(r"\[`([a-z-]+)`\](?!\()", API.read_text())) == listed


def test_each_verb_is_in_a_page() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    assert [verb for verb in VERBS if VERBS[verb].help and not re.search(rf"(`|orchard ){verb}\b", pages)] == []


def test_loggers_are_those_that_the_page_about_logs_names() -> None:
    used = set(re.findall(r'getLogger\("(orchard\..+?)"\)', program_source()))
    assert set(re.findall(r"`(orchard\.\w+)`", (DOCS / "operating-logs.md").read_text())) == used


def test_each_operation_beside_the_users_api_is_in_a_page() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    paths = {each.path for each in OPERATIONS if f"{each.method} {each.path}" not in USERS_OPERATIONS}
    # The protocol of workers.
    paths = {path for path in paths if not path.startswith("/rpc/")} - {"/vms/{name}/state"}
    assert [path for path in paths if not re.search(path.replace("{name}", r"[^/`\s\"]+") + r"(?![\w/])", pages)] == []


@pytest.mark.parametrize("name", [*LIVE_FIELDS, *SETTINGS])
def test_each_live_field_and_each_setting_is_described(name: str) -> None:
    assert f"`{name}`" in API.read_text()


# ---- messages --------------------------------------------------------------------------------------------------------

TROUBLESHOOTING = DOCS / "troubleshooting.md"
# Letters that a text of the program has to have, so that it does not fit any message.
LETTERS = 10


@cache
def program_messages() -> list[tuple[str, list[str]]]:
    """Return the texts in the product's code as the parts between which something is put in, each after the longest part."""
    found = []
    for path in sorted((ROOT / "orchard").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            if sum(map(str.isalpha, text)) >= LETTERS:
                pieces = re.split(r"\{[a-z]*\}|%[sd]", text)
                found.append((max(pieces, key=len), pieces))
    return found


def is_of_the_program(message: str) -> bool:
    """Return whether a message is a text of the program, with anything put into it."""
    return any(
        longest in message and re.fullmatch(".+".join(map(re.escape, parts)), message)
        for longest, parts in program_messages()
    )


def quoted_messages() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", TROUBLESHOOTING.read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", quoted_messages())
def test_message_that_is_explained_is_one_of_the_program(message: str) -> None:
    assert is_of_the_program(message)


def test_each_row_about_messages_is_checked() -> None:
    rows = re.findall(r"^\| (?!message |---).*$", TROUBLESHOOTING.read_text(), re.MULTILINE)
    assert len(rows) == len(quoted_messages()) > 0


def test_no_message_is_explained_twice() -> None:
    assert [message for message, count in Counter(quoted_messages()).items() if count > 1] == []


def test_message_that_the_program_does_not_have_is_found() -> None:
    assert not is_of_the_program("no bananas in VM NAME")
