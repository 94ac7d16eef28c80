"""The verb `completion`, which prints a shell's part of the completion of words, and `__complete`, which answers it.

The shells' parts know nothing: for each word they call `orchard __complete`, which finds the verbs, options and values
in the parsers of the verbs themselves, and the names of VMs, workers and accounts at the controller. When something
goes wrong, no names are proposed, and nothing is printed where the user types.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from orchard.base.command_line import CommandLine, HomeError
from orchard.cli.connection import ControllerConnection, path_of
from orchard.cli.context import choose_context, read_contexts
from orchard.cli.failure import CommandError
from orchard.cli.main import INSTALL_VERBS, ROLE_VERBS, VERBS, make_parser
from orchard.cli.output import printable
from orchard.cli.resources import RESOURCE_KINDS, field_names
from orchard.cli.session import context_path

# A user waits for this at the prompt.
_NAME_SECONDS = 1.5
# Names that one answer may have, and a shell can show.
_MAX_NAMES = 500
# A name goes into the user's command line. One that a server made up must not be more than a name there.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9:_.-]*")
# Tells the shell to complete names of files.
_FILES = ":files"
_CONTEXT = "context"
# The kind of names that an argument takes where no word before it says so, by verb.
_NAMED = {"__tunnel": "vm", "default": _CONTEXT, "delete": _CONTEXT, "bootstrap-token": "service-account"}
# The resource that a kind of token belongs to.
_OF_RESOURCE = {"bootstrap-token": "service-account", "token": "service-account", "vm-access-token": "vm"}

_BASH = """\
# For ~/.bashrc: source <(orchard completion bash)
_orchard() {
    local word line="${COMP_LINE:0:$COMP_POINT}"
    COMPREPLY=()
    while IFS= read -r word; do
        if [[ $word == :files ]]; then
            compopt -o default 2>/dev/null || COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
        else
            COMPREPLY+=("$word")
            [[ $word != *: ]] || compopt -o nospace 2>/dev/null
        fi
    done < <(orchard __complete bash "$line" 2>/dev/null </dev/null)
}
complete -F _orchard orchard
"""
_ZSH = """\
#compdef orchard
# For ~/.zshrc: source <(orchard completion zsh), or a file _orchard in a directory of $fpath
_orchard() {
    local -a found
    found=("${(@f)$(orchard __complete zsh "${(@Q)words[2,CURRENT]}" 2>/dev/null </dev/null)}")
    if [[ $found[1] == :files ]]; then
        _files
    elif [[ $found[1] == *: ]]; then
        compadd -S '' -- $found
    elif [[ -n $found[1] ]]; then
        _describe orchard found
    fi
}
if [[ $funcstack[1] == _orchard ]]; then _orchard "$@"; else compdef _orchard orchard; fi
"""
_FISH = """\
# For ~/.config/fish/completions/orchard.fish
function __orchard_complete
    set -l before (commandline -opc)[2..-1]
    set -l now (commandline -ct)
    set -l found (orchard __complete fish $before "$now" 2>/dev/null </dev/null)
    if test "$found[1]" = :files
        __fish_complete_path "$now"
    else
        printf '%s\\n' $found
    end
end
complete -c orchard -f -a '(__orchard_complete)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


class Proposal(NamedTuple):
    """A word that is proposed, and what it is for."""

    word: str
    about: str = ""


