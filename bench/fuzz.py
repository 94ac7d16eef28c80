"""Any bytes, for as long as there is time: none may lead to anything but an answer, a refusal or a close.

    ./run bench fuzz [TARGET] [--seconds S] [--seed N] [--steered]

TARGET is `http` (bytes on a connection, WebSocket frames among them), `frames` (of tunnels, which are to mean the same in
any pieces), `json` (bodies of requests), `lines` (files of the state) or all of them in turn. The bytes are put together at random from what such bytes consist of; with `--steered`
atheris chooses them by what code they reach (`./run python -m pip install atheris`). Ends with 1 and the bytes at the
first failure.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "net"))

from orchard import schema
from orchard.codec import ValidationError, decode, parse_json
from orchard.storage.errors import DamagedError
from orchard.store import read_state

MOST_WORDS = 12
MOST_BYTES = 4096  # that atheris tries at once


def http(data: bytes) -> None:
    """Half of a byte says into how many pieces the rest is cut."""
    from test_server import send_anything

    parts = 1 + (data[:1] or b"\0")[0] % 8
    step = max(1, len(data) // parts)
    send_anything([data[start : start + step] for start in range(1, len(data), step)])


def frames(data: bytes) -> None:
    """A byte says whose they are, another one how large the pieces are."""
    from test_wsframes import check_same_events_in_pieces

    whose, size = (data[:2] + b"\0\0")[:2]
    check_same_events_in_pieces(data[2:], range(0, len(data), 1 + size), masked=bool(whose & 1))


def json(data: bytes) -> None:
    with suppress(ValidationError):
        raw = parse_json(data)
        for read in (
            lambda: schema.vm_from_client(raw, []),
            lambda: schema.patched_spec(schema.VMSpec(image="i"), raw, []),
            lambda: schema.worker_from_client(raw, []),
            lambda: schema.account_from_client(raw, []),
            lambda: schema.settings_from_client(raw, []),
            lambda: schema.events_from_client(raw, []),
            lambda: schema.report_from_worker(raw, []),
            lambda: decode(schema.VMSpec, raw),
        ):
            with suppress(ValidationError):
                read()


def lines(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as home:
        path = Path(home, "state.jsonl")
        path.write_bytes(data)
        with suppress(DamagedError):
            read_state(path)


def words_of(target: str) -> list[bytes]:
    """Give what the bytes of a target consist of."""
    if target == "http":
        from test_server import FRAGMENTS

        return FRAGMENTS
    if target == "frames":
        from test_server import HELLO_FRAME, VIOLATIONS

        headers = [
            b"\x02\x00",
            b"\x02\x83key.",
            b"\x80\x84key.",
            b"\x00\x7e\x01\x00",
            b"\x82\xfe\x00\x80key.",
            b"\x01\x82key.",
        ]
        return [
            HELLO_FRAME,
            *headers,
            b"\x89\x02hi",
            b"\x8a\x82key.hi",
            b"\x88\x02\x03\xe8",
            "wörld".encode(),
            *(frame for _, frame in VIOLATIONS.values()),
        ]
    texts = ['{"name":"vm",', '"image":"i"', '"cpu":4', '"labels":{"a":"b"}', '"resources":{"x":1}', "}", "{", "[", "]"]
    texts += [":", ",", '"', "\\ud800", "1e999", "-0", "NaN", "null", "true", '"startup_script":{"env":{"A":"b"}}', " "]
    texts += [
        '{"sum":"0123456789abcdef",',
        '"format":"orchard-state"',
        '"version":1',
        '"revision":1',
        '"changes":[]',
        "\n",
    ]
    texts += [
        '"hostDirs":[{"name":"a","path":"/x"}]',
        '"roles":["compute:read"]',
        '"netSoftnet":true',
        '"kind":"log_line"',
    ]
    return [text.encode() for text in texts]


TARGETS: dict[str, Callable[[bytes], None]] = {"http": http, "frames": frames, "json": json, "lines": lines}


def at_random(target: str, seconds: float, seed: int) -> bytes | None:
    """Try random bytes; give those that failed."""
    chance, until, tried = random.Random(seed), time.monotonic() + seconds, 0
    words = words_of(target)
    while time.monotonic() < until:
        count = chance.randrange(MOST_WORDS)
        data = b"".join(
            chance.choice(words) if chance.random() < 0.8 else chance.randbytes(chance.randrange(20))
            for _ in range(count)
        )
        tried += 1
        try:
            TARGETS[target](data)
        except Exception:  # noqa: BLE001 -- whatever it is, it is what was looked for
            traceback.print_exc()
            return data
    print(f"{target}: {tried:,} tried, none failed; seed {seed}")
    return None


def steered(target: str, seconds: float, seed: int) -> None:
    """Have atheris choose the bytes. It ends the process."""
    import atheris  # type: ignore[import-untyped]

    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as corpus:
        for number, word in enumerate(words_of(target)):
            Path(corpus, str(number)).write_bytes(word)
        options = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-max_len={MOST_BYTES}", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, corpus], TARGETS[target])
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench fuzz")
    parser.add_argument("target", nargs="?", choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="for each target; default %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="default: a random one")
    parser.add_argument("--steered", action="store_true", help="by atheris; needs a TARGET")
    options = parser.parse_args()
    if options.steered:
        if options.target is None:
            parser.error("--steered needs a TARGET")
        steered(options.target, options.seconds, options.seed)
    for target in [options.target] if options.target else TARGETS:
        failed = at_random(target, options.seconds, options.seed)
        if failed is not None:
            print(f"{target} fails with {failed!r}; seed {options.seed}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
