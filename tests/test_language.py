"""The wording of the project: docstrings, comments, messages and documents in plain technical English.

The patterns are a small list of turns that readers tripped over; they catch a habit, and prove nothing about the rest.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md"), ROOT / "run"])

TURNS = re.compile(
    r"\b(whoever|nobody|somebody|likewise|that which|errand|noun)s?\b|\b(far|near) ends?\b|\bLaw:"
    r"|(?<!there )\b(is|are|was|were) no (?!longer\b|more\b)[a-z]|\bstands? (twice|there)\b",
    re.IGNORECASE,
)
# First words of a function's docstring in place of a verb, or of the usual one.
OPENINGS = re.compile(r"(Give|Say|What|Who)\b")
# What may follow code on its line: units, and pragmas of the tools.
UNITS = re.compile(r"# (seconds|milliseconds|microseconds|bytes|KiB|MiB|GiB|GB|bits|characters|connections)$")
PRAGMAS = re.compile(r"# (noqa|type|fmt|pragma|mypy|ruff|nosec)\b")
# To read all files as Python takes seconds, and these find the few that need it: a docstring with such a first word, the end
# and the begin of adjacent strings, and a comment behind code, which `ruff format` sets off by two spaces.
OPENED = re.compile(r"^\s*[\"']+\s*(Give|Say|What|Who)\b", re.MULTILINE)
JOINTS = re.compile(r"[\"']\s*[a-zA-Z]{,2}[\"']")
BEHIND = re.compile(r"\S {2,}(#.*)")


def may_have_bad_strings(text: str) -> bool:
    """Return False only for a file without problems in its strings."""
    return bool(OPENED.search(text) or TURNS.search(JOINTS.sub("", text)))


def may_have_bad_comments(text: str) -> bool:
    """Return False only for a file without problems in its comments."""
    behind = BEHIND.findall(text)
    return bool(
        any(not UNITS.fullmatch(comment) and not PRAGMAS.match(comment) for comment in behind)
        or any(TURNS.search(line) for line in text.splitlines() if "#" in line)
    )


def comments(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield line, text and whether code stands before it, for each comment of a file."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, bool(token.line[: token.start[1]].strip())


def docstring_of(node: ast.AST) -> ast.Constant | None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        match node.body:
            case [ast.Expr(value=ast.Constant(value=str()) as first), *_]:
                return first
    return None


def problems_of_comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and problem of each comment with a turn, and of each behind code but units and pragmas."""
    for line, comment, follows_code in comments(text):
        if TURNS.search(comment) or (follows_code and not UNITS.fullmatch(comment) and not PRAGMAS.match(comment)):
            yield line, comment


def problems_of_strings(text: str, *, has_messages: bool) -> Iterator[tuple[int, str]]:
    """Yield line and problem of each docstring and, in the product, of each message: a string of more than one word."""
    documented = set()
    # A docstring comes after the node that it describes.
    for node in ast.walk(ast.parse(text)):
        if (docstring := docstring_of(node)) is not None:
            documented.add(docstring)
            words = str(docstring.value)
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if TURNS.search(words) or (is_function and OPENINGS.match(words.lstrip())):
                yield docstring.lineno, words
        elif has_messages and isinstance(node, ast.Constant) and node not in documented:
            message = str(node.value)
            if " " in message.strip() and TURNS.search(message):
                yield node.lineno, message


@pytest.mark.parametrize("folder", ["orchard", "tests", "bench"])
def test_sources_use_plain_words(folder: str) -> None:
    """Docstrings, comments and messages."""
    problems: list[str] = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text()
        found: list[tuple[int, str]] = []
        if may_have_bad_strings(text):
            found += problems_of_strings(text, has_messages=folder == "orchard")
        if may_have_bad_comments(text):
            found += problems_of_comments(text)
        problems += [f"{path.relative_to(ROOT)}:{line}: {words[:80]!r}" for line, words in found]
    assert problems == []


PLANTED = '''"""A module."""


# Nobody reads this comment.
def work() -> str:
    """Give a message."""
    size = 3  # more than that
    raise ValueError("the far end is gone")
'''


def test_problems_are_found() -> None:
    assert [line for line, _ in problems_of_comments(PLANTED)] == [4, 7]
    assert [line for line, _ in problems_of_strings(PLANTED, has_messages=True)] == [6, 8]
    assert [line for line, _ in problems_of_strings(PLANTED, has_messages=False)] == [6]


@pytest.mark.parametrize(
    ("may_have", "text"),
    [
        (may_have_bad_comments, "# Nobody reads this comment."),
        (may_have_bad_comments, "size = 3  # more than that"),
        (may_have_bad_strings, 'def work():\n    """Give a message."""'),
        (may_have_bad_strings, "def work():\n    'Give a message.'"),
        (may_have_bad_strings, 'raise ValueError("it is at the far "\n    f"end")'),
    ],
)
def test_file_with_a_problem_is_parsed(may_have: Callable[[str], bool], text: str) -> None:
    assert may_have(text)
    assert not may_have("# A comment.\n" + text[:3])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_plain_words(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [f"{path.relative_to(ROOT)}:{line}: {text[:80]!r}" for line, text in lines if TURNS.search(text)] == []
