"""The file of contexts: what is read, what is written, and which context a verb uses."""

from __future__ import annotations

import base64
import json
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchard.cli.context import Context, Contexts, choose_context, read_contexts, write_contexts
from orchard.cli.failure import CommandError

PEM = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
ENCODED = base64.b64encode(PEM).decode()
PRODUCTION = Context("https://orchard.example.com:6120", PEM, "ci", "s3cret: #1")
TWO = Contexts("production", {"production": PRODUCTION, "local-dev": Context("http://127.0.0.1:6120")})

# As other programs write them.
FILES = {
    "block style": f"""\
default-context: production
contexts:
    local-dev:
        url: http://127.0.0.1:6120
    production:
        url: https://orchard.example.com:6120
        certificate: {ENCODED}
        serviceAccountName: ci
        serviceAccountToken: "s3cret: #1"
""",
    "quoted keys and a folded certificate": f"""\
---
# written by hand
contexts:
  "production":
    certificate: !!binary |
      {ENCODED[:40]}
      {ENCODED[40:]}
    serviceAccountName: 'ci'
    serviceAccountToken: 's3cret: #1'
    url: https://orchard.example.com:6120
  local-dev:
    url: http://127.0.0.1:6120
    serviceAccountName: ""
default-context: production
""",
    "JSON": json.dumps(
        {
            "default-context": "production",
            "contexts": {
                "production": {
                    "url": PRODUCTION.url,
                    "certificate": ENCODED,
                    "serviceAccountName": "ci",
                    "serviceAccountToken": "s3cret: #1",
                },
                "local-dev": {"url": "http://127.0.0.1:6120"},
            },
        }
    ),
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_files_of_other_programs_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "orchard.yml"
    path.write_text(text)
    assert read_contexts(path) == TWO


def test_what_was_written_is_read_again_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "orchard.yml"
    write_contexts(path, TWO)
    assert read_contexts(path) == TWO
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_contexts(path, Contexts())
    assert read_contexts(path) == Contexts()


@pytest.mark.parametrize(
    "text",
    [
        "contexts: [1]",
        "contexts:\n  a:\n    certificate: '%'\n    url: x",
        "contexts:\n  a:\n    serviceAccountName: ci",
        "contexts:\n  a: text",
        "no colon here",
        "a: b\n  c: d",
        '{"contexts": [',
        '{"contexts": {"a": {"url": 5}}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_file_that_is_not_understood_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "orchard.yml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CommandError, match=r"orchard\.yml"):
        read_contexts(path)


def test_contexts_that_are_not_there() -> None:
    with pytest.raises(CommandError, match="production"):
        TWO.find("prod")
    assert TWO.without("production") == Contexts("", {"local-dev": Context("http://127.0.0.1:6120")})
    assert Contexts().with_context("a", PRODUCTION).default == "a"


@pytest.mark.parametrize(
    ("name", "environ", "chosen"),
    [
        ("", {}, PRODUCTION),
        ("local-dev", {}, Context("http://127.0.0.1:6120")),
        ("", {"ORCHARD_SERVICE_ACCOUNT_TOKEN": "t"}, Context(PRODUCTION.url, PEM, "ci", "t")),
        ("", {"ORCHARD_URL": PRODUCTION.url, "ORCHARD_SERVICE_ACCOUNT_NAME": "a"}, Context(PRODUCTION.url, PEM, "a", "s3cret: #1")),
        # The credentials of one controller are not sent to another one.
        ("", {"ORCHARD_URL": "https://other"}, Context("https://other")),
        ("", {"ORCHARD_URL": "https://other", "ORCHARD_SERVICE_ACCOUNT_NAME": "a", "ORCHARD_SERVICE_ACCOUNT_TOKEN": "t"},
         Context("https://other", None, "a", "t")),
    ],
)  # fmt: skip
def test_environment_goes_before_the_context(name: str, environ: Mapping[str, str], chosen: Context) -> None:
    assert choose_context(TWO, environ, name) == chosen


def test_without_any_context_the_environment_is_enough() -> None:
    assert choose_context(Contexts(), {"ORCHARD_URL": "http://h"}) == Context("http://h")
    with pytest.raises(CommandError, match="context create"):
        choose_context(Contexts(), {})


def test_tokens_are_not_in_a_repr() -> None:
    assert "s3cret" not in repr(TWO)
