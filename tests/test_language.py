"""The wording of the project: docstrings, comments, messages and documents in plain technical English.

The patterns are a small list of turns that readers tripped over; they catch a habit, and prove nothing about the rest.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("orchard", "tests", "bench") for path in (ROOT / folder).rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md"), ROOT / "run"])

TURNS = re.compile(
    r"\b(whoever|nobody|somebody|likewise|that which|errand|noun)s?\b|\b(far|near) ends?\b|\bLaw:"
    r"|(?<!there )\b(is|are|was|were) no (?!longer\b|more\b)[a-z]|\bstands? (twice|there)\b",
    re.IGNORECASE,
)
# First words of a function's docstring that are no verb, or not the usual one.
OPENINGS = re.compile(r"(Give|Say|What|Who)\b")
# What may follow code on its line: units, and pragmas of the tools.
UNITS = re.compile(r"# (seconds|milliseconds|microseconds|bytes|KiB|MiB|GiB|GB|bits|characters|connections)$")
PRAGMAS = re.compile(r"# (noqa|type|fmt|pragma|mypy|ruff|nosec)\b")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def comments(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield line, text and whether code stands before it, for each comment of a file."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, bool(token.line[: token.start[1]].strip())


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_nodes(path: Path) -> Iterator[ast.Constant]:
    for node in ast.walk(tree(path)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            assert isinstance(first.value, ast.Constant)
            yield first.value


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in docstring_nodes(path):
        yield node.lineno, str(node.value)


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of the string literals with more than one word, but for docstrings."""
    documented = set(docstring_nodes(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and node not in documented and " " in str(node.value).strip():
            yield node.lineno, str(node.value)


def found(texts: Iterator[tuple[int, str]], path: Path, pattern: re.Pattern[str]) -> list[str]:
    name = path.relative_to(ROOT)
    return [f"{name}:{line}: {match[0]!r} in {text[:80]!r}" for line, text in texts if (match := pattern.search(text))]


def test_docstrings_and_comments_use_plain_words() -> None:
    mine = Path(__file__)
    problems: list[str] = []
    for path in SOURCES:
        if path != mine:
            problems += found(docstrings(path), path, TURNS)
            problems += found(((line, text) for line, text, _ in comments(path)), path, TURNS)
    assert problems == []


def test_messages_use_plain_words() -> None:
    problems: list[str] = []
    for path in SOURCES:
        if path.parts[len(ROOT.parts)] == "orchard":
            problems += found(messages(path), path, TURNS)
    assert problems == []


def test_function_docstrings_begin_with_a_plain_verb() -> None:
    problems = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {text[:80]!r}"
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node))
        and OPENINGS.match(text)
    ]
    assert problems == []


def test_a_comment_has_a_line_of_its_own() -> None:
    """Only units and pragmas follow code on its line."""
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in SOURCES
        for line, text, follows_code in comments(path)
        if follows_code and not UNITS.fullmatch(text) and not PRAGMAS.match(text)
    ]
    assert problems == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_plain_words(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    assert found(iter(lines), path, TURNS) == []
