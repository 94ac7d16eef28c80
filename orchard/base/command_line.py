"""How the command lines of Orchard are read and repeated, and where Orchard keeps its files by default.

`CommandLine` is an argparse.ArgumentParser, and the `parse_*` functions are `type=` functions for it: they raise
ArgumentTypeError with the text and what was expected; argparse then exits with status 2.

Each call of the `orchard` command imports this file. What takes long to import is imported where it is used, and patterns
are compiled where they are used.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from zipimport import zipimporter

# As typing.TYPE_CHECKING, whose import takes a tenth of the start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, Literal, NoReturn, TextIO

# JSON numbers are exact up to here.
_MAX_AMOUNT = 2**53 - 1
_ADDRESS = r"(?:\[([^\[\]]+)\]|([^:\[\]]*)):([0-9]{1,5})"
# As many digits as _MAX_AMOUNT has: int() takes long for texts of thousands of digits.
_DURATION = r"(?=.)(?:([0-9]{1,5})d)?(?:([0-9]{1,7})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s?)?"
# Seconds of the units of a duration.
_UNITS = (86_400, 3_600, 60, 1)
_WHOLE_NUMBER = r"[0-9]{1,16}"

_DIRECTORY = ".orchard"
# What an earlier version kept in $ORCHARD_HOME itself, as patterns. A role has data there if its first pattern matches.
_OLD_DATA = {
    "controller": ("controller/state.jsonl", "controller"),
    "worker": ("worker.lock", "worker.lock", "worker-*.lock", "worker-*.cluster", "instance-id", "tart", "vetu"),
    "command": ("orchard.yml", "orchard.yml"),
}


class HomeError(Exception):
    """Orchard's directory cannot be used; str() names the reason and the remedy."""


def orchard_home(role: Literal["controller", "worker", "command"]) -> Path:
    """Return the directory for what Orchard stores: $ORCHARD_HOME/.orchard, or ~/.orchard without that variable.

    Raises HomeError for a user without a home directory. Also if `role` has data in $ORCHARD_HOME itself, where an
    earlier version kept it, and none in the returned directory: a controller would start with an empty state, and a
    worker would not know its VMs.
    """
    from pathlib import Path

    given = os.environ.get("ORCHARD_HOME")
    if not given:
        try:
            return Path.home() / _DIRECTORY
        except RuntimeError:
            raise HomeError("this user has no home directory; set ORCHARD_HOME to a directory of its own") from None
    old, home = Path(given), Path(given) / _DIRECTORY
    sign, *patterns = _OLD_DATA[role]
    if (old / sign).exists() and not (home / sign).exists():
        raise HomeError(_describe_move(old, home, sorted(path for each in patterns for path in old.glob(each))))
    return home


def controller_directory(given: Path | None) -> Path:
    """Return the data directory of a controller: the given one, or the default. Raises HomeError."""
    return given or orchard_home("controller") / "controller"


def _describe_move(old: Path, home: Path, paths: Sequence[Path]) -> str:
    """Return why `paths` have to be moved from `old` to `home`, and the command."""
    import shlex

    words = " ".join(shlex.quote(str(path)) for path in paths)
    target = shlex.quote(str(home))
    return (
        f"{old} has data of an earlier version, which this one keeps in {home}; stop the processes that use it, then:"
        f" mkdir -p -m 700 {target} && mv {words} {target}/"
    )


def running_program() -> list[str]:
    """Return the words that run the `orchard` command as it runs now: from an archive, or from an environment."""
    loader = getattr(sys.modules["__main__"], "__loader__", None)
    if isinstance(loader, zipimporter):
        # Links stay links, so that an exchange of their targets is an upgrade.
        return [sys.executable, os.path.abspath(loader.archive)]  # noqa: PTH100
    return [sys.executable, "-P", "-m", "orchard"]