class _Position(NamedTuple):
    """Where a command line ends: at a value of `action`, if any, after `values` of arguments before it.

    `verb` is the last verb or subordinate verb.
    """

    parser: CommandLine
    verb: str
    action: argparse.Action | None
    values: Mapping[str, str]
    may_be_option: bool


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare `completion` or `__complete`."""
    parser.add_argument("shell", choices=tuple(_SCRIPTS))
    if verb == "completion":
        parser.set_defaults(run=_print_script)
    else:
        parser.add_argument("words", nargs=argparse.REMAINDER)
        parser.set_defaults(run=_complete)


def _print_script(options: argparse.Namespace) -> int:
    print(_SCRIPTS[options.shell], end="")
    return 0


def _complete(options: argparse.Namespace) -> int:
    words = _split(options.words[0] if options.words else "") if options.shell == "bash" else options.words
    current = words[-1] if words else ""
    for found in find_candidates(words):
        print(_written(found, options.shell, current))
    return 0


def _written(found: Proposal, shell: str, current: str) -> str:
    """Return a candidate as a shell wants it."""
    about = " ".join(printable(found.about).split())
    if found.word == _FILES:
        return _FILES
    if shell == "bash":
        # bash takes ":" and "=" for the ends of words, and wants what follows.
        begun = current[: max(current.rfind(":"), current.rfind("=")) + 1]
        rest = found.word.removeprefix(begun)
        return rest if re.fullmatch(r"[\w:./=@%+,-]*", rest, re.ASCII) else shlex.quote(rest)
    if shell == "zsh":
        # The first ":" that has no backslash ends the word.
        return found.word if found.word.endswith(":") else f"{found.word.replace(':', chr(92) + ':')}:{about}"
    return f"{found.word}\t{about}"


def _split(line: str) -> list[str]:
    """Return the words of a command line of bash after the name of the command; the last one may be unfinished."""
    for end in ("", '"', "'"):
        try:
            words = shlex.split(line + end)
        except ValueError:
            continue
        if not words or (not end and line[-1:].isspace()):
            words.append("")
        return words[1:]
    return []


def find_candidates(words: Sequence[str]) -> list[Proposal]:
    """Return what the last word of a command line may become; the first word is the verb."""
    *before, current = words or [""]
    try:
        if before:
            found = list(_candidates(before, current))
        else:
            found = [Proposal(name, verb.help) for name, verb in VERBS.items() if verb.help]
    except (CommandError, HomeError, ImportError):
        return []
    return [candidate for candidate in found if candidate.word.startswith(current) or candidate.word == _FILES]


def _candidates(before: list[str], current: str) -> Iterator[Proposal]:
    name, *rest = before
    if name not in VERBS:
        return
    if name in ROLE_VERBS and not rest:
        yield from map(Proposal, ("run", *INSTALL_VERBS))
        return
    parser = make_parser(name, rest[0] if name in ROLE_VERBS else "")
    position = _find_position(parser, name, rest[1:] if name in ROLE_VERBS else rest)
    option, equals, value = current.partition("=")
    if (
        position.may_be_option
        and current.startswith("-")
        and (position.action is None or not _is_option(position.action))
    ):
        action = position.parser._option_string_actions.get(option)
        if not equals:
            yield from _options(position.parser)
        elif action is not None:
            of_option = position._replace(action=action)
            yield from (Proposal(f"{option}={each.word}", each.about) for each in _values(of_option, value))
    elif position.action is not None:
        yield from _values(position, current)


def _options(parser: CommandLine) -> Iterator[Proposal]:
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            about = (action.help or "").replace("%%", "%")
            yield from (Proposal(name, about.partition(";")[0]) for name in action.option_strings)


def _is_option(action: argparse.Action) -> bool:
    return bool(action.option_strings)


def _find_position(parser: CommandLine, verb: str, words: Sequence[str]) -> _Position:
    """Return the position behind these words in the arguments of a verb."""
    values: dict[str, str] = {}
    may_be_option = True
    left = [action for action in parser._actions if not _is_option(action)]
    option: argparse.Action | None = None
    for index, word in enumerate(words):
        if option is not None:
            values[option.dest], option = word, None
        elif word == "--" and may_be_option:
            may_be_option = False
        elif word.startswith("-") and len(word) > 1 and may_be_option:
            found = parser._option_string_actions.get(word)
            # An optional value is written behind "=".
            option = found if found is not None and found.nargs is None else None
        elif left and isinstance(left[0], argparse._SubParsersAction):
            part = left[0].choices.get(word)
            if part is None:
                return _Position(parser, verb, None, values, may_be_option)
            return _find_position(part, word, words[index + 1 :])
        elif left:
            values[left[0].dest] = word
            if left[0].nargs in (None, "?"):
                del left[0]
    return _Position(parser, verb, option or (left[0] if left else None), values, may_be_option)


# ---- values ----------------------------------------------------------------------------------------------------------


def _values(position: _Position, current: str) -> Iterator[Proposal]:
    """Yield the values of the argument at a position that may begin with `current`."""
    action = position.action
    assert action is not None
    if isinstance(action, argparse._SubParsersAction):
        yield from (Proposal(choice.dest, choice.help or "") for choice in action._choices_actions)
    elif action.choices is not None:
        yield from map(Proposal, action.choices)
    elif action.dest in position.parser.completions:
        yield from map(Proposal, position.parser.completions[action.dest])
    elif action.dest == _CONTEXT:
        yield from _names(_CONTEXT, position, current)
    elif action.dest in ("source", "target"):
        if ":" not in current and "/" not in current:
            yield from (Proposal(f"{name.word}:") for name in _names("vm", position, current))
        yield Proposal(_FILES)
    elif action.dest in ("name", "account"):
        yield from _resource_names(position, current)
    elif action.type is Path or action.dest in ("file", "command"):
        yield Proposal(_FILES)


def _resource_names(position: _Position, current: str) -> Iterator[Proposal]:
    """Yield names of the kind that the words before say, and the fields of one: `get vm NAME/FIELD`."""
    kind = position.values.get("kind") or _NAMED.get(position.verb, "")
    kind = _OF_RESOURCE.get(kind, kind)
    name, slash, _ = current.partition("/")
    if slash and position.verb == "get" and kind in RESOURCE_KINDS:
        yield from (Proposal(f"{name}/{each}") for each in sorted(field_names(RESOURCE_KINDS[kind])))
    else:
        yield from _names(kind, position, current)


def _names(kind: str, position: _Position, begin: str) -> list[Proposal]:
    """Return the names of one kind that begin so, as far as the controller tells them in time."""
    contexts = read_contexts(context_path())
    if kind == _CONTEXT:
        return [Proposal(name, context.url) for name, context in sorted(contexts.by_name.items()) if name.isprintable()]
    kind = kind if kind in RESOURCE_KINDS else kind.removesuffix("s")
    if kind not in RESOURCE_KINDS or not RESOURCE_KINDS[kind].columns:
        return []
    if begin and not _NAME.fullmatch(begin):
        return []
    found: list[Proposal] = []
    context = choose_context(contexts, os.environ, position.values.get("context", ""))

    def ask() -> None:
        query = {"limit": str(_MAX_NAMES), **({"filter": f"name={begin}*"} if begin else {})} if kind == "vm" else {}
        try:
            with ControllerConnection(context, seconds=_NAME_SECONDS) as controller:
                items = controller.fetch_list(path_of(RESOURCE_KINDS[kind].path), query=query)
        except CommandError:
            return
        found.extend(
            Proposal(str(item.get("name")), str(item.get("status") or item.get("state") or "")) for item in items
        )

    # A thread, since a name server is waited for without a limit. It ends with this process.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_NAME_SECONDS)
    return [each for each in found[:_MAX_NAMES] if _NAME.fullmatch(each.word)]