class CommandLine(argparse.ArgumentParser):
    """An argument parser that refuses an unknown option with the name of the nearest known one.

    It never shows more of an unknown argument than the name of the option: the rest may be a secret. Options have to be
    written out: `--bootstrap-token T` must not stand for `--bootstrap-token-stdin`.
    """

    # Whether options may come between positional arguments, for a parser whose last argument takes any number of words.
    is_intermixed = False

    def __init__(self, **options: Any) -> None:
        # argparse makes a formatter for each option that is added, and each would look up the terminal's width.
        self._help_formatter = options.pop("formatter_class", argparse.HelpFormatter)
        super().__init__(formatter_class=partial(self._help_formatter, width=80), allow_abbrev=False, **options)
        # For completion in a shell: the words that an argument may be, by its name in the parsed options.
        self.completions: dict[str, Sequence[str]] = {}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            expected = (
                f"expected one of {', '.join(known)}" if len(known) > 1 else f"expected {self.prog} {known[0]} ..."
            )
            raise argparse.ArgumentError(action, f'"{value}" is unknown{suggest(str(value), known)}, {expected}')

    def format_help(self) -> str:
        self.formatter_class = self._help_formatter
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 after one line."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print a help text or a message. Exit with 1 if standard output fails, which argparse would ignore."""
        out = sys.stderr if file is None else file
        try:
            out.write(message)
            out.flush()
        except OSError as error:
            discard_output(out)
            if out is sys.stdout:
                self.exit(1, "" if isinstance(error, BrokenPipeError) else f"{self.prog}: {error.strerror}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error("1 argument is too many" if len(unknown) == 1 else f"{len(unknown)} arguments are too many")
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            name, _, _ = word.partition("=")
            if name.startswith("-"):
                self.error(f"unknown option {name}{suggest(name, self._option_string_actions)}")
        return options, unknown


def discard_output(stream: TextIO) -> None:
    """Redirect a standard stream to /dev/null, so that flushing it at the end of the process does not fail again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def add_ignored_options(parser: CommandLine, values: Mapping[str, str]) -> None:
    """Accept options that have no effect. The parsed `ignored` is the list of those that were given, or None.

    `values` maps each option to the name of its value, "" for an option without a value.
    """
    add = parser.add_argument_group("accepted for existing service files, without effect").add_argument
    for option, value in values.items():
        if value:
            add(option, metavar=value, dest="ignored", action="append", type=partial(_option_name, option))
        else:
            add(option, dest="ignored", action="append_const", const=option)


def _option_name(option: str, _value: str) -> str:
    return option


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ", did you mean WORD?" for the nearest known word, "" if none is near."""
    # Imported here, because most command lines have no unknown word.
    import difflib

    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def parse_address(text: str) -> tuple[str | None, int]:
    """Parse HOST:PORT, [IPV6]:PORT or :PORT. The host is None for :PORT, which means all addresses."""
    match = re.fullmatch(_ADDRESS, text)
    if match is None or int(match[3]) > 65535:
        raise argparse.ArgumentTypeError(
            f'address is "{text}", expected HOST:PORT, [IPV6]:PORT or :PORT, at most 65535'
        )
    return match[1] or match[2] or None, int(match[3])


def parse_port(text: str) -> int:
    """Parse a TCP port to listen on. 0 means any free port."""
    if not re.fullmatch(_WHOLE_NUMBER, text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f'port is "{text}", expected a whole number from 0 to 65535')
    return int(text)


def parse_seconds(text: str) -> float:
    """Parse a time span in seconds, above 0: a number, or one such as 3m0s."""
    try:
        value = float(text)
    except ValueError:
        value = _duration(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'time span is "{text}", expected a time above 0, in seconds or such as 3m0s')
    return value


def parse_duration(text: str) -> int:
    """Parse a time span such as 90, 90s, 3m, 3m0s or 1h30m, of at least a second, in seconds."""
    seconds = _duration(text)
    if not seconds:
        raise argparse.ArgumentTypeError(f'time span is "{text}", expected one such as 90s, 3m or 1h30m')
    return seconds


def parse_span(text: str) -> int:
    """Parse a time span, or 0 for none."""
    return 0 if text in ("0", "0s") else parse_duration(text)


def _duration(text: str) -> int:
    """Return the seconds of a text such as 3m0s; 0 if it is none."""
    match = re.fullmatch(_DURATION, text)
    return 0 if match is None else sum(int(part or 0) * size for part, size in zip(match.groups(), _UNITS, strict=True))


def parse_number(text: str, *, least: int = 0) -> int:
    """Parse a whole number."""
    if not re.fullmatch(_WHOLE_NUMBER, text) or not least <= int(text) <= _MAX_AMOUNT:
        raise argparse.ArgumentTypeError(f'number is "{text}", expected a whole number of at least {least}')
    return int(text)


parse_count = partial(parse_number, least=1)


def parse_boolean(text: str) -> bool:
    """Parse true or false, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f'the value is "{text}", expected true or false')
    return text.lower() == "true"


def parse_words(text: str) -> list[str]:
    """Parse words that are separated by commas. Empty words are dropped."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_pairs(text: str) -> dict[str, str]:
    """Parse KEY=VALUE,KEY=VALUE, each key at most once. Blanks around keys and values are dropped."""
    found = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise argparse.ArgumentTypeError(f'pair is "{part}", expected KEY=VALUE[,KEY=VALUE...]')
        if key.strip() in found:
            raise argparse.ArgumentTypeError(f'"{text}" names "{key.strip()}" twice, expected each key once')
        found[key.strip()] = value.strip()
    return found


def parse_resources(text: str) -> dict[str, int]:
    """Parse NAME=AMOUNT,NAME=AMOUNT with whole amounts."""
    found = {}
    for name, amount in parse_pairs(text).items():
        if not re.fullmatch(_WHOLE_NUMBER, amount) or int(amount) > _MAX_AMOUNT:
            raise argparse.ArgumentTypeError(f'resource is "{name}={amount}", expected NAME=WHOLE NUMBER')
        found[name] = int(amount)
    return found
